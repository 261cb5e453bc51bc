"""Text from an exported folder by onnxruntime alone. This code uses neither torch nor numpy, which
onnxruntime itself loads.

    python -m minismoe.runtime FOLDER "a prompt"      or --chat, or a prompt on standard input
    from minismoe.runtime import Generator
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import FORMAT, read_info
    from .generator import Generator

__all__ = ["FORMAT", "Generator", "read_info"]


def __getattr__(name: str) -> Any:
    """On first use: the command line reports Ctrl-C and a missing onnxruntime in one line."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".generator" if name == "Generator" else ".folder"
    return getattr(import_module(home, __name__), name)
