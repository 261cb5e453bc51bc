"""Allocate: how many LoRA experts each weight matrix gets (formula 2 of DESIGN.md).

LoRA-SMoE (Xu and Diao 2025, arXiv 2505.06272) lets the tasks vote. s[t, W] is how sensitive matrix
W is to task t (`sensitivity.py` measures it). Matrices are ranked within a group, and each task
gives one expert to each of its most sensitive ones:

    E[W] = number of tasks t for which s[t, W] is in the top `keep` of W's group

A matrix that many tasks lean on gets many experts, one that none does gets no adapter, and none
gets more than there are tasks. Only the order within a task counts, so tasks whose gradients differ
a thousandfold in size have the same say. An example, with keep = 0.5 of one group of four:

    sensitivity    q     k     v     o
    task 1       9.0   1.0   5.0   2.0     votes for q and v
    task 2       0.1   0.2   0.9   0.3     votes for v and o
    experts        1     0     2     1

The other strategies (controls.py) are an experiment's controls: what the vote spends, spent
elsewhere. Each is a row of allocations from small to large, numbered by a whole number, and a
budget takes the largest that fits. No count depends on the order of tasks or matrices.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from . import controls
from .allocation import MOST, Allocation, Counts, is_number, is_whole

Scores = Mapping[str, Mapping[str, float]]  # {task: {module: sensitivity}}
Groups = list[list[str]]  # modules that are ranked together, each group in the order of names
STRATEGIES = ("votes", "proportional", "uniform", "mola", "random", "lora", "ranks")
GROUPS = ("attention_mlp", "kind", "all")


class Unfit(ValueError):
    """What is asked for is possible, but not with what these scores choose."""


def parameters(shape: tuple[int, int], experts: int, rank: int) -> int:
    """Trainable parameters of one module: lora_A, lora_B, and a router where there is a choice.

    `shape` is that of the frozen weight, (out, in).
    """
    d_out, d_in = shape
    return experts * rank * (d_in + d_out) + (experts * d_in if experts > 1 else 0)


def _natural(module: str) -> tuple[list[Any], str]:
    """Sort key in which layer 10 follows layer 9; the name itself keeps "01" apart from "1"."""
    parts = re.split(r"(\d+)", module)  # odd places hold the digits, so like meets like
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], module


def _place(module: str) -> tuple[int | None, str, str]:
    """model.layers.3.self_attn.q_proj -> (3, "self_attn", "q_proj"); None without a number."""
    *parents, kind = module.split(".")
    numbers = [i for i, part in enumerate(parents) if part.isdecimal()]
    layer = int(parents[numbers[0]]) if numbers else None
    return layer, ".".join(parents[numbers[0] + 1 if numbers else 0:]), kind


def _select(modules: Iterable[str], targets: Iterable[str] | str | None) -> list[str]:
    """By name, the modules whose last component is a target, or whose whole name matches one."""
    everything = sorted(modules, key=_natural)
    if targets is None:
        return everything
    words = [word.strip() for word in (targets.split(",") if isinstance(targets, str) else targets)]

    def hit(module: str, word: str) -> bool:
        return _place(module)[2] == word or fnmatchcase(module, word)

    missed = [word for word in words if not any(hit(module, word) for module in everything)]
    if missed or not words:
        present = sorted({_place(module)[2] for module in everything})
        raise ValueError(f"no module matches targets {missed}; projections present: {present}")
    return [module for module in everything if any(hit(module, word) for word in words)]


def _grouped(modules: list[str], group: str) -> Groups:
    """What is ranked together: attention and MLP apart, each projection kind apart, or all."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        _, parent, kind = _place(module)
        half = "attention" if re.search("attn|attention", parent.lower()) else "mlp"
        name = {"attention_mlp": half, "kind": kind, "all": "all"}[group]
        groups.setdefault(name, []).append(module)
    return list(groups.values())


def _kept(keep: float, size: int) -> int:
    """Modules that a task votes for in a group: keep * size, halves up, and never none."""
    # 0.145 * 100 is a little below 14.5 in floating point; the 1e-9 takes a decimal as written.
    return min(size, max(1, math.floor(keep * size + 0.5 + 1e-9)))


