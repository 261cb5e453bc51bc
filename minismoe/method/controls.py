"""The strategies that the paper's vote is compared with: other ways to spend the same budget.

A strategy is a function of an `Order` and of n = 1, 2, ..., whose allocations grow with n (rounding
may move experts in mola and proportional). `allocate` bisects for the largest that fits.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .record import MOST, Allocation, Sensitivities

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

    def limit(self, usual: int) -> int:
        """Experts of a module at most: as asked for, or as the strategy has it."""
        return self.high or max(self.low, usual)

    def total(self, n: int, high: int) -> int:
        """n experts in all, or the number nearest to n that low and `high` a module allow."""
        return min(max(n, 1, self.low * len(self.modules)), high * len(self.modules))


def proportional(order: Order, n: int) -> Allocation:
    """n experts in proportion to a module's share of the sensitivity."""
    return _largest_remainder(order, n, shares(order.scores, order.groups))


def uniform(order: Order, n: int) -> Allocation:
    """n experts for every module."""
    each = min(max(n, order.low), order.limit(MOST))
    return replace(order.draft, experts=dict.fromkeys(order.modules, each))


def mola(order: Order, n: int) -> Allocation:
    """n experts, more the higher the layer: a line from 2 at the lowest to 8 at the highest, as
    MoLA's inverted triangle "2468" (Gao et al. 2024, arXiv 2402.08562), without its steps."""
    layers = {m: int(found[1]) for m in order.modules if (found := LAYER.search(m))}
    if unplaced := [m for m in order.modules if m not in layers]:
        raise ValueError(f"strategy 'mola' finds no layer number in {unplaced}")
    low, high = min(layers.values()), max(layers.values())
    return _largest_remainder(order, n, {
        m: 2 + 6 * (layer - low) / max(1, high - low) for m, layer in layers.items()})


def draw(order: Order, n: int) -> Allocation:
    """n experts, each given to a module drawn at random ("random"). With the same seed, n + 1 gives
    the first n to the same modules, so costs only grow."""
    generator, high = random.Random(order.seed), order.limit(len(order.scores))
    counts = dict.fromkeys(order.modules, order.low)
    for _ in range(order.total(n, high) - order.low * len(counts)):
        counts[generator.choice([module for module in counts if counts[module] < high])] += 1
    return replace(order.draft, experts=counts)


def lora(order: Order, n: int) -> Allocation:
    """One expert of rank n for every module, alpha / rank kept."""
    return replace(order.draft, experts=dict.fromkeys(order.modules, 1), rank=n,
                   alpha=order.draft.alpha * n / order.draft.rank)


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


def _largest_remainder(order: Order, n: int, weights: Mapping[str, float]) -> Allocation:
    """n experts by weight in whole numbers (Hamilton's method).

    Each module gets its quota rounded down, then one goes at a time to the module furthest below
    its quota (or leaves the one furthest above, if `low` gave out too many).
    """
    low, high = order.low, order.limit(MOST)
    total, whole = order.total(n, high), math.fsum(weights.values())
    quota = {module: total * (weights[module] / whole) for module in order.modules}
    counts = {module: min(max(math.floor(share), low), high) for module, share in quota.items()}
    while left := total - sum(counts.values()):
        step = 1 if left > 0 else -1
        able = [module for module in counts if low <= counts[module] + step <= high]
        counts[max(able, key=lambda module: step * (quota[module] - counts[module]))] += step
    return replace(order.draft, experts=counts)
