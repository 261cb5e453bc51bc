"""freeze.py against the reference: float64 least squares over outputs that are all materialised."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture import COUNTS, ROUTED, D, Data, batch, fit, frozen, merge, model_of, tasks
from tiny import plain
from torch import Tensor, nn

from minismoe import reference
from minismoe.export.calibration import Calibration
from minismoe.method.experts import ExpertLinear, expert_layers
from minismoe.method.freeze import (
    RIDGES,
    Fit,
    TaskFits,
    constant_gates,
    exact,
    linear,
    merged,
    no_fits,
    solve,
)
from minismoe.method.hooks import reads as groups
from minismoe.method.loss import IGNORE


def reads(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """All that each adapted layer reads of the real tokens, (N, D), sample by sample."""
    found: dict[str, list[Tensor]] = {}
    hooks = [layer.register_forward_hook(lambda _, args, y, name=name: found.setdefault(
        name, []).append(args[0].reshape(-1, args[0].shape[-1])))
        for name, layer in expert_layers(model).items()]
    with torch.no_grad():
        for ids, mask, *_ in batches:
            for row, m in zip(ids, mask):
                model.model(row[m.bool()][None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def held_out(batches: list[Data], held: bool) -> list[Data]:
    """The rows that are held out, every fourth, or the others."""
    whole = [torch.cat([b[i] for b in batches]) for i in range(3)]
    rows = (torch.arange(len(whole[0])) % 4 == 1) == held
    return [(whole[0][rows], whole[1][rows], whole[2][rows])]


def loss(fit_: Fit, layer: ExpertLinear, x: Tensor) -> float:
    """Share of the mixture's output energy that a fit misses on x."""
    y = plain(layer).added(x)
    return ((y - x @ fit_.lora_A.T @ fit_.lora_B.T).square().sum() / y.square().sum()).item()


# --- the fits -----------------------------------------------------------------------------------

def test_fits_are_the_best_of_the_reference_on_held_out_samples() -> None:
    """Of constant gates and of the linear fits by two ridges."""
    model, data = model_of().requires_grad_(False), tasks(40)
    data["b"] = [tuple(t[:3, :3] for t in data["b"][0])]         # few tokens: there gates are best
    fits, chosen = fit(model, data), set()
    assert list(fits) == [None, "a", "b"]
    seen = [{t: reads(model, held_out(data[t], held)) for t in data} for held in (False, True)]
    for task in fits:
        xs, hs = ({name: torch.cat([part[t][name] for t in data if task in (None, t)])
                   for name in COUNTS} for part in seen)
        assert list(fits[task]) == list(COUNTS)
        for name in ROUTED:
            layer, found = plain(expert_layers(model)[name]), fits[task][name]
            tried = [reference.fits(layer, xs[name], 1.0)["gates"], *(
                reference.fits(layer, xs[name], ridge)["linear"] for ridge in RIDGES)]
            losses = [reference.residual(layer, A, hs[name]) for A in tried]
            best = losses.index(min(losses))
            torch.testing.assert_close(found.lora_A, tried[best], rtol=1e-5, atol=1e-5)
            assert found.kind == ("gates" if best == 0 else "linear")
            assert found.residual == pytest.approx(losses[best], rel=1e-6)
            assert found.residual == pytest.approx(
                loss(found, expert_layers(model)[name], hs[name]), rel=1e-6)
            chosen.add(best)
    assert chosen == {0, 1, 2}


