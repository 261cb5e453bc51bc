"""What training will take, told before it starts: bytes by part, and the micro-batch that fits.

Weights, adapters, gradients and the optimizer's moments are computed from config.json, exactly.
Activations are measured: a few blocks of the model's sizes, with zeros for weights, compute the
gradients of four small batches while the bytes of live tensors are counted. These are linear in the
number of blocks and in the quantities of a batch (`quantities`), so four batches give all rates.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from ..model.decoder import SHORT, CausalLM
from ..model.quantize import BLOCK
from ..model.tokens import shared_prefixes

MIB = 1 << 20
BLOCKS, WEIGHTS = 4, 1 << 24    # measured are so many blocks, or more up to so many weights
TRIED = 32                      # micro-batches, those with the most places, that may be the largest


def meta_model(config: Config) -> CausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return CausalLM(config)


def quantities(ids: Tensor, mask: Tensor, labels: Tensor) -> list[int]:
    """What activations of a batch, each (B, T), are linear in: tokens, of which rows share some;
    places (B * T); supervised tokens; and B * T * T, as attention weights are."""
    supervised = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    again = sum((end - first - 1) * (stop - start) for first, end, start, stop in
                shared_prefixes(ids, mask.bool() & ~supervised))
    return [int(mask.sum()) - again, ids.numel(), int(supervised.sum()),
            ids.numel() * ids.shape[1]]


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
        """A storage was freed; another one may get its key."""
        self.known.discard(key)
        self.now -= size


def train_gradients(model: CausalLM, batch: Batch) -> None:
    """What training computes of a micro-batch: see loop.train_step."""
    losses, _ = supervised_losses(model, *batch, needed_only=True)
    balance = balance_loss(expert_layers(model).values(), batch[1], model.model.copies)
    (losses.sum() + balance).backward()


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
    rates: dict[int, Tensor] = field(default_factory=dict, init=False)   # by measured length

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
        each = sum(p.numel() for p in meta_model(self.config).model.layers[0].parameters())
        count = min(layers, max(BLOCKS, WEIGHTS // each))
        picked = [i * (layers - 1) // max(1, count - 1) for i in range(count)]
        model = meta_model(replace(
            self.config, vocab_size=8, num_hidden_layers=count, tie_word_embeddings=False,
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

    def measured(self, model: CausalLM, batch: Batch,
                 gradients: Callable[[CausalLM, Batch], Any] = train_gradients) -> list[float]:
        """Bytes that a forward pass of all layers leaves, and what the rest takes beside them,
        from `model`, a few of the blocks."""
        counter, marks, count = LiveBytes(model), list[int](), len(model.model.layers)
        hooks = [block.register_forward_pre_hook(lambda *_: marks.append(counter.now))
                 for block in model.model.layers]
        hooks.append(model.model.register_forward_hook(lambda *_: marks.append(counter.now)))
        with counter:
            gradients(model, batch)
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        kept, more = marks[count], 0.0           # --recompute passes the blocks again, after these
        if (absent := self.config.num_hidden_layers - count) > 0:
            # A first block's input needs no gradient; a last MLP sees supervised tokens alone.
            more = (marks[count - 1] - marks[1]) / (count - 2) * absent
        return [kept + more, counter.peak - kept]

    def rate(self, length: int) -> Tensor:
        """Bytes of each of the quantities, (4, 2): kept, and beside; of batches so long."""
        T = 64
        if self.device == "mps" or self.device == "cpu" and self.dtype.itemsize < 4:
            # Attention that keeps its weights (decoder.attend) outgrows the rest where it is long.
            T *= -(-min(length, SHORT + 64) // T)
        if T not in self.rates:
            model, known, found = self.few_blocks(), [], []
            for first, second, supervised in ((T, T // 2, 2), (T, T - 1, 2), (T, T - 1, 8),
                                              (T - 32, T - 33, 2)):
                batch = collate([
                    Example("", [i] * n, [IGNORE] * (n - supervised) + [i] * supervised)
                    for i, n in enumerate((first, second))], 0, self.device)
                known.append(quantities(*batch))
                found.append(self.measured(model, batch))
            self.rates[T] = torch.linalg.solve(torch.tensor(known).double(),
                                               torch.tensor(found).double())
        return self.rates[T]

    def activations(self, examples: Sequence[Example]) -> int:
        """Bytes of one micro-batch at its peak."""
        batch = collate(sorted(examples, key=lambda e: e.ids), 0)
        found = quantities(*batch)
        kept, beside = (torch.tensor(found).double() @ self.rate(batch[0].shape[1])).tolist()
        if self.base_bits:                   # one matrix at a time is made of its bits
            beside += (self.config.hidden_size * self.config.intermediate_size
                       * self.dtype.itemsize)
        return int(kept + max(beside, self.loss(found[2])))

    def loss(self, supervised: int) -> int:
        """Bytes of the logits that are held at once, and their exponentials."""
        rows = min(supervised, max(1, CHUNK // self.config.vocab_size))
        return rows * self.config.vocab_size * 8

    def probe(self, length: int) -> list[float]:
        """What the probe keeps of an example of so many tokens, and takes beside that: bytes."""
        plain = replace(self, allocation=replace(self.allocation, experts={}, ranks={}),
                        recompute=False)
        ids = torch.ones(2, length, dtype=torch.long, device=self.device)
        kept, beside = plain.measured(
            plain.few_blocks(), (ids, ids, ids),
            lambda model, batch: sample_norms(model, linear_layers(model), *batch))
        return [kept / 2, beside / 2]

    def total(self, batches: Sequence[Sequence[Example]], micro: int) -> int:
        """Bytes of training in micro-batches of so many examples, beside the runtime's."""
        parts = [batch[i:i + micro] for batch in batches for i in range(0, len(batch), micro)]
        parts.sort(key=lambda part: -len(part) * max(len(e.ids) for e in part))
        return sum(self.fixed().values()) + max(map(self.activations, parts[:TRIED]))

    def fit(self, batches: Sequence[Sequence[Example]], room: int) -> int:
        """The largest micro-batch, at most a whole batch, with which training takes `room` bytes.

        Raises ValueError, saying which flags would help by how much, if one example is too many.
        """
        micro = max(map(len, batches))
        while (need := self.total(batches, micro)) > room:
            if micro == 1:
                raise ValueError(
                    f"training one example at a time needs {need / MIB:,.0f} MiB, and "
                    f"{room / MIB:,.0f} MiB are free: {self.advice(batches, 1)}")
            micro -= 1
        return micro

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
