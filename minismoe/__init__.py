"""minismoe: mixtures of LoRA experts for small language models, allocated by sensitivity.

Names are resolved on first use, so that importing the package loads nothing heavy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "checkpoint", "load_adapter": "checkpoint", "save_adapter": "checkpoint",
    "load_tokenizer": "tokenizer", "probe": "sensitivity", "allocate": "allocate",
    "Allocation": "allocate", "add_experts": "experts", "generate": "evaluate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        # The function `allocate` shares its module's name: put the function in the module's place.
        globals()[name] = value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
