"""The memory of this process: what it takes, and what bounds it."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path


def resident() -> int:
    """Bytes that this process takes now, or where no system call tells, has taken."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def peak_resident() -> int:
    """The most memory that this process has taken, in bytes; 0 where the system does not say."""
    with suppress(OSError, IndexError):  # ru_maxrss, on Linux, begins with that of the parent
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    try:
        import resource
    except ImportError:                                  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def group_rooms(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the control groups of this process leave, as of a container (cgroup v2)."""
    rooms = []
    with suppress(OSError, IndexError):
        group = root / re.findall(r"0::/(.*)", Path("/proc/self/cgroup").read_text())[0]
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):          # no such file; "max" is no number
                most, used = (int((folder / f"memory.{name}").read_text())
                              for name in ("max", "current"))
                stat = (folder / "memory.stat").read_text()          # pages of files can go
                rooms.append(most - used + int(re.findall(r"inactive_file (\d+)", stat)[0]))
    return rooms


def bound_memory() -> None:
    """Keep two caches of a CPU from growing with every length of batch that comes by.

    oneDNN keeps what it compiles for a shape, in bfloat16 23 MB a length of batch, up to 1,024
    shapes; 64 are those of one step. And glibc learns to keep freed tensors in its heap, which
    tensors of ever other sizes tear to pieces; a fixed threshold has it give large ones back. (At
    256 KiB it took small models twice the time to train, in pages that came and went.)
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")                # read when the first matrix is multiplied
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):          # a C library that is not glibc
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 20)                    # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 26)                    # M_TRIM_THRESHOLD
