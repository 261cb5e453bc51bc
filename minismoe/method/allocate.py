"""Allocate: how many LoRA experts each weight matrix gets: votes (`reference.vote`), and budgets;
and allocation.json, which says so.

A task gives one expert to each of its most sensitive matrices, a share `keep` of each group. Only
the order within a task counts, so tasks whose gradients differ a thousandfold in size have the same
say. A matrix has as many experts as votes, and at least min_experts: 1 for the scripts, 0 in the
paper, where a matrix without a vote gets no adapter. With keep = 0.5 of one group of four:

    sensitivity    q     k     v     o
    task 1       9.0   1.0   5.0   2.0     votes for q and v
    task 2       0.1   0.2   0.9   0.3     votes for v and o
    experts        1     0     2     1

A budget of parameters takes the largest keep that fits it. Two strategies read no score: "uniform"
gives each matrix a share `keep` of as many experts as there are tasks, "lora" gives each one. No
count depends on the order of tasks or modules.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

GROUP = "attention_mlp"  # what is ranked together: matrices of attention, and those of MLPs
STRATEGIES = ("votes", "uniform", "lora")
LAYER = r"(?:^|\.)\d+\."  # what stands before a module's name within its layer
KEEP = 0.6  # share of its group that a task votes for, unless a size is asked for
Counts = dict[str, int]  # {module: experts}
Sensitivities = Mapping[str, Mapping[str, float]]  # {task: {module: sensitivity}}
FORMAT = "minismoe.allocation/1"
MOST = 1 << 10  # experts of one matrix: bounds the memory that a file can ask for


def is_whole(value: Any, least: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**50


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


@dataclass(frozen=True)
class Allocation:
    """The content of allocation.json: each module's experts, and how they are built."""

    experts: Counts  # only modules with >= 1
    rank: int = 8  # of each expert
    alpha: float = 16  # an expert's output is scaled by alpha / rank
    top_k: int = 2  # experts active a token, in modules that have more
    strategy: str = "custom"
    group: str | None = None
    keep: float | None = None  # share of its group that a task votes for
    trainable_parameters: int | None = None  # None if the shapes are unknown

    def __str__(self) -> str:
        return (f"{self.strategy}: {sum(self.experts.values())} experts of rank {self.rank} on "
                f"{len(self.experts)} matrices")

    def check_rank(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError with the modules whose smaller side of (out, in) is below the rank."""
        if small := [f"{module} {[*shapes[module]]}" for module in self.experts
                     if self.rank > min(shapes[module])]:
            raise ValueError(f"rank {self.rank} is more than the matrix itself has: "
                             f"{', '.join(small)}; give a smaller rank, or targets without them")

    def trainable(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Trainable parameters (lora_A, lora_B, router) on weights of these shapes, (out, in)."""
        return sum(E * self.rank * sum(shapes[module]) + (E * shapes[module][1] if E > 1 else 0)
                   for module, E in self.experts.items())

    def problems(self) -> list[str]:
        """One message for each wrong value; a count of 0 is allowed."""
        keep, trainable = self.keep, self.trainable_parameters
        checks = [
            ("rank", is_whole(self.rank, 1), "a whole number >= 1"),
            ("alpha", is_number(self.alpha) and self.alpha > 0, "a number > 0"),
            ("top_k", is_whole(self.top_k, 1), "a whole number >= 1"),
            ("strategy", isinstance(self.strategy, str), "text"),
            ("group", self.group is None or isinstance(self.group, str), "text or null"),
            ("keep", keep is None or is_number(keep) and 0 < keep <= 1, "in (0, 1]"),
            ("trainable_parameters", trainable is None or is_whole(trainable, 0), "a whole number")]
        return [f"{name} must be {what}, got {getattr(self, name)!r}"
                for name, good, what in checks if not good] + [
            f"experts must map names to whole numbers from 0 to {MOST}, got {module!r}: {count!r}"
            for module, count in self.experts.items()
            if not (isinstance(module, str) and module and is_whole(count, 0) and count <= MOST)]

    def to_json(self) -> dict[str, Any]:
        """The form of allocation.json, for `json.dump`."""
        settings = asdict(self)
        experts = settings.pop("experts")
        return {"format": FORMAT, **settings, "experts": experts}

    @classmethod
    def from_json(cls, value: object) -> "Allocation":
        """Read `to_json`'s form, or a bare {module: count}, the form of the paper's published code.

        A count of 0 means no adapter. Raises one ValueError that names everything wrong.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"an allocation is a JSON object, got {value!r}")
        settings: dict[str, Any] = dict(value) if "format" in value else {"experts": value}
        form, experts = settings.pop("format", FORMAT), settings.pop("experts", None)
        known = {f.name: settings.pop(f.name) for f in fields(cls) if f.name in settings}
        problems = [f"format must be {FORMAT!r}, got {form!r}"] if form != FORMAT else []
        problems += [f"unknown field {name!r}" for name in settings]
        if not isinstance(experts, Mapping) or not any(experts.values()):
            problems.append(f"experts must give some module an expert, got {experts!r}")
            experts = {}
        problems += cls(dict(experts), **known).problems()
        if problems:
            raise ValueError("not an allocation: " + "; ".join(problems))
        known.setdefault("alpha", 2 * known.get("rank", cls.rank))  # as allocate() does
        return cls({module: count for module, count in experts.items() if count}, **known)


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


def allocate(scores: Sensitivities, *, strategy: str = "votes", keep: float | None = None,
             budget_params: int | None = None, min_experts: int = 0, rank: int = 8,
             alpha: float | None = None, top_k: int = 2,
             shapes: Mapping[str, tuple[int, int]] | None = None) -> Allocation:
    """Give each module of {task: {module: sensitivity}} its number of experts.

    strategy: one of STRATEGIES. keep: the share of its group that a task votes for (default: KEEP),
    or budget_params: at most so many trainable parameters by votes. min_experts: votes that fall
    short of it are raised to it. alpha: twice the rank by default. shapes: {module: (out, in)}, by
    default `scores.shapes`. Raises ValueError for wrong arguments and for a budget that is too
    small, with the nearest possible one.
    """
    keep = KEEP if keep is None and budget_params is None else keep
    if alpha is None:
        alpha = 2 * rank if is_whole(rank, 1) else 1
    draft = Allocation({}, rank, alpha, top_k, strategy, GROUP, keep)
    sizes = (getattr(scores, "shapes", None) if shapes is None else shapes) or {}
    _check(scores, draft, budget_params, min_experts, sizes)
    modules = sorted(next(iter(scores.values())), key=natural)
    if strategy == "votes":
        found = _by_votes(draft, scores, grouped(modules), budget_params, min_experts, sizes)
    else:
        each = 1 if strategy == "lora" else max(min_experts, _kept(keep or KEEP, len(scores)))
        found = replace(draft, experts=dict.fromkeys(modules, each))
    known = all(module in sizes for module in modules)
    return replace(found, trainable_parameters=found.trainable(sizes) if known else None, experts={
        module: found.experts[module] for module in next(iter(scores.values()))
        if found.experts[module]})


def _by_votes(draft: Allocation, scores: Sensitivities, groups: Sequence[Sequence[str]],
              budget: int | None, least: int, sizes: Mapping[str, tuple[int, int]]) -> Allocation:
    """The allocation by votes with the keep of `draft`, or with the largest that fits a budget."""
    # Every keep that gives a task one more vote in a group of n: (i - 1/2) / n rounds up to i.
    keeps = {(2 * i - 1) / (2 * n) for n in map(len, groups) for i in range(1, n + 1)}
    for keep in sorted(keeps, reverse=True) if budget is not None else [draft.keep or KEEP]:
        votes = vote(scores, groups, keep)
        found = replace(draft, keep=keep, experts={
            module: max(count, least) for module, count in votes.items()})
        if budget is None or (size := found.trainable(sizes)) <= budget:
            return found
    raise ValueError(f"a budget of {budget} trainable parameters is too small: the nearest "
                     f"possible is {size}")


def _check(scores: Sensitivities, draft: Allocation, budget: int | None, least: int,
           sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise one ValueError that names everything wrong with the arguments of `allocate`."""
    modules: set[str] = set().union(*scores.values())
    unknown = sorted(modules - sizes.keys()) if budget is not None else []
    checks = [
        (draft.strategy in STRATEGIES, f"strategy {draft.strategy!r} is none of {STRATEGIES}"),
        (is_whole(least, 0) and least <= MOST,
         f"min_experts must be a whole number from 0 to {MOST}, got {least!r}"),
        (budget is None or draft.keep is None, "give only one of keep and budget_params"),
        (budget is None or draft.strategy == "votes", "budget_params is for votes alone"),
        (budget is None or is_whole(budget, 0),
         f"budget_params must be a whole number, got {budget!r}"),
        (not unknown, f"budget_params needs the shapes of modules, and lacks those of {unknown}"),
        (modules, "the scores hold no module"),
        *((modules == set(values), f"task {task!r} lacks {sorted(modules - set(values))}")
          for task, values in scores.items()),
        *((is_number(score), f"{module!r} of task {task!r} must be finite and >= 0, got {score!r}")
          for task, values in scores.items() for module, score in values.items())]
    if problems := draft.problems() + [problem for good, problem in checks if not good]:
        raise ValueError("; ".join(problems))


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
