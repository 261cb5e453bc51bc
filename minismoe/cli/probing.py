"""The probe as the scripts run it, with a bar and kept norms, and the allocation that follows."""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.tasks import Batch, probe_batches
from ..io.drawing import terminal_heatmap
from ..io.files import read_json
from ..io.text import clean, table
from ..method.allocate import Allocation, Unfit, allocate
from ..method.experts import linear_layers
from ..method.sensitivity import Scores, overlap, probe, shapes_of
from ..model.decoder import CausalLM
from ..training import distributed
from ..training.resume import Norms
from .inputs import Inputs

PROBE_BATCH = 16
AUTO_START, AUTO_MOST = 16, 512          # samples a task of --samples auto
KEEP_NORMS = 2.0                         # seconds after which a probe saves what it has measured
BLIND = ("uniform", "mola", "random", "lora")        # given a budget, these read no score


def needed(args: argparse.Namespace) -> bool:
    """Whether the flags leave anything for the probe to decide."""
    budget = args.budget_experts or args.budget_params
    return not args.allocation and not (budget and args.strategy in BLIND)


def choose(args: argparse.Namespace, scores: Scores) -> Allocation:
    """The allocation that the flags ask for; Unfit where it does not fit what the scores choose."""
    found = allocate(scores, strategy=args.strategy, group=args.group, keep=args.keep,
                     budget_experts=args.budget_experts, budget_params=args.budget_params,
                     min_experts=args.min_experts, max_experts=args.max_experts,
                     targets=args.targets, rank=args.rank, alpha=args.alpha, top_k=args.top_k,
                     seed=args.seed)
    if small := [f"{m} {[*scores.shapes[m]]}" for m in found.experts
                 if found.rank_of(m) > min(scores.shapes[m])]:
        raise Unfit(f"rank {found.rank} is more than the matrix itself has: {', '.join(small)}")
    return found


def guess(args: argparse.Namespace, sizes: dict[str, tuple[int, int]], tasks: Sequence[str],
          ) -> Allocation:
    """The allocation of the flags as it might come out: tasks agree in most of their votes."""
    if getattr(args, "allocation", None):
        found = read_allocation(args, args.allocation)
        if wrong := [name for name in found.experts if name not in sizes]:
            raise ValueError(f"no linear layer that can be adapted: {', '.join(wrong)}")
        return found
    rng, scores = random.Random(0), Scores(sizes)
    common = {name: rng.random() for name in sizes}
    for task in tasks:
        scores[task] = {name: value + 0.1 * rng.random() for name, value in common.items()}
    return choose(args, scores)


def foreseen(args: argparse.Namespace, inputs: Inputs) -> Allocation:
    """The same for a model that is loaded; where the probe is not needed, just what comes out."""
    return guess(args, shapes_of(inputs.model), list(inputs.encoded))


def rehearse(args: argparse.Namespace, inputs: Inputs) -> None:
    """ValueError for allocation flags that are wrong whatever the probe will find."""
    with suppress(Unfit):
        foreseen(args, inputs)


