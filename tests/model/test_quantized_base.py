"""A base in 8 or 4 bits against a float model that holds the same rounded weights."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture import merge
from tiny import randomise

from minismoe.data.tasks import Example
from minismoe.method.allocate import Allocation
from minismoe.method.experts import add_experts, linear_layers
from minismoe.method.sensitivity import probe
from minismoe.model.checkpoint import load_adapter, load_model, save_adapter
from minismoe.model.decoder import CausalLM
from minismoe.model.quantize import BlockLinear
from minismoe.training.evaluate import generate
from minismoe.training.loop import Trainer
from minismoe.training.plan import TrainConfig

Make = Callable[[str], tuple[Any, Path]]


def pair(folder: Path, bits: int, dtype: torch.dtype) -> tuple[CausalLM, CausalLM]:
    """The model in blocks, and a float model of what the blocks stand for."""
    ours, plain = load_model(folder, dtype, base_bits=bits), load_model(folder, dtype)
    for name, layer in linear_layers(ours).items():
        assert isinstance(layer, BlockLinear), name
        assert not any(p.requires_grad for p in layer.parameters()), name
        plain.get_submodule(name).weight = torch.nn.Parameter(layer.weight.dense(), False)
    return ours, plain


def examples() -> list[Example]:
    rows = torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example("a", ids[:7 + i], [-100, -100, *ids[2:7 + i]], i) for i, ids in enumerate(rows)]


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_outputs_and_gradients_are_those_of_the_rounded_weights(
        checkpoint: Make, bits: int, dtype: torch.dtype, adapted: bool) -> None:
    models = pair(checkpoint("qwen2")[1], bits, dtype)
    names = [n for n in linear_layers(models[0]) if adapted or "layers.0.mlp" in n]
    found = []
    for model in models:
        randomise(add_experts(model, dict.fromkeys(names, 3), rank=4))
        trainer = Trainer(model, TrainConfig(), 0)
        sums = trainer.gradients(examples(), 8)
        found.append((sums, [p.grad for p in trainer.parameters.values()]))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) > 0
    for one, other in zip(found[0][1], found[1][1]):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [8, 4])
def test_probe_and_generation_are_those_of_the_rounded_weights(checkpoint: Make, bits: int) -> None:
    models = pair(checkpoint("llama_tied")[1], bits, torch.float32)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    batch = ids, torch.ones_like(ids), ids
    scores = [probe(model, {"a": [batch]}) for model in models]
    assert scores[0].shapes == scores[1].shapes
    assert scores[0]["a"] == pytest.approx(scores[1]["a"], rel=1e-5)
    assert generate(models[0], ids.tolist(), 5, [0]) == generate(models[1], ids.tolist(), 5, [0])


def test_other_numbers_of_bits_are_refused(checkpoint: Make) -> None:
    with pytest.raises(ValueError, match="base_bits is 2: give 16, 8, 4 or None"):
        load_model(checkpoint("llama")[1], base_bits=2)


def test_weights_in_16_bits_stay_in_their_file_and_lose_nothing(
        checkpoint: Make, tmp_path: Path) -> None:
    hf, _ = checkpoint("llama")
    copy.deepcopy(hf).bfloat16().save_pretrained(tmp_path / "bf16")
    model, plain = (load_model(tmp_path / "bf16", base_bits=bits) for bits in (16, None))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.stored.dtype == torch.bfloat16 and weight.dense().dtype == torch.float32
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids), plain(ids))


def test_adapter_returns_to_its_base_in_any_form(checkpoint: Make, tmp_path: Path) -> None:
    """Trained on few bits, it loads there and onto the float base, and merges into either."""
    folder = checkpoint("llama")[1]
    trained = load_model(folder, base_bits=4)
    allocation = Allocation(dict.fromkeys(linear_layers(trained), 1), rank=4, alpha=8)
    randomise(add_experts(trained, allocation))
    save_adapter(trained, tmp_path, allocation)
    assert json.loads((tmp_path / "adapter.json").read_text())["base_bits"] == 4
    ids = torch.tensor([[5, 6, 7, 8]])
    for bits in (4, None):
        model = load_model(folder, base_bits=bits)
        load_adapter(model, tmp_path)
        beside = model(ids)
        if bits:
            assert torch.equal(beside, trained(ids))
        merge(model)
        torch.testing.assert_close(model(ids), beside, rtol=1e-4, atol=1e-4)
