"""The memory of this process: how much it took, and settings that take less."""

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path


def peak_resident() -> int:
    """The most bytes that this process has taken; 0 if the system does not say."""
    with suppress(OSError, IndexError):  # on Linux, a child's ru_maxrss begins at its parent's
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    try:
        import resource
    except ImportError:                                  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bound_memory() -> None:
    """Keep two caches from growing with every new length of a batch on a CPU.

    oneDNN keeps the kernels of up to 1,024 shapes (in bfloat16 23 MB for each length of batch); one
    step has 64. glibc learns to keep freed tensors, which tensors of other sizes fragment; with a
    fixed threshold it returns large ones (at 256 KiB, small models trained at half the speed).
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")                # read when the first matrix is multiplied
    with suppress(OSError, AttributeError):              # a C library that is not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 20)                        # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 26)                        # M_TRIM_THRESHOLD
