"""A frozen base in 8 or 4 bits, in the blocks of quantize.py, which exports use too.

One matrix at a time is made of its blocks, in the forward pass and again in the backward one, which
only wants the gradient of what the layer reads. Embeddings, head, norms and biases stay floats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .quantize import Blocks, dequantize, quantize


class QuantizedWeight(nn.Module):
    """A weight (out, in) in blocks, where a layer has its parameter; scales are kept in float16."""

    data: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Tensor, bits: int, dtype: torch.dtype):
        """Quantise `weight`; `dense` gives it back as `dtype`."""
        super().__init__()
        self.bits, self.shape, self.dtype = bits, weight.shape, dtype
        blocks = quantize(weight, bits)
        for name, part in (("data", blocks.data), ("scales", blocks.scales.half()),
                           ("zeros", blocks.zeros)):
            self.register_buffer(name, part)

    @property
    def device(self) -> torch.device:
        return self.scales.device

    def dense(self) -> Tensor:
        """The weight (out, in), made anew."""
        blocks = Blocks(self.bits, self.data, self.scales, self.zeros)
        return dequantize(blocks, self.dtype)[:, :self.shape[1]]


class _Linear(torch.autograd.Function):
    """y = W x + b of a frozen W, which no graph holds: x alone gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.weight.dense(), None, None


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear whose weight is a QuantizedWeight."""

    def __init__(self, linear: nn.Linear, weight: QuantizedWeight):
        """Take the place of `linear`, with its bias."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = weight, linear.bias         # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _Linear.apply(x, self.weight, self.bias)
