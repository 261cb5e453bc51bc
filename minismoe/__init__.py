"""minismoe: mixtures of LoRA experts for small language models, allocated by sensitivity.

Names are resolved on first use, so that importing the package loads nothing heavy.
"""

from importlib import import_module
from typing import Any

from .allocate import allocate  # at once: on first use, its module of the same name could be met

__version__ = "0.1.0"

_HOME = {
    "load_model": "checkpoint", "load_adapter": "checkpoint", "save_adapter": "checkpoint",
    "load_tokenizer": "tokenizer", "probe": "sensitivity", "Allocation": "allocation",
    "add_experts": "experts", "generate": "evaluate",
}
__all__ = ["allocate", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
