"""What a run is told to try next: on the toy as the script prints it, and by the losses alone."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import write_lines

import train
from minismoe.data import toy
from minismoe.data.tasks import Example
from minismoe.training.verdict import guessing_loss, prompt_of


def answers(task: str, *given: str) -> list[Example]:
    """Lines whose prompt is one token, and whose answer is a token a letter and an end."""
    return [Example(task, [0, *map(ord, word), 1], [-100, *map(ord, word), 1]) for word in given]


def test_guessing_knows_how_often_each_answer_occurs() -> None:
    """The plain sum over two tasks."""
    lines = answers("a", *["yes"] * 8, *["no"] * 4) + answers("b", *["x"] * 3, *["y"] * 3)
    total = 8 * math.log(12 / 8) + 4 * math.log(12 / 4) + 6 * math.log(2)
    tokens = 8 * 4 + 4 * 3 + 6 * 2
    assert guessing_loss(lines, lambda e: e.task) == pytest.approx(total / tokens)
    assert guessing_loss(lines, prompt_of) == pytest.approx(total / tokens)      # one prompt each
    lines[0].ids[0], lines[8].ids[0] = 7, 8
    assert guessing_loss(lines, prompt_of) < total / tokens


COUNT = [(line[0]["content"], line[1]["content"]) for line in toy.tasks()[1].train[:56]]


@pytest.mark.parametrize("lines, flags, said", [
    (COUNT, ("--epochs", 1), r"ended at \S+: try --epochs 16, the default for so many lines"),
    (COUNT, ("--epochs", 4, "--lr", 0.5), r"ended at \S+: try --lr 3.5e-03, the default"),
    (COUNT, ("--epochs", 4, "--lr", 1e-4), r"ended at \S+: try --lr 3.5e-03, the default"),
    ([(q, "yes") for q, _ in COUNT], ("--epochs", 2), ""),
    ([*COUNT[:9], *((q, "no") for q, _ in COUNT[:9])], ("--epochs", 28),
     "training lines ask the same and answer differently, and no training learns both: remove"),
    (COUNT[:2], ("--epochs", 40), ""),
    pytest.param(COUNT, (), "", marks=pytest.mark.slow)])
def test_a_run_is_told_what_helps(tmp_path: Path, succeed, lines: list[tuple[str, str]],
                                  flags: Any, said: str) -> None:
    write_lines(tmp_path / "t" / "train.jsonl", lines)
    write_lines(tmp_path / "t" / "test.jsonl", [('Make "kn" upper case.', "KN")])
    out = succeed(train.main, "--model", toy.FOLDER, "--data", tmp_path / "t", "--limit-test", 0,
                  "--out", tmp_path / "run", *flags)
    told, _, _ = out.partition(" s in all; ")[0].rpartition("\n")
    steps, _, told = told.rpartition(" tokens/s")
    assert "steps, " in steps
    assert re.search(said, told) if said else not told.strip()
