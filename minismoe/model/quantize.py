"""Weights in 8 or 4 bits, for exports and for a frozen base that is trained on.

Blocks of 32, 64 or 128 weights share one scale: w = scale * (q - zero), with integers q from 0 to
2^bits - 1 and zero = 2^(bits - 1). The scale takes the largest weight of a block to q = 0, and so
is negative if that weight is positive. Scales and zeros that were searched for the least squared
error did worse: they shrink the largest weights, which matter most. SmolLM2-135M in 4 bits answered
64 % of three tasks with them, and 69 % without.

Letters: N outputs, K inputs, G = ceil(K / size) blocks in a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCKS = (32, 64, 128)               # weights that may share a scale
BLOCK = BLOCKS[0]                    # if nothing else is asked for
ROW = -1                             # in place of a size: a block as long as the row
TINY = 2.0 ** -20         # the least scale: 16 steps of float16, which scales may be stored in
ON_CPU, ON_GPU = 1 << 18, 1 << 23    # weights computed at a time; a CPU's cache holds the former


@dataclass(frozen=True)
class Blocks:
    """A quantised weight. In 4 bits, a byte holds two values, the first in the low nibble.

    shape (N, K), data (N, G, size * bits / 8) uint8, scales (N, G) float. Zeros pad the last block.
    """

    bits: int
    size: int
    shape: torch.Size
    data: Tensor
    scales: Tensor


def quantize(weight: Tensor, bits: int, size: int = BLOCK, positive: bool = False) -> Blocks:
    """Blocks of `size` weights (ROW: of whole rows), in 4 or 8 bits, of a weight (N, K)."""
    data, scales, zero = [], [], 1 << (bits - 1)
    size = weight.shape[1] if size == ROW else size
    for rows in few_rows(weight):
        w = F.pad(weight[rows].float(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
        scale = block_scales(w, zero, positive)
        q = (w / scale).round_().add_(zero).clamp_(0, 2 * zero - 1).byte()
        data.append(pack(q, bits))
        scales.append(scale.squeeze(2))
    return Blocks(bits, size, weight.shape, torch.cat(data), torch.cat(scales))


def block_scales(w: Tensor, zero: int, positive: bool = False) -> Tensor:
    """The scales (..., 1) of blocks of weights (..., n); `positive`, as NPUs take them."""
    low, high = w.amin(-1, True), w.amax(-1, True)
    if positive:                         # q is at least 1
        return (torch.maximum(high, -low) / (zero - 1)).clamp_min(TINY)
    scale = torch.where(high > -low, high, low) / -zero
    return torch.where(scale.abs() < TINY, TINY, scale)


def few_rows(weight: Any) -> list[slice]:
    """Slices of the rows of a weight (N, K), of about ON_CPU or ON_GPU weights."""
    most = ON_CPU if weight.device.type == "cpu" else ON_GPU
    step = max(1, most // weight.shape[1])
    return [slice(n, n + step) for n in range(0, weight.shape[0], step)]


def pack(q: Tensor, bits: int) -> Tensor:
    """uint8 (..., n) below 2^bits -> (..., ceil(n * bits / 8)), the first in the low nibble."""
    if bits == 8:
        return q
    q = F.pad(q, (0, q.shape[-1] % 2))
    return q[..., ::2] | q[..., 1::2] << 4


def columns(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """data (K, N) and scales (G, N), as ONNX's DequantizeLinear reads them on axis 0. data is flat
    uint8; in 4 bits, values are packed without a gap between rows."""
    data = unpack(blocks.data, blocks.bits).flatten(1)[:, :blocks.shape[1]]
    return pack(data.T.flatten(), blocks.bits), blocks.scales.T


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, padding included: (..., n) -> (..., n * 8 / bits)."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantize(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (N, K), computed in float32, a few rows at a time, and rounded to `dtype`."""
    N, K = blocks.shape
    weight = torch.empty(N, K, dtype=dtype, device=blocks.scales.device)
    for rows in few_rows(weight):
        q = unpack(blocks.data[rows], blocks.bits).float().sub_(1 << (blocks.bits - 1))
        weight[rows] = q.mul_(blocks.scales[rows, :, None]).flatten(1)[:, :K]
    return weight


class _Multiply(torch.autograd.Function):
    """y = x W^T + b;   dx = dy W. The backward computes W again instead of keeping it. Compared
    with autograd in tests/model/test_quantized_base.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.weight.dense(), None, None


class BlockWeight(nn.Module):
    """A frozen weight (N, K) stored in blocks; each call of `dense` computes it in `dtype`."""

    data: Tensor
    scales: Tensor

    def __init__(self, blocks: Blocks, dtype: torch.dtype):
        super().__init__()
        self.bits, self.size, self.shape, self.dtype = blocks.bits, blocks.size, blocks.shape, dtype
        self.register_buffer("data", blocks.data)
        self.register_buffer("scales", blocks.scales)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: (..., K) -> (..., N)."""
        return _Multiply.apply(x, self, bias)

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.bits, self.size, self.shape, self.data, self.scales)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight (N, K)."""
        return dequantize(self.blocks, self.dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """Some of its rows (n, K)."""
        shape = torch.Size((len(numbers), self.shape[1]))
        return dequantize(Blocks(self.bits, self.size, shape, self.data[numbers],
                                 self.scales[numbers]), self.dtype)


class WideWeight(nn.Module):
    """A frozen weight (N, K) that stays as it is stored, perhaps in a mapped file; each call of
    `dense` converts it to `dtype`."""

    def __init__(self, stored: Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.stored, self.shape = nn.Parameter(stored, requires_grad=False), stored.shape

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: (..., K) -> (..., N)."""
        return _Multiply.apply(x, self, bias)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight (N, K)."""
        return self.stored.to(self.dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """Some of its rows (n, K)."""
        return self.stored[numbers].to(self.dtype)


class BlockLinear(nn.Linear):
    """An nn.Linear of a weight that is computed when it is needed, as a BlockWeight is."""

    weight: Any

    def __init__(self, weight: Any, bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias                # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.weight(x, self.bias)


class BlockEmbedding(nn.Module):
    """An embedding of such a weight, of which the rows of given tokens alone are computed."""

    def __init__(self, weight: Any):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) -> (..., K)."""
        return self.weight.rows(ids.flatten()).unflatten(0, ids.shape)
