"""freeze.py against the reference, layer by layer and line by line, in float64."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture import COUNTS, ROUTED, batch, model_of
from tiny import plain
from torch import Tensor, nn

from minismoe import reference
from minismoe.method.experts import ExpertLinear, expert_layers, merged
from minismoe.method.freeze import RIDGE, freeze, linear_fit
from minismoe.method.loss import IGNORE


def supervised(seed: int, rows: int = 8, pad: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """Lines whose first two tokens, and pads, have no loss."""
    ids, mask, _ = batch(seed, rows, pad)
    order = mask.cumsum(1) - 1
    return ids, mask, ids.masked_fill((order < 2) | (mask == 0), IGNORE)


def watched(model: Any, data: tuple[Tensor, Tensor, Tensor],
            ) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """By mixture, what it reads of each line, x (N, D), and || dL / dy ||^2 (N,) of L, the sum of
    the line's losses; each line goes alone through the model, without padding."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in ROUTED}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            seen[name][0].append(args[0].detach().reshape(-1, args[0].shape[-1]))
            y.register_hook(lambda dy: seen[name][1].append(
                dy.reshape(-1, dy.shape[-1]).square().sum(1)))
        return hook

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in ROUTED]
    for row, mask, labels in zip(*data):
        ids, wanted = row[mask.bool()], labels[mask.bool()]
        logits = model.lm_head(model.model(ids[None]))[0]
        nn.functional.cross_entropy(logits[:-1], wanted[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("pad", ["right", "left"])
def test_fits_and_residuals_are_those_of_the_reference(pad: str) -> None:
    model, data = model_of(), supervised(3, pad=pad)
    seen, fast = watched(copy.deepcopy(model), data), copy.deepcopy(model)
    residuals = freeze(fast, data, size=3)
    assert [*residuals] == ROUTED
    for name in ROUTED:
        slow, (x, d) = plain(expert_layers(model)[name]), map(torch.cat, seen[name])
        lengths = torch.tensor([len(part) for part in seen[name][0]])
        held = torch.arange(len(lengths)).repeat_interleave(lengths) % 4 == 1
        w = 0.01 + 0.99 * d / d.mean()
        A = reference.linear_fit(slow, x[~held], w[~held])
        found = expert_layers(fast)[name].lora_A.flatten(0, 1)
        torch.testing.assert_close(found, A, rtol=1e-6, atol=1e-9)
        y = slow.added(x[held])
        missed = y - slow.scaling * x[held] @ A.T @ slow.lora_B.flatten(0, 1)
        lost, energy = (w[held] @ part.square().sum(1) for part in (missed, y))
        assert residuals[name] == pytest.approx((lost / energy).item(), rel=1e-6)


@given(T=st.integers(2, 40), D=st.integers(1, 9), E=st.integers(2, 4), seed=st.integers(0, 999))
def test_a_fit_is_where_the_gradient_of_its_loss_is_zero(T: int, D: int, E: int, seed: int) -> None:
    """Of mean(w || gh - A' x ||^2) + shift || A' - A_g ||^2."""
    torch.manual_seed(seed)
    layer = ExpertLinear(nn.Linear(D, 3, bias=False).double(), E, 2, 4.0, 2)
    layer.lora_B.data.normal_()
    x, w = torch.randn(T, D, dtype=torch.float64), torch.rand(T, dtype=torch.float64) + 0.1
    with torch.no_grad():
        A, _ = linear_fit(layer, x, w, torch.zeros(T, dtype=torch.bool))
        slow = plain(layer)
        g = slow.gates(x)
        A_g = torch.cat([(w @ g[:, e]) / w.sum() * each for e, each in enumerate(slow.lora_A)])
        gh = torch.cat([g[:, e, None] * (x @ each.T) for e, each in enumerate(slow.lora_A)], 1)
        shift = RIDGE * (w @ x.square().sum(1)) / T / D
        torch.testing.assert_close(((gh - x @ A.T) * w[:, None]).T @ x / T, shift * (A - A_g),
                                   rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_equal_gates_are_frozen_without_loss(k: int) -> None:
    model = model_of()
    for layer in expert_layers(model).values():
        if layer.router is not None:
            layer.router.data.zero_()              # every gate 1/k, and topk breaks all ties alike
            layer.top_k = min(k, len(layer.router))
    ids, mask, _ = batch(99)
    before = model(ids, mask)
    assert max(freeze(model, supervised(5)).values()) < 1e-12
    torch.testing.assert_close(model(ids, mask), before)


def test_a_model_of_transformers_is_frozen_alike() -> None:
    """Its layers see pads, which ours do not."""
    pytest.importorskip("transformers")
    ours, theirs = model_of(), model_of("hf-llama")
    theirs.load_state_dict(ours.state_dict(), strict=False)
    found = [freeze(model, supervised(7)) for model in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for name, layer in expert_layers(ours).items():
        torch.testing.assert_close(expert_layers(theirs)[name].lora_A, layer.lora_A, rtol=1e-3,
                                   atol=1e-5)       # transformers normalises in float32


def test_parameters_stay_and_nothing_else_changes() -> None:
    model = model_of().train()
    before = {name: (p, p.detach().clone(), p.requires_grad)
              for name, p in model.named_parameters()}
    freeze(model, supervised(1))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert {n for n in before if "router" in n} == before.keys() - dict(
        model.named_parameters()).keys()
    for name, p in model.named_parameters():
        same, value, asks = before[name]
        assert p is same and p.requires_grad == asks and p.grad is None
        changed = name.removesuffix(".lora_A") in ROUTED
        assert torch.equal(p, value) != changed, name
    assert freeze(model, supervised(1)) == {}        # there is nothing left to freeze


@pytest.mark.parametrize(("part", "value"), [
    ("lora_A", torch.nan), ("lora_B", torch.nan), ("router", torch.nan), ("router", torch.inf)])
def test_what_is_not_finite_is_named(part: str, value: float) -> None:
    """NaN sums read as a residual of 0 otherwise."""
    model, lost = model_of(), "model.layers.1.mlp.down_proj"
    getattr(expert_layers(model)[lost], part).data[0, 0] = value
    with pytest.raises(ValueError, match="is not finite: train with --dtype float32, or"):
        freeze(model, supervised(2))
    assert not any(m._forward_hooks for m in model.modules())


def test_merged_computes_what_frozen_experts_add_beside() -> None:
    model, (ids, mask, _) = model_of(), batch(3)
    freeze(model, supervised(4))
    beside = model(ids, mask)[mask.bool()]
    for name, layer in expert_layers(model).items():
        added = sum(layer.scaling * B.T @ A for A, B in zip(layer.lora_A, layer.lora_B))
        joined = nn.Linear(layer.in_features, layer.out_features, device="meta")
        joined.weight = nn.Parameter(merged(layer.weight, layer), requires_grad=False)
        joined.bias = layer.bias
        torch.testing.assert_close(joined.weight.data, layer.weight + added)
        model.set_submodule(name, joined)
    torch.testing.assert_close(model(ids, mask)[mask.bool()], beside)


def test_bfloat16_is_merged_in_float32_and_rounded_once() -> None:
    model = model_of(dtype=torch.bfloat16)
    freeze(model, supervised(6))
    for name in COUNTS:
        layer = expert_layers(model)[name]
        A, B = layer.lora()
        assert layer.lora_A.dtype == torch.float32 and A.shape == (2 * COUNTS[name],
                                                                   layer.in_features)
        wide = layer.weight.double() + B.double() @ A.double()
        result = merged(layer.weight, layer)
        assert result.dtype == torch.bfloat16
        nearest = (wide.bfloat16().double() - wide).abs()        # float32 may miss it at a tie
        assert ((result.double() - wide).abs() <= nearest + 1e-6 * wide.abs().max()).all()
