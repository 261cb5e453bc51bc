"""What training will take, told before it starts: bytes by part.

Weights, adapters, gradients and the optimizer's moments are computed from config.json, exactly.
Activations are measured: a few blocks of the model's sizes, with zeros for weights, compute the
gradients of a micro-batch while the bytes of live tensors are counted. Every further block keeps
as much as these do, so no weights are needed and a large model takes seconds.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.tasks import Batch, Example, collate
from ..io.process import group_rooms, resident
from ..method.allocate import Allocation, parameters
from ..method.experts import add_experts, balance_loss, expert_layers, linear_layers
from ..method.loss import CHUNK, IGNORE, supervised_losses
from ..method.sensitivity import sample_norms
from ..model.config import Config
from ..model.decoder import CausalLM
from ..model.quantize import BLOCK

MIB = 1 << 20
BLOCKS = 4                      # of a deeper model so many are measured,
PLACES = 2048                   # and of a larger micro-batch rows of so many tokens in all
VOCABULARY = 256                # of the measured blocks; the memory of logits is computed


def meta_model(config: Config) -> CausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return CausalLM(config)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that are made under it, and their peak.

    These are the same each time and on every device. What a process takes from the system is not:
    allocators round up, and keep what was freed. Scratch memory inside a kernel is not seen.
    """

    def __init__(self, model: torch.nn.Module):
        """Views of the weights of `model` are not counted."""
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)):
            if (key := storage._cdata) not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, key, storage.nbytes())
        return result

    def freed(self, key: int, size: int) -> None:
        """Take off the bytes of a freed storage, whose key another one may get."""
        self.known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Setup:
    """What memory depends on, beside the batches."""

    config: Config
    allocation: Allocation
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    base_bits: int | None = None
    recompute: bool = False
    shards: int = 1              # processes of which each holds a part of the blocks
    probe: bool = False          # of the model without experts, in place of training

    def fixed(self) -> dict[str, int]:
        """Bytes by part, of what does not depend on the batch."""
        model, size, found = meta_model(self.config), self.dtype.itemsize, self.allocation
        shapes = {n: (m.out_features, m.in_features) for n, m in linear_layers(model).items()}
        trained = sum(parameters(shapes[name], count, found.rank_of(name))
                      for name, count in found.experts.items())
        base = sum(p.numel() for p in model.parameters()) * size
        if self.shards > 1:                  # besides its part, a process holds two whole blocks
            blocks = sum(p.numel() for p in model.model.layers.parameters()) * size
            two = 2 * blocks // self.config.num_hidden_layers
            base -= blocks - min(blocks, blocks // self.shards + two)
        if bits := self.base_bits:
            for N, K in shapes.values():
                G = -(-K // BLOCK)
                row = G * (BLOCK * bits // 8) + 2 * G + -(-G * bits // 8)    # with scales, zeros
                base += N * (row - K * size)
        return {"base weights": base, "adapters": 4 * trained, "optimizer": 8 * trained,
                "gradients": 4 * trained}

    def few_blocks(self) -> CausalLM:
        """Some blocks, spread over the model's depth, with their experts; weights are zeros."""
        layers, found = self.config.num_hidden_layers, self.allocation
        count = min(layers, BLOCKS)
        picked = [i * (layers - 1) // max(1, count - 1) for i in range(count)]
        model = meta_model(replace(
            self.config, vocab_size=VOCABULARY, num_hidden_layers=count, tie_word_embeddings=False,
            windows=tuple(self.config.windows[i] for i in picked)))
        model.to(self.dtype).to_empty(device=self.device).requires_grad_(False)
        for parameter in model.parameters():
            parameter.zero_()
        named = {name: re.sub(r"layers\.(\d+)", lambda m: f"layers.{picked[int(m[1])]}", name)
                 for name in linear_layers(model)}
        add_experts(model, replace(
            found, experts={new: found.experts.get(old, 0) for new, old in named.items()},
            ranks={new: found.ranks[old] for new, old in named.items() if old in found.ranks}))
        model.model.recompute = self.recompute
        return model

    def gradients(self, model: CausalLM, ids: Tensor, mask: Tensor, labels: Tensor) -> None:
        """What the probe or training (loop.train_step) computes of a batch, each (B, T)."""
        if self.probe:
            sample_norms(model, linear_layers(model), ids, mask, labels)
        else:
            losses, _ = supervised_losses(model, ids, mask, labels, needed_only=True)
            layers = expert_layers(model).values()
            (losses.sum() + balance_loss(layers, mask, model.model.copies)).backward()

    def measured(self, model: CausalLM, batch: Batch) -> tuple[float, float]:
        """Bytes that the forward pass of all layers leaves, and what the rest takes beside them,
        seen on `model`, which has a few of the layers."""
        counter, marks, count = LiveBytes(model), list[int](), len(model.model.layers)
        for block in model.model.layers:
            block.register_forward_pre_hook(lambda *_: marks.append(counter.now))
        model.model.register_forward_hook(lambda *_: marks.append(counter.now))
        with counter:
            self.gradients(model, batch[0] % VOCABULARY, batch[1],
                           batch[2].clamp(max=VOCABULARY - 1))
        kept, more = marks[count], 0.0           # later marks are of --recompute
        if (absent := self.config.num_hidden_layers - count) > 0:
            # A first block's input needs no gradient; a last MLP sees supervised tokens alone.
            more = (marks[count - 1] - marks[1]) / (count - 2) * absent
        return kept + more, counter.peak - kept

    def activations(self, examples: Sequence[Example]) -> int:
        """Bytes of one micro-batch at its peak."""
        longest, cfg = max(len(e.ids) for e in examples), self.config
        few = sorted(examples, key=lambda e: e.ids)[:max(2, PLACES // longest)]
        scale = sum(len(e.ids) for e in examples) / sum(len(e.ids) for e in few)
        kept, beside = (size * scale for size in self.measured(
            self.few_blocks(), collate(few, 0, self.device)))
        if self.base_bits:                   # one matrix at a time is made of its bits
            beside += cfg.hidden_size * cfg.intermediate_size * self.dtype.itemsize
        supervised = sum(label != IGNORE for e in examples for label in e.labels[1:])
        rows = min(supervised, max(1, CHUNK // cfg.vocab_size))
        return int(kept + max(beside, rows * cfg.vocab_size * 8))    # logits, their exponentials

    def total(self, batches: Sequence[Sequence[Example]], micro: int) -> int:
        """Bytes of training in micro-batches of so many examples, beside the runtime's."""
        parts = [batch[i:i + micro] for batch in batches for i in range(0, len(batch), micro)]
        return sum(self.fixed().values()) + self.activations(largest(parts))

    def advice(self, batches: Sequence[Sequence[Example]], micro: int) -> str:
        """Flags with which training would take less memory, and how much less, best first."""
        length, half = max(len(e.ids) for batch in batches for e in batch) // 2, max(1, micro // 2)
        cut = [[replace(e, ids=e.ids[:length], labels=e.labels[:length]) for e in batch]
               for batch in batches]
        now = self.total(batches, micro)
        saved = [(now - size, flag) for flag, size in (
            ("--recompute", replace(self, recompute=True).total(batches, micro)),
            ("--base-bits 4", replace(self, base_bits=4).total(batches, micro)),
            (f"--micro-batch-size {half}", self.total(batches, half)),
            (f"--max-length {length}", self.total(cut, micro)))]
        return ", ".join(f"{flag} saves {size / MIB:,.0f} MiB"
                         for size, flag in sorted(saved, reverse=True) if size > 0)


def largest(batches: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """The batch of the most places, pads included."""
    return max(batches, key=lambda batch: len(batch) * max(len(e.ids) for e in batch))


def available(device: str) -> int | None:
    """Bytes that this process may take on `device`, with what it takes already; None: unknown."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if kind == "mps":
        return torch.mps.recommended_max_memory()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # processes of torchrun
    with suppress(OSError, IndexError):                  # Linux alone says what is free
        found = re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        return resident() + min([1024 * int(found[0]), *group_rooms()]) // here
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4 // here
    except (AttributeError, OSError, ValueError):
        return None
