"""Experts at random: the control with which compare.py compares the paper's vote."""

import math
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minismoe.method import allocate as ours
from minismoe.method.allocate import Allocation, select

Counts = dict[str, int]                              # {module: experts}
Scores = Mapping[str, Mapping[str, float]]           # {task: {module: sensitivity}}


def allocate(scores: Scores, *, strategy: str, seed: int = 0, **settings: Any) -> Allocation:
    """The largest random allocation that fits budget_params; any other as minismoe does."""
    if strategy != "random":
        return ours.allocate(scores, strategy=strategy, **settings)
    shapes, rank, budget = (settings[name] for name in ("shapes", "rank", "budget_params"))

    def at(n: int) -> Allocation:
        counts = draw(scores, n, settings.get("min_experts", 0), seed)
        drawn = Allocation({m: counts[m] for m in shapes if counts[m]}, rank, 2 * rank,
                           settings.get("top_k", 2), strategy)
        return replace(drawn, trainable_parameters=drawn.trainable(shapes))

    numbers = range(1, budget // min(map(sum, shapes.values())) + 1)
    return at(bisect_right(numbers, budget, key=lambda n: at(n).trainable_parameters))


def draw(scores: Scores, n: int, low: int = 0, seed: int = 0) -> Counts:
    """{module: experts}, n in all and at least `low` each. Each expert goes to a module drawn at
    random, which has at most one for each task. With the same seed, n + 1 gives the first n to the
    same modules."""
    generator, high = random.Random(seed), max(low, len(scores))
    counts = dict.fromkeys(select(next(iter(scores.values())), None), low)
    for _ in range(min(n, high * len(counts)) - low * len(counts)):
        counts[generator.choice([module for module in counts if counts[module] < high])] += 1
    return counts


def shares(scores: Scores, groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """A module's part of its group's sensitivity, summed over tasks. In each group a task's parts
    sum to the number of modules."""
    weights: dict[str, float] = {}
    for members in groups:
        totals = {task: math.fsum(values[m] for m in members) for task, values in scores.items()}
        # fsum is exact: the order of tasks cannot change the last digit.
        weights |= {module: len(members) * math.fsum(
            values[module] / totals[task] if totals[task] else 1 / len(members)
            for task, values in scores.items()) for module in members}
    return weights