@given(T=st.integers(2, 40), D=st.integers(1, 9), R=st.integers(1, 6), seed=st.integers(0, 999))
def test_linear_fits_are_where_the_gradient_of_their_loss_is_zero(T: int, D: int, R: int,
                                                                  seed: int) -> None:
    """Of ||gh - x A'||^2 + shift ||A' - A||^2, by both systems: of the tokens where they are fewer
    than the inputs, else of the inputs."""
    g = torch.Generator().manual_seed(seed)
    x, *starts = (torch.randn(shape, dtype=torch.float64, generator=g)
                  for shape in ((T, D), (R, D), (1, D)))
    targets = [torch.randn(T, len(A), dtype=torch.float64, generator=g) for A in starts]
    found = [*linear(starts, x, targets)]
    assert len(found) == len(RIDGES)
    for ridge, As in zip(RIDGES, found):
        shift = ridge * x.square().sum() / D
        for start, A, gh in zip(starts, As, targets):
            torch.testing.assert_close((gh - x @ A.T).T @ x, shift * (A - start),
                                       rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("k", [1, 3])
def test_equal_gates_are_frozen_without_loss(k: int) -> None:
    model = model_of()
    for layer in expert_layers(model).values():
        if layer.router is not None:
            layer.router.data.zero_()              # every gate 1/k, and topk breaks all ties alike
            layer.top_k = min(k, len(layer.router))
    (x, mask, _), found = batch(99), fit(model, tasks())
    assert all(f.residual < 1e-12 for task in (None, "a", "b") for f in found[task].values())
    torch.testing.assert_close(frozen(model, found[None])(x, mask), model(x, mask))


def test_a_token_that_counts_twice_is_there_twice() -> None:
    model = model_of().requires_grad_(False)
    layer = expert_layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(20, layer.in_features, dtype=torch.float64)
    times, held = torch.arange(20) % 3 + 1, torch.arange(20) % 4 == 1
    again = torch.arange(20).repeat_interleave(times)
    found = solve({"": layer}, x, held, times)[""]
    wanted = solve({"": layer}, x[again], held[again], torch.ones(len(again)))[""]
    torch.testing.assert_close(found.lora_A, wanted.lora_A)
    assert found.residual == pytest.approx(wanted.residual)


def test_gates_of_equal_and_of_dead_experts_are_those_of_least_squares() -> None:
    model = model_of().requires_grad_(False)
    names = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    equal, dead = (expert_layers(model)[name] for name in names)
    for p in (equal.lora_A, equal.lora_B):
        p[1] = p[0]                                # two experts that cannot be told apart
    dead.lora_B[2] = 0                             # one that adds nothing
    seen = reads(model, tasks()["a"])
    for name, layer in zip(names, (equal, dead)):
        x, slow = seen[name], plain(layer)
        gated = torch.stack([g[:, None] * (x @ A.T) for g, A in zip(
            slow.gates(x).T, slow.lora_A)], 1).flatten(1)
        c = constant_gates(layer, x @ layer.lora_A.flatten(0, 1).T, gated)
        each = torch.stack(slow.outputs(x), 2).flatten(0, 1)
        wanted = torch.linalg.lstsq(each, slow.added(x).reshape(-1, 1), driver="gelsd").solution
        torch.testing.assert_close(c, wanted[:, 0])          # it may be singular


def test_tasks_of_one_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="b: two calibration samples or more are needed"):
        no_fits(expert_layers(model_of()), {"a": [batch(1)], "b": [batch(1, 1)]}, [None])


# --- gathering ----------------------------------------------------------------------------------

def same(a: TaskFits, b: TaskFits, **tolerance: float) -> None:
    for task, ours in a.items():
        assert list(ours) == list(b[task])
        for name, found in ours.items():
            torch.testing.assert_close(found.lora_A, b[task][name].lora_A, **tolerance)
            assert found.kind == b[task][name].kind


@pytest.mark.parametrize("size", [1, 5])
def test_batches_and_pads_change_nothing(size: int) -> None:
    """Pads are left out; a task's fits are the same beside another task."""
    model = model_of()
    apart = {task: [tuple(t[i:i + size, :int(whole[1][i:i + size].sum(1).max())] for t in whole)
                    for whole in batches for i in range(0, 8, size)]
             for task, batches in tasks().items()}
    found = fit(model, tasks())
    same(found, fit(model, apart), rtol=1e-6, atol=1e-9)
    same({"a": found["a"]}, fit(model, {"a": tasks()["a"]}), rtol=0, atol=1e-12)


