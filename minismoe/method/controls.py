"""The strategies that the paper's vote is compared with: other ways to spend the same budget.

A strategy is a function that takes an `Order` and gives a row of allocations from small to large:
a range of whole numbers, and the allocation of each. `allocate` takes the largest that fits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .names import natural, place
from .record import MOST, Allocation, Counts, Sensitivities

Row = tuple[range, Callable[[int], Allocation]]


@dataclass(frozen=True)
class Order:
    """What a strategy is asked for."""

    draft: Allocation           # rank, alpha, top_k and so on; the strategy fills in the experts
    scores: Sensitivities
    groups: Sequence[Sequence[str]]                  # modules that are ranked together
    low: int                    # experts of a module, at least
    high: int | None            # and at most; None leaves this to the strategy
    most: int                   # experts * rank, in total, that the budget pays for at most
    seed: int

    @property
    def modules(self) -> list[str]:
        """All modules in natural order, which settles ties."""
        return sorted((module for members in self.groups for module in members), key=natural)


def proportional(order: Order) -> Row:
    """Experts in proportion to a module's share of the sensitivity."""
    return _by_weight(order, shares(order.scores, order.groups))


def uniform(order: Order) -> Row:
    """The same number of experts for every module; numbered by it."""
    return range(max(1, order.low), _limit(order) + 1), lambda experts: replace(
        order.draft, experts=dict.fromkeys(order.modules, experts))


def mola(order: Order) -> Row:
    """More experts the higher the layer: a line from 2 at the lowest to 8 at the highest, as MoLA's
    inverted triangle "2468" (Gao et al. 2024, arXiv 2402.08562), without its steps."""
    layers = {m: layer for m in order.modules if (layer := place(m)[0]) is not None}
    if unplaced := [m for m in order.modules if m not in layers]:
        raise ValueError(f"strategy 'mola' finds no layer number in {unplaced}")
    low, high = min(layers.values()), max(layers.values())
    return _by_weight(order, {m: 2 + 6 * (layer - low) / max(1, high - low)
                              for m, layer in layers.items()})


def draw(order: Order) -> Row:
    """Experts dropped one by one on modules chosen at random ("random"). One more in total with the
    same seed adds an expert and moves none, so costs only grow."""
    high = order.high or max(order.low, len(order.scores))

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


CONTROLS: dict[str, Callable[[Order], Row]] = {
    "proportional": proportional, "uniform": uniform, "mola": mola, "random": draw, "lora": lora}


def _limit(order: Order) -> int:
    """Experts of one module at most: as asked for, or as many as the budget pays for."""
    return order.high or max(order.low, min(max(1, order.most // order.draft.rank), MOST))


def _by_total(order: Order, high: int, count: Callable[[int], Counts]) -> Row:
    """The row of a rule that shares out a number of experts, at most `high` a module."""
    first = max(1, order.low * len(order.modules))
    last = max(first, min(high * len(order.modules), order.most // order.draft.rank))
    return range(first, last + 1), lambda total: replace(order.draft, experts=count(total))


def _by_weight(order: Order, weights: Mapping[str, float]) -> Row:
    sorted_, high = {module: weights[module] for module in order.modules}, _limit(order)
    return _by_total(order, high, lambda n: largest_remainder(sorted_, n, order.low, high))


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
