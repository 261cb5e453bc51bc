"""train.py --plan and --micro-batch-size auto: what a run takes and what fits, before it starts.

If several processes share the work, memory is that of each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.tasks import Example
from ..io.process import resident
from ..io.text import table
from ..method.experts import add_experts
from ..method.loss import IGNORE
from ..model.checkpoint import load_model, read_config
from ..model.decoder import CausalLM
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
    runtime: int                 # bytes of Python and the libraries
    room: int | None             # bytes; None: unknown
    probed: list[float] | None   # bytes that the probe keeps of an example, and takes beside

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(e.ids) for batch in self.batches for e in batch)

    def probe_bytes(self, micro: int) -> int:
        """Bytes of the probe of as many examples, at most `PROBE_BATCH`, beside the runtime's."""
        if not self.probed:
            return 0
        rows = min(probing.PROBE_BATCH, micro)
        kept, beside = self.probed
        return self.setup.fixed()["base weights"] + int(
            rows * kept + max(rows * beside, self.setup.loss(rows * self.longest)))


def look_ahead(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig,
               ) -> Prospect:
    """Read config.json and the data, and measure activations; no weights are loaded."""
    folder = model_folder(inputs)
    config, device = read_config(folder)[0], torch.device(inputs.device)
    if inputs.data or inputs.model is None:
        encoded = read_data(inputs, folder)[2]
        names, examples = list(encoded), [e for x in encoded.values() for e in x.examples]
    else:                                    # a batch of examples of --max-length
        length = context(inputs, folder)
        answer = max(1, length // 10)
        ids = [[i, *range(length - 1)] for i in range(training.batch_size)]
        examples = [Example("", row, [IGNORE] * (length - answer) + row[-answer:]) for row in ids]
        names = inputs.tasks.split(",") if inputs.tasks else [""]
    sizes = probing.shapes(meta_model(config))
    setup = Setup(config, probing.guess(allocating, sizes, names, inputs.seed),
                  getattr(torch, inputs.dtype), device.type, inputs.base_bits, training.recompute,
                  distributed.world() if inputs.shard else 1)
    batches = schedule(examples, training)
    longest = max(len(e.ids) for e in examples)
    probed = setup.probe(longest) if probing.needed(allocating) else None
    setup.rate(longest)                      # afterwards the libraries have what they need
    runtime = 0 if device.type == "cuda" else resident()     # a GPU's is not in what it has free
    if device.type == "cpu" and setup.dtype.itemsize < 4:
        runtime += ONEDNN
    return Prospect(folder, setup, batches, runtime,
                    training.memory or available(inputs.device), probed)


def fitting_micro_batch(inputs: InputConfig, allocating: AllocationConfig, training: TrainConfig,
                        ) -> int:
    """The largest micro-batch, of all processes together, that fits --memory or the device."""
    return _fitting(look_ahead(inputs, allocating, training), training.batch_size)


def _fitting(p: Prospect, batch_size: int) -> int:
    most = min(distributed.gather(_fitting_here(p)))
    return min(batch_size, most * distributed.world())


def _fitting_here(p: Prospect) -> int:
    """That of this process within 0.9 of the room: allocators keep some of what is freed."""
    if p.room is None:
        raise ValueError(f"cannot tell how much memory {p.setup.device} has: give --memory")
    if p.runtime >= 0.9 * p.room:
        need = p.runtime + p.setup.total(p.batches, 1)
        raise ValueError(f"training one example at a time needs {need / MIB:,.0f} MiB, of which "
                         f"Python and torch take {p.runtime / MIB:,.0f}, and there are "
                         f"{p.room / MIB:,.0f}: give a larger --memory")
    room = int(0.9 * p.room) - p.runtime
    most = p.setup.fit(p.batches, room)
    while most > 1 and p.probe_bytes(most) > room:
        most = min(most, probing.PROBE_BATCH) - 1
    if (more := p.probe_bytes(most) - room) > 0:
        print(f"the probe may take {more / MIB:,.0f} MiB more than there are: "
              "--allocation FILE leaves it out", file=sys.stderr)
    return most


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
    micro = _fitting(p, training.batch_size) if auto else training.micro_batch_size
    mine, fixed = distributed.share(micro), p.setup.fixed()
    total = p.setup.total(p.batches, mine)
    parts = {"runtime": p.runtime, **fixed, "activations": total - sum(fixed.values()),
             "peak": p.runtime + total}
    print(f"{fixed['adapters'] // 4:,} trainable parameters; {p.setup.allocation}"
          + (" (a guess: the probe decides)" if p.probed else ""))
    print(table(["memory", "MiB"], [[part, f"{size / MIB:,.1f}"] for part, size in parts.items()]))
    print("weights, adapters, optimizer and gradients are exact; activations are extrapolated from "
          "measured small batches")
    room = f"{p.room / MIB:,.0f} MiB are free" if p.room else "how much is free was not measured"
    print(f"{inputs.dtype}, {micro} of {training.batch_size} examples at a time, of up to "
          f"{p.longest} tokens; {room}")
    probe = p.runtime + p.probe_bytes(mine)
    if probe > parts["peak"]:
        print(f"the probe before it takes up to {probe / MIB:,.0f} MiB")
    fits = all(distributed.gather(p.room is None or max(parts["peak"], probe) <= p.room))
    if not fits:
        print("too much: " + (
            "Python and torch alone take more" if p.room and p.runtime >= p.room else
            p.setup.advice(p.batches, mine) if p.room is None or parts["peak"] > p.room else
            "the probe alone; --allocation FILE leaves it out, --max-length shortens it"))
    if inputs.data or inputs.model is None:
        print(f"training: {len(p.batches)} steps, " + (
            "whose time was not measured: it does not fit" if not fits else
            "whose time is not measured with --shard" if inputs.shard else
            f"whose time was not measured: {p.folder} holds no weights"
            if not any(p.folder.glob("*.safetensors")) else duration(p, inputs.device, micro)))
        print(f"disk: {fixed['adapters'] * (1 + 3 * (KEPT + 1)) / MIB:,.0f} MiB for the adapter "
              f"and {KEPT + 1} checkpoints (one while it is written)")


def duration(p: Prospect, device: str, micro: int) -> str:
    """How long training will take, from a few measured steps."""
    model = load_model(p.folder, p.setup.dtype, device, p.setup.base_bits)
    add_experts(model, p.setup.allocation)
    model.model.recompute = p.setup.recompute
    tokens, rate = sum(len(e.ids) for b in p.batches for e in b), tokens_per_second(
        model, p.batches, micro)
    return (f"{tokens:,} tokens, {rate:,.0f} tokens/s measured: about {tokens / rate / 60:,.1f} "
            f"minutes, besides {'the probe and ' if p.probed else ''}two evaluations")


def tokens_per_second(model: CausalLM, batches: Sequence[Sequence[Example]], micro: int) -> float:
    """Of a few steps, spread over the schedule."""
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
