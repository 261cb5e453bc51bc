"""The course of a run: its learning rate, whose peak follows the base's weights, and its freeze."""

import math
from collections.abc import Mapping
from statistics import median

from torch import nn

from ..method.experts import expert_layers
from .plan import TaskPlan

LR = 0.4                      # see `default_lr`
WARMUP, LEAST = 0.05, 10      # share of the steps, and steps: see `learning_rate`
FREEZE = {"answers": 0.8, "loss": 0.4}       # see `freezing_step`


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


def learning_rate(step: int, steps: int, peak: float, since: int = 0) -> float:
    """Linear warm-up to the peak over WARMUP of the steps, then half a cosine to 0.

    The warm-up has at least LEAST steps, or half of all. The first steps of AdamW move each entry
    by the rate, however noisy its gradient is, and a run of few steps has no time to mend what they
    break: runs of 26 steps were seen to end at guessing. since: the step at which the optimizer
    began, from which the rate rises.
    """
    warm = max(1, min(LEAST, steps // 2), round(WARMUP * steps))
    cosine = math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))
    return peak * min(1.0, (step - since + 1) / warm) * (1 + cosine) / 2


def freezing_step(steps: int, plans: Mapping[str, TaskPlan]) -> int:
    """The number of steps after which the mixtures of a run become plain LoRAs.

    A frozen model needs some steps more: the toy's mean exact match over three seeds was 0.972 when
    frozen after 0.8 of the steps, 0.953 after 0.9, 0.920 after 0.95, and 0.963 when routed to the
    end (with a loss on prompts, which the toy has no longer). The best step of free text comes
    early, and only frozen steps may be kept, so a run with free text freezes earlier. At least one
    step follows.
    """
    share = min(FREEZE[plan.judged] for plan in plans.values())
    return max(0, min(round(share * steps), steps - 1))
