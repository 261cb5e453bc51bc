"""Whether a run learns: the course of its losses, beside what one reaches without learning."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

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


def trouble(losses: Sequence[float], guess: float, continued: bool) -> str:
    """What the losses of training lines, one a step, say against a run; "" if nothing. `guess` is
    their `guessing_loss`. One that is continued may begin as low as it ends."""
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
    if last > max(0.1, 0.97 * means[0]) and not continued:
        return f"the loss of training lines, {last:.3f}, is no better than at the beginning"
    return ""


def read_metrics(file: Path) -> tuple[list[float], dict[int, float]]:
    """The loss of training lines at each step, from step 1 on, and that of validation lines by step
    where it was measured: in a run that is continued, at step 0 first."""
    with naming(file, ValueError):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return ([line["loss"] for line in lines if line["step"]],
                {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line})


def rate_to_try(peak: float | None, default: float) -> str:
    """The rate to try after one that taught nothing."""
    return f"try --lr {default if peak != default else default / 4:.1e}"


def warn(run: Path, examples: Sequence[Example], peak: float, default: float,
         continued: bool) -> None:
    """Say so if the losses of the steps so far show that a run does not learn."""
    losses, _ = read_metrics(run / "metrics.jsonl")
    if reason := trouble(losses, guessing_loss(examples, examples), continued):
        print_above_bar(f"step {len(losses)}: {reason}: {rate_to_try(peak, default)}")


def advice(metrics: Path, guess: float, to_try: str) -> str:
    """How the losses went, and what they advise; "" of a single step, or without validation lines.

    guess: `guessing_loss` of the validation lines; to_try: what to try if the run taught nothing.
    On SmolLM2 more epochs gained where the loss of validation lines fell at the end, and training
    lines had at least half of it.
    """
    losses, by_step = read_metrics(metrics)
    if len(by_step) < 2:
        return ""
    measures = [*by_step.items()]
    (_, end), (best_step, best) = measures[-1], min(measures, key=lambda measure: measure[1])
    before = [measure for measure in measures if measure[0] <= LATE * len(losses)]
    late_step, late = (before or measures)[-1 if before else 0]
    known = fmean(losses[-math.ceil(len(losses) / 10):])
    course = (f"loss of validation lines: {late:.3f} after step {late_step}, {end:.3f} at the end, "
              f"at best {best:.3f}, after step {best_step}; of training lines: {known:.3f}")
    if best > 0.97 * guess:
        return (f"{course}: the run learnt no more than how often each answer occurs, which alone "
                f"gives {guess:.3f}: {to_try}, or more lines")
    if reason := trouble(losses, math.inf, continued=0 in by_step):
        return f"{course}: {reason}: {to_try}"
    falls = end < min(0.95 * late, late - 0.01)
    return course + (": more --epochs may gain" if falls and known > end / 2 else "")
