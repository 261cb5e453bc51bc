"""Allocate: how many LoRA experts each weight matrix gets: votes (`reference.vote`), and budgets.

A task gives one expert to each of its most sensitive matrices, a share `keep` of each group. Only
the order within a task counts, so tasks whose gradients differ a thousandfold in size have the same
say. A matrix has as many experts as votes, and at least min_experts: 1 for the scripts, 0 in the
paper, where a matrix without a vote gets no adapter. With keep = 0.5 of one group of four:

    sensitivity    q     k     v     o
    task 1       9.0   1.0   5.0   2.0     votes for q and v
    task 2       0.1   0.2   0.9   0.3     votes for v and o
    experts        1     0     2     1

A budget of parameters takes the largest keep that fits it. Two strategies read no score. "uniform"
gives each matrix a share `keep` of as many experts as there are tasks or, with a budget, as many as
fit. "lora" gives each matrix one expert, with a budget of the largest rank that fits. No count
depends on the order of tasks or modules.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from .allocation import MOST, Allocation, Counts, Sensitivities, is_number, is_whole

GROUP = "attention_mlp"  # what is ranked together: matrices of attention, and those of MLPs
STRATEGIES = ("votes", "uniform", "lora")
LAYER = r"(?:^|\.)\d+\."  # what stands before a module's name within its layer
KEEP = 0.6  # share of its group that a task votes for, unless a size is asked for


def vote(scores: Sensitivities, groups: Sequence[Sequence[str]], keep: float) -> Counts:
    """{module: experts}. Of equal scores, the first of the group wins."""
    votes = {module: 0 for members in groups for module in members}
    for values in scores.values():
        for members in groups:
            best = sorted(members, key=values.__getitem__, reverse=True)
            for module in best[:_kept(keep, len(members))]:
                votes[module] += 1
    return votes


def _kept(keep: float, count: int) -> int:
    """A share of `count`, at least 1. Halves round up. 0.145 * 100 is a little below 14.5 in
    floating point, hence the 1e-9."""
    return max(1, math.floor(keep * count + 0.5 + 1e-9))


@dataclass(frozen=True)
class AllocationSettings:
    """How `allocate` gives experts to matrices."""

    strategy: str = "votes"              # or "uniform", or "lora"
    keep: float | None = None            # share of its group that a task votes for; None: KEEP
    budget_params: int | None = None     # at most so many trainable parameters, in place of keep
    min_experts: int = 0                 # votes that fall short of it are raised to it
    target_modules: Iterable[str] | str | None = None        # see `select`
    rank: int = 8                        # of each expert
    alpha: float | None = None           # None: twice the rank
    top_k: int = 2                       # experts active a token


def allocate(scores: Sensitivities, settings: AllocationSettings | None = None, *,
             shapes: Mapping[str, tuple[int, int]] | None = None, **changes: Any) -> Allocation:
    """Give each module of {task: {module: sensitivity}} its number of experts.

    settings: the defaults of `AllocationSettings` if None; `changes` are fields of it. shapes:
    {module: (out, in)}, by default `scores.shapes`. Raises ValueError for wrong settings and for a
    budget that is too small, with the nearest possible one.
    """
    given = replace(settings or AllocationSettings(), **changes)
    budget, least = given.budget_params, given.min_experts
    keep = KEEP if given.keep is None and budget is None else given.keep
    alpha = given.alpha
    if alpha is None:
        alpha = 2 * given.rank if is_whole(given.rank, 1) else 1
    draft = Allocation({}, given.rank, alpha, given.top_k, given.strategy, GROUP, keep)
    _check(scores, draft, budget, least)
    modules = select(next(iter(scores.values())), given.target_modules)
    sizes = (getattr(scores, "shapes", None) if shapes is None else shapes) or {}
    unknown = [module for module in modules if module not in sizes]
    if budget is not None and unknown:
        raise ValueError(f"budget_params needs the shapes of modules, and lacks those of {unknown}")
    if given.strategy == "lora":
        best = replace(draft, experts=dict.fromkeys(modules, 1))
        if budget is not None:           # alpha / rank stays
            rank = max(1, budget // replace(best, rank=1).trainable(sizes))
            best = _largest([replace(best, rank=rank, alpha=alpha * rank / given.rank)], sizes,
                            budget)
    else:
        options = _options(draft, scores, grouped(modules), least)
        best = next(options) if budget is None else _largest(options, sizes, budget)
    return replace(best, trainable_parameters=None if unknown else best.trainable(sizes), experts={
        m: best.experts[m] for m in next(iter(scores.values())) if best.experts.get(m)})


def _options(draft: Allocation, scores: Sensitivities, groups: Sequence[Sequence[str]], least: int,
             ) -> Iterator[Allocation]:
    """What the strategy of `draft`, "votes" or "uniform", may allocate: with its keep, or without
    one for a budget, from few experts to many."""
    if draft.strategy == "uniform":
        few = max(1, least, _kept(draft.keep, len(scores)) if draft.keep else 1)
        for each in range(few, MOST + 1):
            yield replace(draft, experts=dict.fromkeys(chain(*groups), each))
        return
    # Every keep that gives a task one more vote in a group of n: (i - 1/2) / n rounds up to i.
    keeps = {(2 * i - 1) / (2 * n) for n in map(len, groups) for i in range(1, n + 1)}
    for keep in [draft.keep] if draft.keep else sorted(keeps):
        yield replace(draft, keep=keep, experts={
            module: max(count, least) for module, count in vote(scores, groups, keep).items()})


def _largest(options: Iterable[Allocation], shapes: Mapping[str, tuple[int, int]], budget: int,
             ) -> Allocation:
    """The largest of the options, which ascend in size, that has at most `budget` trainable
    parameters. ValueError if none has."""
    best = None
    for option in options:
        if (size := option.trainable(shapes)) > budget:
            break
        best = option
    if best is None:
        raise ValueError(f"a budget of {budget} trainable parameters is too small: the nearest "
                         f"possible is {size}")
    return best


def _check(scores: Sensitivities, draft: Allocation, budget: int | None, least: int) -> None:
    """Raise one ValueError that names everything wrong with the arguments of `allocate`."""
    modules: set[str] = set().union(*scores.values())
    checks = [
        (draft.strategy in STRATEGIES, f"strategy {draft.strategy!r} is none of {STRATEGIES}"),
        (is_whole(least, 0) and least <= MOST,
         f"min_experts must be a whole number from 0 to {MOST}, got {least!r}"),
        (draft.strategy != "lora" or least in (0, 1),
         f"'lora' is one expert a module, so min_experts {least!r} cannot be met"),
        (budget is None or draft.keep is None, "give only one of keep and budget_params"),
        (budget is None or is_whole(budget, -math.inf),
         f"budget_params must be a whole number < 2**50, got {budget!r}"),
        (modules, "the scores hold no module"),
        *((modules == set(values), f"task {task!r} lacks {sorted(modules - set(values))}")
          for task, values in scores.items()),
        *((is_number(score), f"{module!r} of task {task!r} must be finite and >= 0, got {score!r}")
          for task, values in scores.items() for module, score in values.items())]
    if problems := draft.problems() + [problem for good, problem in checks if not good]:
        raise ValueError("; ".join(problems))


def select(modules: Iterable[str], targets: Iterable[str] | str | None) -> list[str]:
    """In natural order, the modules whose last component is a target or whose name matches one, or
    all for None. Raises ValueError with the targets that match nothing."""
    kinds = {module: module.rpartition(".")[2] for module in sorted(modules, key=natural)}
    targets = "*" if targets is None else targets
    words = targets.split(",") if isinstance(targets, str) else targets
    hits = {word: {m for m, kind in kinds.items() if kind == word or fnmatchcase(m, word)}
            for word in map(str.strip, words) if word}
    if not hits or not all(hits.values()):
        raise ValueError(f"no module matches targets {[word for word in hits if not hits[word]]}; "
                         f"projections present: {sorted(set(kinds.values()))}")
    return [module for module in kinds if any(module in matched for matched in hits.values())]


def natural(module: str) -> tuple[list[Any], str]:
    """Sort key in which layer 10 follows layer 9; the name itself keeps "01" apart from "1"."""
    parts = re.split(r"(\d+)", module)  # every second part holds digits, so numbers meet numbers
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], module


def grouped(modules: Iterable[str]) -> list[list[str]]:
    """Modules that are ranked together: those of attention, or of a convolution, which mix tokens
    as well; and those of MLPs."""
    groups = defaultdict[bool, list[str]](list)
    for module in modules:
        parent = re.split(LAYER, module, maxsplit=1)[-1].rpartition(".")[0]
        groups[re.search("attn|attention|conv", parent.lower()) is not None].append(module)
    return list(groups.values())
