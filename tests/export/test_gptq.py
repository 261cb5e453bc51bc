"""GPTQ against its definition in float64, and against plain rounding by what a model writes."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from exported import rounded
from hypothesis import given
from hypothesis import strategies as st
from mixture import COUNTS, V, batch, model_of
from torch import Tensor

from minismoe.data.tasks import Example
from minismoe.export import calibration
from minismoe.export.gptq import factor, gptq
from minismoe.export.weights import GraphFormat
from minismoe.method.experts import expert_layers
from minismoe.method.hooks import gram
from minismoe.method.loss import IGNORE
from minismoe.model.quantize import (
    BlockEmbedding,
    Blocks,
    quantize,
    unpack,
)


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


def together(parts: Sequence[Blocks]) -> Blocks:
    """Rows that were rounded in several weights."""
    data, scales = (torch.cat([getattr(b, part) for b in parts]) for part in ("data", "scales"))
    shape = torch.Size((len(data), parts[0].shape[1]))
    return replace(parts[0], shape=shape, data=data, scales=scales)


@given(N=st.integers(1, 6), K=st.integers(1, 80), sizes=st.permutations([32, 64, 128]),
       seed=st.integers(0, 99))
def test_integers_are_those_of_the_definition(N: int, K: int, sizes: list[int], seed: int) -> None:
    x = correlated(2 * K, K, seed)
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    for size in sizes[:2]:
        blocks = together(gptq(W.split(2), factor(x, 0.02), 4, size))
        q = unpack(blocks.data, 4).flatten(1)
        far = (q[:, :K].float() - by_definition(W, x.T @ x, size, 0.02)).abs()
        assert far.max() <= 1 and (far > 0).float().mean() < 0.02      # halves round either way
        assert (q[:, K:] == 8).all(), "padding must stay 0"
        assert blocks.scales.shape == (N, -(-K // size)) and blocks.size == size


@pytest.mark.parametrize("K", [1, 256, 700, 1025])
def test_a_gram_matrix_is_the_whole_product(K: int) -> None:
    x = torch.randn(50, K, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(x), x.T @ x)


def test_inputs_that_are_always_zero_are_rounded_plainly() -> None:
    W = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    (found,) = gptq([W], factor(torch.zeros(9, 64)), 4, 32)
    plain = quantize(W, 4, 32)
    torch.testing.assert_close(found.data, plain.data)
    torch.testing.assert_close(found.scales, plain.scales)


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(dtype=torch.float32)


BATCHES = [batch(seed) for seed in range(6)]
LINES = [Example("a", row[real.bool()].tolist(), [IGNORE] * int(real.sum()))
         for ids, mask, _ in BATCHES for row, real in zip(ids, mask)]


def test_matrices_rounded_on_samples_write_nearly_what_they_did(model: Any) -> None:
    form, inputs = GraphFormat("ort", "int4", 64), dict[str, list[Tensor]]()
    handles = [layer.register_forward_hook(lambda layer, args, y, name=name: inputs.setdefault(
        name, []).append(args[0].double())) for name, layer in expert_layers(model).items()]
    with torch.no_grad():
        for ids, mask, _ in BATCHES:
            model(ids, mask)
    for handle in handles:
        handle.remove()
    plain = rounded(model, form)
    on_samples = rounded(model, form, model, {"a": LINES[:24], "b": LINES[24:]})

    def far(tree: Any, name: str) -> float:
        """How far what the matrix writes is from what it would write unrounded."""
        x, w = torch.cat(inputs[name]), model.get_submodule(name).weight.detach().double()
        error = tree.get_submodule(name).dense().double() - w
        return float((x @ error.T).square().sum() / (x @ w.T).square().sum())

    ratios = [far(on_samples, name) / far(plain, name) for name in COUNTS]
    assert statistics.mean(ratios) < 0.8 and max(ratios) < 1
    assert on_samples.lm_head.weight is on_samples.model.embed_tokens.weight
    for table in (plain.lm_head, on_samples.lm_head):
        ids = torch.arange(V)
        torch.testing.assert_close(BlockEmbedding(table.weight)(ids), table.weight.dense())
    assert not torch.equal(plain.lm_head.weight.data, on_samples.lm_head.weight.data)


def test_weights_in_8_bits_are_rounded_to_the_nearest(model: Any) -> None:
    tree = rounded(model, GraphFormat("ort", "int8", 64), model, {"a": LINES})
    for name, layer in expert_layers(tree).items():
        wanted = quantize(model.get_submodule(name).weight, 8, 32)
        assert torch.equal(layer.weight.blocks.data, wanted.data)


def test_the_tied_table_is_damped_more(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    damped: list[float] = []

    def watched(x: Tensor, damping: float) -> Tensor:
        damped.append(damping)
        return factor(x, damping)

    monkeypatch.setattr(calibration, "factor", watched)
    rounded(model, GraphFormat("ort", "int4", 64), model, {"a": LINES[:8]})
    inputs = 4 * len(model.model.layers)     # q, k and v; o; gate and up; down
    assert damped == [*[0.1] * inputs, 0.3]
