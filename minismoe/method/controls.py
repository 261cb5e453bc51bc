"""What the paper's vote is compared with: other ways to spend the same number of experts."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from .allocation import Counts


def shares(scores: Mapping[str, Mapping[str, float]], groups: Sequence[Sequence[str]],
           ) -> dict[str, float]:
    """Weights of "proportional": a module's part of its group's sensitivity, summed over tasks.

    A task's parts sum to 1 in each group, and a group weighs as much as it has modules.
    """
    weights: dict[str, float] = {}
    for members in groups:
        columns = [[values[module] for module in members] for values in scores.values()]
        totals = [math.fsum(column) for column in columns]
        parts = [[score / total if total else 1 / len(members) for score in column]
                 for column, total in zip(columns, totals, strict=True)]
        # fsum is exact, so that the order of tasks cannot show in the last digit.
        weights |= {module: len(members) * math.fsum(part[i] for part in parts)
                   for i, module in enumerate(members)}
    return weights


def ramp(layers: Mapping[str, int | None]) -> dict[str, float]:
    """Weights of "mola", a line from 2 at the lowest layer to 8 at the highest.

    The inverted triangle "2468" of MoLA (Gao et al. 2024, arXiv 2402.08562), without its steps.
    """
    placed = {module: layer for module, layer in layers.items() if layer is not None}
    if unplaced := [module for module in layers if module not in placed]:
        raise ValueError(f"strategy 'mola' finds no layer number in {unplaced}")
    low, high = min(placed.values()), max(placed.values())
    return {module: 2 + 6 * (layer - low) / max(1, high - low) for module, layer in placed.items()}


def largest_remainder(weights: Mapping[str, float], total: int, low: int, high: int) -> Counts:
    """Share `total` experts by weight (Hamilton's method), from low to high of them a module.

    Each gets its quota rounded down, then one goes at a time to whichever is furthest below its
    quota (or leaves whichever is furthest above, where `low` gave out too many). Ties go in the
    order of `weights`. Needs low * modules <= total <= high * modules.
    """
    whole = math.fsum(weights.values())
    quota = {module: total * (weight / whole) for module, weight in weights.items()}
    counts = {module: min(max(math.floor(quota[module]), low), high) for module in weights}
    while left := total - sum(counts.values()):
        step = 1 if left > 0 else -1
        able = [module for module in weights if low <= counts[module] + step <= high]
        counts[max(able, key=lambda module: step * (quota[module] - counts[module]))] += step
    return counts


def draw(modules: list[str], total: int, low: int, high: int, seed: int) -> Counts:
    """Drop `total` experts one by one on modules chosen at random among those below `high`.

    A larger total with the same seed only adds experts, so what it costs only grows.
    """
    generator, counts = random.Random(seed), dict.fromkeys(modules, low)
    for _ in range(total - low * len(modules)):
        counts[generator.choice([module for module in modules if counts[module] < high])] += 1
    return counts
