"""Lily equals PEFT's, core experts equal LoRA, both merge exactly, and no gate sees the answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES
from torch import nn

from minismoe.data.tasks import Example, collate
from minismoe.data.toy import TASKS
from minismoe.io.files import read_json
from minismoe.method.experts import ExpertLinear, linear_layers
from minismoe.method.loss import supervised_losses
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM
from minismoe.training.evaluate import generate

sys.path.insert(0, str(Path(__file__).parent))
import shared_experts  # noqa: E402
from shared_experts import Core, Lily, Prompts, Shared, add_core, add_lily, parameters  # noqa: E402

LAYERS, STRIDE, COUNT, RANK, SCALE = 4, 2, 3, 5, 1.5
ADD = {"lily": lambda model: add_lily(model, RANK, STRIDE, COUNT, SCALE),
       "core": lambda model: add_core(model, RANK, COUNT, SCALE)}


def adapted(kind: str, seed: int = 0) -> CausalLM:
    """A tiny model with shared experts, all of whose parameters are random."""
    torch.manual_seed(seed)
    model = CausalLM(Config.from_dict({"model_type": "llama", **SIZES,
                                       "num_hidden_layers": LAYERS}))
    ADD[kind](model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    return model


def shared_layers(model: nn.Module) -> dict[str, Shared]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Shared)}


def whole(*lengths: int) -> Prompts:
    """Packed sequences of these lengths that are all prompt."""
    prompts = Prompts()
    prompts.rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    prompts.mean = torch.stack([(prompts.rows == i) / n for i, n in enumerate(lengths)])
    return prompts


def arguments(**given: Any) -> Any:
    args = shared_experts.parse([])
    for name, value in given.items():
        setattr(args, name, value)
    return args


def test_lily_equals_peft_in_outputs_gradients_and_parameters() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    torch.manual_seed(1)
    base = nn.Sequential(*(nn.Sequential() for _ in range(LAYERS)))
    for layer in base:
        layer.add_module("q_proj", nn.Linear(12, 12))
    theirs = peft.get_peft_model(base, peft.LilyConfig(
        r=RANK, stride_A=STRIDE, num_B=COUNT, scaling=SCALE, target_modules=["q_proj"],
        init_weights=False))
    layers = [layer.q_proj for layer in theirs.base_model.model]
    made: dict[int, nn.Parameter] = {}

    def same(weight: torch.Tensor, *shape: int) -> nn.Parameter:
        """Ours with their values: one parameter for one of theirs."""
        return made.setdefault(id(weight), nn.Parameter(weight.detach().clone().view(*shape)))

    prompts, ours = whole(7), []
    for layer in layers:
        A, B = layer.lily_A["default"].weight, layer.lily_B["default"].weight
        lily = Lily(layer.base_layer, SCALE, prompts, same(A, RANK, 12), same(B, COUNT, RANK, 12))
        lily.router = same(layer.lily_router["default"].weight, COUNT, RANK)
        ours.append(lily)
    assert len({id(m.A) for m in ours}) == LAYERS // STRIDE and len({id(m.B) for m in ours}) == 1
    x = torch.randn(7, 12)
    y, expected = nn.Sequential(*ours)(x), theirs(x[None])[0]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    (y ** 2).sum().backward()
    (expected ** 2).sum().backward()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    for p in trained:
        torch.testing.assert_close(made[id(p)].grad, p.grad.view_as(made[id(p)]),
                                   atol=1e-4, rtol=1e-4)
    shapes = {f"{i}.q_proj": (12, 12) for i in range(LAYERS)}
    counted = parameters(arguments(stride=STRIDE, num_b=COUNT), "lily", RANK, shapes)
    assert counted == sum(p.numel() for p in trained)


@pytest.mark.parametrize("lengths", [(6,), (4, 9, 2)])
def test_one_core_expert_equals_lora_with_the_cores_in_b(lengths) -> None:
    torch.manual_seed(2)
    linear, prompts = nn.Linear(10, 8), whole(*lengths)
    core = Core(linear, SCALE, prompts, RANK, 1)
    lora = ExpertLinear(linear, 1, RANK, SCALE * RANK, 1)
    with torch.no_grad():
        core.B.normal_()
        core.M.normal_()
        lora.lora_A.copy_(core.A[None])
        lora.lora_B.copy_(((core.M[0] + core.M[1]) @ core.B)[None])
    x = torch.randn(sum(lengths), 10)
    torch.testing.assert_close(core(x), lora(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ADD)
def test_each_sequence_equals_a_model_that_its_gates_are_merged_into(kind) -> None:
    model, rows = adapted(kind), [[5, 6, 7, 8, 9], [11, 12, 13]]
    ids, mask, _ = collate([Example("", row, row) for row in rows], 0)
    with torch.no_grad():
        logits = model(ids, mask)
        for i, row in enumerate(rows):
            plain = CausalLM(model.config)
            plain.load_state_dict({name.replace(".linear", ""): p for name, p in
                                   model.state_dict().items()}, strict=False)
            for name, layer in shared_layers(model).items():
                target = plain.get_submodule(name)
                assert target.weight.equal(layer.linear.weight)
                target.weight.copy_(layer.merged(layer.gates[i]))
                assert not layer.gates[0].allclose(layer.gates[1], atol=1e-4)
            torch.testing.assert_close(logits[i, :len(row)], plain(torch.tensor([row]))[0],
                                       atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ADD)
def test_the_answer_and_other_sequences_change_no_gate(kind) -> None:
    """The same prompts with other answers, and beside other lines, in training as in generation."""
    model, prompt, other = adapted(kind), [5, 6, 7, 8], [21, 22, 23, 24, 25, 26]

    def gates(*lines: tuple[list[int], list[int]]) -> list[torch.Tensor]:
        batch = collate([Example("", p + a, [-100] * len(p) + a) for p, a in lines], 0)
        supervised_losses(model, *batch, needed_only=True)
        return [layer.gates[0].clone() for layer in shared_layers(model).values()]

    first = gates((prompt, [30, 31]))
    for found in (gates((prompt, [40])), gates((prompt, [30, 31]), (prompt[:2] + other, [9]))):
        torch.testing.assert_close(found, first, atol=1e-5, rtol=1e-5)
    generate(model, [prompt], 3, [96])
    torch.testing.assert_close([layer.gates[0] for layer in shared_layers(model).values()], first,
                               atol=1e-5, rtol=1e-5)
    different = gates((other, [30, 31]))
    assert any(not a.allclose(b, atol=1e-3) for a, b in zip(first, different))


@pytest.mark.parametrize("kind", ADD)
@torch.no_grad()
def test_generation_with_a_cache_keeps_the_gates_of_the_prompt(kind) -> None:
    model, prompts = adapted(kind), [[5, 6, 7, 8], [11, 12, 13, 14, 15, 16], [20]]
    for prompt, found in zip(prompts, generate(model, prompts, 6, [])):
        expected = list(prompt)
        for _ in range(6):                           # without a cache; `needed` ends the prompt
            needed = torch.zeros(1, len(expected), dtype=torch.bool)
            needed[0, [len(prompt) - 1, -1]] = True
            hidden = model.model(torch.tensor([expected]), None, None, needed)[0, -1]
            expected.append(int(model.lm_head(hidden).argmax()))
        assert found == expected[len(prompt):]


@pytest.mark.parametrize("kind", shared_experts.KINDS)
def test_parameters_are_counted_and_equal_within_two_percent(kind) -> None:
    args = arguments(experts=3, stride=2, num_b=2)
    torch.manual_seed(0)
    model = CausalLM(Config.from_dict({"model_type": "llama", **SIZES, "num_hidden_layers": 4,
                                       "hidden_size": 128, "intermediate_size": 256}))
    found = shared_experts.forms(args, model)
    shared_experts.adapt(args, model, kind, 2.0)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == found[kind]["parameters"]
    assert abs(count / found["mixture"]["parameters"] - 1) <= 0.02


def test_lily_shares_a_between_neighbours_and_b_between_all_layers_of_a_kind() -> None:
    layers = shared_layers(adapted("lily"))
    for kind in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        of_kind = [layers[f"model.layers.{i}.{kind}"] for i in range(LAYERS)]
        assert of_kind[0].A is of_kind[1].A is not of_kind[2].A is of_kind[3].A
        assert len({id(layer.B) for layer in of_kind}) == 1
        assert len({id(layer.router) for layer in of_kind}) == LAYERS
    one = "model.layers.0.self_attn"
    assert layers[f"{one}.k_proj"].B is not layers[f"{one}.v_proj"].B


def test_the_base_is_unchanged_at_first() -> None:
    for kind, add in ADD.items():
        torch.manual_seed(0)
        model = CausalLM(Config.from_dict({"model_type": "llama", **SIZES}))
        ids = torch.arange(12).view(2, 6)
        before = model(ids)
        add(model)
        torch.testing.assert_close(model(ids), before, msg=kind)
        assert not any(p.requires_grad for m in linear_layers(model).values()
                       for p in m.parameters())


def test_a_grid_is_recorded_continued_and_written(tmp_path, monkeypatch, capsys) -> None:
    calls = []

    def run(args, kind, scale, lr, inputs, seed):
        calls.append((kind, scale, lr, seed))
        good = kind == "lily" and scale == 2 and lr == 2e-3
        return {t.name: "".join(str(int(good or i % 2)) for i in range(len(t.test)))
                for t in inputs.tasks}

    monkeypatch.setattr(shared_experts, "RESULTS", tmp_path)
    monkeypatch.setattr(shared_experts, "run", run)
    flags = ["--lrs", "1e-3,2e-3", "--scales", "1,2", "--search-seeds", "1", "--seeds", "2",
             "--kinds", "lora,lily", "--limit-train", "20", "--limit-test", "8"]
    shared_experts.main(flags)
    said = capsys.readouterr().out
    assert len(calls) == 2 * (4 + 2) and ("lily", 2.0, 2e-3, 300) in calls
    assert ("lora", 1.0, 1e-3, 300) in calls                   # of equal ones the smallest
    assert "| lily | 67 | 248,168 | 2 | 0.002 | 100.0 | 100.0 | **+50.0" in said
    assert "| lily | 2 | 50.0 | **100.0** |" in said
    shared_experts.main(flags)
    assert len(calls) == 12 and set(read_json(tmp_path / "shared-experts.json")["runs"][
        "final lily 2 0.002 300"]) == set(TASKS)
    with pytest.raises(ValueError, match="another --name"):
        shared_experts.main([*flags, "--num-b", "4"])
