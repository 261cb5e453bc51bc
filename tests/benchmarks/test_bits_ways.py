"""The ways of bits.py to choose among options: what each spends, and on what."""

import bits
import pytest

from minismoe.method.bits import total

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [*(f"model.layers.{i}.{kind}" for i in range(24) for kind in KINDS), "model.embed_tokens"]
COST = {name: [100, 110, 190] for name in NAMES}


def test_plain_ways_set_layers_and_vocabulary() -> None:
    chosen = bits.plain(NAMES, bits.MIDDLE, bits.LARGE)
    assert chosen.pop("model.embed_tokens") == bits.LARGE and set(chosen.values()) == {bits.MIDDLE}


@pytest.mark.parametrize("budget", [9700, 10000, 12345])
def test_random_choices_spend_the_budget(budget: int) -> None:
    several = [bits.at_random(COST, budget, seed) for seed in range(3)]
    assert several[0] != several[1] or budget == 9700
    assert several[0] == bits.at_random(COST, budget, 0)
    assert all(budget - 10 < total(COST, chosen) <= budget for chosen in several)


def test_the_rule_of_thumb_gives_8_bits_to_down_proj_alone() -> None:
    chosen = bits.down_in_8(NAMES)
    assert {name for name, option in chosen.items() if option == bits.LARGE} == {
        name for name in NAMES if name.endswith("down_proj")}
    assert set(chosen.values()) == {bits.SMALL, bits.LARGE}


def test_llama_cpps_rule_gives_more_to_v_and_down_of_some_layers() -> None:
    """ggml-org/llama.cpp, use_more_bits: of 24 layers 0 to 2, 21 to 23, and 5, 8, ..., 20."""
    chosen = bits.q4_k_m(NAMES, 24)
    layers = [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert {name for name, option in chosen.items() if option == bits.LARGE} == {
        "model.embed_tokens", *(f"model.layers.{i}.{kind}" for i in layers
                                for kind in ("self_attn.v_proj", "mlp.down_proj"))}
    assert set(chosen.values()) == {bits.MIDDLE, bits.LARGE}
