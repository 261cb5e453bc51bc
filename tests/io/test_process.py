import ctypes
import mmap
import platform
import re
from pathlib import Path

import pytest

from minismoe.io.process import HUGE, use_huge_pages

SMAPS = Path("/proc/self/smaps")


def huge_bytes(address: int) -> int:
    """Bytes on huge pages in the mapping that holds an address."""
    for head, body in re.findall(r"^(\w+-\w+ .*)\n((?:\w+: .*\n)*)", SMAPS.read_text(), re.M):
        start, end = (int(x, 16) for x in head.split()[0].split("-"))
        if start <= address < end:
            return int(re.findall(r"AnonHugePages: +(\d+)", body)[0]) << 10
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not (SMAPS.is_file() and Path("/sys/kernel/mm/transparent_hugepage").is_dir()
                         and [*map(int, platform.release().split(".")[:2])] >= [6, 1]),
                    reason="Linux 6.1 or later")
def test_used_memory_moves_to_huge_pages_unchanged_and_unused_memory_stays_unused() -> None:
    size = 8 * HUGE
    used, unused = (mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                    for _ in range(2))
    for kept in (used, unused):                          # else the two would be one mapping
        kept.madvise(mmap.MADV_DONTFORK if kept is used else mmap.MADV_NORMAL)
    text = bytes(range(256)) * (size // 256)
    used[:] = text
    unused[:4096] = bytes(4096)
    use_huge_pages()
    places = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (used, unused)]
    assert huge_bytes(places[0] + HUGE) > 0
    assert huge_bytes(places[1] + HUGE) == 0
    assert used[:] == text
