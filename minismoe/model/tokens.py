"""Packing: a batch without padding, prefixes that sequences share held once; and the KV cache.

Letters: B batch, T time, N packed tokens, D hidden, K key/value heads, C head size, L taps of a
convolution. Both backwards are compared with autograd by test_hand_written_backwards in
tests/model/test_decoder.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        self.capacity = capacity
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
        mask = attention_mask.bool()
        self.shape, self.device, self.shared, self.cache = mask.shape, mask.device, shared, cache
        B, T = mask.shape
        rows = torch.arange(B, device=self.device)[:, None].expand_as(mask)
        order = mask.cumsum(1) - 1                                       # (B, T) index in its row
        copies = torch.ones_like(order)
        if shared:
            mask = mask.clone()
        for first, end, start, stop in shared:
            mask[first + 1:end, start:stop] = False
            copies[first, start:stop] = end - first
        self.where = None if mask.all() else mask.reshape(-1).nonzero().squeeze(1)
        self.rows, local = self.pack(rows.reshape(-1)), self.pack(order.reshape(-1))
        self.slots = self.rows * T + local
        self.copies = self.pack(copies.reshape(-1)) if shared else None
        self.new = order[:, -1] + 1                                      # (B,) tokens of each row
        self.positions, longest = local, T
        if cache is not None:
            self.positions = local + cache.lengths[self.rows]
            cache.lengths += self.new
            longest = cache.used = min(cache.used + T, cache.capacity)
        self.masks = {w: self._mask(w, longest) for w in set(config.windows)}

    def pack(self, x: Tensor) -> Tensor:
        """(B*T, ...) -> (N, ...), without padding."""
        return x if self.where is None else x.index_select(0, self.where)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), with zeros at padding."""
        return self._spread(x, self.where)

    def sequences(self, x: Tensor) -> Tensor:
        """(N, heads, C) -> (B, heads, T, C), padded on the right."""
        return self._spread(x, self.slots).transpose(1, 2)

    def _spread(self, x: Tensor, places: Tensor | None) -> Tensor:
        """(N, ...) -> (B, T, ...), with token n at places[n] of the B*T."""
        if self.where is None or places is None:
            return x.unflatten(0, self.shape)
        return _Spread.apply(x, places, self.shape, self.shared)

    def flat(self, x: Tensor) -> Tensor:
        """(B, heads, T, C) -> (N, heads * C), the inverse of `sequences`."""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return x if self.where is None else _Gather.apply(x, self.slots)

    def _mask(self, window: int | None, keys: int) -> Tensor | None:
        """Whether a query may see each of so many keys, (B, 1, T, keys); None if just causal."""
        if self.cache is None and (window is None or window >= keys):
            return None
        query = self.sequences(self.positions[:, None, None]).to(self.device)     # (B, 1, T, 1)
        key = torch.arange(keys, device=self.device)
        seen = key <= query
        return seen if window is None else seen & (key > query - window)


class _Spread(torch.autograd.Function):
    """Packed tokens to their places in (B, T, ...); shared prefixes are copied to each sequence.

    y[places] = x, then y[other rows] = y[first row] for each prefix
    dx = dy[places], where dy[first row] is the sum of dy over the rows of each prefix
    Places differ, so the backward copies where autograd would add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, shape: Sequence[int],
                shared: Shared) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shared = shared
        y = x.new_zeros(math.prod(shape), *x.shape[1:]).index_copy_(0, places, x)
        y = y.unflatten(0, shape)
        for first, end, start, stop in shared:
            y[first + 1:end, start:stop] = y[first, start:stop].clone()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.shared:
            dy = dy.clone()
        for first, end, start, stop in ctx.shared:
            dy[first, start:stop] = dy[first:end, start:stop].sum(0)
        return dy.flatten(0, 1).index_select(0, ctx.saved_tensors[0]), None, None, None


class _Gather(torch.autograd.Function):
    """y = x[places] of x (M, ...); all places differ, so the backward copies: dx[places] = dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return dy.new_zeros(ctx.rows, *dy.shape[1:]).index_copy_(0, places, dy), None


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
