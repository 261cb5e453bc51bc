"""The strategies that the paper's vote is compared with: other ways to spend the same budget.

A strategy is a function that takes an `Order` and gives a row of allocations from small to large:
a sequence of steps, and a function from a step to its allocation. `allocate` takes the largest that
fits.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .record import MOST, Allocation, Counts, Sensitivities

Row = tuple[Sequence[Any], Callable[[Any], Allocation]]
LAYER = re.compile(r"(?:^|\.)(\d+)\.")            # the first number among a module's parents


@dataclass(frozen=True)
class Order:
    """What a strategy is asked for."""

    draft: Allocation           # rank, alpha, top_k and so on; the strategy fills in the experts
    scores: Sensitivities
    modules: Sequence[str]      # in natural order, which settles ties
    groups: Sequence[Sequence[str]]                  # those that are ranked together
    low: int                    # experts of a module, at least
    high: int | None            # and at most; None leaves this to the strategy
    seed: int
    most: int = 0               # experts * rank, in total, that the budget pays for at most

    def limit(self, usual: int) -> int:
        """Experts of a module at most: as asked for, or as the strategy has it."""
        return self.high or max(self.low, usual)


def proportional(order: Order) -> Row:
    """Experts in proportion to a module's share of the sensitivity."""
    weights = shares(order.scores, order.groups)
    return _by_weight(order, {module: weights[module] for module in order.modules})


def uniform(order: Order) -> Row:
    """The same number of experts for every module; numbered by it."""
    return range(max(1, order.low), order.limit(MOST) + 1), lambda experts: replace(
        order.draft, experts=dict.fromkeys(order.modules, experts))


def mola(order: Order) -> Row:
    """More experts the higher the layer: a line from 2 at the lowest to 8 at the highest, as MoLA's
    inverted triangle "2468" (Gao et al. 2024, arXiv 2402.08562), without its steps."""
    layers = {m: int(found[1]) for m in order.modules if (found := LAYER.search(m))}
    if unplaced := [m for m in order.modules if m not in layers]:
        raise ValueError(f"strategy 'mola' finds no layer number in {unplaced}")
    low, high = min(layers.values()), max(layers.values())
    return _by_weight(order, {m: 2 + 6 * (layer - low) / max(1, high - low)
                              for m, layer in layers.items()})


def draw(order: Order) -> Row:
    """Experts dropped one by one on modules chosen at random ("random"). One more in total with the
    same seed adds an expert and moves none, so costs only grow."""
    high = order.limit(len(order.scores))

    def count(total: int) -> Counts:
        generator, counts = random.Random(order.seed), dict.fromkeys(order.modules, order.low)
        for _ in range(total - order.low * len(counts)):
            counts[generator.choice([module for module in counts if counts[module] < high])] += 1
        return counts

    return _by_total(order, high, count)


def lora(order: Order) -> Row:
    """One expert a module; numbered by the rank of all, alpha / rank kept."""
    draft, ones = order.draft, dict.fromkeys(order.modules, 1)
    return range(1, max(1, order.most) + 1), lambda rank: replace(
        draft, experts=ones, rank=rank, alpha=draft.alpha * rank / draft.rank)


def _by_total(order: Order, high: int, count: Callable[[int], Counts]) -> Row:
    """The row of a rule that shares out a number of experts, `high` a module at most."""
    first = max(1, order.low * len(order.modules))
    last = max(first, min(high * len(order.modules), order.most // order.draft.rank))
    return range(first, last + 1), lambda total: replace(order.draft, experts=count(total))


def _by_weight(order: Order, weights: Mapping[str, float]) -> Row:
    high = order.limit(MOST)
    return _by_total(order, high, lambda n: largest_remainder(weights, n, order.low, high))


def shares(scores: Sensitivities, groups: Sequence[Sequence[str]]) -> dict[str, float]:
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


def largest_remainder(weights: Mapping[str, float], total: int, low: int, high: int) -> Counts:
    """Share `total` by weight in whole numbers (Hamilton's method), low to high for each module.

    Each gets its quota rounded down, then one goes at a time to the module furthest below its quota
    (or leaves the one furthest above, if `low` gave out too many). Ties go in the order of
    `weights`. Needs low * modules <= total <= high * modules.
    """
    whole = math.fsum(weights.values())
    quota = {module: total * (weight / whole) for module, weight in weights.items()}
    counts = {module: min(max(math.floor(quota[module]), low), high) for module in weights}
    while left := total - sum(counts.values()):
        step = 1 if left > 0 else -1
        able = [module for module in weights if low <= counts[module] + step <= high]
        counts[max(able, key=lambda module: step * (quota[module] - counts[module]))] += step
    return counts
