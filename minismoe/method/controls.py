"""The strategies that the paper's vote is compared with: other ways to spend the same budget.

A strategy is a function of an `Order` and of n = 1, 2, ..., whose allocations grow with n.
`allocate` bisects for the largest that fits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .allocation import MOST, Allocation, Sensitivities

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

    def limit(self, usual: int) -> int:
        """Experts of a module at most: as asked for, or as the strategy has it."""
        return self.high or max(self.low, usual)


def uniform(order: Order, n: int) -> Allocation:
    """n experts for every module."""
    each = min(max(n, order.low), order.limit(MOST))
    return replace(order.draft, experts=dict.fromkeys(order.modules, each))


def lora(order: Order, n: int) -> Allocation:
    """One expert of rank n for every module, alpha / rank kept."""
    return replace(order.draft, experts=dict.fromkeys(order.modules, 1), rank=n,
                   alpha=order.draft.alpha * n / order.draft.rank)
