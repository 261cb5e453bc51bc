"""Healing: the mixture is left alone, and healing comes nearer to it."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixture import COUNTS, ROUTED, V, model_of, tasks
from safetensors import safe_open

from minismoe.data.tasks import Example, collate
from minismoe.export import heal as healing
from minismoe.export import prepare
from minismoe.export.heal import Healing, heal_maps, heal_scales, heal_step, sharing_copy
from minismoe.export.prepare import save_fits
from minismoe.export.scales import (
    quantize_model,
    round_weights,
    scale_model,
)
from minismoe.export.settings import ExportConfig, Source
from minismoe.method.experts import expert_layers
from minismoe.method.freeze import Fit, TaskFits, fit, freeze, merge
from minismoe.method.loss import IGNORE
from minismoe.model.quantize import PART, BlockLinear, BlockWeight, dequantize, quantize


def examples(labelled: bool = True, count: int = 24) -> list[Example]:
    rng = random.Random(0)
    rows = [[rng.randrange(V) for _ in range(rng.randint(4, 12))] for _ in range(count)]
    return [Example("a", ids, [IGNORE, *ids[1:]] if labelled else [IGNORE] * len(ids), i)
            for i, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def mixture() -> Any:
    return model_of(dtype=torch.float32)


@pytest.fixture(scope="module")
def fits(mixture: Any) -> Any:
    """Frozen mixtures by kind of fit."""
    return fit(mixture, tasks())


@pytest.fixture(autouse=True)
def untouched(mixture: Any) -> Any:
    """Whatever a test does, the mixture computes what it did."""
    before = copy.deepcopy(mixture.state_dict())
    yield
    assert all(torch.equal(v, before[k]) for k, v in mixture.state_dict().items())
    assert all(p.grad is None for p in mixture.parameters()) and not mixture.training
    assert list(expert_layers(mixture)) == list(COUNTS)


def test_a_copy_shares_every_weight(mixture: Any) -> None:
    copied = sharing_copy(mixture)
    assert copied.state_dict().keys() == mixture.state_dict().keys()
    for (name, ours), (_, theirs) in zip(copied.named_parameters(), mixture.named_parameters()):
        assert ours is theirs, name
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.model.layers[0] is not mixture.model.layers[0]


# --- heal ---------------------------------------------------------------------------------------

def loss_of(model: Any, data: list[Example]) -> float:
    ids, mask, labels = collate(data, 0)
    with torch.no_grad():
        logits = model(ids, mask)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(),
                           ignore_index=IGNORE).item()


def divergence(model: Any, teacher: Any, data: list[Example]) -> float:
    ids, mask, _ = collate(data, 0)
    with torch.no_grad():
        p, q = (m(ids, mask)[mask.bool()].double().log_softmax(-1) for m in (teacher, model))
    return ((p.exp() * (p - q)).sum() / len(p)).item()


@pytest.mark.parametrize("labelled", [True, False])
def test_healing_lowers_the_loss(mixture: Any, fits: Any, labelled: bool) -> None:
    start, data = fits["mean"].together, examples(labelled)
    healed = heal_maps(Healing(mixture, data, 20, 0), start, lr=1e-2)
    assert list(healed) == list(COUNTS)
    assert {f.kind for f in healed.values()} == {"healed"}
    losses = []
    for chosen in (start, healed):
        model = sharing_copy(mixture)
        freeze(model, chosen)
        losses.append(loss_of(model, data) if labelled else divergence(model, mixture, data))
    assert losses[1] < 0.9 * losses[0]
    for name, found in healed.items():
        assert found.residual == start[name].residual
        assert not torch.equal(found.lora_A, start[name].lora_A)


def test_healing_is_deterministic(mixture: Any, fits: Any) -> None:
    healing = Healing(mixture, examples(), 3, 0)
    first, again = (heal_maps(healing, fits["gates"].together) for _ in range(2))
    assert all(torch.equal(first[n].lora_A, again[n].lora_A) for n in first)


def step_loss(student: Any, teacher: Any, data: list[Example]) -> torch.Tensor:
    """The loss of a healing step by autograd, from full logits."""
    ids, mask, labels = collate(data, 0)
    if (labels[:, 1:] != IGNORE).any():
        return F.cross_entropy(student(ids, mask)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                               ignore_index=IGNORE)
    q, p = (m(ids, mask)[mask.bool()].log_softmax(-1) for m in (student, teacher))
    return (p.detach().exp() * (p.detach() - q)).sum() / len(q)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("size", [3, 16])
def test_a_step_and_its_gradient_equal_autograd(
        mixture: Any, fits: Any, labelled: bool, size: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(healing, "CHUNK", 5 * V)                   # five tokens at a time
    student, data = sharing_copy(mixture), examples(labelled)
    freeze(student, fits["mean"].together)
    parts = [p for p in student.parameters() if p.requires_grad]
    found = heal_step(student, Healing(mixture, data, 1, 0, size), data)
    wanted = step_loss(student, mixture, data)
    assert found == pytest.approx(wanted.item(), rel=1e-4)
    for part, gradient in zip(parts, torch.autograd.grad(wanted, parts)):
        torch.testing.assert_close(part.grad, gradient, rtol=1e-3, atol=1e-6)


# --- scales -------------------------------------------------------------------------------------

def blocks_of(model: Any, precision: str, block: int) -> Any:
    return quantize_model(model, lambda name: model.get_parameter(name).detach(), precision, block)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [PART, 300])
def test_gradients_of_scales_equal_autograd(
        mixture: Any, block: int, recompute: bool, chunk: int, monkeypatch: pytest.MonkeyPatch,
        ) -> None:
    """In float64: a functional call of the mixture with weights that autograd makes of scales.

    chunk: weights made at a time, so a whole matrix or a few rows of it.
    """
    monkeypatch.setattr("minismoe.model.quantize.PART", chunk)
    model, data = copy.deepcopy(mixture).double(), examples()
    merge(model, fit(model, tasks())["linear"].together)
    blocks = blocks_of(model, "int4", block)
    student = sharing_copy(model)
    student.model.recompute = recompute
    scaled = scale_model(student, blocks)
    deltas = {}
    for name, weight in scaled.items():
        weight.delta.data = torch.randn(weight.delta.shape).double() * 0.1
        deltas[name] = weight.delta.detach().clone().requires_grad_()
    heal_step(student, Healing(model, data, 1, 0), data)

    def dense(name: str) -> torch.Tensor:
        b = blocks[name]
        grown = deltas[name].exp().repeat_interleave(b.size, 1)[:, :b.shape[1]]
        return grown * dequantize(b).double()

    plain = sharing_copy(model)
    weights = {name: dense(name) for name in scaled}
    def call(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(plain, weights, (ids, mask))
    step_loss(call, model, data).backward()
    for name, weight in scaled.items():
        torch.testing.assert_close(weight.delta.grad, deltas[name].grad, rtol=1e-4, atol=1e-8,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("labelled", [True, False])
def test_healing_scales_lowers_the_loss(mixture: Any, fits: Any, labelled: bool) -> None:
    """Integers stay."""
    base, data = sharing_copy(mixture), examples(labelled)
    merge(base, fits["linear"].together)
    before = blocks_of(base, "int4", 32)
    healing = Healing(mixture, data, 30, 0)
    after, again = (heal_scales(healing, before, lr=3e-2) for _ in range(2))
    losses = []
    for blocks in (before, after):
        model = sharing_copy(base)
        round_weights(model, "int4", 32, blocks)
        losses.append(loss_of(model, data) if labelled else divergence(model, mixture, data))
    assert losses[1] < 0.95 * losses[0]
    for name, healed in after.items():
        assert torch.equal(healed.data, before[name].data), name
        assert torch.equal(healed.scales, again[name].scales), "not deterministic"
        assert not torch.equal(healed.scales, before[name].scales), name


def test_no_gradient_of_a_whole_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minismoe.model.quantize.ON_CPU", 4 * 64)        # four rows at a time
    weight, largest = BlockWeight(quantize(torch.randn(40, 64), 4), torch.float32, True), []
    sums = BlockWeight.block_sums
    monkeypatch.setattr(BlockWeight, "block_sums", lambda self, gradient, w: (
        largest.append(gradient.numel()), sums(self, gradient, w))[1])
    BlockLinear(weight, None)(torch.randn(3, 64)).sum().backward()
    assert len(largest) == 10 and max(largest) == 4 * 64


# --- frozen.safetensors -------------------------------------------------------------------------

def test_frozen_maps_are_kept_beside_the_adapter(fits: Any, tmp_path: Path) -> None:
    save_fits(tmp_path, fits["linear"])
    assert [p.name for p in tmp_path.iterdir()] == ["frozen.safetensors"]
    with safe_open(tmp_path / "frozen.safetensors", "pt") as f:
        assert f.metadata()["format"] == "minismoe.frozen/1"
        notes = json.loads(f.metadata()["fits"])
        assert len(notes) == 3 * len(COUNTS)
        for prefix, by_name in (("", fits["linear"].together), *(
                (f"{task}/", found) for task, found in fits["linear"].by_task.items())):
            for name, wanted in by_name.items():
                path = prefix + name
                assert torch.equal(f.get_tensor(f"{path}.lora_A"), wanted.lora_A)
                assert torch.equal(f.get_tensor(f"{path}.lora_B"), wanted.lora_B)
                assert notes[path] == [wanted.kind, wanted.residual]
        name = ROUTED[0]
        assert f.get_slice(f"a/{name}.lora_A").get_shape() == [2 * COUNTS[name], 16]
        assert f.get_slice(f"{name}.lora_B").get_shape() == [16, 2 * COUNTS[name]]


@pytest.mark.parametrize("residual, trained", [(0.01, ["scales"]), (0.02, ["maps", "scales"])])
def test_maps_that_miss_much_are_healed_before_they_are_rounded(
        residual: float, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for part in ("maps", "scales"):
        monkeypatch.setattr(prepare, f"heal_{part}",
                            lambda *_, part=part, **__: found.append(part) or {})
    for name in ("quantize_model", "refine", "merged_weights", "save_fits"):
        monkeypatch.setattr(prepare, name, lambda *_: {})
    A, B = torch.zeros(1, 1), torch.zeros(1, 1)
    fits = TaskFits({"m": Fit(A, B, "linear", residual),             # single experts miss nothing
                     "n": Fit(A, B), "o": Fit(A, B)}, {})
    model, tokenizer = SimpleNamespace(config=None), SimpleNamespace(pad_id=0)
    config = ExportConfig(heal=40, precision="int4", block=32)
    prepare.prepare_part(config, Source(Path(), Path(), "", model, tokenizer), {"t": []}, {}, fits)
    assert found == trained
