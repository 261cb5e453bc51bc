"""What a progress bar writes at a terminal and into a file."""

import io
import sys
import time

import pytest

from minismoe.io import progress


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
    for _ in progress.progress_bar(range(60), "train", unit="step", leave=leave):
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
