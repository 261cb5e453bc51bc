import ctypes
import mmap
import platform
import re
import sys
from pathlib import Path

import pytest
from tiny import python

from minismoe.io import process
from minismoe.io.process import HUGE, give_back_memory, huge_page_ranges, use_huge_pages

SMAPS = Path("/proc/self/smaps")
ROLLUP = Path("/proc/self/smaps_rollup")


def in_mapping(address: int, line: str) -> int:
    """Bytes that smaps says in this line about the mapping that holds an address."""
    for head, body in re.findall(r"^(\w+-\w+ .*)\n((?:\w+: .*\n)*)", SMAPS.read_text(), re.M):
        start, end = (int(x, 16) for x in head.split()[0].split("-"))
        if start <= address < end:
            return int(re.findall(rf"{line}: +(\d+)", body)[0]) << 10
    raise AssertionError("no such mapping")


def huge_pages() -> int:
    """Bytes of this process in huge pages."""
    return int(re.findall(r"AnonHugePages: +(\d+)", ROLLUP.read_text())[0]) << 10


@pytest.mark.skipif(not (SMAPS.is_file() and Path("/sys/kernel/mm/transparent_hugepage").is_dir()
                         and [*map(int, platform.release().split(".")[:2])] >= [6, 1]),
                    reason="Linux 6.1 or later")
def test_used_memory_moves_to_huge_pages_unchanged_and_unused_memory_stays_unused() -> None:
    """In one mapping, as the cache and the weights may be; what was there before stays as it is."""
    size = 8 * HUGE
    earlier = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    text = bytes(range(256)) * (size // 256)
    earlier[:] = text
    others = huge_page_ranges()
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:size] = text
    memory[size + HUGE:size + HUGE + 4096] = bytes(4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    before = in_mapping(address + HUGE, "Rss")
    huge = huge_pages()
    use_huge_pages(huge_page_ranges() - others)
    # None of what was there before, which is as large; what Python allocated since may move too.
    assert size - HUGE <= huge_pages() - huge <= size + 2 * HUGE
    assert in_mapping(address + HUGE, "Rss") < before + HUGE
    assert memory[:size] == text



@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library keeps other memory")
def test_freed_memory_returns_to_the_system() -> None:
    """Below what is in use: glibc keeps it until something above it is freed."""
    def resident() -> int:
        return int(re.findall(r"Rss: +(\d+)", ROLLUP.read_text())[0]) << 10
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(65536) for _ in range(500)]
    for block in blocks:
        ctypes.memset(block, 1, 65536)
    before = resident()
    for block in blocks[:-1]:
        libc.free(block)
    assert resident() > before - (4 << 20)
    give_back_memory()
    assert resident() < before - (24 << 20)
    libc.free(blocks[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has segments that grow")
@pytest.mark.parametrize("given, found", [
    ({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x:1"}, "None"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, "x:1")])
def test_cuda_memory_grows_by_segments_unless_it_is_set(given: dict[str, str], found: str) -> None:
    code = ("import os; from minismoe.io.process import bound_memory; "
            "os.environ.pop('PYTORCH_CUDA_ALLOC_CONF', None); "
            f"os.environ.update({given}); bound_memory(); "
            "print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))")
    assert python("-c", code).stdout.strip() == found


@pytest.mark.skipif(sys.platform == "win32", reason="it does not say")
def test_the_peak_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux says it, and as other systems do."""
    peak = process.peak_resident()
    assert peak % 1024 == 0 and 10 << 20 < peak < 100 << 30
    monkeypatch.setattr(process.Path, "read_text", lambda _: "")
    assert 10 << 20 < process.peak_resident() < 100 << 30
