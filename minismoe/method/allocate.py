"""Allocate: how many LoRA experts each weight matrix gets: `reference.vote`, and budgets.

A task gives one expert to each of its most sensitive matrices, a share `keep` of each group. Only
the order within a task counts, so tasks whose gradients differ a thousandfold in size have the same
say. A matrix without a vote gets no adapter. With keep = 0.5 of one group of four:

    sensitivity    q     k     v     o
    task 1       9.0   1.0   5.0   2.0     votes for q and v
    task 2       0.1   0.2   0.9   0.3     votes for v and o
    experts        1     0     2     1

A budget takes the largest keep that fits it. With min_experts 1, as the scripts have it, a matrix
without a vote gets one expert all the same. "uniform" and "lora" spend the same budget elsewhere,
for comparison. No count depends on the order of tasks or modules.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from .allocation import MOST, Allocation, Counts, Sensitivities, Unfit, is_number, is_whole

STRATEGIES = ("votes", "uniform", "lora")
GROUPS = ("attention_mlp", "kind", "all")
LAYER = r"(?:^|\.)\d+\."  # what stands before a module's name within its layer
KEEP = 0.6  # share of its group that a task votes for, unless a size is asked for


def vote(scores: Sensitivities, groups: Sequence[Sequence[str]], keep: float) -> Counts:
    """{module: experts}. Of equal scores, the first of the group wins."""
    votes = {module: 0 for members in groups for module in members}
    for values in scores.values():
        for members in groups:
            # Halves round up. 0.145 * 100 is a little below 14.5 in floating point, hence the 1e-9.
            kept = max(1, math.floor(keep * len(members) + 0.5 + 1e-9))
            for module in sorted(members, key=values.__getitem__, reverse=True)[:kept]:
                votes[module] += 1
    return votes


def allocate(scores: Sensitivities, *, strategy: str = "votes", group: str = "attention_mlp",
             keep: float | None = None, budget_experts: int | None = None,
             budget_params: int | None = None, min_experts: int = 0, max_experts: int | None = None,
             targets: Iterable[str] | str | None = None, rank: int = 8, alpha: float | None = None,
             top_k: int = 2, shapes: Mapping[str, tuple[int, int]] | None = None) -> Allocation:
    """Give each module of {task: {module: sensitivity}} its number of experts.

    It spends what votes do at `keep` (a share of each group, 0.6 by default), or at most
    `budget_experts` experts, or at most `budget_params` trainable parameters. Counts are clamped to
    min_experts..max_experts; no max_experts means the number of tasks for votes, and no limit for
    uniform. "lora" gives each module one expert of the largest rank that fits, at the same
    alpha / rank; in budget_experts, one of 2 * `rank` counts as two. `alpha` is 2 * rank by
    default, `shapes`, {module: (out, in)}, is `scores.shapes`. Raises ValueError for wrong
    arguments and for a budget that is too small, with the nearest possible one; Unfit if it is too
    small for these scores only.
    """
    budgets = [budget for budget in (budget_experts, budget_params) if budget is not None]
    keep = KEEP if keep is None and not budgets else keep
    alpha = (2 * rank if is_whole(rank, 1) else 1) if alpha is None else alpha
    draft = Allocation({}, rank, alpha, top_k, strategy, group, keep)
    _check(scores, draft, budgets, min_experts, max_experts)
    modules = select(next(iter(scores.values())), targets)
    sizes = (getattr(scores, "shapes", None) if shapes is None else shapes) or {}
    unknown = [module for module in modules if module not in sizes]
    if budget_params is not None and unknown:
        raise ValueError(f"budget_params needs the shapes of modules, and lacks those of {unknown}")
    in_params = budget_params is not None or (strategy == "lora" and not budgets and not unknown)
    scale = 1 if in_params else rank  # else an expert costs its rank, which lora chooses itself

    def cost(option: Allocation) -> int:
        return option.trainable(sizes) if in_params else option.rank * sum(option.experts.values())

    limits = scores, grouped(modules, group), min_experts, max_experts
    options, by_votes = _options(draft, *limits), replace(draft, strategy="votes")
    budget = budgets[0] * scale if budgets else cost(_options(by_votes, *limits)[0])
    least = cost(options[0])
    if least > budget:
        floor = cost(replace(draft, experts=dict.fromkeys(modules, min_experts)))
        raise (ValueError if floor > budget else Unfit)(
            f"{budget // scale} {'parameters' if in_params else 'experts'} "
            f"({'the budget' if budgets else 'what votes spend'}) are too few for {strategy!r} "
            f"with min_experts {min_experts}: the nearest possible is {-(-least // scale)}")
    best = [option for option in options if cost(option) <= budget][-1]
    if strategy == "lora":  # one rank costs as much as another
        best = replace(best, rank=budget // least, alpha=alpha * (budget // least) / rank)
    return replace(best, trainable_parameters=None if unknown else best.trainable(sizes), experts={
        m: best.experts[m] for m in next(iter(scores.values())) if best.experts.get(m)})


def _options(draft: Allocation, scores: Sensitivities, groups: Sequence[Sequence[str]], low: int,
             high: int | None) -> list[Allocation]:
    """What draft.strategy may allocate, from few experts to many; of lora only rank 1."""
    modules = [module for members in groups for module in members]
    if draft.strategy == "lora":
        return [replace(draft, experts=dict.fromkeys(modules, 1), rank=1)]
    if draft.strategy == "uniform":
        return [replace(draft, experts=dict.fromkeys(modules, each))
                for each in range(max(1, low), (high or MOST) + 1)]
    # Every keep that gives a task one more vote in a group of n: (i - 1/2) / n rounds up to i.
    keeps = {(2 * i - 1) / (2 * n) for n in map(len, groups) for i in range(1, n + 1)}
    most = high or max(low, len(scores))
    return [replace(draft, keep=keep, experts={
        module: min(max(count, low), most) for module, count in vote(scores, groups, keep).items()})
        for keep in ([draft.keep] if draft.keep else sorted(keeps))]


def _check(scores: Sensitivities, draft: Allocation, budgets: Sequence[int], low: int,
           high: int | None) -> None:
    """Raise one ValueError that names everything wrong with the arguments of `allocate`."""
    modules: set[str] = set().union(*scores.values())
    checks = [
        (draft.strategy in STRATEGIES, f"strategy {draft.strategy!r} is none of {STRATEGIES}"),
        (draft.group in GROUPS, f"group {draft.group!r} is none of {GROUPS}"),
        (is_whole(low, 0) and (high is None or is_whole(high, 1)) and low <= (high or MOST) <= MOST,
         f"needs whole numbers 0 <= min_experts <= max_experts <= {MOST}, max_experts 1 or more, "
         f"got min_experts {low!r} and max_experts {high!r}"),
        (draft.strategy != "lora" or low in (0, 1),
         f"'lora' is one expert a module, so min_experts {low!r} cannot be met"),
        (len(budgets) + (draft.keep is not None) < 2, "give only one of keep and the two budgets"),
        *((is_whole(budget, -math.inf), f"a budget must be a whole number < 2**50, got {budget!r}")
          for budget in budgets),
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


def grouped(modules: Iterable[str], group: str) -> list[list[str]]:
    """Modules that are ranked together: attention and MLP apart, each projection apart, or all."""
    groups = defaultdict(list)
    for module in modules:
        parent, _, kind = re.split(LAYER, module, maxsplit=1)[-1].rpartition(".")
        attention = re.search("attn|attention|conv", parent.lower()) is not None     # mixes tokens
        groups[{"attention_mlp": attention, "kind": kind, "all": ""}[group]].append(module)
    return list(groups.values())
