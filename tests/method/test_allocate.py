"""allocate.py against the reference, and its budgets against every neighbour.

Hypothesis draws small models: layers 9, 10 and 11 (so that natural order matters), some of four
projections, one to four tasks whose scores are small whole numbers (so that ties are common).
"""

import json
import math
import random
import re
from typing import Any, ClassVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minismoe import reference
from minismoe.method.allocate import STRATEGIES, Allocation, allocate

KINDS = ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj")  # by name
Model = tuple[dict[str, dict[str, float]], dict[str, tuple[int, int]]]


@st.composite
def models(draw: Any) -> Model:
    """(scores, shapes): every module of every task, in the order of names."""
    layers = draw(st.lists(st.sampled_from((9, 10, 11)), min_size=1, unique=True).map(sorted))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(sorted))
    modules = [f"model.layers.{layer}.{kind}" for layer in layers for kind in kinds]
    score = st.integers(0, 6) | st.floats(1e-6, 1e6)
    scores = {f"task{i}": {module: draw(score) for module in modules}
              for i in range(draw(st.integers(1, 4)))}
    side = st.integers(1, 40)
    return scores, {module: (draw(side), draw(side)) for module in modules}


keeps = st.integers(1, 100).map(lambda percent: percent / 100)


def shuffled(scores: dict[str, dict[str, float]], seed: int) -> dict[str, dict[str, float]]:
    """The same scores, with tasks and modules in another order."""
    mix = random.Random(seed)
    modules = mix.sample([*scores["task0"]], len(scores["task0"]))
    return {task: {module: scores[task][module] for module in modules}
            for task in mix.sample([*scores], len(scores))}


def size(allocation: Allocation, shapes: dict[str, tuple[int, int]]) -> int:
    """Trainable parameters, matrix by matrix: lora_A, lora_B, and the router of several experts."""
    return sum(count * (allocation.rank * (shapes[module][1] + shapes[module][0])
                        + (shapes[module][1] if count > 1 else 0))
               for module, count in allocation.experts.items())


# The paper's rule


@given(models(), keeps, st.integers(0, 2))
def test_votes_equal_the_reference(model: Model, keep: float, least: int) -> None:
    """Votes that fall short of min_experts are raised to it."""
    scores, shapes = model
    groups = [group for part in ("mlp", "self_attn") if (group := [m for m in shapes if part in m])]
    votes = reference.vote(scores, groups, keep)
    found = allocate(scores, keep=keep, shapes=shapes, min_experts=least)
    assert found.experts == {module: raised for module, count in votes.items()
                             if (raised := max(count, least))}
    assert found.trainable_parameters == size(found, shapes)


@pytest.mark.parametrize(("keep", "modules", "kept"), [
    (0.145, 100, 15), (0.144, 100, 14), (0.25, 2, 1), (0.01, 10, 1), (0.15, 10, 2), (1, 7, 7)])
def test_halves_round_up_as_written(keep: float, modules: int, kept: int) -> None:
    scores = {"t": {f"h.{i}.c": 1.0 for i in reversed(range(modules))}}
    found = allocate(scores, keep=keep)
    assert set(found.experts) == {f"h.{i}.c" for i in range(kept)}  # ties go by name: 9 before 10


def test_keep_is_three_fifths_unless_a_size_is_given() -> None:
    scores = {"t": {f"h.{i}.mlp.c": float(i) for i in range(10)}}
    found = allocate(scores)
    assert [*found.experts] == [f"h.{i}.mlp.c" for i in range(4, 10)] and found.keep == 0.6


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30)
@given(models(), keeps, st.integers(0, 99), st.booleans())
def test_order_of_tasks_and_modules_is_no_matter(
        strategy: str, model: Model, keep: float, seed: int, by_budget: bool) -> None:
    scores, shapes = model
    mixed, by_budget = shuffled(scores, seed), by_budget and strategy == "votes"
    how: dict[str, Any] = {"budget_params": 6000} if by_budget else {"keep": keep}
    found: list[Any] = []
    for each in (scores, mixed):
        try:
            found.append(allocate(each, strategy=strategy, shapes=shapes, **how))
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1]
    if isinstance(found[1], Allocation):
        assert [*found[1].experts] == [m for m in mixed["task0"] if m in found[0].experts]


