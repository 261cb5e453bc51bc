"""train.py --plan and --micro-batch-size auto: what a run takes and what fits, before any work.

Where several processes share the work, memory is that of each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.tasks import Example
from ..io.text import table
from ..method.experts import add_experts
from ..method.loss import IGNORE
from ..model.checkpoint import load_model, read_config
from ..model.decoder import CausalLM
from ..training import distributed
from ..training.loop import TrainConfig, schedule, train_step
from ..training.memory import (
    MIB,
    Setup,
    Shape,
    activations,
    advice,
    available,
    fit_micro_batch,
    fixed,
    largest,
    runtime_bytes,
    shapes,
    trainable,
    weight_bytes,
)
from ..training.resume import KEPT
from . import inputs as cli
from . import probing
from .flags import AllocationConfig, InputConfig

STEPS, SECONDS = 4, 30           # measured steps, the first to warm up; and how long they may take


@dataclass
class Prospect:
    """What is known of a run before any work."""

    folder: Path                 # of the base
    setup: Setup
    batches: list[list[Example]]
    runtime: int                 # bytes


def look_ahead(args: argparse.Namespace) -> Prospect:
    """Read config.json and the data, and wake the libraries; no weights are loaded."""
    folder, config = (f := cli.model_folder(args)), read_config(f)[0]
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    names, examples = args.tasks.split(",") if args.tasks else [""], []
    if args.data or args.model is None:
        _, _, encoded = cli.read_data(args, folder)
        names, examples = list(encoded), [e for x in encoded.values() for e in x.examples]
    cfg = TrainConfig(epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
    setup = Setup(config, probing.guess(args, shapes(config), names, args.seed), dtype, device.type,
                  args.base_bits, args.recompute, distributed.world() if args.shard else 1)
    return Prospect(folder, setup, schedule(examples or imagined(
        args, cli.context(args, folder)), cfg),
                    runtime_bytes(args.device, dtype))


def imagined(args: argparse.Namespace, length: int) -> list[Example]:
    """Without data: a batch of examples of so many tokens."""
    ids = [[i, *range(length - 1)] for i in range(args.batch_size)]
    supervised = max(1, length // 10)
    return [Example("", row, [IGNORE] * (len(row) - supervised) + row[-supervised:]) for row in ids]


def merged(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig,
           ) -> argparse.Namespace:
    """The fields of all three, which the functions of this file read."""
    return argparse.Namespace(**{**vars(training), **vars(allocating), **vars(inputs)})


def fitting_micro_batch(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig,
                        ) -> int:
    """The largest micro-batch that fits --memory or the device."""
    args = merged(inputs, allocating, training)
    return largest_fitting(args, look_ahead(args))


def bound_cuda_memory(device: torch.device, size: int) -> None:
    """Let torch take at most `size` bytes; training halves a micro-batch that does not fit."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device.index)


def largest_fitting(args: argparse.Namespace, p: Prospect) -> int:
    """The largest micro-batch, of all processes together."""
    most = min(distributed.gather(_largest_fitting(args, p)))
    return min(args.batch_size, most * distributed.world())


def _largest_fitting(args: argparse.Namespace, p: Prospect) -> int:
    """That of this process within 0.9 of the room: allocators keep some of what comes back."""
    room = args.memory or available(args.device)
    if room is None:
        raise ValueError(f"how much memory {args.device} has is not known: give --memory")
    if p.runtime >= 0.9 * room:
        need = p.runtime + sum(fixed(p.setup).values()) + largest(p.setup, p.batches, 1)
        raise ValueError(f"training one example at a time needs {need / MIB:,.0f} MiB, of which "
                         f"Python and torch take {p.runtime / MIB:,.0f}, and there are "
                         f"{room / MIB:,.0f}: give a larger --memory")
    room = int(0.9 * room) - p.runtime
    most = fit_micro_batch(p.setup, p.batches, room)
    while most > 1 and probing.needed(args) and probing_bytes(p, most) > room:
        most = min(most, probing.PROBE_BATCH) - 1
    if probing.needed(args) and (need := probing_bytes(p, most)) > room:
        print(f"the probe may take {(need - room) / MIB:,.0f} MiB more than there are: "
              "--allocation FILE leaves it out", file=sys.stderr)
    return most


