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
from minismoe.training.plan import TaskPlan, TrainConfig
from minismoe.training.verdict import advice, contradictions, guessing_loss


def answers(task: str, *given: str) -> list[Example]:
    """Lines whose prompt is one token, and whose answer is a token a letter and an end."""
    return [Example(task, [0, *map(ord, word), 1], [-100, *map(ord, word), 1]) for word in given]


def test_guessing_knows_how_often_each_answer_occurs() -> None:
    """The plain sum; where nearly each line has an answer of its own, nobody can guess."""
    lines = answers("a", *["yes"] * 8, *["no"] * 4)
    total = 8 * math.log(12 / 8) + 4 * math.log(12 / 4)
    assert guessing_loss(lines) == pytest.approx(total / (8 * 4 + 4 * 3))
    assert guessing_loss(lines + answers("a", "x", "y", "z")) == math.inf
    assert contradictions(lines) == 1 and contradictions(lines[:8]) == 0      # one prompt


@pytest.mark.parametrize("judged, losses, unseen, passes, lr, said", [
    ("answers", [2, 1, 0.5, 0.1, 0.05], 0.9, 12, 1e-3, "known by heart: more lines would help"),
    ("answers", [2, 1, 0.5, 0.1, 0.05], 0.1, 12, 1e-3, ""),
    ("loss", [3, 2.9, 2.8, 2.8, 2.8], 3.0, 3, 1e-3, ""),
    ("answers", [2, 1, 0.9, 0.9, 1.9], 2, 12, 1e-3, "a lower rate, --lr 2.5e-04: the training"),
    ("answers", [2, 1, 0.9, 0.6, 0.4], 2, 12, 1e-3, "--epochs 24: the training loss still fell"),
    ("answers", [2, 1, 0.9, 0.6, 0.4], 2, 6, 1e-3, "--epochs 12, the default for so many lines"),
    ("answers", [2, 1, 0.9, 0.6, 0.4], 2, 12, 1e-4, "--lr 1.0e-03, the default for this base"),
    ("answers", [0.41, 0.41, 0.41, 0.41, 0.41], 0.41, 12, 1e-3, "guessing by how often")])
def test_advice_follows_from_the_losses_of_a_task(judged, losses, unseen, passes, lr, said) -> None:
    lines = [Example("t", [n, 5 + n % 3, 1], [-100, 5 + n % 3, 1]) for n in range(90)]
    if "guess" not in said:              # ln(3) / 2 for these; of other answers, none can guess
        lines = [Example("t", [n, 100 + n, 1], [-100, 100 + n, 1]) for n in range(90)]
    else:
        losses = [0.54] * 5
    plan, usual = (TaskPlan(90, p, 1, 0.2, 0.1, judged, 0) for p in (passes, 12))
    given = advice(lines, plan, usual if judged == "answers" else plan, losses, unseen,
                   TrainConfig(lr=lr), 1e-3)
    assert said in given and bool(said) == bool(given)


COUNT = [(line[0]["content"], line[1]["content"]) for line in toy.tasks()[1].train[:56]]


@pytest.mark.parametrize("lines, flags, said", [
    (COUNT, ("--epochs", 1), r"t: try --epochs 16, the default for so many lines"),
    (COUNT, ("--epochs", 4, "--lr", 0.5), r"t: try --lr 3.5e-03, the default"),
    ([*COUNT[:9], *((q, "no") for q, _ in COUNT[:9])], ("--epochs", 28),
     "t: 9 prompts have several answers: keep one of each")])
def test_a_run_is_told_what_helps(tmp_path: Path, succeed, lines: list[tuple[str, str]],
                                  flags: Any, said: str) -> None:
    write_lines(tmp_path / "t" / "train.jsonl", lines)
    write_lines(tmp_path / "t" / "test.jsonl", [('Make "kn" upper case.', "KN")])
    out = succeed(train.main, "--model", toy.FOLDER, "--data", tmp_path / "t", "--limit-test", 0,
                  "--out", tmp_path / "run", *flags)
    assert re.search(f"^{said}", out, re.MULTILINE)
