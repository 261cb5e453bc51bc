"""The probe as the scripts run it, with a bar, and the allocation that follows from it."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..data.tasks import Batch, probe_batches
from ..io.drawing import terminal_heatmap
from ..io.files import read_json
from ..io.text import clean, table
from ..method.allocate import Allocation, Unfit, allocate
from ..method.experts import linear_layers
from ..method.sensitivity import Scores, overlap, probe
from ..training import distributed
from .flags import AllocationConfig
from .inputs import Inputs

PROBE_BATCH = 16                         # samples at once
AUTO_START, AUTO_MOST = 16, 512          # samples a task of --samples auto
BLIND = ("uniform", "mola", "random", "lora")        # given a budget, these read no score


def needed(allocating: AllocationConfig) -> bool:
    """Whether the flags leave anything for the probe to decide."""
    budget = allocating.budget_experts or allocating.budget_params
    return not allocating.file and not (budget and allocating.strategy in BLIND)


def choose(allocating: AllocationConfig, scores: Scores, seed: int) -> Allocation:
    """The allocation that the flags ask for; Unfit if the scores choose one that does not fit."""
    a = allocating
    found = allocate(scores, strategy=a.strategy, group=a.group, keep=a.keep,
                     budget_experts=a.budget_experts, budget_params=a.budget_params,
                     min_experts=a.min_experts, max_experts=a.max_experts, targets=a.targets,
                     rank=a.rank, alpha=a.alpha, top_k=a.top_k, seed=seed)
    if small := [f"{m} {[*scores.shapes[m]]}" for m in found.experts
                 if found.rank_of(m) > min(scores.shapes[m])]:
        raise Unfit(f"rank {found.rank} is more than the matrix itself has: {', '.join(small)}")
    return found


def guess(allocating: AllocationConfig, sizes: Mapping[str, tuple[int, int]],
          tasks: Sequence[str], seed: int) -> Allocation:
    """What the probe may lead to, from random scores on which tasks mostly agree.

    It is no guess if the probe is not needed. `sizes` is {module: (out, in)}. Raises ValueError for
    flags that are wrong whatever the probe finds.
    """
    if allocating.file:
        found = read_allocation(allocating, allocating.file)
        if wrong := [name for name in found.experts if name not in sizes]:
            raise ValueError(f"no linear layer that can be adapted: {', '.join(wrong)}")
        return found
    rng, scores = random.Random(0), Scores(dict(sizes))
    common = {name: rng.random() for name in sizes}
    for task in tasks:
        scores[task] = {name: value + 0.1 * rng.random() for name, value in common.items()}
    return choose(allocating, scores, seed)


def known_allocation(allocating: AllocationConfig, inputs: Inputs, seed: int,
                     kept: Path | None = None) -> Allocation | None:
    """The allocation in the file `kept`, or that the flags alone decide; None if neither is there.

    Raises ValueError as `guess` does.
    """
    if kept and kept.exists():
        return read_allocation(allocating, kept)
    try:
        found = guess(allocating, shapes(inputs.model), list(inputs.encoded), seed)
    except Unfit:                        # with other scores it may fit
        if not needed(allocating):
            raise
        return None
    return None if needed(allocating) else found


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of the linear layers that may get experts."""
    return {name: (m.weight.shape[0], m.weight.shape[1])
            for name, m in linear_layers(model).items()}


