"""token_weights.py against autograd, text by text, in float64; and what rounding makes of them."""

import itertools
import math
from typing import Any

import pytest
import torch
from mixture import batch, model_of
from tiny import FAMILIES, SIZES
from torch import Tensor

from minismoe.export.calibration import Calibration, State
from minismoe.export.gptq import factor
from minismoe.export.layers import HEAD
from minismoe.method.experts import linear_layers
from minismoe.method.loss import IGNORE
from minismoe.model.decoder import CausalLM, Config

SHARED = 2                               # tokens that all texts begin with
ANSWERS = ((0, 2), (1, 2), (1, 4), (5, 3), (6, 2))       # texts, and places of tokens in them
MODEL: Any = model_of().requires_grad_(False)


def texts_of(pad: str) -> tuple[Tensor, Tensor, Tensor]:
    """Eight texts that begin alike, of whose tokens some are answers. What comes before three of
    these is what all texts begin with."""
    ids, mask, _ = batch(0, pad=pad)
    labels, first = torch.full_like(ids, IGNORE), mask.int().argmax(1)
    for row, start in zip(ids, first):
        row[start:start + SHARED] = torch.tensor([1, 2])
    for text, place in ANSWERS:
        labels[text, first[text] + place] = ids[text, first[text] + place]
    return ids, mask, labels


def gradient(ids: Tensor, place: int) -> dict[str, Tensor]:
    """{module: dL/dy (T, out)} of one text (T,) and one answer, by the definition of L."""
    outputs = dict[str, Tensor]()
    layers = linear_layers(MODEL) | {HEAD: MODEL.lm_head}
    handles = [m.register_forward_hook(lambda m, args, y, name=name: outputs.update({name: y}))
               for name, m in layers.items()]
    handles.append(MODEL.model.embed_tokens.register_forward_hook(
        lambda m, args, y: y.requires_grad_()))
    logits = MODEL(ids[None])[0, place - 1]
    for handle in handles:
        handle.remove()
    second, first = logits.sort().values[-2:]
    loss = (first - second) / (1 + math.exp((first - second).item() / 4))
    found = torch.autograd.grad(loss, [*outputs.values()])
    return {name: d.view(len(ids), -1) for name, d in zip(outputs, found)}


@pytest.mark.parametrize("pad", ["right", "left"])
def test_the_mean_over_signs_equals_autograd_of_each_answer(pad: str) -> None:
    ids, mask, labels = texts_of(pad)
    state = State(MODEL, (ids, mask, labels))
    assert len(state.answers) == len(ANSWERS)
    every = [state.token_weights(MODEL, torch.tensor(signs))
             for signs in itertools.product((1, -1), repeat=len(ANSWERS))]
    assert {HEAD, *linear_layers(MODEL)} == {*every[0]}
    of_answers = [(text, gradient(ids[text][mask[text] > 0], place)) for text, place in ANSWERS]
    sources = state.tokens.sources.view(ids.shape)
    for name in every[0]:
        wanted = torch.zeros(len(state.tokens.ids)).double()
        for text, of in of_answers:
            wanted.index_add_(0, sources[text, :len(of[name])], of[name].square().sum(1))
        found = torch.stack([of[name] for of in every]).mean(0)
        torch.testing.assert_close(found, wanted)


def test_a_gram_matrix_counts_tokens_by_their_weights() -> None:
    """Of the matrices that read the same x, and of how often a token is there."""
    calibration = Calibration(MODEL, {"a": [texts_of("right")]})
    calibration.weigh()
    for names, x in calibration.run_layer(0).items():
        w = sum(calibration.token_weights[name] for name in names) * calibration.times.sum()
        w /= sum(calibration.token_weights[name].sum() for name in names)
        rows = x * (0.1 * calibration.times + 0.9 * w).sqrt()[:, None]
        torch.testing.assert_close(calibration.factor(names, x), factor(rows))


def test_texts_without_answers_count_as_often_as_they_are_there() -> None:
    ids, mask, labels = texts_of("right")
    calibration = Calibration(MODEL, {"a": [(ids, mask, torch.full_like(labels, IGNORE))]})
    calibration.weigh()
    (names, x), *_ = calibration.run_layer(0).items()
    rows = x * calibration.times.sqrt()[:, None]
    assert x is not None and not calibration.token_weights
    torch.testing.assert_close(calibration.factor(names, x), factor(rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_family_has_weights(family: str) -> None:
    kind, changes = FAMILIES[family]
    model = CausalLM(Config.from_dict(SIZES | {"model_type": kind} | changes)).eval()
    calibration = Calibration(model.requires_grad_(False), {"a": [texts_of("right")]})
    calibration.weigh()
    assert calibration.token_weights.keys() == {HEAD, *linear_layers(model)}
    assert all(w.isfinite().all() and w.sum() > 0 for w in calibration.token_weights.values())