# Budgets


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(0, 60), st.integers(0, 2))
def test_a_budget_is_met_to_within_one_step(model: Model, amount: int, low: int) -> None:
    scores, shapes = model

    def spend(budget: int) -> Allocation:
        return allocate(scores, shapes=shapes, budget_params=budget, min_experts=low)

    budget = amount * 397
    try:
        found = spend(budget)
    except ValueError as error:
        nearest = int(re.fullmatch(r".* the nearest possible is (\d+)", str(error))[1])
        assert nearest > budget
        with pytest.raises(ValueError, match=f"is {nearest}$"):
            spend(nearest - 1)
        budget, found = nearest, spend(nearest)
        assert size(found, shapes) == nearest
    assert found.trainable_parameters == size(found, shapes) <= budget
    # Groups have 1, 2, 3, 4, 6, 8, 9 or 12 modules: 144ths show every step.
    every = [allocate(scores, keep=i / 144, min_experts=low) for i in range(1, 145)]
    assert all(size(above, shapes) > budget for above in every
               if sum(above.experts.values()) > sum(found.experts.values()))
    assert found.experts and min(found.experts.get(module, 0) for module in shapes) >= low


@given(models(), st.integers(1, 48))
def test_a_found_keep_can_be_given_again(model: Model, amount: int) -> None:
    scores, shapes = model
    budget = 300 * amount
    assume(budget >= size(allocate(scores, keep=1e-6), shapes))
    found = allocate(scores, budget_params=budget, shapes=shapes)
    assert allocate(scores, keep=found.keep, shapes=shapes) == found


@given(models(), keeps)
def test_uniform_gives_each_matrix_the_same_share_of_all_tasks(model: Model, keep: float) -> None:
    scores, shapes = model
    found = allocate(scores, strategy="uniform", keep=keep).experts
    assert found == dict.fromkeys(shapes, max(1, int(keep * len(scores) + 0.5 + 1e-9)))


def test_lora_has_the_rank_that_is_given() -> None:
    found = allocate(GOOD, strategy="lora", rank=3, alpha=24)
    assert (found.experts, found.rank, found.alpha) == ({"h.0.a": 1, "h.0.b": 1}, 3, 24)


# Names


@pytest.mark.parametrize(("module", "attention"), [
    ("model.layers.0.self_attn.q_proj", True), ("h.0.attn.c_attn", True),
    ("encoder.layer.0.attention.self.query", True), ("model.layers.0.mlp.up_proj", False),
    ("attn_net.layers.0.mlp.up_proj", False), ("layers.0.conv.in_proj", True),
    ("layers.0.mlp.attn_gate", False)])
def test_attention_is_told_by_the_parent_inside_the_layer(module: str, attention: bool) -> None:
    own, other = ("z.0.attn.p", "z.0.mlp.p") if attention else ("z.0.mlp.p", "z.0.attn.p")
    chosen = allocate({"t": {own: 0.0, other: 2.0, module: 1.0}}, keep=0.01).experts
    assert chosen == {module: 1, other: 1}               # the best of each group


# Arguments


class Probed(dict):  # type: ignore[type-arg]
    """Scores that know their shapes, as `probe` returns them."""

    shapes: ClassVar[dict[str, tuple[int, int]]] = {"h.0.a": (3, 5), "h.0.b": (2, 2)}


def test_shapes_come_with_the_scores() -> None:
    scores = Probed(t={"h.0.a": 2.0, "h.0.b": 1.0}, u={"h.0.a": 2.0, "h.0.b": 1.0})
    found = allocate(scores, keep=0.5, rank=2, alpha=3)
    assert found.trainable_parameters == 2 * 2 * 8 + 2 * 5 and found.alpha == 3
    assert allocate(scores, rank=3).alpha == 6
    assert allocate(scores, budget_params=37, rank=1).experts == {"h.0.a": 2}
    with pytest.raises(ValueError, match=r"budget_params.*'h.0.b'"):
        allocate(scores, budget_params=99, shapes={"h.0.a": (3, 5)})


GOOD = {"t": {"h.0.a": 2.0, "h.0.b": 1.0}}


