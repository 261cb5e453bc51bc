"""quantize.py: the rounding of onnxruntime, packing, and shapes that do not divide."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from onnxruntime.capi import _pybind_state
from torch import Tensor

from minismoe.model.quantize import ROW, columns, dequantize, quantize, unpack


def weight(outputs: int = 24, inputs: int = 96, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=g) * torch.rand(outputs, 1, generator=g)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_rounds_the_same(bits: int, size: int) -> None:
    w = weight(24, 200)
    ours, G = quantize(w, bits, size), -(-200 // size)
    data = np.zeros((24, G, size * bits // 8), dtype=np.uint8)
    scales, zeros = np.zeros(24 * G, dtype=np.float32), np.zeros(24 * G, dtype=np.uint8)
    rounding = {4: _pybind_state.quantize_matmul_4bits, 8: _pybind_state.quantize_matmul_8bits}
    rounding[bits](data, w.T.contiguous().numpy(), scales, zeros, size, 24, 200, True)
    torch.testing.assert_close(ours.scales.flatten(), torch.from_numpy(scales), rtol=1e-6, atol=0)
    theirs = replace(ours, data=torch.from_numpy(data))
    q, p = (unpack(b.data, bits).flatten(1)[:, :200].int() for b in (ours, theirs))
    far = (q - p).abs()
    assert far.max() <= 1 and (far > 0).float().mean() < 0.01      # halves round either way


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 1e4])
def test_constant_blocks_are_finite_and_close(bits: int, value: float) -> None:
    blocks = quantize(torch.full((2, 64), value), bits)
    assert blocks.scales.isfinite().all()
    assert (blocks.scales != 0).all()
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
    found = dequantize(b)
    assert found.shape == w.shape
    padding = unpack(b.data, bits).flatten(1)[:, inputs:]
    assert (padding == 2 ** (bits - 1)).all(), "padding must stay 0"
    assert error(found, w) < (0.02 if bits == 4 else 1e-4)

    data, scales = columns(b)                                    # the same from (K, N)
    q = unpack(data, bits)[:inputs * outputs].view(inputs, outputs).float() - 2 ** (bits - 1)
    each = torch.arange(inputs) // size
    torch.testing.assert_close((q * scales[each]).T, found)


def test_rows_are_independent_of_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(40, 64)
    whole = quantize(w, 4)
    monkeypatch.setattr("minismoe.model.quantize.ON_CPU", 3 * 64)
    parts = quantize(w, 4)
    for field in ("data", "scales"):
        assert torch.equal(getattr(whole, field), getattr(parts, field))


def test_rows_have_one_positive_scale_each() -> None:
    w = weight(40, 48)
    w[0], w[1] = 0, -w[1].abs()
    found = quantize(w, 8, ROW, positive=True)
    assert found.scales.shape == (40, 1) and bool((found.scales > 0).all())
    assert bool(((dequantize(found) - w).abs() <= found.scales / 2 + 1e-6).all())
    assert int(found.data.min()) >= 1                    # from -127 to 127
