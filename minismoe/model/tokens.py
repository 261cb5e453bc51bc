"""Packing: a batch as rows without padding, prefixes that sequences share held once; the KV cache.

Where each token lies follows from the lengths and the tokens alone, so it is worked out on the CPU
and sent to the device at once: nothing waits for the device.

Letters: B batch, T time, N packed tokens, S of them that are read, K key/value heads, C head size,
L taps of a convolution, I its channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..method.loss import to_device
from .config import Config

FEW = 4                # a shared prefix of fewer tokens is not worth the work


class Cache:
    """Keys and values (batch, K, capacity, C) of the tokens so far, from position 0 on, unpadded.
    Convolutions have their last inputs, (batch, L - 1, I), in `inputs` instead, and delta nets a
    memory each, (batch, value heads, key size, value size), in `memories`, float32 or better."""

    def __init__(self, model: Any, batch: int, capacity: int):
        """Room for `capacity` tokens in each of `batch` rows of `model`, a CausalLM."""
        cfg, weight = model.config, model.model.norm.weight
        shape = (batch, cfg.num_key_value_heads, capacity, cfg.head_dim)
        self.keys = {i: weight.new_zeros(shape) for i in cfg.attention_layers}
        self.values = {i: weight.new_zeros(shape) for i in cfg.attention_layers}
        self.inputs = {i: weight.new_zeros(batch, cfg.conv_size - 1, channels)
                       for i, channels in cfg.convolutions.items()}
        memory = (batch, cfg.linear_num_value_heads, cfg.linear_key_head_dim,
                  cfg.linear_value_head_dim)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.memories = {i: weight.new_zeros(memory, dtype=dtype) for i in cfg.delta_layers}
        self.lengths = [0] * batch


class Tokens:
    """The tokens of a batch (B, T) as rows (N, ...) without padding, and where each of them lies.

    A prefix that neighbouring sequences share is packed once, in the first of them. Two sequences
    that begin with a and b, of which d and e are needed, are N = 5 rows:

        input_ids   a b c d        ids            a b c d e
                    a b e .        positions      0 1 2 3 2
                                   batch_rows     0 0 0 0 1
        sources     0 1 2 3        repeats        2 2 1 1 1
                    0 1 4 0        in_batch       0 1 2 3 6
                                   in_sequences   0 1 2 3 6
                                   read           3 4
    """

    ids: Tensor              # (N,) token
    positions: Tensor        # (N,) rotary position, after what the cache holds
    batch_rows: Tensor       # (N,) the sequence that it lies in
    repeats: Tensor          # (N,) how many sequences hold it
    in_batch: Tensor         # (N,) its place among the B * T of the batch
    in_sequences: Tensor     # (N,) the same if the batch is padded on the right
    sources: Tensor          # (B * T,) the row at each place, if padded on the right; any at a pad
    past: Tensor             # (B,) tokens of the cache
    new: Tensor              # (B,) tokens beside them
    read: Tensor | None = None           # (S,) rows whose hidden states are needed; None: all
    places: tuple[Tensor, Tensor]        # (S,) sequence and column of each of these, on the CPU

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, config: Config,
                 device: torch.device, needed: Tensor | None = None, cache: Cache | None = None,
                 read: Tensor | None = None):
        """Of right- or left-padded input_ids and attention_mask (B, T), which follow what `cache`
        holds. needed (B, T) marks tokens that are read; before the first of them, neighbouring
        sequences share what they begin with alike. read (B, T) marks all that are read, by default
        `needed`, and keeps apart what is followed by another token. Tensors on the CPU spare a
        wait."""
        ids, mask = input_ids.cpu(), attention_mask.to("cpu", torch.bool, copy=True)
        self.shape, self.cache, T = mask.shape, cache, mask.shape[1]
        past = torch.tensor(cache.lengths if cache else [0] * len(mask))
        order = mask.cumsum(1) - 1                           # (B, T) number of a token in its row
        self.ends = [n + new for n, new in zip(past.tolist(), mask.sum(1).tolist())]
        repeats, shared = torch.ones_like(order), list[tuple[int, int, int, int]]()
        if needed is not None and not past.any():
            shared = shared_prefixes(ids, mask & ~needed.cpu())
        if read is not None:
            shared = [(first, end, start, stop - 1) for first, end, start, stop in shared]
        for first, end, start, stop in shared:
            mask[first + 1:end, start:stop] = False
            repeats[first, start:stop] = end - first
        rows, columns = mask.nonzero(as_tuple=True)
        numbers = order[rows, columns]                                   # (N,) in their sequence
        packed = {"ids": ids[rows, columns], "positions": numbers + past[rows], "batch_rows": rows,
                  "repeats": repeats[rows, columns], "past": past,
                  "in_batch": rows * T + columns, "in_sequences": rows * T + numbers}
        sources = torch.zeros_like(order)
        sources.view(-1)[packed["in_sequences"]] = torch.arange(len(rows))
        for first, end, start, stop in shared:
            sources[first + 1:end, start:stop] = sources[first, start:stop]
        packed |= {"sources": sources.flatten(), "new": torch.tensor(self.ends) - past}
        if needed is not None:
            packed["read"] = (needed if read is None else read).cpu()[rows, columns].nonzero()[:, 0]
            self.places = rows[packed["read"]], columns[packed["read"]]
        vars(self).update(to_device_together(packed, device))
        self.shared = bool(shared)           # whether any prefix is packed once
        # Of each window of the model, what attention may see; None if just causal.
        self.masks = {window: self._mask(window, device) for window in set(config.windows)}

    def sequences(self, x: Tensor) -> Tensor:
        """(N, heads, C) -> (B, heads, T, C), padded on the right with any tokens: no real one
        attends to them, and what they give is not read."""
        return x.index_select(0, self.sources).view(*self.shape, *x.shape[1:]).transpose(1, 2)

    def flat(self, x: Tensor) -> Tensor:
        """(B, heads, T, C) -> (N, heads * C), the inverse of `sequences`."""
        return x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self.in_sequences)

    def unpack(self, x: Tensor) -> Tensor:
        """Rows (N, ...), or (S, ...) of those that are read, -> (B, T, ...), elsewhere zeros."""
        index = self.in_batch if self.read is None else self.in_batch[self.read]
        y = x.new_zeros(self.shape.numel(), *x.shape[1:])
        return y.index_copy(0, index, x).unflatten(0, self.shape)

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Whether a query may see each key so far, (B, 1, T, keys), or (1, 1, T, T) without a
        cache; None if just causal."""
        T, keys = self.shape[1], max(self.ends) if self.cache else self.shape[1]
        if keys == T and (window is None or window >= T):
            return None
        past = self.past if self.cache else self.past[:1]        # all of them 0
        query = past[:, None, None, None] + torch.arange(T, device=device)[:, None]
        key = torch.arange(keys, device=device)
        visible = key <= query
        return visible if window is None else visible & (key > query - window)


