"""sensitivity.py against the reference: a float64 autograd gradient of each weight and sample."""

import copy
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import SMALL, Shapes, padded, plain, small_model
from torch import Tensor, nn

from minismoe import reference
from minismoe.method.experts import add_experts, expert_layers, linear_layers
from minismoe.method.loss import IGNORE
from minismoe.method.sensitivity import probe, sample_norms

V, D = SMALL["vocab_size"], SMALL["hidden_size"]
KINDS = ["llama", "qwen2", "qwen3", "hf-llama", "hf-qwen2"]
MATRICES = [f"model.layers.{i}.{name}" for i in range(2) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
# A row has 3 tokens or more: a first token attends to itself alone, whatever q and k are.
# With widths of 8 to 24, a gram is cheaper up to 5 tokens (k, v), 7 (q, o) or 9 (the MLP).
LENGTHS = {"all grams": [5, 3, 4], "grams and products": [7, 3, 5], "all products": [13, 6, 9]}
Data = tuple[Tensor, Tensor, Tensor]


def model_of(kind: str, experts: bool = False) -> nn.Module:
    """A random tiny model: ours, or one of transformers."""
    model = small_model(kind, tie_word_embeddings=True)
    if kind.endswith("qwen2"):
        assert model.model.layers[0].self_attn.q_proj.bias is not None
    if experts:
        add_experts(model, {name: i % 4 for i, name in enumerate(MATRICES)}, rank=2)
        for layer in expert_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.3)
    return model.eval()


def batch(lengths: list[int], pad: str = "right", seed: int = 1) -> Data:
    """Rows of these lengths; about half of the tokens are supervised, the last one always."""
    ids, mask = padded(lengths, pad, seed)
    supervised = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    supervised[range(len(ids)), [-1 if pad == "left" else n - 1 for n in lengths]] = True
    return ids, mask, torch.where(supervised & mask.bool(), ids, IGNORE)


