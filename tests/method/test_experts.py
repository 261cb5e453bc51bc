"""experts.py against the reference, against autograd, and against PEFT."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SMALL, padded, plain, randomise
from torch import Tensor, nn

from minismoe import reference
from minismoe.method.allocate import Allocation
from minismoe.method.experts import (
    ExpertLinear,
    add_experts,
    balance_loss,
    expert_layers,
    take_logits,
    top_k_gates,
)
from minismoe.model.decoder import CausalLM, Config
from minismoe.model.tokens import Tokens

COUNTS = {"model.layers.0.self_attn.q_proj": 1, "model.layers.0.self_attn.v_proj": 3,
          "model.layers.0.mlp.down_proj": 8, "model.layers.1.self_attn.o_proj": 3,
          "model.layers.1.mlp.gate_proj": 2}                     # top_k 2: k < E, k = E and E = 1
PARTS = ("lora_A", "lora_B", "router")


def llama() -> nn.Module:
    """A random transformers Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def ours(model: nn.Module) -> CausalLM:
    """Our decoder with the weights of a transformers Llama."""
    copied = CausalLM(Config.from_dict(SMALL | {"model_type": "llama"}))
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def adapted(in_: int = 7, out: int = 5, experts: int = 4, rank: int = 3, k: int = 2, *,
            bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> ExpertLinear:
    """One layer, trained for a while."""
    torch.manual_seed(seed)
    linear = nn.Linear(in_, out, bias=bias, dtype=dtype).requires_grad_(False)
    return randomise(ExpertLinear(linear, experts, rank, 2.5 * rank, k), seed)


def batch(pad: str = "right") -> tuple[Tensor, Tensor]:
    return padded([9, 4, 6], pad)


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, router logits, and the gradients of x and of every expert part, under a loss that gives
    each output and each router logit a gradient of its own."""
    x, g = x.detach().clone().requires_grad_(), torch.Generator().manual_seed(5)
    found = {"y": layer(x)}
    if layer.router_logits is not None:
        found["logits"] = layer.router_logits
    upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in found.values()]
    wanted = {"x": x} | {part: p for part in PARTS if (p := getattr(layer, part)) is not None}
    return found | dict(zip(wanted, torch.autograd.grad(
        [*found.values()], [*wanted.values()], upstream, materialize_grads=True)))


# --- the layer ----------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None, database=None)
@given(shape=st.lists(st.integers(1, 4), max_size=2), E=st.integers(1, 6), k=st.integers(1, 7),
       r=st.integers(1, 4), in_=st.integers(1, 6), out=st.integers(1, 6), bias=st.booleans(),
       seed=st.integers(0, 99))
def test_any_sizes_equal_the_reference(shape: list[int], E: int, k: int, r: int, in_: int, out: int,
                                       bias: bool, seed: int) -> None:
    layer = adapted(in_, out, E, r, k, bias=bias, seed=seed)
    x = torch.randn(in_, *shape, dtype=torch.float64).movedim(0, -1)          # not contiguous
    torch.testing.assert_close(gradients(layer, x), gradients(plain(layer), x), rtol=1e-6,
                               atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ties_choose_exactly_k(k: int) -> None:
    gates = top_k_gates(torch.zeros(5, 4), k)
    assert (gates > 0).sum(-1).tolist() == [k] * 5
    torch.testing.assert_close(gates[gates > 0], torch.full((5 * k,), 1 / k))
    partly = top_k_gates(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), k)
    assert (partly > 0).sum() == k
    assert partly.argmax() == 1
    assert partly.sum() == pytest.approx(1)

    assert reference.chosen(torch.zeros(5, 4), k).tolist() == [[True] * k + [False] * (4 - k)] * 5

    layer = adapted(k=k)
    layer.router.data.zero_()
    found = gradients(layer, torch.randn(6, 7, dtype=torch.float64))
    assert all(value.isfinite().all() for value in found.values())
    assert k == 4 or balance([layer], 6).item() == pytest.approx(1)


def test_gates_are_the_renormalised_softmax_whatever_the_size_of_the_logits() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 40 + 1000
    gates, p = top_k_gates(logits, 2), logits.double().softmax(-1)
    kept = torch.where(p >= p.topk(2).values[:, 1:], p, 0)
    torch.testing.assert_close(gates, (kept / kept.sum(-1, keepdim=True)).float())


def test_bfloat16_routes_in_float32() -> None:
    layer = adapted(64, 48, dtype=torch.bfloat16)
    exact, x = copy.deepcopy(layer).float(), torch.randn(40, 64).bfloat16()
    y, expected = layer(x), exact(x.float())
    assert (y.dtype, layer.router_logits.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(layer.router_logits, exact.router_logits)
    assert (y.float() - expected).norm() < 0.01 * expected.norm()
    y.float().square().sum().backward()
    expected.square().sum().backward()
    for part in PARTS:
        found, value = getattr(layer, part).grad, getattr(exact, part).grad
        assert getattr(layer, part).dtype == found.dtype == torch.float32
        assert (found - value).norm() < 0.02 * value.norm(), part


def test_bfloat16_rounds_no_gradient_of_the_balance_loss() -> None:
    layer = adapted(64, 48, dtype=torch.bfloat16)
    exact, x = copy.deepcopy(layer).double(), torch.randn(40, 64).bfloat16()
    for made, inputs in ((layer, x), (exact, x.double())):
        made(inputs)
        balance([made], 40).backward()
    found, value = layer.router.grad, exact.router.grad
    assert (found - value).norm() < 1e-5 * value.norm()


# --- a model ------------------------------------------------------------------------------------

def test_uneven_experts_in_one_model_equal_the_reference() -> None:
    model = randomise(add_experts(llama().double(), COUNTS, rank=2)).double()
    assert {n: m.lora_A.shape[0] for n, m in expert_layers(model).items()} == COUNTS
    loop = copy.deepcopy(model)
    for name, layer in expert_layers(loop).items():
        loop.set_submodule(name, plain(layer))
    (ids, mask), found = batch(), []
    for m in (model, loop):
        logits = m(input_ids=ids, attention_mask=mask).logits
        F.cross_entropy(logits[mask.bool()], ids[mask.bool()]).backward()
        found.append((logits, {n: p.grad for n, p in m.named_parameters()
                               if n.rpartition(".")[2] in PARTS}))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)
    assert all(gradient.any() for gradient in found[0][1].values())
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == found[0][1].keys(), "a frozen weight has a gradient"


@pytest.mark.parametrize("experts", [COUNTS, Allocation(COUNTS, rank=3, alpha=12, top_k=1)])
def test_add_experts_in_place(experts: Any) -> None:
    base, model = llama(), llama()
    names, parameters = [n for n, _ in model.named_modules()], dict(model.named_parameters())
    assert add_experts(model, experts) is model
    assert [n for n, _ in model.named_modules()] == names
    new = {n for n, p in model.named_parameters() if p.requires_grad}
    assert new == {f"{n}.{part}" for n in COUNTS for part in PARTS
                   if COUNTS[n] > 1 or part != "router"}
    after = dict(model.named_parameters())
    assert after.keys() - new == parameters.keys()
    assert all(after[n] is p for n, p in parameters.items())
    ids, mask = batch()
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits,
                               base(input_ids=ids, attention_mask=mask).logits)
    own = isinstance(experts, Allocation)
    for name, layer in expert_layers(model).items():
        rank, scaling, top_k = (3, 4, 1) if own else (8, 2, 2)
        assert layer.lora_A.shape == (COUNTS[name], rank, layer.in_features)
        assert layer.lora_B.shape == (COUNTS[name], rank, layer.out_features)
        assert (layer.scaling, layer.top_k) == (scaling, min(top_k, COUNTS[name]))


def test_a_matrix_that_gets_no_expert_may_be_smaller_than_the_rank() -> None:
    model = add_experts(nn.Sequential(nn.Linear(64, 4), nn.Linear(64, 64)), {"0": 0, "1": 1})
    assert list(expert_layers(model)) == ["1"]


def test_a_model_with_experts_takes_no_others() -> None:
    """An adapter is saved with one allocation, so others could never be loaded again."""
    model = add_experts(llama(), {"model.layers.0.mlp.up_proj": 2})
    with pytest.raises(ValueError, match="has experts already: load the base anew"):
        add_experts(model, {"model.layers.1.mlp.up_proj": 2})
    assert list(expert_layers(model)) == ["model.layers.0.mlp.up_proj"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"model.layers.0.mlp.up_proj.{part}" for part in ("lora_A", "lora_B", "router")]


def test_wrong_names_are_all_named_and_nothing_is_done() -> None:
    model, fine = llama(), "model.layers.1.mlp.up_proj"
    wrong = ["model.layers.9.mlp.up_proj", "lm_head", "model.norm", "model.embed_tokens",
             "model.layers.0.mlp", "model"]
    with pytest.raises(ValueError, match=f"adapted: {', '.join(wrong)}$"):
        add_experts(model, dict.fromkeys([fine, *wrong], 2))
    assert not expert_layers(model)
    assert model.model.embed_tokens.weight.requires_grad


def test_a_model_can_be_copied_between_its_forward_and_backward() -> None:
    model = randomise(add_experts(llama(), COUNTS, rank=2))
    ids, mask = batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(input_ids=ids, attention_mask=mask).logits, logits)
    balance_loss(take_logits(expert_layers(model)), mask.flatten()).backward()
    layers = expert_layers(model), expert_layers(copied)
    for name, count in COUNTS.items():
        assert layers[0][name].lora_A is not layers[1][name].lora_A
        if count > 2:
            assert layers[0][name].router.grad.any()
            assert layers[1][name].router.grad is None


def test_one_expert_computes_and_learns_as_peft_lora_does() -> None:
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(
        r=4, lora_alpha=12.0, lora_dropout=0.0, target_modules=targets, bias="none"))
    names = [n for n, m in llama().named_modules() if n.split(".")[-1] in targets]
    mine = randomise(add_experts(llama(), Allocation(dict.fromkeys(names, 1), rank=4, alpha=12.0)))
    state, (ids, mask) = dict(theirs.named_parameters()), batch()
    weights = {layer: [state[f"base_model.model.{name}.{part}.default.weight"]
                       for part in ("lora_A", "lora_B")]
               for name, layer in expert_layers(mine).items()}
    for layer, (A, B) in weights.items():
        A.data.copy_(layer.lora_A[0])
        B.data.copy_(layer.lora_B[0].T)
    losses = [model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
                    ).loss for model in (mine, theirs)]
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    for layer, (A, B) in weights.items():
        torch.testing.assert_close(layer.lora_A.grad[0], A.grad)
        torch.testing.assert_close(layer.lora_B.grad[0].T, B.grad)


# --- balance ------------------------------------------------------------------------------------

def balance(layers: list[ExpertLinear], rows: int) -> Tensor:
    """The balance loss of the last forward, all of whose rows count."""
    return balance_loss(take_logits({str(i): m for i, m in enumerate(layers)}), torch.ones(rows))


@given(sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=5))
def test_the_balance_loss_of_any_sizes_equals_the_reference(sizes: list[tuple[int, int]]) -> None:
    """And its gradients; it is 0 without a layer that chooses among its experts."""
    layers = [adapted(experts=E, k=k, seed=i) for i, (E, k) in enumerate(sizes)]
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        layer(x)
    choosing = [layer for layer in layers if layer.top_k < layer.experts]
    each = [reference.balance_loss(layer.router_logits, layer.top_k) for layer in choosing]
    found, wanted = balance(layers, 6), [x, *(layer.router for layer in choosing)]
    if not choosing:
        assert found.item() == 0
        return
    expected = torch.stack(each).mean()
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(expected, wanted, retain_graph=True)
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(torch.autograd.grad(found, wanted), gradients)


def test_a_choice_whose_probability_is_too_small_for_a_float_counts() -> None:
    layer = adapted(3, 5, 3, 2, 2, dtype=torch.float32)
    layer.router.data.copy_(torch.eye(3))
    layer(torch.tensor([[400.0, 0.0, 200.0], [0.0, 400.0, 200.0]]))         # softmax: 1, 0 and 0
    expected = reference.balance_loss(layer.router_logits, 2).item()
    assert balance([layer], 2).item() == pytest.approx(expected)


@pytest.mark.parametrize("pad", ["right", "left"])
def test_pads_do_not_count(pad: str) -> None:
    theirs = llama()
    mine = randomise(add_experts(ours(theirs), COUNTS, rank=2))
    randomise(add_experts(theirs, COUNTS, rank=2))
    (ids, mask), values = batch(pad), []
    for model, weights in ((mine, torch.ones(int(mask.sum()))), (theirs, mask.flatten())):
        model(input_ids=ids, attention_mask=mask)
        routing = take_logits(expert_layers(model))
        assert routing.keys() == {n for n, E in COUNTS.items() if E > 2}
        loss = balance_loss(routing, weights)
        loss.backward()
        values.append((loss, model.get_submodule("model.layers.0.mlp.down_proj").router.grad))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    everything = balance_loss(routing, torch.ones(mask.numel()))
    assert abs(everything - loss) > 1e-4                # the pads would have made a difference


def test_logits_are_taken_once() -> None:
    layer = adapted()
    layer(torch.randn(4, 7, dtype=torch.float64))
    assert [*take_logits({"a": layer, "b": adapted()})] == ["a"]
    assert take_logits({"a": layer}) == {} and layer.router_logits is None


def test_a_shared_beginning_counts_for_all_sequences() -> None:
    """Computed once or in every row: the same balance loss."""
    model = randomise(add_experts(ours(llama()).double(), COUNTS, rank=2))
    ids, mask = batch()
    ids[:, :3] = ids[0, :3]

    def gradients(share: bool) -> list[Tensor]:
        model.zero_grad()
        needed = torch.zeros_like(mask, dtype=torch.bool) if share else None
        tokens = Tokens(ids, mask, model.config, torch.device("cpu"), needed)
        model.model.rows(tokens)
        balance_loss(take_logits(expert_layers(model)), tokens.repeats).backward()
        return [p.grad.clone() for n, p in model.named_parameters()
                if n.endswith("router") and p.grad is not None]

    expected = gradients(False)
    assert len(expected) == 3 and all(g.any() for g in expected)
    torch.testing.assert_close(gradients(True), expected)


def test_experts_begin_as_peft_and_mixtral_do() -> None:
    torch.manual_seed(0)
    layer = ExpertLinear(nn.Linear(1024, 64), experts=8, rank=16, alpha=32, top_k=2)
    A, bound = layer.lora_A, 1024 ** -0.5                # uniform in the bounds of nn.Linear
    assert A.abs().max() <= bound and A.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.02)
    assert layer.router.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("experts, more", [
    ({"0": 2, "1": None}, {}), ({"0": 1.5}, {}), ({"0": -3}, {}), ({"0": 1}, {"rank": 0}),
    ({"0": 2}, {"top_k": 0}), ({"0": 1, "": 1}, {})])
def test_wrong_numbers_leave_the_model_as_it_was(experts, more) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="must"):
        add_experts(model, experts, **more)
    assert all(type(m) is nn.Linear and m.weight.requires_grad for m in model)