def probing_bytes(p: Prospect, micro: int) -> int:
    """Bytes of the probe where so many examples are trained at once. It computes each whole, and
    keeps all; up to 1.3 times what training would keep of that was seen."""
    longest = max(len(e.ids) for batch in p.batches for e in batch)
    plain = replace(p.setup, recompute=False, allocation=replace(p.setup.allocation, experts={}))
    count = min(probing.PROBE_BATCH, micro)
    rows = count * longest
    return weight_bytes(plain) + int(1.3 * activations(plain, Shape(count, longest, rows, rows)))


def show_plan(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig, auto: bool,
              ) -> None:
    """Print parameters, memory by part, time and disk of the run that the flags ask for.

    A folder that holds config.json alone will do: what is measured, the time, is left out then.
    """
    args = merged(inputs, allocating, training)
    p, micro = look_ahead(args), args.micro_batch_size
    if auto:
        micro = largest_fitting(args, p)
    mine = distributed.share(micro)
    parts = {"runtime": p.runtime, **fixed(p.setup),
             "activations": largest(p.setup, p.batches, mine)}
    peak, room = sum(parts.values()), args.memory or available(args.device)
    a, longest = p.setup.allocation, max(len(e.ids) for batch in p.batches for e in batch)
    print(f"{trainable(p.setup):,} trainable parameters; {a}"
          + (" (on which, the probe decides)" if probing.needed(args) else ""))
    print(table(["memory", "MiB"], [[part, f"{size / MIB:,.1f}"] for part, size in (
        *parts.items(), ("peak", peak))]))
    print(f"{args.dtype}, {micro} of {args.batch_size} examples at a time, of up to {longest} "
          f"tokens; there are {f'{room / MIB:,.0f} MiB' if room else 'MiB that nobody knows'}")
    before = p.runtime + probing_bytes(p, mine) if probing.needed(args) else 0
    if before > peak:
        print(f"the probe before it takes up to {before / MIB:,.0f} MiB")
    fits = all(distributed.gather(room is None or max(peak, before) <= room))
    if not fits:
        print("too much: " + (
            "Python and torch alone take more" if room and p.runtime >= room else
            advice(p.setup, p.batches, mine) if room is None or peak > room else
            "the probe alone; --allocation FILE leaves it out, --max-length shortens it"))
    if args.data or args.model is None:
        print(duration(args, p, micro, fits))
        print(f"disk: {disk(p.setup, len(p.batches)) / MIB:,.0f} MiB for the adapter, "
              f"{KEPT + 1} checkpoints (one while it is written) and metrics")


def duration(args: argparse.Namespace, p: Prospect, micro: int, fits: bool) -> str:
    """How long training will take, from a few measured steps."""
    tokens = sum(len(e.ids) for batch in p.batches for e in batch)
    text = f"training: {len(p.batches)} steps, {tokens:,} tokens"
    if not fits or args.shard or not any(p.folder.glob("*.safetensors")):
        return f"{text}; the time is not known, as no step can be measured here"
    model = load_model(p.folder, p.setup.dtype, args.device, p.setup.base_bits)
    add_experts(model, p.setup.allocation)
    rate = tokens_per_second(model, p.batches, micro, args.recompute)
    beside = "the probe and two evaluations" if probing.needed(args) else "two evaluations"
    return (f"{text}, {rate:,.0f} tokens/s measured: about {tokens / rate / 60:,.1f} minutes, and "
            f"beside them {beside}")


def tokens_per_second(model: CausalLM, batches: Sequence[Sequence[Example]], micro: int,
                      recompute: bool) -> float:
    """Of a few steps, spread over the schedule."""
    model.model.recompute = recompute
    cfg = TrainConfig(micro_batch_size=micro)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    begun, seen, seconds = time.perf_counter(), 0, 0.0
    for n, batch in enumerate(batches[::-(-len(batches) // STEPS)]):
        start = time.perf_counter()
        line = train_step(model, batch, cfg, 0, 1)       # its loss, read back, waits for the device
        optimizer.step()
        optimizer.zero_grad()
        if n == 0 and len(batches) > 1:
            continue
        seen, seconds = seen + line["tokens"], seconds + time.perf_counter() - start
        if distributed.anywhere(time.perf_counter() - begun > SECONDS):      # all end together
            break
    return seen / seconds


def disk(setup: Setup, steps: int) -> int:
    """Bytes of a run's folder: parameters alone in the adapter, with two moments in checkpoints."""
    line = 300 + 30 * len(setup.allocation.experts) // 20        # of metrics.jsonl, on the average
    return 4 * trainable(setup) * (1 + 3 * (KEPT + 1)) + steps * line
