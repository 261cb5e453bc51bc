"""quantize.py: errors against plain rounding, packing, and shapes that do not divide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minismoe.model.quantize import BLOCK, columns, dequantize, quantize, unpack


def weight(outputs: int = 24, inputs: int = 96, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=g) * torch.rand(outputs, 1, generator=g)


def plain(w: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Rounded block by block, without a search."""
    blocks, most = w.unflatten(1, (-1, BLOCK)), 2 ** bits - 1
    low, high = blocks.amin(2, True).clamp(max=0), blocks.amax(2, True).clamp(min=0)
    if symmetric:
        scale = blocks.abs().amax(2, True) / (most // 2)
        return ((blocks / scale).round() * scale).flatten(1)
    scale = (high - low) / most
    zero = (-low / scale).round()
    return (((blocks / scale).round() + zero).clamp(0, most).sub(zero) * scale).flatten(1)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("bits", "share"), [(4, 0.95), (8, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_below_that_of_either_grid(bits: int, share: float, seed: int) -> None:
    w = weight(seed=seed)
    found = error(dequantize(quantize(w, bits)), w)
    for symmetric in (True, False):
        assert found <= share * error(plain(w, bits, symmetric), w) + 1e-9


@pytest.mark.parametrize("bits", [4, 8])
def test_grid_points_are_exact(bits: int) -> None:
    """Weights that lie on a grid with a step of 1, over its whole range, come back as they were."""
    q = torch.randint(0, 2 ** bits, (6, 64), generator=torch.Generator().manual_seed(0))
    q[:, ::BLOCK], q[:, 1::BLOCK] = 0, 2 ** bits - 1
    w = (q - 2 ** (bits - 1) // 2).float()
    assert error(dequantize(quantize(w, bits)), w) <= 1e-12


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 1e4])
def test_constant_blocks_are_finite_and_close(bits: int, value: float) -> None:
    blocks = quantize(torch.full((2, 64), value), bits)
    assert blocks.scales.isfinite().all()
    assert (blocks.scales > 0).all()
    torch.testing.assert_close(dequantize(blocks), torch.full((2, 64), value), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_small_weights_are_as_exact(bits: int) -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    small, usual = (error(dequantize(quantize(w * std, bits)), w * std) ** 0.5
                    for std in (0.0003, 0.02))
    assert small < 1.2 * usual


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 36), (4, 32), (7, 31), (3, 97), (2, 192)])
def test_packed_shapes_and_columns_hold_the_same_weights(
        bits: int, size: int, outputs: int, inputs: int) -> None:
    w, groups = weight(outputs, inputs), -(-inputs // size)
    b = quantize(w, bits, size)
    assert b.shape == w.shape
    assert b.data.shape == (outputs, groups, size * bits // 8)
    assert b.scales.shape == (outputs, groups)
    assert b.zeros.shape == (outputs, -(-groups * bits // 8))
    found = dequantize(b)
    assert found.shape == w.shape
    padding = unpack(b.data, bits) - unpack(b.zeros, bits)[:, :groups, None]
    assert not padding.flatten(1)[:, inputs:].any(), "padding must stay 0"
    assert error(found, w) < (0.01 if bits == 4 else 1e-4)

    data, scales, zeros = columns(b)                             # the same from (K, N)
    q = unpack(data, bits)[:inputs * outputs].view(inputs, outputs).float()
    zero = unpack(zeros, bits)[:groups * outputs].view(groups, outputs)
    each = torch.arange(inputs) // size
    torch.testing.assert_close(((q - zero[each]) * scales[each]).T, found)


def test_rows_are_independent_of_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(40, 64)
    whole = quantize(w, 4)
    monkeypatch.setattr("minismoe.model.quantize.ON_CPU", 3 * 64)
    parts = quantize(w, 4)
    for field in ("data", "scales", "zeros"):
        assert torch.equal(getattr(whole, field), getattr(parts, field))
