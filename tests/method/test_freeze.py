"""freeze.py against the reference: float64 least squares over outputs that are all materialised."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture import COUNTS, ROUTED, D, Data, batch, model_of, tasks
from tiny import plain, randomise
from torch import Tensor, nn

from minismoe import reference
from minismoe.export.calibration import Calibration
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.tree import fits_to_make, freeze_and_round
from minismoe.method import freeze as module
from minismoe.method.experts import ExpertLinear, add_experts, expert_layers
from minismoe.method.freeze import KINDS, Fit, TaskFits, exact, fit, freeze, merge, merged, solve
from minismoe.method.reads import reads as groups


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


def fits_by_kind(model: Any, data: dict[str, list[Data]]) -> dict[str, TaskFits]:
    return {kind: fit(model, data, kind) for kind in KINDS}


def loss(fit_: Fit, layer: ExpertLinear, x: Tensor) -> float:
    """Share of the mixture's output energy that a fit misses on x."""
    y = plain(layer).added(x)
    return ((y - x @ fit_.lora_A.T @ fit_.lora_B.T).square().sum() / y.square().sum()).item()


# --- the fits -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "pad", "ridge"), [
    ("llama", "right", 1e-13), ("llama", "right", 0.1), ("hf-llama", "right", 1e-13),
    ("hf-llama", "left", 0.1)])
