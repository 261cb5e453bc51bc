"""The cells of compare.py: their names, seeds, rates, data and allocations."""

import argparse
import json
import math
import random
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm import tqdm

from minismoe.data import toy
from minismoe.data.tasks import Task, load_tasks
from minismoe.io.files import read_json
from minismoe.io.hub import resolve
from minismoe.method.allocate import Allocation, allocate

STRATEGIES: dict[str, dict[str, Any]] = {             # arguments of allocate
    "lora": {"strategy": "lora"}, "uniform": {"strategy": "uniform"},
    "votes": {"strategy": "votes"},
    "votes-floor": {"strategy": "votes", "min_experts": 1},
}
PAPER = ("lora", "uniform", "votes", "votes-floor")
SEARCH = 1000                         # first seed of the search; final seeds are below
TEST_SEEDS = 10                       # validation avoids the test lines of so many final seeds of
                                      # the default (avoiding those of 50 would leave no fact)
VALIDATION, TOLERANCE = 0.2, 0.01
# Words of the default's questions, which say nothing about the case that they ask for.
FILLER = {*re.findall("[a-z]+", str([*toy.TASKS.values()]).lower())}
FIXED = ("model", "data", "tasks", "limit_train", "limit_test", "epochs", "rank", "top_k",
         "samples", "first_seed", "flags")          # the same for all cells of a folder


@dataclass(frozen=True)
class Cell:
    """One run: a probe, or a training of the search or of the final comparison."""

    phase: str                        # probe, search, final
    seed: int
    strategy: str = ""
    budget: str = ""                  # experts a matrix of the uniform mixture, or "paper"
    lr: float | None = None           # None: not chosen yet

    @property
    def name(self) -> str:
        """Name of the cell's folder: all of its settings."""
        rate = "?" if self.lr is None else f"{self.lr:g}"
        budget = self.budget if self.budget == "paper" else f"x{self.budget}"
        parts = [self.strategy, budget, f"lr{rate}"] if self.strategy else []
        return "-".join([self.phase, *parts, f"seed{self.seed}"])


def search_cells(args: argparse.Namespace) -> list[Cell]:
    return [cell for seed in range(SEARCH, SEARCH + args.search_seeds) for cell in (
        Cell("probe", seed), *(Cell("search", seed, strategy, budget, lr)
        for budget, strategy in rows(args) for lr in args.lrs))]


def final_cells(args: argparse.Namespace) -> list[Cell]:
    """Ordered by seed, so that the grid is a fair comparison before it is complete."""
    rates = {row: chosen_rate(args, *row) for row in rows(args)}
    return [cell for seed in range(args.first_seed, args.first_seed + args.seeds) for cell in (
        Cell("probe", seed), *(Cell("final", seed, strategy, budget, lr)
        for (budget, strategy), lr in rates.items()))]


def all_cells(args: argparse.Namespace) -> Iterator[Cell]:
    """The search, then the final cells. Their rates are looked up when the search is over."""
    yield from search_cells(args)
    yield from final_cells(args)


def rows(args: argparse.Namespace) -> list[tuple[str, str]]:
    """All (budget, strategy) pairs to compare."""
    return [(b, s) for b in args.budgets for s in args.strategies if b != "paper" or s in PAPER]


def chosen_rate(args: argparse.Namespace, budget: str, strategy: str) -> float | None:
    """The rate with the best validation, over all seeds; None before its search is finished."""
    scores = dict.fromkeys(args.lrs, 0.0)
    for cell in search_cells(args):
        if (cell.phase, cell.strategy, cell.budget) != ("search", strategy, budget):
            continue
        folder = args.out / cell.name
        if not finished(folder):
            return None
        result = folder / "results.json"               # absent if the training diverged
        scores[cell.lr] += read_json(result)["mean"]["after"] if result.exists() else -1.0
    return max(args.lrs, key=lambda lr: (scores[lr], -lr))


def finished(folder: Path) -> bool:
    return any((folder / f"{n}.json").exists() for n in ("results", "sensitivity", "diverged"))


def seconds_of(folder: Path) -> float | None:
    file = folder / "cell.json"
    return float(read_json(file)["seconds"]) if file.exists() else None


def tasks(args: argparse.Namespace, seed: int) -> list[Task]:
    """The tasks. Lines of the default depend on the seed, lines of --data do not."""
    names = args.tasks.split(",") if args.tasks else ()
    found = load_tasks(args.data, names) if args.model else [
        task for task in toy.tasks(seed) if not names or task.name in names]
    if missing := set(names) - {task.name for task in found}:
        raise ValueError(f"no task {', '.join(sorted(missing))}; there are {', '.join(toy.TASKS)}")
    for task in found:
        task.train, task.test = task.train[:args.limit_train], task.test[:args.limit_test]
    return found


def case(messages: Sequence[Mapping[str, str]]) -> frozenset[str]:
    """The words of a question without filler, since the default asks one thing in several ways."""
    text = " ".join(m["content"] for m in messages[:-1]).lower()
    return frozenset(re.findall(r"\w+", text)) - FILLER


def split(task: Task, taken: set[frozenset[str]]) -> Task:
    """A task for the search, made of the training lines of `task`.

    No case is in both of its parts, and no case `taken` by a final test set is in its test part.
    """
    groups: dict[frozenset[str], list] = {}
    for messages in task.train:
        groups.setdefault(case(messages), []).append(messages)
    order = list(groups.values())
    random.Random(SEARCH).shuffle(order)
    found, want = Task(task.name, [], []), math.ceil(VALIDATION * len(task.train))
    for lines in order:
        free = len(found.test) < want and case(lines[0]) not in taken
        (found.test if free else found.train).extend(lines)
    if not (found.train and found.test):
        raise ValueError(f"{task.name} has too few training lines to search a learning rate on")
    return found


