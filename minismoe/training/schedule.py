"""The learning rate of a run: its peak, from the size of the base's weights, and its course."""

import math
from statistics import median

from torch import nn

from ..method.experts import expert_layers

LR = 0.4                      # see `default_lr`
WARMUP, LEAST = 0.05, 10      # share of the steps, and steps: see `learning_rate`


def default_lr(model: nn.Module) -> float:
    """The peak learning rate for the experts of `model`: LR * w^(3/4) / alpha^(1/2), in two digits.

    w is the median over adapted matrices W (out, in) of |W| / (sqrt(out) * in), the Frobenius norm.
    AdamW moves each entry of A and B by the rate, whatever W is, and W x is |W| / sqrt(out) times
    as large as x. The experts' output grows as the rate while only B has moved, and later, when A
    has moved along with x, as rate^2 * alpha * in. To stay in proportion to W x, the rate follows
    |W| at first, and sqrt(w / alpha) later. tests/benchmarks/README.md says how LR and the power
    were found.
    """
    layers = expert_layers(model).values()
    w = median(layer.dense().float().norm().item() / math.sqrt(layer.out_features)
               / layer.in_features for layer in layers)
    alpha = median(layer.scaling * layer.rank for layer in layers)
    return float(f"{LR * w ** 0.75 / math.sqrt(alpha):.1e}")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to the peak over WARMUP of the steps, then half a cosine to 0.

    The warm-up has at least LEAST steps, or half of all. The first steps of AdamW move each entry
    by the rate, however noisy its gradient is, and a run of few steps has no time to mend what they
    break: runs of 26 steps were seen to end at guessing.
    """
    warm = max(1, min(LEAST, steps // 2), round(WARMUP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
