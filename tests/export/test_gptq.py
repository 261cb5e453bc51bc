"""GPTQ against its definition in float64, and against plain rounding by what a model writes."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture import model_of, tasks
from torch import Tensor, nn

from minismoe.data.tasks import Example, collate
from minismoe.export.gptq import (
    RIDGE,
    fitted,
    gptq,
    layer_calls,
    layer_sums,
    own_tokens,
    quantize_model,
    refine,
    round_weights,
)
from minismoe.export.heal import sharing_copy
from minismoe.model.quantize import dequantize, quantize, unpack
from minismoe.model.tokens import Tokens


def by_definition(W: Tensor, H: Tensor, size: int, damping: float) -> Tensor:
    """Integers (N, K): each column is rounded, then all later ones are the least-squares answer.

    With the columns up to k fixed, the rest moves by -e H^-1[k, rest] / H^-1[k, k], where H is
    that of the columns from k on.
    """
    W, H = W.double().clone(), H.double() / H.double().diagonal().mean()
    H = H + damping * torch.eye(len(H), dtype=torch.float64)
    found = torch.zeros(W.shape)
    for k in range(W.shape[1]):
        if k % size == 0:
            block = W[:, k:k + size]
            largest = block.gather(1, block.abs().argmax(1, True))
            scale = largest / -8
        q = (W[:, k:k + 1] / scale).round().clamp(-8, 7)
        inverse = torch.linalg.inv(H[k:, k:])
        W[:, k:] -= (W[:, k:k + 1] - q * scale) / inverse[0, 0] * inverse[:1]
        found[:, k:k + 1] = q + 8
    return found


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs x (T, K) that 10 directions nearly explain."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 10, generator=random) @ torch.randn(10, inputs, generator=random)
    return x + 0.3 * torch.randn(tokens, inputs, generator=random)


@given(N=st.integers(1, 6), K=st.integers(1, 80), size=st.sampled_from([32, 64]),
       seed=st.integers(0, 99))
def test_integers_are_those_of_the_definition(N: int, K: int, size: int, seed: int) -> None:
    x = correlated(2 * K, K, seed)
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    blocks = gptq(W, x.T @ x, 4, size)
    q = unpack(blocks.data, 4).flatten(1)
    far = (q[:, :K].float() - by_definition(W, x.T @ x, size, 0.01)).abs()
    assert far.max() <= 1 and (far > 0).float().mean() < 0.02      # halves round either way
    assert (q[:, K:] == 8).all(), "padding must stay 0"


@pytest.mark.parametrize("size", [32, 128])
def test_outputs_stay_closer_than_by_plain_rounding(size: int) -> None:
    x, W = correlated(600, 200), torch.randn(40, 200, generator=torch.Generator().manual_seed(1))

    def error(rounded: Tensor) -> float:
        return float((x @ (rounded - W).T).square().mean())
    found, plain = gptq(W, x.T @ x, 4, size), quantize(W, 4, size)
    assert error(dequantize(found)) < 0.1 * error(dequantize(plain))


def test_inputs_that_are_always_zero_are_rounded_plainly() -> None:
    W = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    found, plain = gptq(W, torch.zeros(64, 64), 4, 32), quantize(W, 4, 32)
    torch.testing.assert_close(found.data, plain.data)
    torch.testing.assert_close(found.scales, plain.scales)


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(dtype=torch.float32)


BATCHES = [batch for task in tasks().values() for batch in task]


def calls(model: Any, text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """x (T, K) and y (T, N) of each linear layer of the first decoder layer on a text (1, T)."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [part.register_forward_hook(lambda part, x, y, name=name: seen.update(
        {name: (x[0].double(), y.double())}))
        for name, part in model.model.layers[0].named_modules() if isinstance(part, nn.Linear)]
    with torch.no_grad():
        model(text)
    for hook in hooks:
        hook.remove()
    return seen


