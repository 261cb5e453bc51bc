"""What training will take, told before it starts: bytes by part.

Weights, adapters, gradients and the optimizer's moments follow exactly from config.json.
Activations are measured on the loaded model: the live bytes of a step are counted at two small
sizes, and a line through both tells those of a larger micro-batch.
"""

import os
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.tasks import Example, collate
from ..io.process import group_rooms, resident
from ..method.allocate import Allocation
from ..method.experts import balance_loss, expert_layers, linear_layers
from ..method.loss import CHUNK, IGNORE, supervised_losses
from ..method.sensitivity import sample_norms, shapes_of
from ..model.config import Config
from ..model.decoder import CausalLM, meta_model
from ..model.quantize import BLOCK

MIB = 1 << 20
SMALL = 512                     # tokens of the smaller measured step, which has one row at least
VOCABULARY = 256                # rows of its head; logits are added by formula


def fixed_bytes(config: Config, allocation: Allocation, dtype: torch.dtype,
                base_bits: int | None = None) -> dict[str, int]:
    """Bytes by part of what does not depend on the batch."""
    model, size = meta_model(config), dtype.itemsize
    shapes = shapes_of(model)
    trained = allocation.trainable(shapes)
    base = sum(p.numel() for p in model.parameters()) * size
    if base_bits:
        for N, K in shapes.values():
            G = -(-K // BLOCK)
            row = G * (BLOCK * base_bits // 8) + 2 * G                           # data, scales
            base += N * (row - K * size)
    return {"base weights": base, "adapters": 4 * trained, "optimizer": 8 * trained,
            "gradients": 4 * trained}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that are made under it, and their peak.

    These are the same each time and on every device, unlike what a process takes: allocators round
    up, and keep what was freed. Scratch memory inside a kernel is not seen.
    """

    def __init__(self, model: nn.Module):
        """What `model` holds already, gradients too, is not counted."""
        super().__init__()
        self.now = self.peak = 0
        held = [*model.parameters(), *model.buffers(),
                *(p.grad for p in model.parameters() if p.grad is not None)]
        self.known = {t.untyped_storage()._cdata for t in held}

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


def step_bytes(model: CausalLM, examples: Sequence[Example], probe: bool) -> tuple[int, int]:
    """Bytes that are live after the decoder's forward pass, and how far the step's peak exceeds
    them, without logits. The step is of training (train_step without its sums) or of the probe."""
    head, kept = model.lm_head, list[int]()
    ids, mask, labels = collate(examples, 0, head.weight.device)
    labels = labels.clamp(max=min(VOCABULARY, len(head.weight)) - 1)
    for parameter in model.parameters():
        if parameter.requires_grad:                  # as a micro-batch before would leave it
            parameter.grad = torch.zeros_like(parameter)
    counter = LiveBytes(model)
    hook = model.model.register_forward_hook(lambda *_: kept.append(counter.now))
    model.lm_head = nn.Linear(1, 1, bias=False)
    model.lm_head.weight = nn.Parameter(head.weight[:VOCABULARY], requires_grad=False)
    try:
        with counter, hook:
            if probe:
                sample_norms(model, linear_layers(model), ids, mask, labels)
            else:
                losses, _ = supervised_losses(model, ids, mask, labels, needed_only=True)
                balance = balance_loss(expert_layers(model).values(), mask, model.model.copies)
                (losses.sum() + balance).backward()
    finally:
        model.lm_head = head
        model.zero_grad(set_to_none=True)
        for layer in expert_layers(model).values():
            layer.router_logits = None               # its graph holds the layer, which holds it
    return kept[0], counter.peak - kept[0]


def measure_peak(model: CausalLM, examples: Sequence[Example], probe: bool = False,
             ) -> Callable[[Sequence[Example]], int]:
    """A function that tells the bytes of a micro-batch at its peak, measured on some `examples`."""
    rows = sorted(examples, key=lambda e: e.ids)     # as training does: prefixes are shared
    few = max(1, SMALL // max(len(e.ids) for e in rows))
    parts = (rows[:few], rows[:2 * few]) if few < len(rows) else ([], rows)
    small, large = (step_bytes(model, part, probe) if part else (0, 0) for part in parts)
    start, end = (sum(len(e.ids) for e in part) for part in parts)               # tokens
    vocabulary = len(model.lm_head.weight)

    def peak(batch: Sequence[Example]) -> int:
        along = (sum(len(e.ids) for e in batch) - start) / (end - start)
        kept, beside = (a + along * (b - a) for a, b in zip(small, large))
        supervised = sum(label != IGNORE for e in batch for label in e.labels[1:])
        logits = min(supervised, max(1, CHUNK // vocabulary)) * vocabulary * 8   # and exponentials
        return int(kept + max(beside, logits))
    return peak


def largest(batches: Sequence[Sequence[Example]], micro: int) -> Sequence[Example]:
    """The micro-batch of at most `micro` examples that has the most positions, pads included."""
    return max((batch[i:i + micro] for batch in batches for i in range(0, len(batch), micro)),
               key=lambda part: len(part) * max(len(e.ids) for e in part))


def available(device: str) -> int:
    """Bytes that this process may hold on `device`, with what it holds now. Raises ValueError if
    the system does not tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if kind == "mps":
        return torch.mps.recommended_max_memory()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # processes of torchrun
    with suppress(OSError, IndexError):                  # Linux alone says what is free
        found = re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        return resident() + min([1024 * int(found[0]), *group_rooms()]) // here
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4 // here
    raise ValueError(f"cannot tell how much memory {device} has: give --memory")