def test_fits_and_residuals_equal_the_reference(kind: str, pad: str, ridge: float,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RIDGES", (ridge,))
    model, data = model_of(kind).requires_grad_(False), tasks(40, pad)
    fits = fits_by_kind(model, data)
    assert list(fits) == ["mean", "gates", "linear"]
    seen = [{t: reads(model, held_out(data[t], held)) for t in data} for held in (False, True)]
    for task in (None, "a", "b"):
        xs, hs = ({name: torch.cat([part[t][name] for t in data if task in (None, t)])
                   for name in COUNTS} for part in seen)
        assert list(fits["linear"][task]) == list(COUNTS)
        for name in ROUTED:
            layer, x = plain(expert_layers(model)[name]), xs[name]
            wanted = reference.fits(layer, x, ridge)
            assert fits["linear"][task][name].kind == "linear"
            for what in fits:
                found = fits[what][task][name]
                torch.testing.assert_close(found.lora_A, wanted[what], rtol=1e-5, atol=1e-5)
                assert found.residual == pytest.approx(
                    reference.residual(layer, wanted[what], hs[name]), rel=1e-6)
                assert found.residual == pytest.approx(loss(
                    found, expert_layers(model)[name], hs[name]), rel=1e-6)
            if ridge < 1e-9:      # any linear map of rank R with B's row space: y W
                W = torch.linalg.lstsq(x, layer.added(x)).solution.T                # (out, D)
                torch.testing.assert_close(found.lora_B @ found.lora_A, W, rtol=1e-5, atol=1e-5)


def test_the_ridge_is_the_best_one_on_held_out_samples() -> None:
    model, data = model_of().requires_grad_(False), tasks(40)
    data["b"] = data["b"][:1]                            # few samples: there large ridges are best
    fits, chosen = fit(model, data), []
    for task in "ab":
        xs, hs = (reads(model, held_out(data[task], held)) for held in (False, True))
        for name in ROUTED:
            layer, found = plain(expert_layers(model)[name]), fits[task][name]
            losses = [reference.residual(layer, reference.fits(layer, xs[name], ridge)["linear"],
                                         hs[name]) for ridge in module.RIDGES]
            losses.append(reference.residual(layer, reference.fits(layer, xs[name], 1.0)["gates"],
                                             hs[name]))
            assert found.residual == pytest.approx(min(losses), rel=1e-5)
            chosen.append(losses.index(min(losses)))
    assert len({*chosen}) > 2                            # none is best for all of them


@pytest.mark.parametrize("k", [1, 3])
def test_equal_gates_are_frozen_without_loss(k: int) -> None:
    model = model_of()
    for layer in expert_layers(model).values():
        if layer.router is not None:
            layer.router.data.zero_()              # every gate 1/k, and topk breaks all ties alike
            layer.top_k = min(k, len(layer.router))
    x, before = batch(99), copy.deepcopy(model)
    fits = fits_by_kind(model, tasks())
    for kind, found in fits.items():
        assert all(f.residual < 1e-12 for task in (None, "a", "b") for f in found[task].values())
        frozen = copy.deepcopy(model)
        freeze(frozen, found[None])
        torch.testing.assert_close(frozen(*x[:2]), before(*x[:2]), msg=kind)


@given(E=st.integers(2, 5), r=st.integers(1, 3), k=st.integers(1, 5), N=st.integers(2, 60),
       D=st.integers(1, 9), out=st.integers(1, 9), seed=st.integers(0, 999))
def test_on_the_fitting_samples_linear_beats_gates_beats_mean(E: int, r: int, k: int, N: int,
                                                              D: int, out: int, seed: int) -> None:
    """Both systems of the ridge: of the tokens where they are fewer, else of the inputs."""
    torch.manual_seed(seed)
    layer = ExpertLinear(nn.Linear(D, out, dtype=torch.float64), E, r, 2.0 * r, k)
    randomise(layer, seed).requires_grad_(False)
    x, fitted = torch.randn(N, D, dtype=torch.float64), torch.arange(2 * N) % 2 == 1
    twice = x.repeat_interleave(2, 0)                    # each token is fitted, and judges
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RIDGES", (1e-10,))
        fits = [solve({"": layer}, twice, fitted, kind=kind)[""] for kind in KINDS]
    losses = [fit.residual for fit in fits]
    assert losses == sorted(losses, reverse=True) or max(
        b - a for a, b in zip(losses, losses[1:])) < 1e-7
    same = plain(layer)
    if same.added(x).any():
        least = reference.residual(same, reference.fits(same, x, 1.0)["gates"], x)
        assert reference.residual(same, fits[1].lora_A, x) <= least + 1e-7


def test_a_token_that_counts_twice_is_there_twice() -> None:
    model = model_of().requires_grad_(False)
    layer = expert_layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(20, layer.in_features, dtype=torch.float64)
    times, held = torch.arange(20) % 3 + 1, torch.arange(20) % 4 == 1
    again = torch.arange(20).repeat_interleave(times)
    for kind in KINDS:
        found = solve({"": layer}, x, held, times, kind)[""]
        wanted = solve({"": layer}, x[again], held[again], kind=kind)[""]
        torch.testing.assert_close(found.lora_A, wanted.lora_A)
        assert found.residual == pytest.approx(wanted.residual)


def test_gates_of_equal_and_of_dead_experts_are_those_of_least_squares() -> None:
    model = model_of()
    name = "model.layers.0.self_attn.q_proj"
    layer = expert_layers(model)[name]
    for p in (layer.lora_A, layer.lora_B):
        p.data[1] = p.data[0]                      # two experts that cannot be told apart
    dead = expert_layers(model)["model.layers.1.mlp.up_proj"]
    dead.lora_B.data[2] = 0                        # one that adds nothing
    data = tasks()
    fits = fits_by_kind(model, data)
    seen = [reads(model, held_out([b for t in data for b in data[t]], held))
            for held in (False, True)]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        found, (x, unseen) = fits["gates"][None][name], (part[name] for part in seen)
        each = torch.stack(plain(expert_layers(model)[name]).outputs(x), 2).flatten(0, 1)
        added = plain(expert_layers(model)[name]).added(x).reshape(-1, 1)
        c = torch.linalg.lstsq(each, added, driver="gelsd").solution           # it may be singular
        A = (expert_layers(model)[name].lora_A * c[:, :, None]).flatten(0, 1)
        assert found.kind == "gates"
        assert found.residual == pytest.approx(reference.residual(
            plain(expert_layers(model)[name]), A, unseen), rel=1e-6)
        assert fits["linear"][None][name].residual <= found.residual


def test_untrained_experts_lose_nothing() -> None:
    model = model_of()
    for layer in expert_layers(model).values():
        layer.lora_B.data.zero_()
    for found in fits_by_kind(model, tasks()).values():
        assert {f.residual for f in found[None].values()} == {0.0}


def test_gates_are_taken_where_held_out_samples_say_that_linear_is_worse() -> None:
    few = {"a": [tuple(t[:, :3] for t in batch(1, 3))]}   # 6 tokens to fit 16 or 24 inputs
    fits = fits_by_kind(model_of(), few)
    kinds = {name: fits["linear"]["a"][name].kind for name in ROUTED}
    assert "gates" in kinds.values()
    for name, kind in kinds.items():
        found, gates = fits["linear"]["a"][name], fits["gates"]["a"][name]
        assert found.residual <= gates.residual
        if kind == "gates":
            assert torch.equal(found.lora_A, gates.lora_A)


def test_tasks_of_one_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="b: two calibration samples or more are needed"):
        fit(model_of(), {"a": [batch(1)], "b": [batch(1, 1)]})
    with pytest.raises(ValueError, match="samples of one task or more"):
        fit(model_of(), {})