def _keeps(groups: Groups) -> list[float]:
    """Every keep at which some group takes one module more: where `_kept` begins to round up."""
    return sorted({(2 * i - 1) / (2 * len(g)) for g in groups for i in range(1, len(g) + 1)})


def _votes(scores: Scores, groups: Groups, keep: float, low: int, high: int) -> Counts:
    """The paper's rule. Of equal scores the first by name wins: groups and sort keep that order."""
    votes = {module: 0 for members in groups for module in members}
    for values in scores.values():
        for members in groups:
            ranked = sorted(members, key=values.__getitem__, reverse=True)
            for module in ranked[:_kept(keep, len(members))]:
                votes[module] += 1
    return {module: min(max(count, low), high) for module, count in votes.items()}


def _row(draft: Allocation, scores: Scores, groups: Groups, low: int, high: int, most: int,
         seed: int) -> tuple[range, Callable[[int], Allocation]]:
    """A strategy's allocations from small to large: their numbers, and a number's allocation.

    Numbers above `most` are left out: they fit no budget.
    """
    modules = sorted((module for members in groups for module in members), key=_natural)
    if draft.strategy == "votes":  # numbered by place in `keeps`
        keeps = [draft.keep] if draft.keep else _keeps(groups)
        return range(len(keeps)), lambda i: replace(
            draft, keep=keeps[i], experts=_votes(scores, groups, keeps[i], low, high))
    if draft.strategy == "lora":  # by rank
        ones = dict.fromkeys(modules, 1)
        return range(1, max(1, most) + 1), lambda rank: replace(
            draft, experts=ones, rank=rank, alpha=draft.alpha * rank / draft.rank)
    if draft.strategy == "uniform":  # by experts a module
        return range(max(1, low), high + 1), lambda experts: replace(
            draft, experts=dict.fromkeys(modules, experts))
    if draft.strategy == "ranks":  # by ranks in total
        weights = controls.shares(scores, groups)
        roots = {module: weights[module]**0.5 for module in modules}
        totals = range(len(modules), max(len(modules), min(high * len(modules), most)) + 1)
        return totals, lambda total: replace(
            draft, experts=dict.fromkeys(modules, 1),
            ranks=controls.largest_remainder(roots, total, 1, high))
    first = max(1, low * len(modules))  # by experts in total
    totals = range(first, max(first, min(high * len(modules), most)) + 1)
    if draft.strategy == "random":
        return totals, lambda total: replace(
            draft, experts=controls.draw(modules, total, low, high, seed))
    weights = (controls.shares(scores, groups) if draft.strategy == "proportional"
               else controls.ramp({module: _place(module)[0] for module in modules}))
    weights = {module: weights[module] for module in modules}  # in the order that settles ties
    return totals, lambda total: replace(
        draft, experts=controls.largest_remainder(weights, total, low, high))


def _check(scores: Scores, draft: Allocation, budgets: tuple[int | None, int | None], low: int,
           high: int | None) -> None:
    """Raise one ValueError that names everything wrong with the arguments of `allocate`."""
    modules: set[str] = set().union(*scores.values())
    given = [budget for budget in budgets if budget is not None]
    checks = [
        (draft.strategy in STRATEGIES, f"strategy {draft.strategy!r} is none of {STRATEGIES}"),
        (draft.group in GROUPS, f"group {draft.group!r} is none of {GROUPS}"),
        (is_whole(low, 0) and low <= MOST,
         f"min_experts must be a whole number from 0 to {MOST}, got {low!r}"),
        (high is None or is_whole(high, 1) and high <= MOST,
         f"max_experts must be a whole number from 1 to {MOST}, got {high!r}"),
        (not (is_whole(low, 0) and is_whole(high, 1)) or is_whole(high, low),
         f"min_experts {low!r} is above max_experts {high!r}"),
        (draft.strategy not in ("lora", "ranks") or low in (0, 1),
         f"{draft.strategy!r} is one expert a module, so min_experts {low!r} cannot be met"),
        (len(given) + (draft.keep is not None) < 2, "give only one of keep and the two budgets"),
        *((is_whole(budget, -math.inf), f"a budget must be a whole number < 2**50, got {budget!r}")
          for budget in given),
        (modules, "the scores hold no module"),
        *((modules == set(values), f"task {task!r} lacks {sorted(modules - set(values))}")
          for task, values in scores.items()),
        *((is_number(score), f"{module!r} of task {task!r} must be finite and >= 0, got {score!r}")
          for task, values in scores.items() for module, score in values.items())]
    if problems := draft.problems() + [problem for good, problem in checks if not good]:
        raise ValueError("; ".join(problems))


