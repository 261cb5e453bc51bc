"""What is printed is aligned, short and free of control characters; and progress bars."""

import errno
import io
import re
import sys
import time

import pytest
import torch

from minismoe.io.progress import progress_bar
from minismoe.io.text import LONGEST, clean, error_line, print_error, table


def test_table_aligns_what_is_wide_on_a_terminal():
    rows = [["日本語", "ab"], ["é", "cd"], ["e\u0301", "ef"], ["abcdefg", "gh"]]
    lines = table(["task", "what"], rows).splitlines()[2:]
    assert lines == ["日本語     ab", "é          cd", "e\u0301          ef", "abcdefg    gh"]


def test_table_aligns_numbers_right_and_text_left():
    text = table(["task", "before", "mean"], [["trec", 3, "0.86"], ["a longer one", "-", "12.10%"]])
    assert text.splitlines() == ["task          before    mean",
                                 "------------  ------  ------",
                                 "trec               3    0.86",
                                 "a longer one       -  12.10%"]
    assert table(["a", "b"], []).splitlines() == ["a  b", "-  -"]


def test_clean_keeps_what_can_be_read_and_nothing_else() -> None:
    assert clean("naïve 試験 ✓ नि\u200dख") == "naïve 試験 ✓ नि\u200dख"
    assert clean("a\x1b[31mb\r\u202ec\n") == "a\ufffd[31mb\ufffd\ufffdc\ufffd"
    assert clean("a\nb", "\n") == "a\nb"


@pytest.mark.parametrize(("error", "line"), [
    (ValueError("two\n  lines\x1b"), "two lines\ufffd"), (KeyboardInterrupt(), "KeyboardInterrupt"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"),
     "a/b: No space left on device: free some space or choose another folder; earlier files are "
     "unchanged"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (OSError("plain"), "plain")])
def test_an_error_is_one_line_with_advice(error: BaseException, line: str) -> None:
    assert error_line(error) == line


@pytest.mark.parametrize("said", [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has", "Invalid buffer size: 24.00 GiB",
    "MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 1 GB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "of torch on this CPU"])
def test_out_of_memory_names_the_flags_that_help(said: str) -> None:
    if said == "of torch on this CPU":
        with pytest.raises(RuntimeError) as raised:
            torch.empty(1 << 60, dtype=torch.uint8)
        said = str(raised.value)
    for error in RuntimeError(said), MemoryError():
        line = error_line(error)
        assert re.fullmatch("out of memory .*--batch-size.*--max-length.*--recompute.*"
                            "--base-bits.*", line)
        assert "bfloat16" not in line            # it is slow on many CPUs


def test_a_long_error_is_cut() -> None:
    assert error_line(ValueError("x" * 5000)) == "x" * LONGEST + "… (5,000 characters)"


def test_debug_prints_the_traceback_first(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("bad")
    except ValueError as e:
        print_error(e, True, " (process 1)")
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("\nerror (process 1): bad\n")


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """A clock at [0], which stands still by itself."""
    clock = [1e9]
    for module in (time, sys.modules["tqdm.std"]):
        monkeypatch.setattr(module, "time", lambda: clock[0])
    return clock


def written(monkeypatch, now: list[float], terminal: bool, seconds: float, leave: bool) -> str:
    """What a bar of 60 steps writes, if a step takes so many seconds."""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(60), "train", unit="step", leave=leave):
        now[0] += seconds
    return stream.getvalue()


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("seconds, steps", [(0.5, 20), (10, 1)])         # of a step; in 10 s
def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end(monkeypatch, now, leave, seconds,
                                                                 steps) -> None:
    said = written(monkeypatch, now, terminal=False, seconds=seconds, leave=leave)
    assert "\r" not in said and said.endswith("\n")
    counts = [line.split(" [")[0].split()[-1] for line in said.splitlines()]
    assert counts == [f"{n}/60" for n in range(steps, 61, steps)] + ["60/60"] * leave
    assert all(line.startswith("train: ") for line in said.splitlines())


def test_a_file_gets_nothing_of_a_bar_that_ends_soon(monkeypatch, now) -> None:
    assert written(monkeypatch, now, terminal=False, seconds=0.1, leave=True) == ""


def test_a_terminal_sees_one_line_redrawn(monkeypatch, now) -> None:
    said = written(monkeypatch, now, terminal=True, seconds=0.5, leave=True)
    assert said.count("\r") > 50 and said.count("\n") == 1
