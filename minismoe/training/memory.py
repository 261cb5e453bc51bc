"""What a run will need, computed before it: memory by part, and the micro-batch that fits.

Memory is counted from what autograd keeps of each layer (see `kept`), not measured, so that it can
be told for a model of which only config.json is here. Tests hold it against autograd's own tensors.

Letters as in model.py: B batch, T its longest row, N real tokens without pads and with what rows
begin with alike once, S supervised tokens, D hidden, M intermediate, H query heads, K key/value
heads, C head size, V vocabulary; E experts of a matrix, r rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data.tasks import Example, collate
from ..io.process import group_rooms, resident
from ..method.allocate import Allocation, parameters
from ..method.experts import add_experts, linear_layers
from ..method.loss import CHUNK, IGNORE
from ..model.config import Config
from ..model.decoder import SHORT, CausalLM
from ..model.quantize import BLOCK
from ..model.tokens import shared_prefixes
from .loop import TrainConfig, train_step

MIB = 1 << 20
ONEDNN = 64 * MIB               # what it compiles for bfloat16 on a CPU: see memory.bound_memory


@dataclass(frozen=True)
class Shape:
    """Sizes of one micro-batch."""

    B: int
    T: int
    N: int
    S: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Shape:
        """The sizes that these examples have as a batch."""
        ids, mask, labels = collate(sorted(examples, key=lambda e: e.ids), 0)
        needed = F.pad(labels[:, 1:] != IGNORE, (0, 1))
        again = sum((end - first - 1) * (stop - start)
                    for first, end, start, stop in shared_prefixes(ids, mask.bool() & ~needed))
        (B, T), N = ids.shape, int(mask.sum()) - again
        return cls(B, T, N, int(needed.sum()))

    @classmethod
    def at_most(cls, examples: Sequence[Example]) -> Shape:
        """The same if nothing were alike, at little cost."""
        lengths = [len(e.ids) for e in examples]
        return cls(len(lengths), max(lengths), sum(lengths),
                   sum(label != IGNORE for e in examples for label in e.labels[1:]))


@dataclass(frozen=True)
class Setup:
    """What memory depends on, beside the batch."""

    config: Config
    allocation: Allocation
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    base_bits: int | None = None
    recompute: bool = False
    shards: int = 1              # processes of which each holds a part of the blocks


def shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the head."""
    return {name: (m.out_features, m.in_features)
            for name, m in linear_layers(_meta(config)).items()}


def _meta(config: Config) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config)


def trainable(setup: Setup) -> int:
    """Parameters of the experts and their routers."""
    sizes = shapes(setup.config)
    return sum(parameters(sizes[name], count, setup.allocation.rank_of(name))
               for name, count in setup.allocation.experts.items())


