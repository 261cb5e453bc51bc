"""How many kernels a training step starts: the counts are exact, and may only fall."""


import launches
import pytest
import torch

from minismoe.data.tasks import collate
from minismoe.method.experts import linear_layers
from minismoe.method.sensitivity import sample_norms
from minismoe.model.decoder import CausalLM, Config


@pytest.mark.parametrize("side, dtype, most", [
    ("mixture", torch.bfloat16, 297), ("mixture", torch.float32, 239),
    ("LoRA", torch.bfloat16, 143), ("LoRA", torch.float32, 120), ("probe", torch.bfloat16, 110)])
def test_a_layer_starts_few_kernels_and_a_step_waits_once(side, dtype, most) -> None:
    layer, besides, waits = launches.kernels(side, dtype)
    assert 0 < layer.total() <= most, layer
    assert 0 < besides <= 90
    assert waits == 1


def test_a_scaled_embedding_waits_for_nothing() -> None:
    """Gemma's, whose multiplier is rounded to the model's dtype."""
    gemma = launches.config(2, launches.NARROW) | {"model_type": "gemma3_text"}
    with torch.device("meta"):
        model = CausalLM(Config.from_dict(gemma))
    ids, mask, _ = collate(launches.examples(4), 0)
    with launches.Kernels("meta") as kernels:
        model.model(ids, mask)
    assert not launches.WAITS & kernels.seen.keys()
    with launches.Kernels("meta") as kernels:
        torch.ones(2).to("meta")
    assert kernels.seen == {launches.COPY: 1}


def test_a_layer_on_a_cpu_starts_few_kernels() -> None:
    counts = []
    for layers in (2, 4):
        step = launches.step_of("mixture", layers, torch.bfloat16, "cpu", launches.NARROW,
                                launches.examples(2))
        step()
        with launches.Kernels("cpu") as kernels:
            step()
        counts.append(kernels.seen.total())
    assert 0 < (counts[1] - counts[0]) / 2 <= 350


def test_a_batch_of_the_probe_waits_for_nothing() -> None:
    """On tensors without memory: whatever reads a value of theirs raises."""
    with torch.device("meta"):
        model = CausalLM(Config.from_dict(launches.config(2, launches.NARROW)))
    batch = collate(launches.examples(4), 0)
    assert not batch[0].is_meta
    norms = sample_norms(model.requires_grad_(False), linear_layers(model), *batch)
    assert norms.is_meta and norms.shape == (4, 14)


@pytest.mark.slow
def test_peft_is_counted_in_the_same_way() -> None:
    """56 products: 7 matrices, A and B of each, and 5 gradients of these less one of x."""
    layer, _, _ = launches.kernels("PEFT")
    assert layer["mm"] == 7 * 3 + 7 * 5
    assert layer.total() > 200
