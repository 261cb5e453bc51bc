"""bits.py against plain loops, autograd's second derivative, and every choice of options."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import padded, tiny_config
from torch import Tensor, nn

from minismoe.method import bits
from minismoe.method.bits import drawn, harms, spend
from minismoe.model.decoder import CausalLM

V = 5
HF: dict[str, Any] = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 12, "head_dim": 4,
                      "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                      "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
                      "tie_word_embeddings": True}


def model_of(kind: str) -> nn.Module:
    """A random tiny model in float64."""
    torch.manual_seed(0)
    model: nn.Module
    if kind.startswith("ours"):
        model = CausalLM(tiny_config(
            vocab_size=V, hidden_size=8, intermediate_size=12, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, tie_word_embeddings="tied" in kind,
            embedding_multiplier=3.0 if "times 3" in kind else 1.0))
    elif kind == "hf-gemma3":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**HF))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
    return model.double().eval()


def changes_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Two random dW of each weight, a tied one under the embedding's name."""
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.Linear))
             and (name != "lm_head" or m.weight is not model.model.embed_tokens.weight)]
    generator = torch.Generator().manual_seed(1)
    return {name: [torch.randn(model.get_submodule(name).weight.shape, generator=generator).double()
                   for _ in range(2)] for name in names}


def harms_of(model: nn.Module, changes: dict[str, list[Tensor]], *batches: tuple[Tensor, ...],
             seed: int = 0) -> dict[str, list[float]]:
    return harms(model, {name: [partial(lambda dW: dW, dW) for dW in options]
                         for name, options in changes.items()}, batches, seed)