def data_folder(args: argparse.Namespace, seed: int) -> Path:
    """The data folder of a seed's cells, written if absent; it appears whole or not at all."""
    search = seed >= SEARCH
    name = "search" if search else "full"
    if not args.model and seed != SEARCH:
        name = f"search{seed}" if search else f"seed{seed}"
    folder: Path = args.out / "data" / name
    if folder.is_dir():
        return folder
    found = tasks(args, seed)
    if search:
        first = args.first_seed
        tests = [t for s in range(first, first + (1 if args.model else TEST_SEEDS))
                 for t in tasks(args, s)]
        found = [split(task, {case(m) for t in tests if t.name == task.name for m in t.test})
                 for task in found]
    shutil.rmtree(temporary := folder.with_name(name + ".tmp"), ignore_errors=True)
    for task in found:
        (temporary / task.name).mkdir(parents=True)
        for part in ("train", "valid", "test"):          # none of the search is held out
            (temporary / task.name / f"{part}.jsonl").write_text("".join(
                json.dumps({"messages": m}) + "\n" for m in getattr(task, part)), encoding="utf-8")
    temporary.rename(folder)
    return folder


def model_folder(args: argparse.Namespace) -> Path:
    return resolve(args.model) if args.model else toy.FOLDER


def probed(args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """{task: {module: sensitivity}} of a seed's probe."""
    file = args.out / Cell("probe", seed).name / "sensitivity.json"
    return {task: value["scores"] for task, value in read_json(file)["tasks"].items()}


def shapes_of(args: argparse.Namespace, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{module: (out, in)}, from the headers of the weight files."""
    shapes: dict[str, tuple[int, int]] = {}
    for file in model_folder(args).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = set(weights.keys())
            shapes |= {m: tuple(weights.get_slice(f"{m}.weight").get_shape())
                       for m in modules if f"{m}.weight" in names}
    return {m: shapes[m] for m in modules}


def allocation_of(args: argparse.Namespace, cell: Cell) -> Allocation:
    """A cell's allocation, from the probe of its seed."""
    scores = probed(args, cell.seed)
    shapes = shapes_of(args, list(next(iter(scores.values()))))
    settings = {**STRATEGIES[cell.strategy], "rank": args.rank, "top_k": args.top_k,
                "shapes": shapes}
    if cell.budget != "paper" or cell.strategy == "lora":     # LoRA is as large as the control
        experts = len(scores) if cell.budget == "paper" else int(cell.budget)
        target = budget_parameters(shapes, experts, args.rank)
        found = fit(scores, target, settings)
        spent = found.trainable_parameters or 0
        if abs(spent / target - 1) > TOLERANCE:
            tqdm.write(f"{cell.name}: {spent:,} parameters are more than 1 % off the budget of "
                       f"{target:,}")
        return found
    spend: dict[str, float] = {"keep": 0.6}
    if cell.strategy == "uniform":       # as many experts a matrix as there are tasks
        spend = {"budget_params": budget_parameters(shapes, len(scores), args.rank)}
    return allocate(scores, **settings, **spend)


def budget_parameters(shapes: Mapping[str, tuple[int, int]], experts: int, rank: int) -> int:
    return Allocation(dict.fromkeys(shapes, experts), rank).trainable(shapes)


def fit(scores: Mapping[str, Mapping[str, float]], target: int, settings: dict[str, Any],
        ) -> Allocation:
    """A rule's allocation with `target` parameters, within 1 % if whole experts allow it.

    The steps of a rule can be coarser than 1 %: one step of votes adds several matrices. So the
    last step is taken in part, the most sensitive matrices first. If the result is still more than
    1 % off, single experts are added or removed. LoRA takes the nearest whole rank.
    """
    shapes = settings["shapes"]

    def size(counts: Mapping[str, int]) -> int:
        return Allocation(dict(counts), settings["rank"]).trainable(shapes)

    def gap(counts: Mapping[str, int]) -> int:
        return abs(size(counts) - target)

    def of_budget(i: int) -> Allocation:
        return allocate(scores, budget_params=round(target * (1 + i / 200)), **settings)

    def larger(i: int) -> bool:
        found = of_budget(i)
        return (found.experts, found.rank) != (under.experts, under.rank)

    under = of_budget(0)
    over = of_budget(bisect_left(range(200), True, key=larger))
    if settings["strategy"] in ("lora", "uniform"):
        return min(under, over, key=lambda a: abs((a.trainable_parameters or 0) - target))
    counts = {m: under.experts.get(m, 0) for m in shapes}
    weights = dict.fromkeys(shapes, 0.0)     # parts of a task's sensitivity, summed over tasks
    for of_task in scores.values():
        total = math.fsum(of_task.values())
        weights = {m: weights[m] + of_task[m] / total for m in shapes}
    for m in sorted(shapes, key=weights.__getitem__, reverse=True):
        while (counts[m] < over.experts.get(m, 0)
               and size(more := {**counts, m: counts[m] + 1}) <= target):
            counts = more
    low, high = settings.get("min_experts", 0), max(len(scores), *counts.values())
    while gap(counts) > TOLERANCE * target:
        best = min(({**counts, m: n + s} for m, n in counts.items() for s in (1, -1)
                    if low <= n + s <= high), key=gap)
        if gap(best) >= gap(counts):
            break
        counts = best
    return replace(under, keep=None, experts={m: n for m, n in counts.items() if n},
                   trainable_parameters=size(counts))
