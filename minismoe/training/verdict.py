"""What to try after a run: the losses of its training lines, beside what one reaches without
learning anything about the questions."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from statistics import fmean

from ..data.tasks import Example
from ..io.files import naming
from ..method.loss import IGNORE

LEARNT = 0.2             # nats a token: smoothed targets leave 0.1, and the rest is noise


def read_metrics(file: Path) -> tuple[list[float], dict[int, float]]:
    """The loss of training lines at each step, from step 1 on, and that of validation lines by step
    where it was measured: in a run that is continued, at step 0 first."""
    with naming(file, ValueError):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return ([line["loss"] for line in lines if line["step"]],
                {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line})


def prompt_of(example: Example) -> Hashable:
    """An example's task, and its tokens before the first supervised one."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    return example.task, tuple(example.ids[:first])


def answer_of(example: Example) -> tuple[int, ...]:
    """The supervised tokens of an example."""
    return tuple(label for label in example.labels if label != IGNORE)


def guessing_loss(examples: Sequence[Example], known: Callable[[Example], Hashable]) -> float:
    """The least mean loss of the supervised tokens for one who knows of an example only what
    `known` tells, and how often each answer occurs among those of which the same is known."""
    counts = defaultdict[Hashable, Counter[tuple[int, ...]]](Counter)
    for e in examples:
        counts[known(e)][answer_of(e)] += 1
    total = sum(count * math.log(answers.total() / count)
                for answers in counts.values() for count in answers.values())
    return total / sum(e.supervised for e in examples)


def advice(losses: Sequence[float], examples: Sequence[Example], lr: tuple[float, float],
           epochs: tuple[int, int]) -> str:
    """One sentence on what to try next; "" if nothing is likely to help.

    losses: of the training lines `examples`, one a step. lr, epochs: that of the run, and the
    default.
    """
    part = math.ceil(len(losses) / 5)                # the last fifth, the one before it, ...
    last, late, *earlier = [fmean(losses[max(0, end - part):end])
                            for end in range(len(losses), 0, -part)] + [math.inf]
    least, (rate, usual), (passes, many), guess = min([late, *earlier]), lr, epochs, math.inf
    once = sum(count == 1 for count in Counter((e.task, answer_of(e)) for e in examples).values())
    if 10 * once < len(examples):                    # answers are a small set, unlike free text
        guess = guessing_loss(examples, lambda e: e.task)
    if last < LEARNT or guess < LEARNT:              # or all answers are the same
        return ""
    if guessing_loss(examples, prompt_of) > last / 3:
        return ("training lines ask the same and answer differently, and no training learns both: "
                "remove one of each")
    ended = f"the loss of training lines ended at {last:.3f}"
    if not usual / 1.5 < rate < 1.5 * usual:
        return f"{ended}: try --lr {usual:.1e}, the default for this base"
    if last > 1.5 * least + 0.1:
        return f"{ended}, after {least:.3f}: try a lower rate, --lr {usual / 4:.1e}"
    if passes < many:
        return f"{ended}: try --epochs {many}, the default for so many lines"
    if last > 0.9 * guess:
        return (f"{ended}, where guessing by how often each answer occurs gives {guess:.3f}: try "
                f"--lr {usual / 4:.1e}, and look at lines with --show 3")
    return f"{ended} and still fell: --epochs {2 * passes} may gain" if last < 0.8 * late else ""