def to_device_together(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Whole numbers on the device, in one copy that nothing waits for."""
    if device.type == "cpu":
        return dict(tensors)
    together = torch.cat([t.flatten() for t in tensors.values()])
    together = together.pin_memory() if device.type == "cuda" else together
    copies = to_device(together, device).split([t.numel() for t in tensors.values()])
    return {name: copy.view(t.shape) for copy, (name, t) in zip(copies, tensors.items())}


def shared_prefixes(input_ids: Tensor, mask: Tensor) -> list[tuple[int, int, int, int]]:
    """Prefixes that all rows of a batch share, and longer ones that groups of neighbours share.

    Only tokens where mask (B, T) is true are shared. Each row is compared with the next one only:
    rows with the same prefix should be neighbours. Each prefix is (first row, last row + 1, first
    token, last token + 1).
    """
    same = (input_ids[1:] == input_ids[:-1]) & mask[1:] & mask[:-1]
    equal = same.cumprod(1).sum(1).tolist()              # (B - 1,) tokens from the first one on
    common, first = min(equal, default=0), 0
    prefixes = [(0, len(mask), 0, common)] if common else []
    for end in range(1, len(mask) + 1):
        if end == len(mask) or equal[end - 1] < common + FEW:
            if end - first > 1:
                prefixes.append((first, end, common, min(equal[first:end - 1])))
            first = end
    return prefixes
