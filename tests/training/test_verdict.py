"""A run that does not learn is told from one that does."""

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny

from minismoe.data.tasks import Example
from minismoe.training.loop import TrainConfig, train
from minismoe.training.rate import default_lr
from minismoe.training.verdict import guessing_loss, trouble


def answers(task: str, *given: str) -> list[Example]:
    """Lines whose prompt is one token, and whose answer is a token a letter and an end."""
    return [Example(task, [0, *map(ord, word), 1], [-100, *map(ord, word), 1]) for word in given]


def test_guessing_knows_how_often_each_answer_occurs() -> None:
    """The plain sum over two tasks, with one count more for each answer and for a new one."""
    known = answers("a", *["yes"] * 8, *["no"] * 4) + answers("b", *["x"] * 3, *["y"] * 3)
    lines = answers("a", "yes", "no", "maybe") + answers("b", "y")
    shares, tokens = [9 / 15, 5 / 15, 1 / 15, 4 / 9], 4 + 3 + 6 + 2
    assert guessing_loss(known, lines) == pytest.approx(-sum(map(math.log, shares)) / tokens)


def test_answers_that_rarely_occur_twice_cannot_be_guessed() -> None:
    known = answers("a", *["yes"] * 8, *["no"] * 4) + answers("chat", *map(str, range(10)))
    assert math.isinf(guessing_loss(known, answers("chat", "1")))
    assert not math.isinf(guessing_loss(known, answers("a", "no")))


@pytest.mark.parametrize("losses, guess, words", [
    ([3 - 0.025 * i for i in range(100)], 0.6, ""),                    # it still falls
    ([3 - 0.025 * i for i in range(90)] + [0.75] * 60, 0.7, "no better than guessing"),
    ([3 - 0.025 * i for i in range(90)] + [0.75] * 60, 0.8, ""),
    ([3 - 0.025 * i for i in range(80)] + [3.0] * 20, math.inf, "jumped from 1.262 to 3.000"),
    # Five steps each of Gemma 3 270M on trec and clinc, at 1.2e-3 (70 % right at last) and 4e-3.
    ([4.52, 2.99, 1.66, 2.03, 1.57, 1.12, 0.83, 1.36, 0.8, 0.85], 0.79, ""),
    ([4.19, 3.05, 2.61, 3.36, 3.25, 2.76, 2.55, 3.41, 3.24, 2.49], 0.79, "no better than guessing"),
    ([2.0, 2.1, 1.9] * 20, math.inf, "no better than at the beginning"),
    ([2.0], 0.1, ""),                                              # too few steps to tell
    ([0.02] * 90 + [0.1] * 10, math.inf, "")])                         # too small to matter
def test_trouble_is_told_from_the_course_of_the_losses(losses: list[float], guess: float,
                                                      words: str) -> None:
    found = trouble([loss for loss in losses for _ in range(5)], guess, False)
    assert words in found and bool(words) == bool(found)


def test_a_continued_run_may_begin_as_low_as_it_ends() -> None:
    flat, up = [0.3, 0.31, 0.29] * 40, [0.3] * 100 + [2.0] * 25
    assert "no better than at the beginning" in trouble(flat, math.inf, False)
    assert trouble(flat, math.inf, True) == ""
    assert "jumped from 0.300 to 2.000" in trouble(up, math.inf, True)


@pytest.mark.parametrize("rate, tells", [(3.0, True), (0.03, False)])
def test_a_run_says_in_its_middle_that_it_learns_nothing(rate: float, tells: bool,
                                                         tmp_path: Path, capsys) -> None:
    """The answer repeats the prompt's only token: a rate of 0.03 learns it, 3 does not."""
    model, lines = tiny(1), [Example("t", [0, i, 2 + i], [-100, -100, 2 + i]) for i in (5, 9)] * 40
    with torch.no_grad():
        model.lm_head.weight.mul_(10)                # or no logit is large enough
    train(model, lines, TrainConfig(8, 8, 8, lr=rate), tmp_path, pad_id=0)
    told = capsys.readouterr()
    assert ("step 40: the loss of training lines" in told.out + told.err) == tells
    assert (f"try --lr {default_lr(model):.1e}" in told.out + told.err) == tells