def allocate(scores: Scores, *, strategy: str = "votes", group: str = "attention_mlp",
             keep: float | None = None, budget_experts: int | None = None,
             budget_params: int | None = None, min_experts: int = 0, max_experts: int | None = None,
             targets: Iterable[str] | str | None = None, rank: int = 8, alpha: float | None = None,
             top_k: int = 2, seed: int = 0, shapes: Mapping[str, tuple[int, int]] | None = None
             ) -> Allocation:
    """Give each scored module its number of experts: the rule at the top of this file.

    It spends what votes give at `keep` (a share of each group, 0.6 by default), or at most
    `budget_experts` experts, or at most `budget_params` trainable parameters. Counts are clamped to
    min_experts..max_experts; no max_experts means the number of tasks for votes and random, and no
    limit for the others. "lora" is one expert a module, of the largest rank that fits, alpha / rank
    kept; in experts, one of twice the `rank` counts as two. "ranks" gives each module a rank of its
    own, in proportion to the root of its share of the sensitivity. `alpha` is 2 * rank by default.
    `seed` is for "random". `shapes`, {module: (out, in)}, is `scores.shapes` by default.
    Raises ValueError for wrong arguments, and Unfit, which is one, for a budget too small, saying
    the nearest possible.
    """
    alpha = (2 * rank if is_whole(rank, 1) else 1) if alpha is None else alpha
    draft = Allocation({}, rank, alpha, top_k, strategy, group, keep)
    _check(scores, draft, (budget_experts, budget_params), min_experts, max_experts)
    modules = _select(next(iter(scores.values())), targets)
    groups = _grouped(modules, group)
    sizes = (getattr(scores, "shapes", None) if shapes is None else shapes) or {}
    unknown = [module for module in modules if module not in sizes]
    if budget_params is not None and unknown:
        raise ValueError(f"budget_params needs the shapes of modules, and lacks those of {unknown}")
    in_params = budget_params is not None or (
        strategy in ("lora", "ranks") and budget_experts is None and not unknown)

    def trainable(found: Allocation) -> int:
        return sum(parameters(sizes[m], count, found.rank_of(m))
                   for m, count in found.experts.items())

    def cost(found: Allocation) -> int:  # in the budget's unit; rounded up, for ranks of "lora"
        ranks = sum(count * found.rank_of(m) for m, count in found.experts.items())
        return trainable(found) if in_params else -(-ranks // rank)

    high = max_experts or max(min_experts, len(scores))
    budget, source = budget_experts if budget_params is None else budget_params, "the budget"
    if budget is None:
        keep, source = 0.6 if keep is None else keep, "what votes spend"
        draft = replace(draft, keep=keep, experts=_votes(scores, groups, keep, min_experts, high))
        budget = cost(draft)
    if strategy not in ("votes", "random"):
        high = max_experts or max(min_experts, min(max(budget, 1), MOST))
    most = budget * rank
    if strategy == "ranks":  # no rank is above the smaller side of a matrix
        high = min((min(sizes[m]) for m in modules if m in sizes), default=most)
        if in_params:
            most = budget // min(sum(sizes[m]) for m in modules)
    numbers, at = _row(draft, scores, groups, min_experts, high, most, seed)
    if (least := cost(at(numbers[0]))) > budget:
        raise Unfit(f"{budget} {'parameters' if in_params else 'experts'} ({source}) are too few "
                    f"for {strategy!r}: the nearest possible is {least}")
    best = at(numbers[bisect_right(numbers, budget, key=lambda number: cost(at(number))) - 1])
    return replace(best, trainable_parameters=None if unknown else trainable(best), experts={
        m: best.experts[m] for m in next(iter(scores.values())) if best.experts.get(m)})