def test_sums_of_a_layer_are_those_of_single_texts(model: Any) -> None:
    """A student of other weights reads and writes something else than its teacher."""
    student, wanted = copy.deepcopy(model), dict[str, Any]()
    nn.init.normal_(student.model.layers[0].self_attn.v_proj.weight, std=0.3)
    for text in (row[real][None] for ids, mask, _ in BATCHES for row, real in zip(ids, mask > 0)):
        theirs, ours = calls(model, text), calls(student, text)
        for name, (x, y) in ours.items():
            H, missing = wanted.get(name, (0, 0))
            wanted[name] = H + x.T @ x, missing + (theirs[name][1] - y).T @ x
    texts = [Tokens(ids, mask, model.config, torch.device("cpu")) for ids, mask, _ in BATCHES]
    with torch.no_grad():
        rest = [layer_calls(model, text)[0][0] for text in texts]
        streams = [model.model.embedded(text.ids) for text in texts]
        written, sums = layer_sums(model.model.layers[0], student.model.layers[0], streams,
                                   streams, rest)
        for x, text, more in zip(written, texts, rest):
            torch.testing.assert_close(x, model.model.layers[0](
                model.model.embedded(text.ids), *more))
    assert sums.keys() == wanted.keys() and wanted["mlp.down_proj"][1].abs().max() > 1
    for name, pair in sums.items():
        for found, expected in zip(pair, wanted[name]):
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_what_a_matrix_lacks_is_the_ridge_regression() -> None:
    """Of what is missing on the inputs, as rows of an augmented least-squares problem."""
    x, lacking = correlated(300, 12).double(), torch.randn(5, 12, dtype=torch.float64)
    H = x.T @ x
    ridge = (RIDGE * H.diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat((x, ridge)), torch.cat(
        (x @ lacking.T, torch.zeros(12, 5, dtype=torch.float64)))).solution.T
    torch.testing.assert_close(fitted((x @ lacking.T).T @ x, H), wanted)


def divergence(model: Any, other: Any) -> float:
    """Mean KL of the predictions of `model` from those of `other` on all texts."""
    found = []
    for ids, mask, _ in BATCHES:
        with torch.no_grad():
            p, q = (m(ids, mask)[mask.bool()].double().log_softmax(-1) for m in (other, model))
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found).mean().item()


def test_a_refined_model_predicts_nearly_what_it_did(model: Any) -> None:
    def weight(name: str) -> Tensor:
        return model.get_parameter(name).detach()

    plain = quantize_model(model, weight, "int4", 32)
    refined, again = dict(plain), dict(plain)
    student = sharing_copy(model)
    refine(model, student, refined, weight, BATCHES)
    refine(model, sharing_copy(model), again, weight, BATCHES)
    for name, found in refined.items():
        assert torch.equal(found.data, again[name].data), "not deterministic"
        assert not torch.equal(found.data, plain[name].data), f"{name} was left as it was"
        assert torch.equal(dequantize(found), student.get_parameter(name))
    far = [divergence(round_weights(sharing_copy(model), blocks), model)
           for blocks in (plain, refined)]
    assert far[1] < 0.95 * far[0]


def test_weights_in_8_bits_are_left_alone(model: Any) -> None:
    blocks = quantize_model(model, lambda name: model.get_parameter(name).detach(), "int8", 32)
    before = dict(blocks)
    refine(model, model, blocks, model.get_parameter, BATCHES)
    assert all(blocks[name] is before[name] for name in before)


@pytest.mark.parametrize("rows, own", [
    (["abcd", "abx"], ["  cd", "  x"]), (["abc"], ["abc"]), (["ab", "ab"], [" b", " b"]),
    (["ab", "abc"], [" b", " bc"]), (["abc", "xbc"], ["abc", "xbc"])])
def test_own_tokens_follow_what_all_rows_begin_with(rows: list[str], own: list[str]) -> None:
    ids, mask, _ = collate([Example("a", [*map(ord, row)], []) for row in rows], 0)
    assert [[c != " " for c in row.ljust(len(mask[0]))] for row in own] == (
        own_tokens(ids, mask).tolist())
