"""Text from an exported folder by onnxruntime alone. This code uses neither torch nor numpy, which
onnxruntime itself loads.

    python -m minismoe.runtime FOLDER "a prompt"      or --chat, or a prompt on standard input
    from minismoe.runtime import Generator
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    """Generator on first use: the command line says in one line that onnxruntime is missing, or
    that Ctrl-C came while it loads."""
    if name != "Generator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .generator import Generator
    return Generator