@pytest.mark.parametrize(("scores", "arguments", "names"), [
    *((GOOD, arguments, names) for arguments, names in [
        ({"strategy": "vote", "rank": 0, "top_k": 1.5, "alpha": -1},
         ["vote", "rank", "top_k", "alpha"]),
        ({"keep": 0.0}, ["keep"]), ({"keep": 1.01}, ["keep"]), ({"keep": math.nan}, ["keep"]),
        ({"keep": 0.5, "budget_params": 3}, ["only one", "keep"]),
        ({"budget_params": 2.5}, ["budget", "2.5"]), ({"budget_params": True}, ["budget", "True"]),
        ({"budget_params": 99}, ["shapes", "h.0.b"]),
        ({"budget_params": 9, "strategy": "lora"}, ["votes alone"]),
        ({"min_experts": -1}, ["min_experts", "-1"]),
        ({"min_experts": 1025}, ["min_experts", "1025"])]),
    ({}, {}, ["no module"]), ({"t": {}}, {}, ["no module"]),
    ({"t": {"a": 1.0, "b": 2.0}, "u": {"b": 1.0, "c": 1.0}}, {},
     ["'t' lacks ['c']", "'u' lacks ['a']"]),
    ({"t": {"a": math.nan, "b": -1.0, "c": math.inf, "d": "x", "e": 1.0}}, {},
     ["'a'", "'b'", "'c'", "'d'"])])
def test_all_that_is_wrong_is_named(scores: Any, arguments: dict[str, Any], names: list[str],
                                    ) -> None:
    with pytest.raises(ValueError) as caught:
        allocate(scores, **arguments)
    assert [name for name in names if name not in str(caught.value)] == []
    assert "'e'" not in str(caught.value)                # a score that is right


# allocation.json


@given(models(), st.sampled_from(STRATEGIES))
def test_json_round_trip(model: Model, strategy: str) -> None:
    scores, shapes = model
    found = allocate(scores, strategy=strategy, keep=1, shapes=shapes, alpha=2.5)
    text = json.dumps(found.to_json())
    again = Allocation.from_json(json.loads(text))
    assert again == found
    assert list(again.experts) == list(found.experts)


def test_json_form_is_that_of_the_design() -> None:
    found = allocate(GOOD, keep=0.5, shapes=Probed.shapes)
    assert found.to_json() == {"format": "minismoe.allocation/1", "strategy": "votes",
                               "group": "attention_mlp", "keep": 0.5, "rank": 8, "alpha": 16,
                               "top_k": 2, "trainable_parameters": 64, "experts": {"h.0.a": 1}}


def test_a_bare_mapping_is_read_and_zeros_are_dropped() -> None:
    bare = Allocation.from_json({"a": 3, "b": 0, "c": 1})
    assert bare == Allocation({"a": 3, "c": 1}, strategy="custom")
    form = {"format": "minismoe.allocation/1", "rank": 4, "experts": {"a": 1}}
    short = Allocation.from_json(form)
    assert (short.rank, short.alpha) == (4, 8)  # alpha follows the rank, as in allocate()


@pytest.mark.parametrize(("value", "names"), [
    ({"a": -1, "b": 1.0, "c": "2", "d": True, "e": None, "f": 10 ** 9, "fine": 2},
     ["'a': -1", "'b': 1.0", "'c': '2'", "'d': True", "'e': None", "'f': 1000000000"]),
    ({"format": "minismoe.allocation/2", "experts": {"a": 0.5}}, ["allocation/2", "'a': 0.5"]),
    ({"format": "minismoe.allocation/1", "experts": {"a": 1}, "rank": "8", "alpha": 0, "top_k": 0,
      "keep": 2, "strategy": 5, "group": 1, "trainable_parameters": -3, "rnk": 4},
     ["rank", "alpha", "top_k", "keep", "strategy", "group", "trainable_parameters", "'rnk'"]),
    ({"format": "minismoe.allocation/1"}, ["experts"]),
    ({"format": "minismoe.allocation/1", "experts": [1]}, ["experts", "[1]"]),
    ({"format": "minismoe.allocation/1", "experts": {"a": 1}, "rank": None}, ["rank"]),
    ({}, ["experts"]), ({"a": 0}, ["experts"]), ({"": 1}, ["''"]), ([], ["[]"]), (None, ["None"])])
def test_bad_files_are_refused_with_every_problem(value: object, names: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Allocation.from_json(value)
    assert [name for name in names if name not in str(caught.value)] == []
    assert "fine" not in str(caught.value)


def test_a_rank_of_the_smaller_side_is_allowed() -> None:
    Allocation({"m": 1}, rank=4).check_rank({"m": (4, 9)})
    with pytest.raises(ValueError, match="rank 5"):
        Allocation({"m": 1}, rank=5).check_rank({"m": (9, 4)})
