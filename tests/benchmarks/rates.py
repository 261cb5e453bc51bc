"""Which learning rate trains best: five rates a cell, from half to twice the default's.

    python tests/benchmarks/rates.py --model SMOLLM2 --data DATA --name SmolLM2-135M
    python tests/benchmarks/rates.py                                     the built-in toy
    python tests/benchmarks/rates.py --table                             what was measured

A cell is a base, tasks, a number of lines, an allocation, a rank and a dtype. --cell changes the
first of CELLS: --cell "lines=400 rank=32". A run's figures are the mean loss of unseen lines and
exact match on them. One forward pass gives both: a greedy answer is exact if each of its tokens,
the end included, is the likeliest. After a kill, the same command runs what is missing. The record
is tests/benchmarks/results/rates.jsonl, a line a run.
"""

import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from compare_report import table
from tqdm import tqdm

from minismoe.data import toy
from minismoe.data.tasks import Example, Task, collate, encode_all, load_tasks, probe_batches
from minismoe.data.tokenizer import load_tokenizer
from minismoe.method.allocate import Allocation, allocate
from minismoe.method.experts import add_experts, linear_layers
from minismoe.method.loss import supervised_tokens
from minismoe.method.sensitivity import probe, shapes_of
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM
from minismoe.training.loop import TrainConfig, train
from minismoe.training.rate import default_lr

RECORD = Path(__file__).parent / "results" / "rates.jsonl"
TIMES = (0.5, 0.7, 1.0, 1.4, 2.0)        # the default's rate
NEAR = 1.18                              # a rate that is nearer to one of TIMES than to the next
AIM = 0.03                               # how far the default's loss may be above the best one
UNSEEN, LONGEST, BATCH = 100, 512, 32    # lines of each task; tokens of a line; lines at once
Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Cell:
    """What is the same for the five rates."""

    base: str = "toy"
    tasks: str = "trec,clinc"
    lines: int = 100                     # of each task
    strategy: str = "lora"               # or votes, with one expert everywhere: train.py's default
    rank: int = 8
    dtype: str = "bfloat16"
    epochs: int = 2
    rescaled: float = 1.0                # see `rescale`
    seed: int = 0                        # of the experts, and of the order of the lines
    warmup: str = ""                     # a share of the steps, in older runs; "": train.py's


FEW = [Cell(strategy=strategy, rank=rank, dtype=dtype)
       for strategy in ("lora", "votes") for dtype in ("bfloat16", "float32") for rank in (8, 32)]
LONG = [Cell(tasks=tasks, lines=1200, epochs=1)
        for tasks in ("trec", "clinc", "banking77", "boolq", "arc_easy")]
CELLS = [*FEW, *(replace(FEW[0], seed=seed) for seed in (1, 2)),
         *(replace(FEW[-1], tasks=tasks) for tasks in ("trec", "clinc", "banking77")),
         *(Cell(tasks=tasks) for tasks in ("trec", "boolq", "arc_easy")),
         Cell(tasks="banking77", lines=400),
         *LONG, *(replace(LONG[0], seed=seed) for seed in (1, 2)),
         *(replace(cell, rank=32) for cell in LONG[:3]),
         *(replace(cell, dtype="float32") for cell in LONG[:3]),
         replace(LONG[0], rank=32, dtype="float32"),
         *(Cell(strategy="votes", lines=600, epochs=1, rank=rank, dtype=dtype)
           for dtype in ("bfloat16", "float32") for rank in (8, 32))]
TOY_CELLS = [Cell(lines=200, strategy=strategy, rank=rank, rescaled=rescaled, seed=seed)
             for strategy, rank, rescaled, seeds in (
                 ("lora", 8, 1.0, 3), ("lora", 8, 4.0, 3), ("lora", 8, 0.25, 3),
                 ("lora", 32, 1.0, 1), ("lora", 32, 4.0, 1), ("votes", 8, 1.0, 1))
             for seed in range(seeds)]
# No rate that was tried teaches more than how often each answer occurs.
UNLEARNT = ("boolq", "arc_easy")