def logits_of(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    output = model(input_ids=ids, **more)
    return getattr(output, "logits", output)


KINDS = ["ours", "ours, tied", "ours, tied, times 3", "hf-llama", "hf-gemma3"]


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_loops(kind: str, pad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "CHUNK", 3 * V)                # three rows at a time
    model = model_of(kind)
    changes, (ids, mask) = changes_of(model), padded([6, 3, 4], pad, vocabulary=V)
    found = harms_of(model, changes, (ids, mask), seed=7)
    tokens = drawn(logits_of(model, ids, attention_mask=mask)[mask.bool()].softmax(-1),
                   torch.Generator().manual_seed(7)).split([*mask.sum(1)])
    expected = {name: [0.0, 0.0] for name in changes}
    for row, keep, targets in zip(ids, mask.bool(), tokens):
        loss = nn.functional.cross_entropy(logits_of(model, row[keep][None])[0], targets,
                                           reduction="sum")
        gradients = torch.autograd.grad(loss, [model.get_submodule(n).weight for n in changes])
        for (name, options), gradient in zip(changes.items(), gradients):
            for o, dW in enumerate(options):
                expected[name][o] += 0.5 * (gradient * dW).sum().item() ** 2 / int(mask.sum())
    for name in changes:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name      # HF: float32 rope


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_expectation_is_the_second_derivative_of_the_divergence(
        kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all next tokens of a text of three, by their probabilities."""
    model, ids = model_of(kind), torch.tensor([[1, 4, 0]])
    whole = changes_of(model)
    changes = {name: whole[name] for name in whole if ".1." not in name}
    p = logits_of(model, ids)[0].softmax(-1).detach()

    def divergence(weight: Tensor, dW: Tensor) -> float:
        """KL(model || model with dW) a token."""
        weight += dW
        q = logits_of(model, ids)[0].log_softmax(-1)
        weight -= dW
        return (p * (p.log() - q)).sum().item() / 3

    expected = {name: [0.0, 0.0] for name in changes}
    for tokens in itertools.product(range(V), repeat=3):
        monkeypatch.setattr(bits, "drawn", lambda *_, tokens=tokens: torch.tensor(tokens))
        share = p[range(3), tokens].prod().item()
        for name, found in harms_of(model, changes, (ids, torch.ones_like(ids))).items():
            expected[name] = [e + share * h for e, h in zip(expected[name], found)]
    for name, options in changes.items():
        for o, dW in enumerate(options):
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                up, down = (divergence(weight, step * dW) for step in (1e-5, -1e-5))
            assert expected[name][o] == pytest.approx((up + down) / 2e-10, rel=1e-3), (name, o)


def test_tokens_are_drawn_by_their_probabilities_and_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [3.0, float("-inf"), 0.0, 0.0]])
    many = drawn(logits.softmax(-1).repeat_interleave(20000, 0), torch.Generator().manual_seed(0))
    for row, p in zip(many.view(2, -1), logits.softmax(-1)):
        shares = row.bincount(minlength=4) / 20000
        torch.testing.assert_close(shares, p, atol=0.015, rtol=0)      # over 4 standard deviations
    model, batch = model_of("ours"), padded([5, 4], vocabulary=V)
    changes = changes_of(model)
    first = harms_of(model, changes, batch, seed=1)
    assert first == harms_of(model, changes, batch, seed=1)
    assert first != harms_of(model, changes, batch, seed=2)


def test_batches_add_up_to_a_mean_over_tokens() -> None:
    model, (ids, mask) = model_of("ours"), padded([5, 3], vocabulary=V)
    changes, one = changes_of(model), torch.Generator()

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        yield ids[:1], mask[:1]
        yield ids[1:, :3], mask[1:, :3]
    one.manual_seed(0)
    whole, split = harms_of(model, changes, (ids, mask)), harms_of(model, changes, *parts())
    for name in changes:                                     # the same numbers are drawn, in order
        assert whole[name] == pytest.approx(split[name])
    with pytest.raises(ValueError, match="no batch"):
        harms_of(model, changes)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("ours, tied").train()
    model.model.norm.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    harms_of(model, changes_of(model), padded([4, 2], vocabulary=V))
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


# --- the choice ---------------------------------------------------------------------------------

@given(st.data())
def test_no_other_choice_of_as_many_bytes_harms_less(data: Any) -> None:
    """Where every step fits until the budget is spent, the choice is the best of all that cost no
    more than it does; and it always fits."""
    names = "abc"[:data.draw(st.integers(1, 3))]
    costs = {name: data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
             for name in names}
    harm = {name: [data.draw(st.integers(0, 50)) / 7 for _ in costs[name]] for name in names}

    def total(values: Any, chosen: dict[str, int]) -> float:
        return sum(values[name][o] for name, o in chosen.items())

    least, most = (sum(f(c) for c in costs.values()) for f in (min, max))
    with pytest.raises(ValueError, match=f"the least possible is {least}"):
        spend(harm, costs, least - 1)
    every = [dict(zip(names, each)) for each in itertools.product(
        *(range(len(costs[name])) for name in names))]
    free = spend(harm, costs, most)
    assert total(harm, free) == pytest.approx(min(total(harm, each) for each in every))
    budget = data.draw(st.integers(least, most))
    chosen = spend(harm, costs, budget)
    spent = total(costs, chosen)
    assert spent <= budget
    best = min(total(harm, each) for each in every if total(costs, each) <= budget)
    # A step that does not fit is at most one, so greedy lacks at most what that step takes away.
    largest = max((max(h) - min(h) for h in harm.values()), default=0)
    assert total(harm, chosen) <= best + largest + 1e-9


def test_the_choice_follows_harm_a_byte() -> None:
    harm = {"a": [8.0, 2.0, 0.0], "b": [5.0, 4.0, 0.0], "c": [1.0, 0.0, 0.0]}
    cost = {"a": [10, 12, 20], "b": [10, 12, 15], "c": [1, 2, 9]}
    assert spend(harm, cost, 21) == {"a": 0, "b": 0, "c": 0}
    assert spend(harm, cost, 23) == {"a": 1, "b": 0, "c": 0}      # 3 a byte; b 1, c 1
    assert spend(harm, cost, 24) == {"a": 1, "b": 0, "c": 1}
    assert spend(harm, cost, 28) == {"a": 1, "b": 2, "c": 0}      # b: 0.5, then 4 / 3 a byte
    assert spend(harm, cost, 99) == {"a": 2, "b": 2, "c": 1}      # more bytes that help nothing
