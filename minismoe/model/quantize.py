"""Weights as blocks of 32 small integers, a scale and a zero point: w = scale * (q - zero).

Each block takes the better of two grids: a symmetric one, whose zero is the middle of the range,
and one that reaches from its smallest weight to its largest. In 4 bits both are also tried
clipped, because a single large weight makes the steps of 31 others coarse.

Letters: N outputs, K inputs, G = ceil(K / 32) blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
CLIPS = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7), 8: (1.0,)}     # of the range; 8 bits need no clip
ROWS = 1 << 18                  # elements computed at a time: what a cache holds
MANY = 1 << 23                  # the same on other devices than a CPU


@dataclass(frozen=True)
class Blocks:
    """Integers as they are stored, low nibble first: data (N, G, 32 * bits / 8), uint8.

    scales (N, G), float32; zeros (N, ceil(G * bits / 8)), uint8, packed as the data is.
    """

    bits: int
    data: Tensor
    scales: Tensor
    zeros: Tensor


def quantize(weight: Tensor, bits: int) -> Blocks:
    """Blocks of a weight (N, K) in 4 or 8 bits; K is padded with zeros to a multiple of 32."""
    step = _step(weight)
    data, scales, zeros = zip(*(_rows(weight[n:n + step], bits)
                                for n in range(0, len(weight), step)))
    return Blocks(bits, torch.cat(data), torch.cat(scales), torch.cat(zeros))


def _step(weight: Tensor) -> int:
    """Rows that are computed at a time."""
    return max(1, (ROWS if weight.device.type == "cpu" else MANY) // weight.shape[1])


def _rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    w = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    best, scales, zeros = (w.new_full((*w.shape[:2], 1), torch.inf) for _ in range(3))
    for scale, zero in _grids(w, bits):
        error = (_round(w, scale, zero, bits).sub_(zero).mul_(scale) - w).square_().sum(2, True)
        better = error < best
        best, scales, zeros = (torch.where(better, new, old) for new, old in (
            (error, best), (scale, scales), (zero, zeros)))
    q = _round(w, scales, zeros, bits).byte()
    return _pack(q, bits), scales.squeeze(2), _pack(zeros.squeeze(2).byte(), bits)


def _round(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (w / scale).round_().add_(zero).clamp_(0, 2 ** bits - 1)


def _grids(w: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(scale, zero) candidates (N, G, 1) of w (N, G, 32)."""
    most = 2 ** bits - 1
    low, high = w.amin(2, True).clamp(max=0), w.amax(2, True).clamp(min=0)   # 0 stays exact
    tiny = 2.0 ** -20                # 16 steps of float16, which scales may become
    # A symmetric grid has one step more on one side of its zero: the larger weight goes there.
    far, middle = torch.maximum(-low, high), torch.where(high > -low, most // 2, most // 2 + 1.0)
    reach = (high - low).clamp(min=tiny)
    for clip in CLIPS[bits]:
        yield (far * clip / (most // 2 + 1)).clamp(min=tiny), middle
        yield (reach * clip / most).clamp(min=tiny), (-low / reach * most).round()


def _pack(q: Tensor, bits: int) -> Tensor:
    """uint8 (..., n) below 2^bits -> (..., ceil(n * bits / 8)), the first in the low nibble."""
    if bits == 8:
        return q
    q = F.pad(q, (0, q.shape[-1] % 2))
    return q[..., ::2] | q[..., 1::2] << 4


def columns(blocks: Blocks, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """What DequantizeLinear reads along axis 0: data (K, N), scales (G, N) and zeros (G, N).

    data and zeros are flat uint8, in which 4-bit values are packed on across the ends of rows.
    """
    bits, G = blocks.bits, blocks.scales.shape[1]
    data = unpack(blocks.data, bits).flatten(1)[:, :inputs]
    zeros = unpack(blocks.zeros, bits)[:, :G]
    return _pack(data.T.flatten(), bits), blocks.scales.T, _pack(zeros.T.flatten(), bits)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of packing, with what padded it: (..., n) -> (..., n * 8 / bits)."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantize(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, 32 * G), computed in float32 and rounded once; only a few rows are float32 at a time."""
    N, G = blocks.scales.shape
    weight = torch.empty(N, G * BLOCK, dtype=dtype, device=blocks.scales.device)
    step = _step(weight)
    for part in (slice(n, n + step) for n in range(0, N, step)):
        zeros = unpack(blocks.zeros[part], blocks.bits)[:, :G, None].float()
        q = unpack(blocks.data[part], blocks.bits).float()
        weight[part] = q.sub_(zeros).mul_(blocks.scales[part, :, None]).flatten(1)
    return weight
