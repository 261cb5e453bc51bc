"""train.py --plan and --micro-batch-size auto: what a run takes and what fits, before it starts.

If several processes share the work, memory is that of each.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.tasks import Example
from ..io.process import resident
from ..io.text import table
from ..method.experts import add_experts
from ..method.loss import IGNORE
from ..model.checkpoint import load_model, read_config
from ..training import distributed
from ..training.loop import TrainConfig, schedule, train_step
from ..training.memory import MIB, Setup, available, meta_model
from ..training.resume import KEPT
from . import probing
from .flags import AllocationConfig, InputConfig
from .inputs import context, model_folder, read_data

STEPS, SECONDS = 4, 30           # measured steps, the first to warm up; and how long they may take
ONEDNN = 64 * MIB                # what it compiles for bfloat16 on a CPU: see process.bound_memory


@dataclass
class Prospect:
    """What is known of a run before it starts."""

    folder: Path                 # of the base
    setup: Setup
    batches: list[list[Example]]
    longest: int                 # tokens
    probes: bool
    runtime: int                 # bytes of Python and the libraries
    room: int | None             # bytes that may be used; None: unknown

    def training(self, micro: int) -> int:
        """Bytes at the peak of training."""
        return self.runtime + self.setup.total(self.batches, micro)

    def probe(self, micro: int) -> int:
        """Bytes at the peak of the probe, whose rows share no tokens; 0 if it is not needed."""
        if not self.probes:
            return 0
        rows = [Example("", [i] * self.longest, [i] * self.longest)
                for i in range(min(probing.PROBE_BATCH, micro))]
        setup = replace(self.setup, probe=True, recompute=False, allocation=replace(
            self.setup.allocation, experts={}, ranks={}))
        return self.runtime + setup.total([rows], len(rows))


def look_ahead(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig,
               ) -> Prospect:
    """Read config.json and the data, and measure activations; no weights are loaded."""
    folder = model_folder(inputs)
    config, device = read_config(folder)[0], torch.device(inputs.device)
    names, examples = inputs.tasks.split(",") if inputs.tasks else [""], []
    if inputs.data or inputs.model is None:
        encoded = read_data(inputs, folder)[2]
        names, examples = list(encoded), [e for x in encoded.values() for e in x.examples]
    if not examples:                         # a batch of examples of --max-length
        length = context(inputs, folder)
        answer = max(1, length // 10)
        ids = [[i, *range(length - 1)] for i in range(training.batch_size)]
        examples = [Example("", row, [IGNORE] * (length - answer) + row[-answer:]) for row in ids]
    sizes = probing.shapes(meta_model(config))
    setup = Setup(config, probing.guess(allocating, sizes, names, inputs.seed),
                  getattr(torch, inputs.dtype), inputs.device, inputs.base_bits, training.recompute,
                  distributed.world() if inputs.shard else 1)
    setup.activations([Example("", [1] * 4, [1] * 4)] * 2)      # the libraries load what they need
    runtime = 0 if device.type == "cuda" else resident()     # a GPU's is not in what it has free
    if device.type == "cpu" and setup.dtype.itemsize < 4:
        runtime += ONEDNN
    return Prospect(folder, setup, schedule(examples, training),
                    max(len(e.ids) for e in examples), probing.needed(allocating), runtime,
                    training.memory or available(inputs.device))


def fitting_micro_batch(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig,
                        ) -> int:
    """The largest micro-batch, of all processes together, that fits --memory or the device.

    Raises ValueError, saying which flags help by how much, if one example is too many.
    """
    return fitting(look_ahead(inputs, allocating, training), training.batch_size)


def fitting(p: Prospect, batch_size: int) -> int:
    """The same, of what is known already."""
    if p.room is None:
        raise ValueError(f"cannot tell how much memory {p.setup.device} has: give --memory")
    room, sizes = int(0.9 * p.room), range(1, batch_size + 1)    # allocators keep freed memory
    micro = bisect_right(sizes, room, key=p.training)
    if micro == 0:
        need = p.training(1)
        raise ValueError(
            f"training one example at a time needs {need / MIB:,.0f} MiB, of which Python and "
            f"torch take {p.runtime / MIB:,.0f}, and {room / MIB:,.0f} MiB may be used: "
            + (p.setup.advice(p.batches, 1) or "give a larger --memory"))
    if p.probe(micro) > room:
        micro = max(1, bisect_right(sizes[:probing.PROBE_BATCH], room, key=p.probe))
    if (more := p.probe(micro) - room) > 0:
        print(f"the probe may take {more / MIB:,.0f} MiB more than there are: "
              "--allocation FILE leaves it out", file=sys.stderr)
    return min(batch_size, min(distributed.gather(micro)) * distributed.world())


def bound_cuda_memory(device: torch.device, size: int) -> None:
    """Let torch take at most `size` bytes; training halves a micro-batch that does not fit."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device.index)