def rescale(model: CausalLM, factor: float) -> None:
    """Multiply the matrices that follow a norm by `factor`, and divide the norm by it: the function
    stays the same, and the default rate changes."""
    shift = float(model.config.post_norms)           # Gemma's norms multiply by 1 + w
    with torch.no_grad():
        for layer in model.model.layers:
            before_mlp = (layer.pre_feedforward_layernorm if model.config.post_norms else
                          layer.post_attention_layernorm)
            for norm, names in ((layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                                (before_mlp, ("gate_proj", "up_proj"))):
                norm.weight.add_(shift).div_(factor).sub_(shift)
                for name, linear in linear_layers(layer).items():
                    if name.rpartition(".")[2] in names:
                        linear.weight.mul_(factor)


@torch.no_grad()
def measure(model: CausalLM, examples: Sequence[Example], pad_id: int) -> tuple[float, float]:
    """Mean loss of the supervised tokens, and the share of lines whose answer is exactly right."""
    losses, right = list[float](), list[bool]()
    order = sorted(examples, key=lambda e: e.ids)
    for i in range(0, len(order), BATCH):
        ids, mask, labels = collate(order[i:i + BATCH], pad_id)
        needed = supervised_tokens(mask, labels)[0]
        rows, columns = needed.nonzero(as_tuple=True)
        hidden = model.model(ids, mask, needed=needed)[rows, columns]            # (S, D)
        logits, targets = model.lm_head(hidden).float(), labels[rows, columns + 1]
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        wrong = torch.zeros(len(ids)).index_add(0, rows, (logits.argmax(-1) != targets).float())
        right += (wrong == 0).tolist()
    return statistics.fmean(losses), statistics.fmean(right)


def examples_of(cell: Cell, data: str | None, tokenizer: Any) -> tuple[Examples, Examples]:
    """Training and unseen lines of each task."""
    tasks = load_tasks(data, cell.tasks.split(",")) if data else toy.tasks(0)
    for task in tasks:
        random.Random(0).shuffle(task.train)
    return tuple({task.name: encode_all(Task(task.name, getattr(task, split)[:count], []),
                                        tokenizer, LONGEST) for task in tasks}
                 for split, count in (("train", cell.lines), ("test", UNSEEN)))


def allocation_of(cell: Cell, model: CausalLM, known: Examples, pad_id: int) -> Allocation:
    if cell.strategy == "lora":
        return Allocation(dict.fromkeys(linear_layers(model), 1), cell.rank, 2 * cell.rank, 1)
    scores = probe(model, {name: probe_batches(lines, 16, 8, pad_id)
                           for name, lines in known.items()})
    return allocate(scores, keep=0.6, min_experts=1, rank=cell.rank, shapes=shapes_of(model))


def run(cell: Cell, times: float, folder: str | Path, data: str | None) -> dict[str, Any]:
    """Train a cell at so many times the default's rate; its line of the record."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, getattr(torch, cell.dtype))
    if cell.rescaled != 1:
        rescale(model, cell.rescaled)
    known, unseen = examples_of(cell, data, tokenizer)
    allocation = allocation_of(cell, model, known, tokenizer.pad_id)
    torch.manual_seed(cell.seed)
    add_experts(model, allocation)
    default = default_lr(model)
    cfg = TrainConfig(epochs=cell.epochs, lr=times * default, checkpoint_every=10 ** 6,
                      compile="off", seed=cell.seed)
    with tempfile.TemporaryDirectory() as work, contextlib.suppress(ArithmeticError):
        train(model, sum(known.values(), []), cfg, Path(work), tokenizer.pad_id)
    after = [measure(model, lines, tokenizer.pad_id) for lines in unseen.values()]
    loss, exact = (round(statistics.fmean(column), 4) for column in zip(*after))
    return asdict(cell) | {"default": default, "rate": cfg.lr, "loss": loss, "exact": exact}


def recorded() -> dict[Cell, list[dict[str, Any]]]:
    """The runs of each cell, in the order of their rates."""
    runs, names = defaultdict[Cell, list](list), {f.name for f in fields(Cell)}
    for line in RECORD.read_text().splitlines() if RECORD.exists() else []:
        content = json.loads(line)
        runs[Cell(**{name: content[name] for name in names & content.keys()})].append(content)
    return {cell: sorted(lines, key=lambda r: r["rate"]) for cell, lines in runs.items()}


def near(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """For each of TIMES the run whose rate is nearest to it, or None if none is near."""
    def off(run: dict[str, Any], times: float) -> float:
        return abs(math.log(run["rate"] / run["default"] / times))
    nearest = ((times, min(runs, key=lambda run: off(run, times))) for times in TIMES)
    return [run if off(run, times) < math.log(NEAR) else None for times, run in nearest]


def group(cell: Cell) -> str:
    """With 1,200 lines or more in all, either warm-up has 7 to 10 steps."""
    if cell.lines * len(cell.tasks.split(",")) >= 1200:
        return "1,200 or more"
    return f"fewer, warm-up of {cell.warmup}" if cell.warmup else "fewer"


def figures(run: dict[str, Any] | None) -> str:
    return f"{run['loss']:.3f}, {100 * run['exact']:.0f}" if run else ""


def markdown() -> str:
    """A row for each cell that has runs near three of TIMES or more, with the present warm-up."""
    rows = []
    for cell, runs in sorted(recorded().items(), key=lambda item: astuple(item[0])):
        five = near(runs)
        if five.count(None) <= 2 and "warm-up" not in group(cell):
            rows.append([
                cell.base + (f" x {cell.rescaled:g}" if cell.rescaled != 1 else ""), cell.tasks,
                cell.lines, ", ".join([
                    f"{cell.strategy}, rank {cell.rank}",
                    *["float32"] * (cell.dtype == "float32" and cell.base != "toy"),
                    *[f"seed {cell.seed}"] * (cell.seed > 0)]),
                f"{runs[0]['default']:.1e}", *map(figures, five)])
    return table(["base", "tasks", "lines", "experts", "default", *(f"{t:g}" for t in TIMES)], rows)


def complete() -> dict[tuple[str, str], list[list[dict[str, Any]]]]:
    """The five runs of each cell that learns and has one near each of TIMES, by base and group."""
    groups = defaultdict[tuple[str, str], list](list)
    for cell, runs in recorded().items():
        five = near(runs)
        if cell.tasks not in UNLEARNT and None not in five:
            groups[cell.base, group(cell)].append(five)
    return groups


def apart(base: str, of: str) -> float | None:
    """The standard deviation of the loss between seeds, pooled over cells and over TIMES but the
    last, with which runs may fail; None without several seeds."""
    losses = defaultdict[tuple[Cell, float], list[float]](list)
    for cell, runs in recorded().items():
        if cell.base == base and group(cell) == of and cell.tasks not in UNLEARNT:
            for times, run in zip(TIMES[:-1], near(runs)):
                if run:
                    losses[replace(cell, seed=0), times].append(run["loss"])
    several = [seeds for seeds in losses.values() if len(seeds) > 1]
    if not several:
        return None
    return math.sqrt(sum(statistics.variance(seeds) * (len(seeds) - 1) for seeds in several)
                     / sum(len(seeds) - 1 for seeds in several))


def by_chance(deviation: float, draws: int = 100_000) -> float:
    """How often the first of five runs that differ by noise alone is within AIM of the best one."""
    losses = torch.randn(draws, len(TIMES), generator=torch.Generator().manual_seed(0)) * deviation
    return (losses[:, 0] - losses.amin(1) <= AIM).double().mean().item()


def means() -> str:
    """A row for each group of complete cells: mean loss and exact match at each of TIMES, in how
    many cells the default's loss is within AIM of the best of TIMES, and in how many it would be if
    all five rates were equally good."""
    rows = []
    for (base, of), cells in sorted(complete().items()):
        within = sum(five[TIMES.index(1)]["loss"] - min(run["loss"] for run in five) <= AIM
                     for five in cells)
        deviation = apart(base, of)
        rows.append([base, of, len(cells), *(
            f"{statistics.fmean(r['loss'] for r in runs):.3f}, "
            f"{100 * statistics.fmean(r['exact'] for r in runs):.0f}" for runs in zip(*cells)),
            f"{100 * within / len(cells):.0f} %",
            f"{deviation:.3f}" if deviation else "",
            f"{100 * by_chance(deviation):.0f} %" if deviation else ""])
    return table(["base", "lines in all", "cells", *(f"{times:g}" for times in TIMES),
                  f"within {AIM}", "seeds", "by chance"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: the toy")
    parser.add_argument("--data", help="folder of tasks; default: the toy's")
    parser.add_argument("--name", default="toy", help="of the base, in the record")
    parser.add_argument("--cell", help="only this one: what differs from the first, NAME=VALUE ...")
    parser.add_argument("--times", help="comma list (default: 0.5,0.7,1,1.4,2)")
    parser.add_argument("--table", action="store_true", help="print the record, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(markdown() + "\n\n" + means())
        return
    cells = CELLS if args.data else TOY_CELLS
    if args.cell is not None:
        changes = dict(change.split("=") for change in args.cell.split())
        cells = [replace(Cell(), **{name: type(getattr(Cell(), name))(value)
                                    for name, value in changes.items()})]
    times = [float(t) for t in args.times.split(",")] if args.times else TIMES
    for cell in cells:
        cell = replace(cell, base=args.name, **({} if args.data else {
            "tasks": "all", "dtype": "float32"}))
        for factor in times:
            if any(abs(r["rate"] / r["default"] / factor - 1) < 0.01
                   for r in recorded().get(cell, [])):
                continue
            line = run(cell, factor, args.model or toy.FOLDER, args.data)
            with RECORD.open("a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(json.dumps(line))


if __name__ == "__main__":
    main()
