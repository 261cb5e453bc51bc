"""The memory of this process: how much it took, and settings that take less or are faster."""

import ctypes
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

HUGE = 2 << 20                                           # bytes of a huge page
MADV_COLLAPSE = 25                                       # of Linux 6.1 and later
MANY = 256               # ranges, each of which takes 8 ms of a core: two cores decode half as fast
CGROUPS = Path("/sys/fs/cgroup")


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
    """Keep three caches from growing with every new length of a batch.

    oneDNN keeps the kernels of up to 1,024 shapes (in bfloat16 23 MB for each length of batch); one
    step has 64. glibc learns to keep freed tensors, which tensors of other sizes fragment; with a
    fixed threshold it returns large ones (at 256 KiB, small models trained at half the speed). On
    CUDA, segments that grow are less fragmented; only Linux has them.
    """
    if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:       # its newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")                # read when the first matrix is multiplied
    with suppress(OSError, AttributeError):              # a C library that is not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 20)                        # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 26)                        # M_TRIM_THRESHOLD


def give_back_memory() -> None:
    """Return to the system what this process has freed, as glibc else keeps it."""
    with suppress(OSError, AttributeError):              # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def processors() -> int:
    """Processors that this process may use: by its affinity, and by the quotas of its cgroups (v2).

    A container that may use 2 of 64 processors sees all 64, and 64 threads would share the time
    of 2.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with suppress(OSError):                              # another system has no such files
        own = re.findall(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        group = CGROUPS.joinpath(*own)
        for folder in (group, *group.parents):           # each may have a quota
            with suppress(OSError, ValueError):          # "max 100000": it has none
                quota, period = map(int, (folder / "cpu.max").read_text().split())
                count = min(count, max(1, -(-quota // period)))
    return count


def huge_page_ranges() -> set[int]:
    """The ranges of a huge page's size, numbered by address, in this process's private memory."""
    ranges = set[int]()
    with suppress(OSError):                              # another system has no such file
        for first, last in re.findall(
                r"^(\w+)-(\w+) rw-p", Path("/proc/self/maps").read_text(), re.MULTILINE):
            ranges.update(range(-(-int(first, 16) // HUGE), int(last, 16) // HUGE))
    return ranges


def use_huge_pages(ranges: Iterable[int]) -> None:
    """Move those of these ranges that are all in use to huge pages, where Linux can.

    The processor translates addresses page by page: a decoder, which reads hundreds of megabytes
    for each token, is faster with fewer pages. To move many, this thread waits for idle processors.
    """
    ranges, pages = [*ranges], HUGE // mmap.PAGESIZE
    # 8 bytes a page; the last one's highest bit: it is in use.
    with suppress(OSError), open("/proc/self/pagemap", "rb") as pagemap:
        madvise = ctypes.CDLL(None).madvise
        if len(ranges) > MANY:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for number in ranges:
            pagemap.seek(8 * pages * number)
            if min(pagemap.read(8 * pages)[7::8], default=0) >= 0x80:    # an error changes nothing
                madvise(ctypes.c_void_p(number * HUGE), ctypes.c_size_t(HUGE), MADV_COLLAPSE)