def show_plan(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig, auto: bool,
              ) -> None:
    """Print parameters, memory by part, time and disk of the run that the flags ask for.

    A folder that holds config.json alone will do; then the time is left out.
    """
    p = look_ahead(inputs, allocating, training)
    micro = fitting(p, training.batch_size) if auto else training.micro_batch_size
    mine, fixed = distributed.share(micro), p.setup.fixed()
    peak, probe = p.training(mine), p.probe(mine)
    parts = {"runtime": p.runtime, **fixed,
             "activations": peak - p.runtime - sum(fixed.values()), "peak": peak}
    print(f"{fixed['adapters'] // 4:,} trainable parameters; {p.setup.allocation}"
          + (" (a guess: the probe decides)" if p.probes else ""))
    print(table(["memory", "MiB"], [[part, f"{size / MIB:,.1f}"] for part, size in parts.items()]))
    print(f"{', '.join(fixed)} are exact; activations were measured on a few blocks")
    print(f"{inputs.dtype}, {micro} of {training.batch_size} examples at a time, of up to "
          f"{p.longest} tokens; "
          + (f"there are {p.room / MIB:,.0f} MiB" if p.room else "free memory was not measured"))
    if probe > peak:
        print(f"the probe before it takes up to {probe / MIB:,.0f} MiB")
    fits = all(distributed.gather(p.room is None or max(peak, probe) <= p.room))
    if not fits:
        print("too much: " + (
            "Python and torch alone take more" if p.room and p.runtime >= p.room else
            p.setup.advice(p.batches, mine) if p.room is None or peak > p.room else
            "the probe alone; --allocation FILE leaves it out, --max-length shortens it"))
    if inputs.data or inputs.model is None:
        measurable = fits and not inputs.shard and any(p.folder.glob("*.safetensors"))
        tokens = sum(len(e.ids) for batch in p.batches for e in batch)
        print(f"training: {len(p.batches)} steps, {tokens:,} tokens, "
              + (duration(p, inputs.device, micro, tokens) if measurable else
                 "whose time was not measured: that takes weights that fit, without --shard"))
        print(f"disk: {fixed['adapters'] * (1 + 3 * (KEPT + 1)) / MIB:,.0f} MiB for the adapter "
              f"and {KEPT + 1} checkpoints (one while it is written)")


def duration(p: Prospect, device: str, micro: int, tokens: int) -> str:
    """How long training will take, from a few measured steps, spread over the schedule."""
    model = load_model(p.folder, p.setup.dtype, device, p.setup.base_bits)
    add_experts(model, p.setup.allocation)
    model.model.recompute = p.setup.recompute
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    cfg = TrainConfig(micro_batch_size=micro)
    begun, seen, seconds = time.perf_counter(), 0, 0.0
    for n, batch in enumerate(p.batches[::-(-len(p.batches) // STEPS)]):
        start = time.perf_counter()
        line = train_step(model, batch, cfg, 0, 1)       # its loss, read back, waits for the device
        optimizer.step()
        optimizer.zero_grad()
        if n == 0 and len(p.batches) > 1:
            continue
        seen, seconds = seen + line["tokens"], seconds + time.perf_counter() - start
        if distributed.anywhere(time.perf_counter() - begun > SECONDS):      # all end together
            break
    rate = seen / seconds
    return (f"{rate:,.0f} tokens/s measured: about {tokens / rate / 60:,.1f} minutes, besides "
            f"{'the probe and ' if p.probes else ''}two evaluations")
