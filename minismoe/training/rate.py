"""The learning rate: its peak, from the size of the base's weights, and its course."""

import math
from statistics import median

from torch import nn

from ..method.experts import expert_layers

LR = 0.4                      # see `default_lr`


def default_lr(model: nn.Module) -> float:
    """The peak learning rate for the experts of `model`: LR * w^(3/4) / alpha^(1/2), in two digits.

    w is the median over adapted matrices W (out, in) of |W| / (sqrt(out) * in), the Frobenius norm.
    A step of AdamW moves each entry of A and B by the rate, whatever W is, and W x has the size
    |W| / sqrt(out) in units of the size of x. At first only B has moved, and the experts' output
    has grown as the rate; once A has moved along with x, A x grows as rate * in, and the output as
    rate^2 * alpha * in. A rate that keeps output / W x the same on any base goes with w in the
    first case and with sqrt(w / alpha) in the second. Runs lie between the two:
    tests/benchmarks/rates.py measured LR and the power of w.
    """
    layers = expert_layers(model).values()
    w = median(layer.dense().float().norm().item() / math.sqrt(layer.out_features)
               / layer.in_features for layer in layers)
    alpha = median(layer.scaling * layer.rank for layer in layers)
    return float(f"{LR * w ** 0.75 / math.sqrt(alpha):.1e}")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up to the peak over a share of the steps, then half a cosine to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
