"""Ranges of activations, for NPUs: what linear layers read and write, in 16 bits.

Letters: N tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.tasks import Example, collate
from ..method.hooks import hooked
from ..model.decoder import CausalLM
from ..training.evaluate import generate

TOP = 65535                      # the largest activation in 16 bits
TEXTS, BATCH = 24, 8             # of each task, to measure activations on, and at once
PROMPTS, ANSWER = 120, 24        # of --prompts instead, and tokens that the model adds to each
WIDER = (0.999, 1.0), (1.0, 1.0), (1.0, 1.5)     # candidates: quantile of extremes, and factor
LARGEST = 65504                  # of float16
FLOAT_ABOVE = 0.005              # mean error of a tensor above which its layer stays in float16


class Range(NamedTuple):
    """The activations that 16 bits hold: low <= 0 <= high."""

    low: float
    high: float

    def round(self, x: Tensor) -> Tensor:
        """x as 16 bits store it."""
        scale, zero = self.step()
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, TOP)

    def step(self) -> tuple[float, int]:
        """Scale and zero point."""
        scale = max(self.high - self.low, 1e-6) / TOP
        return scale, round(-self.low / scale)


Ranges = dict[str, tuple[Range, Range]]    # linear layer -> of its inputs, of its outputs


def answered(model: CausalLM, texts: Sequence[Sequence[int]], stop_ids: Sequence[int],
             ) -> list[list[int]]:
    """Texts with what the model answers to each of them."""
    texts = [ids[:model.config.max_position_embeddings - ANSWER] for ids in texts]
    answers = generate(model, texts, ANSWER, stop_ids)
    return [[*ids, *answer] for ids, answer in zip(texts, answers)]


@torch.no_grad()
def activation_ranges(model: CausalLM, texts: Sequence[Sequence[int]]) -> Ranges:
    """The ranges of what linear layers read and write, by module name; without those of layers
    whose activations no range holds.

    Three texts of four give the candidates, from the extremes of each token. Every fourth chooses
    among them, by the worst error of a token relative to the token's norm. So a range may cut rare
    outliers, but none that dominate a token.
    """
    extremes = watched(model, [t for i, t in enumerate(texts) if i % 4] or texts,
                       lambda key, x: torch.stack(x.aminmax(dim=-1)))
    choices = {key: [Range(min(0.0, f * low.quantile(1 - q).item()),
                           max(0.0, f * high.quantile(q).item())) for q, f in WIDER]
               for key, (low, high) in extremes.items()}
    errors = watched(model, texts[::4], lambda key, x: torch.stack([
        (r.round(x) - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-6) for r in choices[key]]))
    best, bad = {}, set()
    for key, error in errors.items():                              # (candidates, tokens)
        n = int(error.amax(1).argmin())
        best[key] = choices[key][n]
        if error[n].mean() > FLOAT_ABOVE and key[0] != "lm_head":
            bad.add(key[0])
    return {name: (best[name, 0], best[name, 1]) for name, side in best
            if side == 0 and name not in bad}


def refuse_float16(model: CausalLM, texts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError with the linear layer that reads or writes more than float16 holds. CPUs
    compute such graphs with casts, so that only a GPU would show it."""
    largest = watched(model, texts, lambda key, x: x.abs().amax(-1)[None])
    name, most = max(((name, x.max().item()) for (name, _), x in largest.items()),
                     key=lambda found: (not found[1] <= LARGEST, found[1]))
    if not most <= LARGEST:
        raise ValueError(f"{name} reads or writes {most:.3g} on the texts of the check, and "
                         f"float16 ends at {LARGEST}: take a --precision with float32 activations, "
                         "such as int4-8, or q8 for browsers")


def watched(model: CausalLM, texts: Sequence[Sequence[int]],
            measure: Callable[[tuple[str, int], Tensor], Tensor]) -> dict[tuple[str, int], Tensor]:
    """What measure(key, x (N, .)) returns, (., N) of each text, side by side, for the inputs of
    each linear layer, key (name, 0), and for its outputs, (name, 1)."""
    names: dict[nn.Module, str] = {
        m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    measures = defaultdict[tuple[str, int], list[Tensor]](list)

    def hook(layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        for side, x in enumerate((inputs[0], y)):
            key = names[layer], side
            measures[key].append(measure(key, x.flatten(0, -2).float()))

    with hooked(names, hook), torch.no_grad():
        for start in range(0, len(texts), BATCH):
            part = [Example("", [*text], []) for text in texts[start:start + BATCH]]
            ids, mask, _ = collate(part, 0)
            model.lm_head(model.model(ids, mask)[mask.bool()])
    return {key: torch.cat(parts, 1) for key, parts in measures.items()}
