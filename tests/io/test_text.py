"""What is printed is aligned, short and free of control characters; and progress bars."""

import errno
import io
import re
import sys
import time

import pytest
import torch

from minismoe.io.progress import progress_bar
from minismoe.io.text import LONGEST, clean, duration, error_line, print_error, table


def test_a_table_aligns_numbers_right_and_text_left() -> None:
    """Wide characters take two columns, and accents none."""
    text = table(["task", "before", "mean"], [
        ["日本語", 3, "0.86"], ["e\u0301", 4, ""], ["a longer one", "-", "12.10%"]])
    assert text.splitlines() == ["task          before    mean",
                                 "------------  ------  ------",
                                 "日本語             3    0.86",
                                 "e\u0301                  4",
                                 "a longer one       -  12.10%"]
    assert table(["a", "b"], []).splitlines() == ["a  b", "-  -"]


@pytest.mark.parametrize("seconds, said", [
    (0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (599, "10.0 min"), (601, "10 min"),
    (5399, "90 min"), (5400, "1.5 h"), (40_000, "11 h")])
def test_a_time_is_said_in_the_unit_that_suits_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said


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
        print_error(e, True)
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("\nerror: bad\n")


@pytest.mark.parametrize("terminal, seconds, counts", [      # seconds: of a step; 60 steps
    (False, 0.5, [20, 40, 60, 60]), (False, 10, [*range(1, 61), 60]), (False, 0.1, []),
    (True, 0.5, [])])
def test_a_bar_is_redrawn_at_a_terminal_and_is_a_line_each_ten_seconds_in_a_file(
        monkeypatch, terminal: bool, seconds: float, counts: list[int]) -> None:
    now, stream = [1e9], io.StringIO()
    for module in (time, sys.modules["tqdm.std"]):
        monkeypatch.setattr(module, "time", lambda: now[0])
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(60), "train", unit="step"):
        now[0] += seconds
    said = stream.getvalue()
    if terminal:
        assert said.count("\r") > 50 and said.count("\n") == 1
        return
    assert "\r" not in said and all(line.startswith("train: ") for line in said.splitlines())
    assert [line.split(" [")[0].split()[-1] for line in said.splitlines()] == [
        f"{count}/60" for count in counts]
