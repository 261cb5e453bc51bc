"""What to try after a run, by task: the losses of its training lines, beside those of unseen lines
and beside what one reaches without learning anything about the questions."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..data.tasks import Example
from ..io.files import naming
from ..method.loss import IGNORE
from .plan import TaskPlan, TrainConfig

LEARNT = 0.2             # nats a token: smoothed targets leave 0.1, and the rest is noise
Metrics = list[dict[str, float]]         # of each step, the loss of each task that it read


def read_metrics(file: Path) -> tuple[list[float], Metrics, dict[int, float]]:
    """The loss of training lines at each step, from step 1 on; the same by task; and the loss of
    validation lines by step where it was measured: in a run that is continued, at step 0 first."""
    with naming(file, ValueError):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if line["step"]]
        return ([line["loss"] for line in steps], [line["loss_by_task"] for line in steps],
                {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line})


def fifths(task: str, metrics: Metrics) -> list[float]:
    """The mean loss of a task's training lines in each fifth of the steps that read it."""
    losses = [step[task] for step in metrics if task in step]
    size = math.ceil(len(losses) / 5)
    return [fmean(losses[i:i + size]) for i in range(0, len(losses), size or 1)]


def guessing_loss(examples: Sequence[Example]) -> float:
    """The least mean loss of an answer's tokens for one who knows of a task only how often each
    answer occurs; infinite where nearly all answers differ, which nobody can guess."""
    counts = Counter(tuple(label for label in e.labels if label != IGNORE) for e in examples)
    if 10 * sum(count == 1 for count in counts.values()) > len(examples):
        return math.inf
    total = sum(count * math.log(len(examples) / count) for count in counts.values())
    return total / sum(e.supervised for e in examples)


def contradictions(examples: Sequence[Example]) -> int:
    """How many prompts stand before more than one answer."""
    answers = defaultdict[tuple[int, ...], set[tuple[int, ...]]](set)
    for e in examples:
        first = next(i for i, label in enumerate(e.labels) if label != IGNORE)
        answers[tuple(e.ids[:first])].add(tuple(e.ids[first:]))
    return sum(len(different) > 1 for different in answers.values())


def advice(examples: Sequence[Example], plan: TaskPlan, default: TaskPlan, losses: Sequence[float],
           unseen: float | None, cfg: TrainConfig, usual_lr: float) -> str:
    """What to try next for one task; "" if nothing is likely to help.

    examples: its training lines; default: what its plan is without --epochs; losses: its `fifths`;
    unseen: the mean loss of its test lines, if it has any; usual_lr: the base's default rate.
    """
    last, lr = losses[-1], cfg.lr or usual_lr
    least, late = min(losses), losses[-2] if len(losses) > 1 else math.inf
    guess, several = guessing_loss(examples), contradictions(examples)
    if plan.judged == "answers" and 10 * several > len(examples):
        return f"{several} prompts have several answers: keep one of each"
    if last < LEARNT or guess < LEARNT:              # or all answers are the same
        return ("its lines are known by heart: more lines would help"
                if unseen is not None and unseen > max(2 * last, last + LEARNT) else "")
    if not usual_lr / 1.5 < lr < 1.5 * usual_lr:
        return f"try --lr {usual_lr:.1e}, the default for this base"
    if last > 1.5 * least + 0.1:
        return f"try a lower rate, --lr {usual_lr / 4:.1e}: the training loss rose from {least:.3f}"
    if plan.passes < default.passes:
        return f"try --epochs {default.passes}, the default for so many lines"
    if last > 0.9 * guess:
        return (f"try --lr {usual_lr / 4:.1e}, and a look at lines with --show 3: guessing by how "
                f"often each answer occurs has a loss of {guess:.3f}")
    if plan.judged == "answers" and last < 0.8 * late:
        return f"try --epochs {2 * plan.passes}: the training loss still fell"
    return ""
