"""Packing: a batch without padding, prefixes that sequences share held once; and the KV cache.

Letters: B batch, T time, N packed tokens, D hidden, K key/value heads, C head size, L taps of a
convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config

FEW = 4                # a shared prefix of fewer tokens is not worth the work


class Cache:
    """Keys and values (batch, K, capacity, C) of the tokens so far, from position 0 on, unpadded.
    Convolutions have their last inputs, (batch, L - 1, D), in `states` instead."""

    def __init__(self, model: Any, batch: int, capacity: int):
        """Room for `capacity` tokens in each of `batch` rows of `model`, a CausalLM."""
        cfg, weight = model.config, model.model.norm.weight
        shape = (batch, cfg.num_key_value_heads, capacity, cfg.head_dim)
        self.keys = {i: weight.new_zeros(shape) for i in cfg.attention_layers}
        self.values = {i: weight.new_zeros(shape) for i in cfg.attention_layers}
        self.states = {i: weight.new_zeros(batch, cfg.conv_size - 1, cfg.hidden_size)
                       for i in cfg.conv_layers}
        self.lengths = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.used = 0        # an upper bound of lengths, kept on the CPU to avoid a synchronisation


# Prefixes, each as (first row, last row + 1, first token, last token + 1).
Shared = Sequence[tuple[int, int, int, int]]


class Tokens:
    """The places of one batch's (B, T) tokens in packed tensors (N, ...), without padding.

    Tokens of a shared prefix are packed once, in the first of the rows that share it.
    rows, positions (N,): sequence and rotary position of each packed token. slots (N,): its place
    in right-padded (B*T). copies (N,), or None if nothing is shared: how many sequences have it.
    masks: for each window, what attention may see.
    """

    def __init__(self, attention_mask: Tensor, config: Config, cache: Cache | None = None,
                 shared: Shared = ()):
        mask = attention_mask.to(torch.bool, copy=True)
        self.shape, self.device, self.shared, self.cache = mask.shape, mask.device, shared, cache
        T = mask.shape[1]
        order = mask.cumsum(1) - 1                                       # (B, T) index in its row
        copies = torch.ones_like(order)
        for first, end, start, stop in shared:
            mask[first + 1:end, start:stop] = False
            copies[first, start:stop] = end - first
        self.rows, columns = mask.nonzero(as_tuple=True)
        self.where = None if len(self.rows) == mask.numel() else self.rows * T + columns
        local = self.pack(order)
        self.slots = self.rows * T + local
        self.sources = torch.full_like(order, len(local))   # (B, T) slot -> token; N: none
        self.sources.view(-1)[self.slots] = torch.arange(len(local), device=self.device)
        for first, end, start, stop in shared:
            self.sources[first + 1:end, start:stop] = self.sources[first, start:stop]
        self.copies = self.pack(copies) if shared else None
        self.new = order[:, -1] + 1                                      # (B,) tokens of each row
        past, longest = torch.zeros_like(self.new), T
        if cache is not None:
            past = cache.lengths.clone()
            cache.lengths += self.new
            longest = cache.used = cache.used + T
        self.positions = local + past[self.rows]
        self.masks = {w: self._mask(w, past, longest) for w in set(config.windows)}

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...), without padding."""
        x = x.flatten(0, 1)
        return x if self.where is None else x.index_select(0, self.where)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), with zeros where no token was packed."""
        if self.where is None:
            return x.unflatten(0, self.shape)
        y = x.new_zeros(self.shape.numel(), *x.shape[1:])
        return y.index_copy_(0, self.where, x).unflatten(0, self.shape)

    def sequences(self, x: Tensor) -> Tensor:
        """(N, heads, C) -> (B, heads, T, C), padded on the right with zeros."""
        y = x
        if self.where is not None:           # select from (N + 1, heads * C), whose last row is 0
            y = F.embedding(self.sources, F.pad(x.flatten(1), (0, 0, 0, 1)))
        return y.view(*self.shape, *x.shape[1:]).transpose(1, 2)

    def flat(self, x: Tensor) -> Tensor:
        """(B, heads, T, C) -> (N, heads * C), the inverse of `sequences`."""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return x if self.where is None else x.index_select(0, self.slots)

    def _mask(self, window: int | None, past: Tensor, keys: int) -> Tensor | None:
        """Whether a query may see each of so many keys, (B, 1, T, keys); None if just causal."""
        if self.cache is None and (window is None or window >= keys):
            return None
        query = past[:, None, None, None] + torch.arange(self.shape[1], device=self.device)[:, None]
        key = torch.arange(keys, device=self.device)
        seen = key <= query
        return seen if window is None else seen & (key > query - window)


def shared_prefixes(input_ids: Tensor, mask: Tensor) -> Shared:
    """Prefixes that all rows of a batch share, and longer ones that groups of neighbours share.

    Only tokens where mask (B, T) is true are shared. Each row is compared with the next one only:
    rows with the same prefix should be neighbours.
    """
    same = (input_ids[1:] == input_ids[:-1]) & mask[1:] & mask[:-1]
    alike = same.cumprod(1).sum(1).tolist()                              # (B - 1,) tokens
    everyone, first = min(alike, default=0), 0
    found = [(0, len(mask), 0, everyone)] if everyone else []
    for end in range(1, len(mask) + 1):
        if end == len(mask) or alike[end - 1] < everyone + FEW:
            if end - first > 1:
                found.append((first, end, everyone, min(alike[first:end - 1])))
            first = end
    return found
