"""GPTQ against its definition in float64, and against plain rounding by what a model writes."""

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture import COUNTS, model_of, tasks
from torch import Tensor

from minismoe.export.gptq import gptq, quantize_model, refine, second_moments
from minismoe.model.quantize import Blocks, dequantize, quantize, unpack


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
    blocks = gptq(W, x.T @ x, 4, size, 0.02)
    q = unpack(blocks.data, 4).flatten(1)
    far = (q[:, :K].float() - by_definition(W, x.T @ x, size, 0.02)).abs()
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


def test_second_moments_are_those_of_single_texts(model: Any) -> None:
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    wanted: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64) for name in names}

    def add(name: str, x: Tensor) -> None:
        for row in x.reshape(-1, x.shape[-1]).double():
            wanted[name] = wanted[name] + row.outer(row)
    handles = [model.get_submodule(name).register_forward_hook(
        lambda layer, args, y, name=name: add(name, args[0])) for name in names]
    with torch.no_grad():
        for ids, mask, _ in BATCHES:
            for row, real in zip(ids, mask.bool()):
                model(row[real][None])       # the whole text: the head reads each of its tokens
    for handle in handles:
        handle.remove()
    for name, found in second_moments(model, names, BATCHES).items():
        torch.testing.assert_close(found.double(), wanted[name], rtol=1e-4, atol=1e-4)


def test_refined_matrices_write_nearly_what_they_did(model: Any) -> None:
    def weight(name: str) -> Tensor:
        return model.get_parameter(name).detach()

    moments = second_moments(model, list(COUNTS), BATCHES)

    def far(blocks: dict[str, Blocks], name: str) -> float:
        """How far what the matrix writes is from what it would write unrounded."""
        w = weight(f"{name}.weight").double()
        error = dequantize(blocks[f"{name}.weight"]).double() - w
        H = moments[name].double()
        return float((error @ H * error).sum() / (w @ H * w).sum())

    plain = quantize_model(model, weight, "int4", 32)
    refined, in_passes = dict(plain), dict(plain)
    refine(model, refined, weight, BATCHES)
    refine(model, in_passes, weight, BATCHES, memory=1)
    ratios = [far(refined, name) / far(plain, name) for name in COUNTS]
    assert statistics.mean(ratios) < 0.8 and max(ratios) < 1
    for name, found in refined.items():
        assert torch.equal(found.data, in_passes[name].data)
        assert not torch.equal(found.data, plain[name].data), f"{name} was left as it was"


def test_weights_in_8_bits_are_left_alone(model: Any) -> None:
    blocks = quantize_model(model, lambda name: model.get_parameter(name).detach(), "int8", 32)
    before = dict(blocks)
    refine(model, blocks, model.get_parameter, BATCHES)
    assert all(blocks[name] is before[name] for name in before)
