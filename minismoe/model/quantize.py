"""Weights in 8 or 4 bits, for exports and for a frozen base that is trained on.

Blocks of 32, 64 or 128 weights share one scale and one zero point: w = scale * (q - zero), with
integers q. Each block takes the best of several grids: symmetric ones, whose zero is the middle of
the range, and ones from its smallest weight to its largest; in 4 bits also clipped ones, because a
single large weight makes the steps of the others coarse.

Letters: N outputs, K inputs, G = ceil(K / size) blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCKS = (32, 64, 128)               # weights that may share a scale
BLOCK = BLOCKS[0]                    # if nothing else is asked for
CLIPS = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7), 8: (1.0,)}     # shares of the range that are tried
ON_CPU, ON_GPU = 1 << 18, 1 << 23    # weights computed at a time; a CPU's cache holds the former


@dataclass(frozen=True)
class Blocks:
    """A quantised weight. In 4 bits, a byte holds two values, the first in the low nibble.

    shape (N, K), data (N, G, size * bits / 8) uint8, scales (N, G) float,
    zeros (N, ceil(G * bits / 8)) uint8. Rows are padded with zeros to whole blocks.
    """

    bits: int
    size: int
    shape: torch.Size
    data: Tensor
    scales: Tensor
    zeros: Tensor


def quantize(weight: Tensor, bits: int, size: int = BLOCK) -> Blocks:
    """Blocks of `size` weights, in 4 or 8 bits, of a weight (N, K)."""
    parts, step = [], rows_at_a_time(weight)
    for n in range(0, len(weight), step):
        w = F.pad(weight[n:n + step].float(), (0, -weight.shape[1] % size))
        w = w.unflatten(1, (-1, size))
        best, scales, zeros = (w.new_full((*w.shape[:2], 1), torch.inf) for _ in range(3))
        for scale, zero in _grids(w, bits):
            error = (_round(w, scale, zero, bits).sub_(zero).mul_(scale) - w).square_().sum(2, True)
            better = error < best
            best, scales, zeros = (torch.where(better, new, old) for new, old in (
                (error, best), (scale, scales), (zero, zeros)))
        q = _round(w, scales, zeros, bits).byte()
        parts.append((_pack(q, bits), scales.squeeze(2), _pack(zeros.squeeze(2).byte(), bits)))
    return Blocks(bits, size, weight.shape, *(torch.cat(part) for part in zip(*parts)))


def rows_at_a_time(weight: Tensor) -> int:
    """Rows that are computed at a time, so that they stay in a CPU's cache."""
    return max(1, (ON_CPU if weight.device.type == "cpu" else ON_GPU) // weight.shape[1])


def _round(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (w / scale).round_().add_(zero).clamp_(0, 2 ** bits - 1)


def _grids(w: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(scale, zero) candidates (N, G, 1) of w (N, G, size)."""
    most = 2 ** bits - 1
    low, high = w.amin(2, True).clamp(max=0), w.amax(2, True).clamp(min=0)   # 0 stays exact
    tiny = 2.0 ** -20                # 16 steps of float16, which scales may be stored in
    # A symmetric grid has one step more on one side of its zero: the side of the largest weight.
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


def columns(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """data (K, N), scales (G, N) and zeros (G, N), as ONNX's DequantizeLinear reads them on axis 0.

    data and zeros are flat uint8; in 4 bits, values are packed without a gap between rows.
    """
    bits, G = blocks.bits, blocks.scales.shape[1]
    data = unpack(blocks.data, bits).flatten(1)[:, :blocks.shape[1]]
    zeros = unpack(blocks.zeros, bits)[:, :G]
    return _pack(data.T.flatten(), bits), blocks.scales.T, _pack(zeros.T.flatten(), bits)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`, padding included: (..., n) -> (..., n * 8 / bits)."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantize(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (N, K), computed in float32, a few rows at a time, and rounded to `dtype`."""
    (N, K), G = blocks.shape, blocks.scales.shape[1]
    weight = torch.empty(N, K, dtype=dtype, device=blocks.scales.device)
    step = rows_at_a_time(weight)
    for part in (slice(n, n + step) for n in range(0, N, step)):
        zeros = unpack(blocks.zeros[part], blocks.bits)[:, :G, None].float()
        q = unpack(blocks.data[part], blocks.bits).float()
        weight[part] = q.sub_(zeros).mul_(blocks.scales[part, :, None]).flatten(1)[:, :K]
    return weight


class QuantizedWeight(nn.Module):
    """A frozen weight (N, K) in blocks, with float16 scales; `dense` returns it as `dtype`."""

    data: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Tensor, bits: int, dtype: torch.dtype):
        super().__init__()
        self.bits, self.shape, self.dtype = bits, weight.shape, dtype
        blocks = quantize(weight, bits)
        self.register_buffer("data", blocks.data)
        self.register_buffer("scales", blocks.scales.half())
        self.register_buffer("zeros", blocks.zeros)

    @property
    def device(self) -> torch.device:
        return self.scales.device

    def dense(self) -> Tensor:
        """The weight (N, K), dequantised anew at each call."""
        blocks = Blocks(self.bits, BLOCK, self.shape, self.data, self.scales, self.zeros)
        return dequantize(blocks, self.dtype)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that dequantises its frozen W in the backward again, and so does not keep it.

    y = x W^T + b;   dx = dy W
    Compared with autograd in tests/model/test_quantized_base.py,
    test_outputs_and_gradients_are_those_of_the_rounded_weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.weight.dense(), None, None


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear whose weight is a QuantizedWeight, in place of `linear`."""

    def __init__(self, linear: nn.Linear, weight: QuantizedWeight):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = weight, linear.bias         # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _FrozenLinear.apply(x, self.weight, self.bias)
