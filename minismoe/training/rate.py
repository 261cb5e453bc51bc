"""The learning rate: its peak, from the size of the base's weights, and its course."""

import math
from statistics import median

from torch import nn

from ..method.experts import expert_layers

LR = 0.12                     # see `default_lr`


def default_lr(model: nn.Module) -> float:
    """The peak learning rate for the experts of `model`: LR * sqrt(w / alpha), in two digits.

    w is the median over adapted matrices W (out, in) of |W| / (sqrt(out) * in), the Frobenius norm.
    A step of AdamW moves each entry of A and B by the rate, whatever W is. Where these moves go
    along with x, A x grows as rate * in * |x|, and the experts' output as rate^2 * alpha * in, in
    units of the size of x; W x has |W| / sqrt(out). The rate keeps the ratio of both the same on
    any base. tests/benchmarks/rates.py measured LR.
    """
    layers = expert_layers(model).values()
    w = median(layer.dense().float().norm().item() / math.sqrt(layer.out_features)
               / layer.in_features for layer in layers)
    alpha = median(layer.scaling * layer.rank for layer in layers)
    return float(f"{LR * math.sqrt(w / alpha):.1e}")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up to the peak over a share of the steps, then half a cosine to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