def read_allocation(args: argparse.Namespace, file: str | Path) -> Allocation:
    """An allocation file; a bare mapping takes rank, alpha and top-k from the flags."""
    value = read_json(file)
    if isinstance(value, dict) and "format" not in value:
        value = {"format": "minismoe.allocation/1", "experts": value, "rank": args.rank,
                 "alpha": args.alpha or 2 * args.rank, "top_k": args.top_k}
    elif isinstance(value, dict) and file == getattr(args, "allocation", None):
        for name, default in (("rank", 8), ("alpha", None), ("top_k", 2)):
            if (asked := getattr(args, name)) not in (default, value.get(name)):
                print(f"{clean(file)} says {name} {value.get(name)!r}, which is taken, and not "
                      f"{asked}", file=sys.stderr)
    try:
        return Allocation.from_json(value)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def measure(args: argparse.Namespace, inputs: Inputs, run: Path) -> Scores:
    """Probe all tasks, with a bar, and print how far the result can be trusted.

    What is measured is kept in run/checkpoints now and then: a later process begins where an
    earlier one, of the same model, data and samples, ended.
    """
    auto = args.samples == "auto"
    wanted, size = AUTO_START if auto else args.samples, probe_batch(args)
    pools = {name: random.Random(args.seed).sample(e.examples, len(e.examples))
             for name, e in inputs.encoded.items()}
    most = min(AUTO_MOST if auto else wanted, max(map(len, pools.values())))
    with distributed.one_first():        # which may remove what another probe left
        kept = Norms(run, inputs.identity | {
            f"--{flag}": getattr(args, flag) for flag in ("samples", "seed", "dtype", "base_bits")})
    scores, done = Scores(shapes_of(inputs.model)), 0

    def norms(item: tuple[str, Batch]) -> list[list[float]]:
        return probe(inputs.model, {item[0]: [item[1]]}).samples[item[0]].tolist()

    with tqdm(desc="probe", unit="sample", total=0, disable=distributed.rank() > 0) as bar:
        while True:
            bar.total += sum(len(p[done:wanted]) for p in pools.values())
            batches: list[tuple[str, Batch]] = []
            for name, pool in pools.items():
                if len(pool) > done:
                    known = kept.rows(name, done, wanted)
                    if len(known) < min(wanted, len(pool)) - done:       # whole batches of ours
                        known = known[:len(known) // size * size]
                    if len(known):
                        scores.add(name, known)
                        bar.update(len(known))
                    missing = list(probe_batches(
                        pool, wanted - done, size, inputs.tokenizer.pad_id, args.device,
                        done))[-(-len(known) // size):]
                    batches += [(name, batch) for batch in missing]
            try:
                for (name, batch), found in zip(batches, distributed.spread(norms, batches)):
                    scores.add(name, torch.tensor(found, dtype=torch.float64))
                    bar.update(len(batch[0]))
                    distributed.once(kept.save, scores.samples, KEEP_NORMS)
            finally:
                distributed.once(kept.save, scores.samples)
            agreement, done = trust(args, scores), wanted
            if not auto or lowest(agreement) >= args.overlap or done >= most:
                break
            wanted = min(2 * done, most)
    say_agreement(args, scores, agreement, done)
    return scores


def say_agreement(args: argparse.Namespace, scores: Scores, agreement: Mapping[str, float],
                  done: int) -> None:
    """Print how many samples of each task were probed, and the overlap of their halves."""
    rows = [[clean(t), len(scores.samples[t]), "-" if math.isnan(a) else f"{a:.2f}"]
            for t, a in agreement.items()]
    print(table(["task", "samples probed", "split-half overlap"], rows))
    if args.samples == "auto":
        least = lowest(agreement)
        print(f"--samples auto stopped at {done} a task: the lowest overlap is {least:.2f}, "
              f"{'at' if least >= args.overlap else 'below'} the target of {args.overlap:.2f}")


def lowest(agreement: Mapping[str, float]) -> float:
    """The lowest overlap; tasks of a single sample have none. 1 where none has one."""
    return min((a for a in agreement.values() if not math.isnan(a)), default=1.0)


def probe_batch(args: argparse.Namespace) -> int:
    """Samples probed at once by each process: fewer where it trains on fewer at once."""
    micro = getattr(args, "micro_batch_size", None)
    return min(PROBE_BATCH, distributed.share(micro) if micro else PROBE_BATCH)


def trust(args: argparse.Namespace, scores: Scores) -> dict[str, float]:
    """Split-half overlap of the matrices that each task would vote for."""
    names = list(scores.shapes)

    def select(one_task: dict[str, float]) -> set[str]:
        return set(allocate({"": one_task}, group=args.group, keep=args.keep or 0.6,
                            targets=args.targets).experts)

    return {task: overlap(samples, names, select) for task, samples in scores.samples.items()}


def allocation_heatmap(model: CausalLM, allocation: Allocation) -> str:
    """Experts of every linear layer but the head, or their ranks where these differ."""
    what, counts = (("rank", allocation.ranks) if allocation.ranks else
                    ("experts", allocation.experts))
    return terminal_heatmap(f"{what} a matrix", {name: counts.get(name, 0)
                                                 for name in linear_layers(model)}, digits=True)
