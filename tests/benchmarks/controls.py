"""Other ways to spend a budget of parameters, with which compare.py compares the paper's vote.

Each is a function of {task: {module: sensitivity}} and n that gives {module: experts}, n experts in
all; `low` is the least for a module.
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from minismoe.method import allocate as ours
from minismoe.method.allocate import Allocation, grouped, natural, select

Counts = dict[str, int]                              # {module: experts}
Scores = Mapping[str, Mapping[str, float]]           # {task: {module: sensitivity}}
GROUP = "attention_mlp"                              # for `proportional`


def allocate(scores: Scores, *, strategy: str, seed: int = 0, **settings: Any) -> Allocation:
    """The largest allocation of a control that fits budget_params; any other as minismoe does."""
    if strategy not in RULES:
        return ours.allocate(scores, strategy=strategy, **settings)
    shapes, rank, budget = (settings[name] for name in ("shapes", "rank", "budget_params"))
    drawn = {"seed": seed} if strategy == "random" else {}

    def at(n: int) -> Allocation:
        counts = RULES[strategy](scores, n, settings.get("min_experts", 0), **drawn)
        found = Allocation({m: counts[m] for m in shapes if counts[m]}, rank, 2 * rank,
                           settings.get("top_k", 2), strategy, GROUP)
        return replace(found, trainable_parameters=found.trainable(shapes))

    numbers = range(1, budget // min(map(sum, shapes.values())) + 1)
    return at(bisect_right(numbers, budget, key=lambda n: at(n).trainable_parameters))


def proportional(scores: Scores, n: int, low: int = 0) -> Counts:
    """In proportion to a module's share of the sensitivity."""
    return largest_remainder(n, shares(scores, grouped(modules_of(scores), GROUP)), low)


def mola(scores: Scores, n: int, low: int = 0) -> Counts:
    """More experts the higher the layer: a line from 2 at the lowest to 8 at the highest, as MoLA's
    inverted triangle "2468" (Gao et al. 2024, arXiv 2402.08562), without its steps."""
    layers = {m: int(re.search(r"\.(\d+)\.", m)[1]) for m in modules_of(scores)}
    first, last = min(layers.values()), max(layers.values())
    return largest_remainder(n, {m: 2 + 6 * (layer - first) / max(1, last - first)
                                 for m, layer in layers.items()}, low)


def draw(scores: Scores, n: int, low: int = 0, seed: int = 0) -> Counts:
    """Each expert goes to a module drawn at random, which has at most one for each task. With the
    same seed, n + 1 gives the first n to the same modules."""
    generator, high = random.Random(seed), max(low, len(scores))
    counts = dict.fromkeys(modules_of(scores), low)
    for _ in range(min(n, high * len(counts)) - low * len(counts)):
        counts[generator.choice([module for module in counts if counts[module] < high])] += 1
    return counts


RULES: dict[str, Callable[..., Counts]] = {
    "proportional": proportional, "mola": mola, "random": draw}


def modules_of(scores: Scores) -> list[str]:
    """In natural order, which settles ties."""
    return select(next(iter(scores.values())), None)


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


def largest_remainder(n: int, weights: Mapping[str, float], low: int) -> Counts:
    """n experts by weight in whole numbers (Hamilton's method).

    Each module gets its quota rounded down, then one goes at a time to the module furthest below
    its quota (or leaves the one furthest above, if `low` gave out too many).
    """
    total, whole = max(n, low * len(weights)), math.fsum(weights.values())
    quota = {module: total * (weights[module] / whole) for module in sorted(weights, key=natural)}
    counts = {module: max(math.floor(share), low) for module, share in quota.items()}
    while left := total - sum(counts.values()):
        step = 1 if left > 0 else -1
        able = [module for module in counts if low <= counts[module] + step]
        counts[max(able, key=lambda module: step * (quota[module] - counts[module]))] += step
    return counts
