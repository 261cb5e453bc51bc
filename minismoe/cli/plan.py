"""train.py --plan and --micro-batch-size auto: what a run takes and what fits, before it starts.

If several processes share the work, memory is that of each.
"""

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..data.tasks import Example
from ..io.process import resident
from ..io.text import table
from ..method.experts import add_experts
from ..method.loss import IGNORE
from ..method.sensitivity import shapes_of
from ..model.checkpoint import read_config
from ..model.decoder import CausalLM, meta_model
from ..training import distributed
from ..training.loop import TrainConfig, schedule, train_step
from ..training.memory import MIB, available, fixed_bytes, largest, measure_peak
from ..training.resume import KEPT
from . import probing
from .flags import RunConfig
from .inputs import load_base, model_folder, read_data

STEPS, SECONDS = 4, 30           # measured steps, the first to warm up; and how long they may take
LATER = 96 * MIB                 # what torch loads with its first step, seen on x86-64 Linux
ONEDNN = 64 * MIB                # what it compiles for bfloat16 on a CPU: see process.bound_memory


class Prospect:
    """What is known of a run before it starts; sizes are bytes."""

    def __init__(self, config: RunConfig):
        """Read config.json and the data; if the weights are there and fit, measure activations."""
        inputs, training = config.inputs, config.training
        self.config, self.folder = config, model_folder(inputs)
        sizes, dtype = read_config(self.folder)[0], getattr(torch, inputs.dtype)
        self.has_data = inputs.data is not None or inputs.model is None
        if self.has_data:
            encoded = read_data(inputs, self.folder)[2]
            names, examples = list(encoded), [e for x in encoded.values() for e in x]
        else:                                # a batch of examples of --max-length
            length = min(inputs.max_length, sizes.max_position_embeddings)
            answer, names = max(1, length // 10), inputs.names or [""]
            ids = [[i % sizes.vocab_size] * length for i in range(training.batch_size)]
            examples = [Example("", r, [IGNORE] * (length - answer) + r[-answer:]) for r in ids]
        self.batches = schedule(examples, training)
        self.longest = max(len(e.ids) for e in examples)                 # tokens
        self.allocation = probing.guess(config.allocating, shapes_of(meta_model(sizes)), names)
        # By part; `fixed_in` tells the same with the base in so many bits.
        self.fixed_in = partial(fixed_bytes, sizes, self.allocation, dtype)
        self.fixed = self.fixed_in(inputs.base_bits)
        self.runtime = runtime_bytes(dtype, torch.device(inputs.device))
        self.room = training.memory or available(inputs.device)
        # A batch of the probe, if it runs: rows that share no tokens, all supervised.
        rows = min(probing.PROBE_BATCH, training.batch_size) * probing.needed(config.allocating)
        self.probed = [Example("", [i] * self.longest, [i] * self.longest) for i in range(rows)]
        # With its experts; None: no weights, or no room for them. Activations are 0 then.
        self.model: CausalLM | None = None
        self.train_bytes: Callable[[Sequence[Example]], int] = lambda batch: 0
        self.probe_bytes: Callable[[Sequence[Example]], int] = lambda batch: 0
        if any(self.folder.glob("*.safetensors")) and self.fixed_total < self.room:
            self.model = load_base(inputs, self.folder)
            if self.probed:
                self.probe_bytes = measure_peak(self.model, self.probed, probe=True)
            add_experts(self.model, self.allocation)
            self.model.model.recompute = training.recompute
            self.train_bytes = measure_peak(self.model, largest(self.batches, training.batch_size))

    @property
    def fixed_total(self) -> int:
        """What is taken whatever the batch."""
        return self.runtime + sum(self.fixed.values())

    def training_peak(self, micro: int) -> int:
        """The peak of training; without activations if these were not measured."""
        return self.fixed_total + self.train_bytes(largest(self.batches, micro))

    def probe_peak(self, micro: int) -> int:
        """The peak of the probe; less than that of training if it does not run."""
        return self.runtime + self.fixed["base weights"] + self.probe_bytes(self.probed[:micro])


def runtime_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that Python and the libraries take in training; 0 on CUDA: this is no GPU memory."""
    if device.type == "cuda":
        return 0
    return resident() + LATER + (ONEDNN if device.type == "cpu" and dtype.itemsize < 4 else 0)


def fitting(p: Prospect) -> int:
    """The largest micro-batch, of all processes together, that fits --memory or the device.

    Raises ValueError, saying which flags help by how much, if one example is too many.
    """
    room = int(0.9 * p.room)                 # allocators keep some
    counts = range(1, p.config.training.batch_size + 1)
    if (need := p.training_peak(1)) > room:
        raise ValueError(
            f"training one example at a time needs {need / MIB:,.0f} MiB"
            f"{'' if p.model else ' besides activations'}, of which Python and torch take "
            f"{p.runtime / MIB:,.0f}, and {room / MIB:,.0f} MiB may be used: "
            + (advice(p, 1) or "give a larger --memory"))
    if not p.model:
        raise ValueError(f"auto measures a step, but {p.folder} holds no .safetensors: add them, "
                         "or give --micro-batch-size a number")
    micro = min(bisect_right(counts, room, key=p.training_peak),
                max(1, bisect_right(counts, room, key=p.probe_peak)))
    if (more := p.probe_peak(micro) - room) > 0:
        print(f"the probe may take {more / MIB:,.0f} MiB more than there are: "
              "--allocation FILE leaves it out", file=sys.stderr)
    return min(len(counts), min(distributed.gather(micro)) * distributed.world())


def advice(p: Prospect, micro: int) -> str:
    """Flags with which training would take less memory, and how much less, best first."""
    training, now, half = p.config.training, p.training_peak(micro), max(1, micro // 2)
    base = p.fixed_in(4)["base weights"]
    saved = [(p.fixed["base weights"] - base, "--base-bits 4"),
             (now - p.training_peak(half), f"--micro-batch-size {half * distributed.world()}")]
    if p.model:
        batch, length = largest(p.batches, micro), p.longest // 2
        cut = [replace(e, ids=e.ids[:length], labels=e.labels[:length]) for e in batch]
        p.model.model.recompute = True
        recomputed = measure_peak(p.model, largest(p.batches, training.batch_size))
        p.model.model.recompute = training.recompute
        saved += [(now - p.fixed_total - p.train_bytes(cut), f"--max-length {length}"),
                  (now - p.fixed_total - recomputed(batch), "--recompute")]
    fixed = ("--base-bits", "--max-length") if p.config.resume else ()
    return ", ".join(f"{flag} saves {size / MIB:,.0f} MiB" for size, flag in sorted(
        saved, reverse=True) if size > 0 and not flag.startswith(fixed))


def show_plan(config: RunConfig) -> None:
    """Print parameters, memory by part, time and disk of the run that the flags ask for.

    Of a folder that holds config.json alone, all but activations and time.
    """
    p, inputs, training = Prospect(config), config.inputs, config.training
    micro = fitting(p) if config.auto else training.micro_batch_size
    mine = distributed.share(micro)
    peak, probe = p.training_peak(mine), p.probe_peak(mine)
    parts = {"runtime": p.runtime, **p.fixed}
    if p.model:
        parts |= {"activations": peak - p.fixed_total, "peak": peak}
    print(f"{p.fixed['adapters'] // 4:,} trainable parameters; {p.allocation}"
          + (" (a guess: the probe decides)" if p.probed else ""))
    print(table(["memory", "MiB"], [[part, f"{size / MIB:,.1f}"] for part, size in parts.items()]))
    print(f"{', '.join(p.fixed)} are exact{' for that guess' * bool(p.probed)}; activations were "
          + ("measured on small batches" if p.model else
             f"not measured: that takes weights that fit, as .safetensors in {p.folder}"))
    print(f"{inputs.dtype}, {micro} of {training.batch_size} examples at a time, of up to "
          f"{p.longest} tokens; there are {p.room / MIB:,.0f} MiB")
    if probe > peak:
        print(f"the probe before it takes up to {probe / MIB:,.0f} MiB")
    fits = all(distributed.gather(max(peak, probe) <= p.room))
    if not fits:
        print("too much: " + (
            "Python and torch alone take more" if p.runtime >= p.room else
            advice(p, mine) or "no flag saves enough: take a smaller model" if peak > p.room else
            "the probe alone; --allocation FILE leaves it out, --max-length shortens it"))
    if p.has_data:
        count = sum(len(e.ids) for batch in p.batches for e in batch)
        print(f"training: {len(p.batches)} steps, {count:,} tokens, "
              + (duration(p, p.model, micro, count) if p.model and fits else
                 "whose time was not measured: that takes weights that fit"))
        print(f"disk: {p.fixed['adapters'] * (1 + 3 * (KEPT + 1)) / MIB:,.0f} MiB for the adapter "
              f"and {KEPT + 1} checkpoints (one while it is written)")


def duration(p: Prospect, model: CausalLM, micro: int, tokens: int) -> str:
    """How long training will take, from a few measured steps, spread over the schedule."""
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
        if any(distributed.gather(time.perf_counter() - begun > SECONDS)):       # all end together
            break
    rate = seen / seconds
    return (f"{rate:,.0f} tokens/s measured: about {tokens / rate / 60:,.1f} minutes, besides "
            f"{'the probe and ' if p.probed else ''}two evaluations")
