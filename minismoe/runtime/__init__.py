"""Text from an exported folder by onnxruntime alone. This code uses neither torch nor numpy, which
onnxruntime itself loads.

    python -m minismoe.runtime FOLDER "a prompt"      or --chat, or a prompt on standard input
    from minismoe.runtime import Generator
"""

from typing import TYPE_CHECKING, Any

from .folder import FORMAT, read_info

if TYPE_CHECKING:
    from .generator import Generator

__all__ = ["FORMAT", "Generator", "read_info"]


def __getattr__(name: str) -> Any:
    """Generator on first use: the command line reports a missing onnxruntime in one line."""
    if name != "Generator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .generator import Generator
    return Generator