def read_allocation(allocating: AllocationConfig, file: str | Path) -> Allocation:
    """An allocation file; a bare mapping takes rank, alpha and top-k from the flags."""
    value = read_json(file)
    if isinstance(value, dict) and "format" not in value:
        value = {"format": "minismoe.allocation/1", "experts": value, "rank": allocating.rank,
                 "alpha": allocating.alpha or 2 * allocating.rank, "top_k": allocating.top_k}
    elif isinstance(value, dict) and file == allocating.file:
        for name in ("rank", "alpha", "top_k"):
            asked = getattr(allocating, name)
            if asked not in (getattr(AllocationConfig, name), value.get(name)):
                print(f"{clean(file)} says {name} {value.get(name)!r}, which is taken, and not "
                      f"{asked}", file=sys.stderr)
    try:
        return Allocation.from_json(value)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def measure(allocating: AllocationConfig, inputs: Inputs, seed: int, size: int = PROBE_BATCH,
            ) -> Scores:
    """Probe all tasks, with a bar, and print how far the result can be trusted.

    Each process computes `size` samples at once. With --samples auto the samples of each task are
    doubled until the split-half overlap of all tasks reaches --overlap.
    """
    auto = allocating.samples == "auto"
    wanted = AUTO_START if auto else int(allocating.samples)
    pools = {name: random.Random(seed).sample(e.examples, len(e.examples))
             for name, e in inputs.encoded.items()}
    most = min(AUTO_MOST if auto else wanted, max(map(len, pools.values())))
    scores, done = Scores(shapes(inputs.model)), 0
    pad_id, device = inputs.tokenizer.pad_id, inputs.model.lm_head.weight.device

    def norms(item: tuple[str, Batch]) -> list[list[float]]:
        return probe(inputs.model, {item[0]: [item[1]]}).samples[item[0]].tolist()

    with tqdm(desc="probe", unit="sample", total=0, disable=distributed.rank() > 0) as bar:
        while True:
            batches = [(name, batch) for name, pool in pools.items() for batch in
                       probe_batches(pool, wanted - done, size, pad_id, device, done)]
            bar.total += sum(len(batch[0]) for _, batch in batches)
            for (name, _), found in zip(batches, distributed.spread(norms, batches)):
                scores.add(name, torch.tensor(found, dtype=torch.float64))
                bar.update(len(found))
            agreement, done = trust(allocating, scores), wanted
            if not auto or lowest(agreement) >= allocating.overlap or done >= most:
                break
            wanted = min(2 * done, most)
    print_agreement(allocating, scores, agreement, done)
    return scores


def trust(allocating: AllocationConfig, scores: Scores) -> dict[str, float]:
    """Split-half overlap of the matrices that each task would vote for."""
    names = list(scores.shapes)

    def select(one_task: dict[str, float]) -> set[str]:
        return set(allocate({"": one_task}, group=allocating.group, keep=allocating.keep or 0.6,
                            targets=allocating.targets).experts)

    return {task: overlap(samples, names, select) for task, samples in scores.samples.items()}


def lowest(agreement: Mapping[str, float]) -> float:
    """The lowest overlap; a task of a single sample has none. 1 if no task has one."""
    return min((a for a in agreement.values() if not math.isnan(a)), default=1.0)


def print_agreement(allocating: AllocationConfig, scores: Scores, agreement: Mapping[str, float],
                    done: int) -> None:
    """Print how many samples of each task were probed, and the overlap of their halves."""
    rows = [[clean(t), len(scores.samples[t]), "-" if math.isnan(a) else f"{a:.2f}"]
            for t, a in agreement.items()]
    print(table(["task", "samples probed", "split-half overlap"], rows))
    if allocating.samples == "auto":
        least = lowest(agreement)
        print(f"--samples auto stopped at {done} a task: the lowest overlap is {least:.2f}, "
              f"{'at' if least >= allocating.overlap else 'below'} the target of "
              f"{allocating.overlap:.2f}")


def allocation_heatmap(model: nn.Module, allocation: Allocation) -> str:
    """Experts of every linear layer but the head, or their ranks if these differ."""
    what, counts = counted(allocation)
    return terminal_heatmap(f"{what} a matrix", {name: counts.get(name, 0)
                                                 for name in linear_layers(model)}, digits=True)


def counted(allocation: Allocation) -> tuple[str, dict[str, int]]:
    """What an allocation gives to each module: "experts", or "ranks" if these differ."""
    return ("ranks", allocation.ranks) if allocation.ranks else ("experts", allocation.experts)
