"""The weights of a part (see part.py) in few bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.quantize import BlockWeight, quantize
from .gptq import gptq
from .layers import matrix, put_weight
from .part import Part


def round_all(part: Part, names: Sequence[str], R: Tensor | None) -> None:
    """Store matrices that read the same in few bits: in 4, for inputs whose `factor` is R; in 8, or
    without R, each number is rounded to the nearest."""
    if not names or not (way := part.config.form.way_of(names[0])):
        return
    weights = [matrix(part.shipped.get_submodule(name)) for name in names]
    positive = part.config.target == "npu" and way.bits == 8
    blocks = gptq(weights, R, *way) if R is not None and way.bits == 4 else [
        quantize(weight, *way, positive=positive) for weight in weights]
    for name, own in zip(names, blocks):
        put_weight(part.shipped, name, BlockWeight(own, torch.float32))