def test_layers_that_read_the_same_are_one_group() -> None:
    model, (ids, mask, _) = model_of(), batch(0)
    found = {" ".join(name.split(".")[-1][0] for name in names): x for names, x in groups(
        expert_layers(model), [partial(model.model, ids, mask)] * 2).items()}
    assert [*found] == ["q k v", "o", "g u", "d"]        # of the second layer, which comes last
    assert found["q k v"].shape == (2 * mask.sum(), D)


def test_a_prefix_that_texts_share_counts_as_often_as_it_is_there() -> None:
    model, (ids, mask, _) = model_of().requires_grad_(False), batch(0)
    ids[:, :2], labels = ids[:1, :2].clone(), torch.full_like(ids, IGNORE)
    together, apart = (Calibration(model, {"a": batches}) for batches in (
        [(ids, mask, labels)], [*zip(*(t.split(1) for t in (ids, mask, labels)))]))
    assert len(together.times) == mask.sum() - 14 and len(apart.times) == mask.sum()
    for number in range(2):
        found, same = together.run_layer(number), apart.run_layer(number)
        assert [*found] == [*same]
        for (names, x), y in zip(found.items(), same.values()):
            torch.testing.assert_close(together.factor(names, x), apart.factor(names, y))


@pytest.mark.parametrize(("part", "value"), [
    ("lora_A", torch.nan), ("lora_B", torch.nan), ("router", torch.nan), ("router", torch.inf)])
def test_what_is_not_finite_is_named_and_the_model_left_as_it_was(part: str, value: float) -> None:
    """NaN sums read as a residual of 0 otherwise."""
    model, lost = model_of().train(), "model.layers.1.mlp.down_proj"
    getattr(expert_layers(model)[lost], part).data[0, 0] = value
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{lost}: .* is not finite"):
        fit(model, tasks())
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for layer in expert_layers(model).values()
               for p in (layer.lora_A, layer.lora_B))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


# --- freezing and merging -----------------------------------------------------------------------

def test_frozen_and_merged_compute_the_same() -> None:
    model, (ids, mask, _) = model_of(), batch(3)
    fits = fit(model, tasks())[None]
    beside, joined = frozen(model, fits), copy.deepcopy(model)
    merge(joined, fits)
    assert all(layer.router is None for layer in expert_layers(beside).values())
    assert not expert_layers(joined)
    for name in COUNTS:
        layer = beside.get_submodule(name)
        assert layer.lora_A.shape == (1, 2 * COUNTS[name], layer.in_features)
        assert layer.scaling == 1
    torch.testing.assert_close(*(m(ids, mask)[mask.bool()] for m in (beside, joined)))


def test_one_expert_is_exact() -> None:
    model = model_of()
    layer = expert_layers(model)["model.layers.0.self_attn.v_proj"]
    x = torch.randn(5, D, dtype=torch.float64)
    found = exact(layer)
    assert (found.kind, found.residual) == ("exact", 0.0)
    torch.testing.assert_close(x @ merged(layer.weight, found).T, layer(x))
    alone = frozen(model, fit(model, tasks())["a"])
    torch.testing.assert_close(expert_layers(alone)["model.layers.0.self_attn.v_proj"](x), layer(x))


def test_bfloat16_is_merged_in_float32_and_rounded_once() -> None:
    model = model_of(dtype=torch.bfloat16)
    fits = fit(model, tasks())[None]
    for name, found in fits.items():
        weight = model.get_submodule(name).weight
        assert found.lora_A.dtype == found.lora_B.dtype == torch.float32
        wide = weight.double() + found.lora_B.double() @ found.lora_A.double()
        result = merged(weight, found)
        assert result.dtype == torch.bfloat16
        nearest = (wide.bfloat16().double() - wide).abs()        # float32 may miss it at a tie
        assert ((result.double() - wide).abs() <= nearest + 1e-6 * wide.abs().max()).all()