def test_batches_may_come_from_a_generator() -> None:
    model, kept = model_of(), [batch(1), batch(2)]
    same(fit(model, {"a": (b for b in kept)}), fit(model, {"a": kept}))


# --- gathering ----------------------------------------------------------------------------------

def same(a: TaskFits, b: TaskFits, **tolerance: float) -> None:
    for task, ours in a.items():
        assert list(ours) == list(b[task])
        for name, found in ours.items():
            torch.testing.assert_close(found.lora_A, b[task][name].lora_A, **tolerance)
            assert found.kind == b[task][name].kind


@pytest.mark.parametrize("kind", ["llama", "hf-llama"])
def test_pads_are_left_out(kind: str) -> None:
    model = model_of(kind)
    alone = {t: [tuple(x[i:i + 1, :n] for x in b) for b in batches
                 for i, n in enumerate(b[1].sum(1).tolist())] for t, batches in tasks().items()}
    for method in KINDS:
        same(fit(model, tasks(), method), fit(model, alone, method), rtol=1e-6, atol=1e-9)


def test_layers_that_read_the_same_are_one_group() -> None:
    model, (ids, mask, _) = model_of(), batch(0)
    found = {" ".join(name.split(".")[-1][0] for name in names): x for names, x in groups(
        expert_layers(model), [(partial(model.model, ids, mask), None)] * 2)}
    assert [*found] == ["q k v", "o", "g u", "d"]        # of the second layer, which comes last
    assert found["q k v"].shape == (2 * mask.sum(), D)


@pytest.mark.parametrize("size", [1, 5])
def test_layer_by_layer_is_the_whole_model(size: int, tmp_path: Path) -> None:
    """The fits of an export, which keeps hidden states between layers, and those of one pass."""
    model = model_of()
    data = {task: [tuple(t[i:i + size] for t in whole) for whole in batches
                   for i in range(0, 8, size)] for task, batches in tasks().items()}
    source = Source(tmp_path, tmp_path, "", model, None)

    def fits(data: dict[str, list[Data]], **settings: Any) -> TaskFits:
        made = fits_to_make(ExportConfig(**settings), source, data)
        freeze_and_round([], model, data, made)
        return made

    found = fits(data) | fits(data, adapters=True)
    same(fit(model, data), found, rtol=0, atol=1e-12)
    alone = fits({"a": data["a"]}, task="a")
    same({"a": found["a"]}, alone, rtol=0, atol=0)


def test_a_prefix_that_texts_share_counts_as_often_as_it_is_there() -> None:
    model, (ids, mask, _) = model_of().requires_grad_(False), batch(0)
    ids[:, :2] = ids[:1, :2].clone()
    together, apart = (Calibration(model, {"a": batches}) for batches in (
        [(ids, mask)], [(ids[i:i + 1], mask[i:i + 1]) for i in range(8)]))
    assert len(together.times) == mask.sum() - 14 and len(apart.times) == mask.sum()
    for number in range(2):
        for (names, x), (same_names, y) in zip(together.through(number), apart.through(number)):
            assert [*names] == [*same_names]
            torch.testing.assert_close(together.factor(x), apart.factor(y))