def expected_norms(model: nn.Module, data: Data) -> Tensor:
    """|| dL_i / dW ||^2 (B, M): each sample alone, without its pads, by autograd, in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    for name, layer in expert_layers(model).items():
        model.set_submodule(name, plain(layer))
    weights = {name: model.get_submodule(name).weight for name in MATRICES}
    norms = torch.zeros(len(data[0]), len(weights), dtype=torch.float64)
    for i, (ids, mask, labels) in enumerate(zip(*data, strict=True)):
        ids, targets = ids[mask.bool()], labels[mask.bool()][1:]
        if (targets != IGNORE).any():
            logits = model(ids[None])
            logits = getattr(logits, "logits", logits)[0, :-1]
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORE)
            norms[i] = norms.new_tensor(list(reference.sensitivity(weights, [loss]).values()))
    return norms


def norms_of(model: nn.Module, data: Data) -> Tensor:
    """(B, M) as the probe has it."""
    scores = probe(model, {"task": [data]})
    assert list(scores.shapes) == MATRICES
    return scores.samples["task"]


# --- the norms ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("lengths", "pad", "experts"), [
    ([5, 3, 4], "right", True), ([3, 7, 5], "left", False), ([7, 3, 5], "right", True),
    ([13, 6, 9], "left", True), ([11], "", False)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_gradient_of_each_sample(kind: str, lengths: list[int], pad: str,
                                            experts: bool) -> None:
    """Experts are computed in float64, the base alone in float32."""
    model, data = model_of(kind, experts), batch(lengths, pad or "right")
    model = model.double() if experts else model
    found, expected = norms_of(model, data), expected_norms(model, data)
    exact = 1e-9 if experts and pad != "left" else 1e-4    # transformers rotates in float32
    assert (expected > 0).all() and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=exact, atol=0)


def test_float16_squares_do_not_underflow() -> None:
    """Gradients near 1e-4 have squares that float16 does not hold."""
    model, data = model_of("llama"), batch(LENGTHS["grams and products"])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1e-3)
    model = model.half()
    expected = expected_norms(model, data)
    assert expected.min() < 6e-8                          # the least that float16 knows
    found = norms_of(model, data)
    torch.testing.assert_close(found.sum(0), expected.sum(0), rtol=0.2, atol=0)


@pytest.mark.parametrize("kind", ["llama", "hf-llama"])
@pytest.mark.parametrize("which", LENGTHS)
def test_takes_the_cheaper_of_gram_and_product(kind: str, which: str) -> None:
    """A product is as large as a weight, for each sample; where all are grams, none is made."""
    model, data = model_of(kind), batch(LENGTHS[which])
    B, T = data[0].shape
    with Shapes() as shapes:
        norms_of(model, data)
    made = [shape for name, shape in shapes.seen if name == "bmm"]
    grams, products = made.count((B, T, T)), sum(
        made.count(shape) for shape in {(B, 16, 16), (B, 8, 16), (B, 24, 16), (B, 16, 24)})
    weights = {n: model.get_submodule(n).weight.shape for n in MATRICES}
    by_gram = [n for n, (out, in_) in weights.items() if T * (out + in_) < out * in_]
    assert products == len(MATRICES) - len(by_gram)
    assert {"all grams": products == 0, "all products": grams == 0,
            "grams and products": 0 < products < len(MATRICES)}[which]
    readers = {"gate_proj": "up_proj", "q_proj": "v_proj"}             # these read the same x
    inputs = {readers.get(n.split(".")[-1], n.split(".")[-1]).replace("k_proj", "v_proj")
              + n.split(".")[2] for n in by_gram}
    assert grams == len(by_gram) + len(inputs)             # D D^T of each, X X^T once an input


# --- samples, batches, tasks --------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["llama", "hf-llama"])
@pytest.mark.parametrize("pad", ["right", "left"])
def test_a_sample_without_supervision_scores_0(kind: str, pad: str) -> None:
    model, (ids, mask, labels) = model_of(kind), batch([7, 3, 5], pad)
    labels[1] = IGNORE
    data = ids, mask, labels
    found, expected = norms_of(model, data), expected_norms(model, data)
    assert not found[1].any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    nothing = norms_of(model, (ids, mask, torch.full_like(ids, IGNORE)))
    assert not nothing.any()                                             # nor NaN


def test_a_task_without_a_batch_is_named() -> None:
    model, batches = model_of("llama"), iter([batch([3, 4], "right")])
    probe(model, {"a": batches})
    for tasks in ({"a": batches}, {"b": []}):            # an iterator gives its batches once
        with pytest.raises(ValueError, match="has no batch"):
            probe(model, tasks)


@pytest.mark.parametrize("kind", ["llama", "hf-llama"])
def test_order_company_and_batches_do_not_matter(kind: str) -> None:
    model, data = model_of(kind), batch([7, 3, 5, 6, 4, 7])
    whole, order = norms_of(model, data), torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = norms_of(model, tuple(t[order] for t in data))
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=0)
    parts = [tuple(t[i:i + 2] for t in data) for i in (0, 2, 4)]
    scores = probe(model, {"a": parts, "b": iter(parts[1:2])})
    assert scores.shapes == {n: tuple(model.get_submodule(n).weight.shape) for n in MATRICES}
    assert [*scores] == ["a", "b"]
    torch.testing.assert_close(scores.samples["a"], whole, rtol=1e-4, atol=0)
    for task, rows in (("a", whole), ("b", whole[2:4])):
        assert scores[task] == pytest.approx(dict(zip(MATRICES, rows.sum(0).tolist(), strict=True)),
                                             rel=1e-4)


def test_only_the_modules_asked_for() -> None:
    model, data = model_of("llama").requires_grad_(False), batch([7, 3, 5])
    some = {name: model.get_submodule(name) for name in (MATRICES[9], MATRICES[2])}
    torch.testing.assert_close(sample_norms(model, some, *data).double(),
                               norms_of(model, data)[:, [9, 2]], rtol=1e-5, atol=0)


def test_works_under_no_grad() -> None:
    model, data = model_of("llama"), batch([7, 3, 5])
    expected = norms_of(model, data)
    with torch.no_grad():
        torch.testing.assert_close(norms_of(model, data), expected)
        assert not torch.is_grad_enabled()


def test_dropout_is_off() -> None:
    model = small_model("hf-llama", attention_dropout=0.5)
    data = batch([7, 3, 5])
    torch.testing.assert_close(norms_of(model.train(), data), expected_norms(model.eval(), data),
                               rtol=1e-4, atol=0)


# --- the model is left as it was ----------------------------------------------------------------

def mixed(kind: str) -> nn.Module:
    """Mid-training: modules in train mode, parameters that ask, a gradient, a user's hook."""
    model = model_of(kind, experts=True)
    model.model.layers[0].train()
    model.model.layers[1].mlp.train()
    model.model.norm.requires_grad_(True)
    experts = next(iter(expert_layers(model).values()))
    experts.lora_A.grad = torch.ones_like(experts.lora_A)
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: None)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Parameters (which ones, their values and gradients), modes and hooks."""
    modules = {name: (module.training, [[*hooks.values()] for key, hooks in sorted(
        vars(module).items()) if key.endswith("_hooks")]) for name, module in model.named_modules()}
    return modules | {f"{name}.": (id(p), p.requires_grad, p.tolist(), None if p.grad is None else
                                   p.grad.tolist()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("where", ["nowhere", "labels", "input_ids", "backward", "batches"])
@pytest.mark.parametrize("kind", ["llama", "hf-qwen2"])
def test_the_model_is_left_as_it_was_also_after_an_exception(kind: str, where: str) -> None:
    model, (ids, mask, labels) = mixed(kind), batch([7, 3, 5])

    def batches() -> Iterator[Data]:
        yield ids, mask, labels
        if where == "batches":
            raise RuntimeError("the file is gone")
        bad = torch.full_like(ids, V + 5)
        yield (bad if where == "input_ids" else ids), mask, (bad if where == "labels" else labels)

    def fail(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda gradient: 1 / 0)

    handle = model.model.layers[0].register_forward_hook(
        fail if where == "backward" else lambda *_: None)
    before = state(model)
    with nullcontext() if where == "nowhere" else pytest.raises(
            (RuntimeError, IndexError, ZeroDivisionError)):
        probe(model, {"task": batches()})
    assert state(model) == before
    handle.remove()
    assert norms_of(model, (ids, mask, labels)).isfinite().all()


@pytest.mark.filterwarnings("ignore::FutureWarning")         # of torch's, for being looked at
def test_a_batch_leaves_nothing_in_memory() -> None:
    """Not even until the garbage collector runs: on a device, batches would add up."""
    def alive() -> int:
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    model = model_of("llama")
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for lengths in LENGTHS.values():
            sample_norms(model, linear_layers(model), *batch(lengths))
            assert alive() == before
    finally:
        gc.enable()
