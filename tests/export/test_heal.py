"""Healing: the mixture is left alone, and healing comes nearer to it."""

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixture import COUNTS, ROUTED, V, model_of, tasks
from safetensors import safe_open
from torch._dynamo.utils import counters

from minismoe.data.tasks import Example, collate
from minismoe.export.heal import (
    Healing,
    divergences,
    heal,
    heal_step,
    own_tokens,
    sharing_copy,
)
from minismoe.export.rounding import round_weights
from minismoe.export.tree import save_fits, take_blocks
from minismoe.export.weights import GraphFormat
from minismoe.method.experts import expert_layers, expert_parameters
from minismoe.method.freeze import fit, freeze
from minismoe.training import compiled
from minismoe.training.copies import Copies


def examples(count: int = 24) -> list[Example]:
    rng = random.Random(0)
    rows = [[i, *(rng.randrange(V) for _ in range(rng.randint(3, 11)))] for i in range(count)]
    return [Example("a", ids, ids, i) for i, ids in enumerate(rows)]


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


def divergence(model: Any, teacher: Any, data: list[Example]) -> torch.Tensor:
    """KL(teacher || model) of all tokens, each from whole logits."""
    found = []
    for e in data:
        ids = torch.tensor([e.ids])
        with torch.no_grad():
            p = teacher(ids)[0].log_softmax(-1)
        found.append(F.kl_div(model(ids)[0].log_softmax(-1), p, log_target=True, reduction="none"))
    return torch.cat(found).sum(-1)


def student_of(mixture: Any, fits: Any, block: int | None = None) -> Any:
    """A frozen copy of the mixture; with a block, beside weights in 4 bits."""
    student = sharing_copy(mixture)
    freeze(student, fits)
    if block:
        tree = sharing_copy(student)
        round_weights(tree, GraphFormat("ort", "int4", 64, block), mixture, {})
        take_blocks(student, tree)
    return student


@pytest.mark.parametrize("block", [None, 32])
def test_healing_comes_nearer_to_the_mixture(mixture: Any, fits: Any, block: int | None) -> None:
    """In floats, and beside rounded weights."""
    start, data, means = fits["mean"].together, examples(), []
    healed = heal(student_of(mixture, start, block), Healing(mixture, data, 20, 0), lr=1e-2)
    assert list(healed) == list(COUNTS)
    assert {f.kind for f in healed.values()} == {"healed"}
    for chosen in (start, healed):
        model = student_of(mixture, chosen, block)
        means.append(divergence(model, mixture, data).mean().item())
    assert means[1] < 0.9 * means[0]
    for name, found in healed.items():
        assert not torch.equal(found.lora_A, start[name].lora_A)


def test_healing_is_deterministic(mixture: Any, fits: Any) -> None:
    healing = Healing(mixture, examples(), 3, 0)
    first, again = (heal(student_of(mixture, fits["gates"].together), healing)
                    for _ in range(2))
    assert all(torch.equal(first[n].lora_A, again[n].lora_A) for n in first)


def test_compiled_layers_heal_alike(mixture: Any, fits: Any, monkeypatch: pytest.MonkeyPatch,
                                    ) -> None:
    """Beside rounded weights."""
    monkeypatch.setattr(compiled, "compiled_layers", partial(
        compiled.compiled_layers, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    plain, found = (heal(student_of(mixture, fits["gates"].together, 32), Healing(
        mixture, examples(), 5, 0, compile=asked)) for asked in ("off", "on"))
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for name in plain:
        torch.testing.assert_close(found[name].lora_B, plain[name].lora_B, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3 * 61 + 1, 1 << 24])
def test_equals_kl_divergence_of_full_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minismoe.export.heal.CHUNK", chunk)
    hidden, theirs = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0)).double()
    head, other = torch.randn(2, 61, 16, generator=torch.Generator().manual_seed(1)).double()
    hidden.requires_grad_()
    expected = F.kl_div((hidden @ head.T).log_softmax(-1), (theirs @ other.T).log_softmax(-1),
                        reduction="none", log_target=True).sum(-1)
    losses = divergences(hidden, head, theirs, other)
    torch.testing.assert_close(losses, expected)
    upstream = torch.randn(10, generator=torch.Generator().manual_seed(2)).double()
    found, wanted = (torch.autograd.grad((x * upstream).sum(), hidden) for x in (losses, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size", [3, 16])
def test_a_step_and_its_gradient_equal_autograd(mixture: Any, fits: Any, size: int) -> None:
    """No two examples begin alike, so that all tokens are their own."""
    student, data = sharing_copy(mixture), examples()
    freeze(student, fits["mean"].together)
    maps = Copies(student)
    found = heal_step(student, maps, Healing(mixture, data, 1, 0, size), data)
    wanted = divergence(student, mixture, data).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    parameters = [*expert_parameters(student).values()]
    gradients = torch.autograd.grad(wanted, parameters)
    for parameter, gradient in zip(parameters, gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows, own", [
    (["abcd", "abx"], ["  cd", "  x"]), (["abc"], ["abc"]), (["ab", "ab"], [" b", " b"]),
    (["ab", "abc"], [" b", " bc"]), (["abc", "xbc"], ["abc", "xbc"])])
def test_own_tokens_follow_what_all_rows_begin_with(rows: list[str], own: list[str]) -> None:
    ids, mask, _ = collate([Example("a", [*map(ord, row)], []) for row in rows], 0)
    assert [[c != " " for c in row.ljust(len(mask[0]))] for row in own] == (
        own_tokens(ids, mask).tolist())


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