def weight_bytes(setup: Setup) -> int:
    """The frozen base as it is held."""
    model, layers = _meta(setup.config), setup.config.num_hidden_layers
    total = sum(p.numel() for p in model.parameters()) * setup.dtype.itemsize
    if setup.shards > 1:                     # of two blocks all comes together, and goes
        blocks = sum(p.numel() for p in model.model.layers.parameters()) * setup.dtype.itemsize
        total -= blocks - min(blocks, blocks // setup.shards + 2 * blocks // layers)
    if bits := setup.base_bits:
        for N, K in shapes(setup.config).values():
            G = -(-K // BLOCK)
            blocks = G * (BLOCK * bits // 8) + 2 * G + -(-G * bits // 8)  # integers, scales, zeros
            total += N * (blocks - K * setup.dtype.itemsize)
    return total


def kept(setup: Setup, shape: Shape) -> list[int]:
    """Bytes that autograd keeps for the backward pass: a number a layer, then the head's."""
    cfg, s, (B, T, N, S) = setup.config, setup.dtype.itemsize, vars(shape).values()
    D, M, C = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    heads, kv = cfg.num_attention_heads * C, cfg.num_key_value_heads * C
    if setup.device == "mps" or setup.device == "cuda" and s == 4:       # heads are not shared:
        kv = heads                                                       # see model.attend
    per_place = s * (2 * heads + 2 * kv) + 4 * cfg.num_attention_heads       # q, k, v, y, logsumexp
    if (setup.device == "cpu" and s < 4 and T <= SHORT) or setup.device == "mps":
        per_place = s * (heads + 2 * kv + cfg.num_attention_heads * T)       # the weights instead
    attention, mlp = s * D, s * (D + 2 * M)              # a token: what norms and SwiGLU read
    if cfg.qk_norm:
        attention += s * (heads + kv)
    counts, layers = setup.allocation.experts, []

    def experts(layer: int, readers: dict[tuple[str, ...], int]) -> int:
        """Bytes a token of the experts on modules, grouped by the x that they read."""
        token = 0
        for paths, size in readers.items():
            names = [n for p in paths if (n := f"model.layers.{layer}.{p}") in counts]
            token += s * (size if names else 0)              # x, once for those that read it
            for E, r in ((counts[n], setup.allocation.rank_of(n)) for n in names):
                token += s * E * r + 4 * E                   # h, gates
                if E > 1:                                    # logits, and what balances them
                    token += 4 * E + 8 * min(E, setup.allocation.top_k)
        return token

    for i in range(cfg.num_hidden_layers):
        below = attention + experts(i, {
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): D,
            ("self_attn.o_proj",): heads})
        above = mlp + experts(i, {("mlp.gate_proj", "mlp.up_proj"): D, ("mlp.down_proj",): M})
        rows = S if i == cfg.num_hidden_layers - 1 else N    # the last MLP is for the losses alone
        layers.append(B * T * per_place + N * below + rows * above)
    return [*layers, s * (N * 2 * C + 2 * S * D)]


def activations(setup: Setup, shape: Shape) -> int:
    """Bytes of one micro-batch at its peak: all that is kept, and the largest of what comes and
    goes beside it: the loss, or the backward pass of a block."""
    cfg, s = setup.config, setup.dtype.itemsize
    *layers, top = kept(setup, shape)
    if setup.recompute:
        layers = [max(layers), *(shape.N * cfg.hidden_size * s for _ in layers)]
    rows = min(shape.S, max(1, CHUNK // cfg.vocab_size))
    loss = rows * cfg.vocab_size * 8                     # logits, and their exponentials
    block = shape.N * (4 * cfg.intermediate_size * s + cfg.hidden_size * (2 * s + 4))
    if setup.base_bits:
        block += cfg.hidden_size * cfg.intermediate_size * s             # one matrix, made anew
    return sum(layers) + top + max(loss, block)


def fixed(setup: Setup) -> dict[str, int]:
    """Bytes by part, of what does not depend on the batch."""
    count = trainable(setup)
    return {"base weights": weight_bytes(setup), "adapters": 4 * count, "optimizer": 8 * count,
            "gradients": 4 * count}


def largest(setup: Setup, batches: Sequence[Sequence[Example]], micro: int) -> int:
    """Bytes of the activations of the largest micro-batch, where these have `micro` examples."""
    parts = [batch[i:i + micro] for batch in batches for i in range(0, len(batch), micro)]
    bounds = [activations(setup, Shape.at_most(part)) for part in parts]
    found = 0
    for n in sorted(range(len(parts)), key=lambda n: -bounds[n]):
        if bounds[n] <= found:               # nor is any of the rest larger
            break
        found = max(found, activations(setup, Shape.of(parts[n])))
    return found


def fit_micro_batch(setup: Setup, batches: Sequence[Sequence[Example]], room: int) -> int:
    """The largest micro-batch, at most a whole batch, with which training takes `room` bytes.

    Raises ValueError, saying which flags would help by how much, where one example is too many.
    """
    micro, rest = max(map(len, batches)), sum(fixed(setup).values())
    while (need := rest + largest(setup, batches, micro)) > room:
        if micro == 1:
            raise ValueError(f"training one example at a time needs {need / MIB:,.0f} MiB, and "
                             f"{room / MIB:,.0f} MiB are free: {advice(setup, batches, 1)}")
        micro -= 1
    return micro


def advice(setup: Setup, batches: Sequence[Sequence[Example]], micro: int) -> str:
    """Flags that would take less memory than `setup`, and how much less, the best one first."""
    length = max(len(e.ids) for batch in batches for e in batch) // 2
    half = [[replace(e, ids=e.ids[:length], labels=e.labels[:length]) for e in b] for b in batches]
    choices = {"--recompute": (replace(setup, recompute=True), batches, micro),
               "--base-bits 4": (replace(setup, base_bits=4), batches, micro),
               f"--micro-batch-size {micro // 2}": (setup, batches, max(1, micro // 2)),
               f"--max-length {length}": (setup, half, micro)}
    now, *less = (sum(fixed(s).values()) + largest(s, b, m)
                  for s, b, m in [(setup, batches, micro), *choices.values()])
    saved = sorted(((now - size, flag) for flag, size in zip(choices, less)), reverse=True)
    return ", ".join(f"{flag} saves {size / MIB:,.0f} MiB" for size, flag in saved if size > 0)


def runtime_bytes(device: str, dtype: torch.dtype) -> int:
    """What Python and the libraries take of what is `available`, seen after a tiny step that wakes
    them. Of a CUDA device's memory what they take, and what other programs do, is not available."""
    config = Config(8, 32, 32, 1, 1, 1, 32, windows=(None,))
    with torch.random.fork_rng(devices=[]):              # training seeds itself
        model = CausalLM(config).to(device, dtype)
        add_experts(model, {"model.layers.0.mlp.up_proj": 2}, rank=1)
        optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()))
        train_step(model, [Example("", [1] * 4, [1] * 4)] * 2, TrainConfig(), 0)
        optimizer.step()
    if torch.device(device).type == "cuda":
        return 0
    compiled = ONEDNN if torch.device(device).type == "cpu" and dtype.itemsize < 4 else 0
    return resident() + compiled


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
