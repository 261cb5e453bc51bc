"""Whether a run learns: the course of its losses, beside what one reaches without learning."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.tasks import Example
from ..io.files import naming
from ..io.progress import print_above_bar
from ..method.loss import IGNORE

WINDOWS = 5                    # a run's steps are averaged in so many parts
LATE = 0.8     # more epochs may help if the loss of validation lines falls after so many steps


def guessing_loss(known: Sequence[Example], lines: Sequence[Example]) -> float:
    """Mean loss of the supervised tokens of `lines` for one who knows nothing but how often each
    answer occurs among the training lines of its task. Infinite if a task's answers are no small
    set: if a tenth or more of its training lines have an answer of their own."""
    counts = defaultdict[str, Counter[tuple[int, ...]]](Counter)
    for example in known:
        counts[example.task][answer_of(example)] += 1
    total = 0.0
    for example in lines:
        answers = counts[example.task]
        if 10 * sum(count == 1 for count in answers.values()) >= answers.total():
            return math.inf
        total -= math.log((answers[answer_of(example)] + 1) / (answers.total() + len(answers) + 1))
    return total / max(1, sum(example.supervised for example in lines))


def answer_of(example: Example) -> tuple[int, ...]:
    """The supervised tokens of an example."""
    return tuple(label for label in example.labels if label != IGNORE)


def trouble(losses: Sequence[float], guess: float) -> str:
    """What the losses of training lines, one a step, say against a run; "" if nothing. `guess` is
    their `guessing_loss`."""
    size = max(4, len(losses) // WINDOWS)
    means = [fmean(losses[i:i + size]) for i in range(len(losses) % size, len(losses), size)]
    if len(means) < 3:
        return ""
    least, last = min(means), means[-1]
    if last > 1.5 * least + 0.1:
        return f"the loss of training lines jumped from {least:.3f} to {last:.3f}"
    if last > max(0.97 * guess, 0.9 * means[-2]):            # a good run passes the guess falling
        return (f"the loss of training lines, {last:.3f}, is no better than guessing by how often "
                f"each answer occurs, {guess:.3f}")
    if last > max(0.1, 0.97 * means[0]):
        return f"the loss of training lines, {last:.3f}, is no better than at the beginning"
    return ""


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, a line a step."""
    with naming(file, ValueError):
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def remedy(peak: float | None, default: float) -> str:
    """The rate to try after one that taught nothing."""
    return f"try --lr {default if peak != default else default / 4:.1e}"


def warn(run: Path, examples: Sequence[Example], peak: float, default: float) -> None:
    """Say so if the losses of the steps so far show that a run does not learn."""
    lines = read_metrics(run / "metrics.jsonl")
    if reason := trouble([line["loss"] for line in lines], guessing_loss(examples, examples)):
        print_above_bar(f"step {len(lines)}: {reason}: {remedy(peak, default)}")


def advice(metrics: Path, guess: float, remedy: str) -> str:
    """How the losses went, and what they advise; "" of a single step, or without validation lines.

    guess: `guessing_loss` of the validation lines; remedy: what to try if the run taught nothing.
    On SmolLM2 more epochs gained where the loss of validation lines fell at the end, and training
    lines had at least half of it.
    """
    lines = read_metrics(metrics)
    measures = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    if len(measures) < 2:
        return ""
    (_, end), (best_step, best) = measures[-1], min(measures, key=lambda measure: measure[1])
    before = [measure for measure in measures if measure[0] <= LATE * len(lines)]
    late_step, late = (before or measures)[-1 if before else 0]
    known = fmean(line["loss"] for line in lines[-math.ceil(len(lines) / 10):])
    course = (f"loss of validation lines: {late:.3f} after step {late_step}, {end:.3f} at the end, "
              f"at best {best:.3f}, after step {best_step}; of training lines: {known:.3f}")
    if best > 0.97 * guess:
        return (f"{course}: the run learnt no more than how often each answer occurs, which alone "
                f"gives {guess:.3f}: {remedy}, or more lines")
    if reason := trouble([line["loss"] for line in lines], math.inf):
        return f"{course}: {reason}: {remedy}"
    falls = end < min(0.95 * late, late - 0.01)
    return course + (": more --epochs may gain" if falls and known > end / 2 else "")
