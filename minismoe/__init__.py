"""minismoe: mixtures of LoRA experts for small language models, allocated by sensitivity.

Names are resolved on first use, so that importing the package loads nothing heavy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "model.checkpoint", "load_adapter": "model.checkpoint",
    "save_adapter": "model.checkpoint", "load_tokenizer": "data.tokenizer",
    "load_tasks": "data.tasks", "encode_all": "data.tasks", "probe_batches": "data.tasks",
    "probe": "method.sensitivity", "allocate": "method.allocate",
    "Allocation": "method.allocate", "add_experts": "method.experts",
    "train": "training.loop", "TrainConfig": "training.plan", "generate": "training.evaluate",
    "export_model": "export.write", "ExportConfig": "export.settings", "Source": "export.settings",
    "Generator": "runtime.generator",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