def test_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of().train()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(module, "solve", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(model, tasks())
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- freezing and merging -----------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["llama", "hf-llama"])
def test_frozen_and_merged_compute_the_same(kind: str) -> None:
    model, (ids, mask, _) = model_of(kind), batch(3)
    fits = fit(model, tasks())[None]
    frozen, joined = copy.deepcopy(model), copy.deepcopy(model)
    freeze(frozen, fits)
    merge(joined, fits)
    assert all(layer.router is None for layer in expert_layers(frozen).values())
    assert not expert_layers(joined)
    for name in COUNTS:
        layer = frozen.get_submodule(name)
        assert layer.lora_A.shape == (1, 2 * COUNTS[name], layer.in_features)
        assert layer.scaling == 1 and layer.weight is frozen.get_submodule(name).weight
    logits = [getattr(y := m(ids, mask), "logits", y)[mask.bool()] for m in (frozen, joined)]
    torch.testing.assert_close(*logits)


def test_one_expert_is_exact() -> None:
    model = model_of()
    layer = expert_layers(model)["model.layers.0.self_attn.v_proj"]
    x = torch.randn(5, D, dtype=torch.float64)
    found = exact(layer)
    assert (found.kind, found.residual) == ("exact", 0.0)
    torch.testing.assert_close(x @ merged(layer.weight, found).T, layer(x))
    freeze(model, fit(model, tasks(), "gates")["a"])
    torch.testing.assert_close(expert_layers(model)["model.layers.0.self_attn.v_proj"](x), layer(x))


def test_merging_three_times_equals_once() -> None:
    model = model_of(dtype=torch.float32)
    fits, before = fit(model, tasks())[None], model_of(dtype=torch.float32)
    merge(model, fits)
    once = copy.deepcopy(model.state_dict())
    merge(model, fits)
    merge(model, fits)
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())
    for name, layer in expert_layers(before).items():
        found = model.get_submodule(name)
        assert type(found) is nn.Linear and not found.weight.requires_grad
        assert torch.equal(found.weight, merged(layer.weight, fits[name]))
        torch.testing.assert_close(
            found.weight, layer.weight + fits[name].lora_B @ fits[name].lora_A)


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


def test_bfloat16_gathers_in_float32() -> None:
    model, data = model_of(dtype=torch.bfloat16), tasks(40)
    fits = fit(model, data, "gates")[None]
    xs = reads(model, [b for t in data for b in held_out(data[t], True)])
    for name in ROUTED:
        # Batched, bfloat16 rounds elsewhere than sample by sample, and top-k may flip.
        layer = expert_layers(model)[name]
        assert fits[name].residual == pytest.approx(
            loss(fits[name], layer, xs[name].float()), rel=0.2)


def test_what_is_not_finite_is_refused_by_name() -> None:
    """NaN sums read as a residual of 0 otherwise."""
    lost = "model.layers.1.mlp.down_proj"
    for part in ("lora_A", "lora_B", "router"):
        model = model_of()
        getattr(expert_layers(model)[lost], part).data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"^{lost}: .* is not finite"):
            fit(model, tasks())


def test_missing_fits_are_named_before_anything_changes() -> None:
    model = model_of()
    fits = fit(model, tasks())[None]
    lost = "model.layers.1.mlp.down_proj"
    del fits[lost]
    for function in (freeze, merge):
        with pytest.raises(ValueError, match=lost):
            function(model, fits)
    assert [len(layer.lora_A) for layer in expert_layers(model).values()] == list(COUNTS.values())


def test_merging_keeps_the_bias() -> None:
    model = randomise(add_experts(nn.Sequential(nn.Linear(8, 6)).double(), {"0": 1}, rank=2))
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        merge(model, {"0": exact(model[0])})
        assert type(model[0]) is nn.Linear
        torch.testing.assert_close(model(x), wanted)


def test_experts_that_are_nearly_alike_still_have_gates_of_their_own() -> None:
    model = model_of()
    layer = expert_layers(model)["model.layers.0.self_attn.q_proj"]
    for p in (layer.lora_A, layer.lora_B):
        p.data[1] = p.data[0] + 0.01 * p.data[1]
    assert fit(model, tasks(), "gates")[None]["model.layers.0.self_attn.q_proj"].kind == "gates"
