"""How many passes a run takes over its lines, its learning rate (the peak, from the size of the
base's weights, and its course), and what keeps it from knowing few lines by heart alone."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from torch import nn

from ..data.tasks import Example, are_short
from ..method.experts import expert_layers

PASSES, LEAST_PASSES = 120, 3                # see `default_epochs`
LR = 0.4                      # see `default_lr`
PROMPTS, SMOOTHING = 0.2, 0.1     # see `default_prompt_loss_weight` and `default_smoothing`
WARMUP, LEAST = 0.05, 10      # share of the steps, and steps: see `learning_rate`


def default_epochs(examples: Sequence[Example]) -> int:
    """How many passes a run takes over its training lines: PASSES / sqrt(lines), and LEAST_PASSES
    at least: 12 over 100 lines, 6 over 400, 3 from 1,200 on.

    few.py in tests/benchmarks measured PASSES. Free text, whose loss rises again after few passes,
    gets LEAST_PASSES.
    """
    if not are_short([e.supervised for e in examples]):
        return LEAST_PASSES
    return max(LEAST_PASSES, round(PASSES / math.sqrt(len(examples))))


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


def default_prompt_loss_weight(model: nn.Module) -> float:
    """How much a prompt's token counts beside one of an answer, in the loss of training.

    With few lines, the loss of prompts keeps the model from knowing its lines by heart alone (Shi
    et al. 2024, arXiv 2405.14394). In a mixture it would teach routers to share out the words of
    prompts, and merging would lose what they do for answers: the toy fell from 99 to 82 %.
    """
    return 0.0 if is_mixture(model) else PROMPTS


def default_smoothing(model: nn.Module, examples: Sequence[Example]) -> float:
    """The probability that the targets of training leave to all tokens alike (Szegedy et al. 2016,
    arXiv 1512.00567): with few lines, answers are certain long before they are right. Free text and
    mixtures were not found to gain by it."""
    short = are_short([e.supervised for e in examples])
    return SMOOTHING if short and not is_mixture(model) else 0.0


def is_mixture(model: nn.Module) -> bool:
    return any(layer.experts > 1 for layer in expert_layers(model).values())


def defaults(model: nn.Module, examples: Sequence[Example]) -> dict[str, Any]:
    """These numbers, by their names in TrainConfig."""
    return {"lr": default_lr(model), "epochs": default_epochs(examples),
            "prompt_loss_weight": default_prompt_loss_weight(model),
            "label_smoothing": default_smoothing(model, examples)}


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
