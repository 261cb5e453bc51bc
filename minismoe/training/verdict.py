"""The losses of a finished run, and what they say about a task."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from ..io.files import naming

LEARNT = 0.2             # nats a token: smoothed targets leave 0.1, and the rest is noise
NOISE = 0.1              # nats a token, from one fifth of the steps to another


def read_losses(file: Path) -> dict[str, dict[int, float]]:
    """By task and step, the loss of training lines that metrics.jsonl holds."""
    losses = defaultdict[str, dict[int, float]](dict)
    with naming(file, ValueError):
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            for task, loss in line.get("loss_by_task", {}).items():  # step 0 has only a validation
                losses[task][line["step"]] = loss
    return dict(losses)


def verdict(losses: Mapping[int, float], unseen: float | None) -> tuple[float, str]:
    """The loss of a task's training lines at the end, over a fifth of its steps, and what to try
    next; "" if nothing is likely to help.

    losses: by step; unseen: the mean loss of test lines, if there are any.
    """
    values = [*losses.values()]
    size = -(-len(values) // 5)
    means = [fmean(values[i:i + size]) for i in range(len(values) - size + 1)]
    last, least = means[-1], min(means)
    if last > 1.5 * least + NOISE:
        return last, f"the training loss rose from {least:.3f} to {last:.3f}: try a lower --lr"
    if last < LEARNT and unseen is not None and unseen > max(2 * last, last + LEARNT):
        return last, "its training lines are learnt by heart: more lines would help"
    return last, ""
