"""The controls of compare.py against their definitions."""

import itertools
import math
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import controls  # noqa: E402
from controls import draw, mola, proportional  # noqa: E402

NAMES = [f"h.{layer}.{kind}" for layer in (9, 10, 11) for kind in ("attn.q", "mlp.down", "mlp.up")]


@pytest.mark.parametrize("strategy", controls.RULES)
@given(st.data())
def test_a_budget_is_met_in_any_order_of_tasks_and_modules(strategy: str, data: Any) -> None:
    low, side = data.draw(st.integers(0, 2)), st.integers(1, 40)
    shapes = {module: (data.draw(side), data.draw(side)) for module in NAMES}
    scores = {task: {module: float(data.draw(st.integers(0, 6))) for module in NAMES}
              for task in "abc"[:data.draw(st.integers(1, 3))]}
    settings: dict[str, Any] = {"strategy": strategy, "rank": 4, "min_experts": low, "seed": 3}
    least = controls.allocate(scores, budget_params=10 ** 5, shapes=shapes, **settings)
    budget = data.draw(st.integers(10 ** 4, 10 ** 5))
    found = controls.allocate(scores, budget_params=budget, shapes=shapes, **settings)
    assert found.trainable_parameters == found.trainable(shapes) <= budget
    assert min(found.experts.get(module, 0) for module in NAMES) >= low
    assert sum(found.experts.values()) <= sum(least.experts.values())
    tasks = data.draw(st.permutations([*scores]))
    mixed = {task: {m: scores[task][m] for m in data.draw(st.permutations(NAMES))}
             for task in tasks}
    assert controls.allocate(mixed, budget_params=budget, shapes=shapes, **settings) == found


@pytest.mark.parametrize("rule", controls.RULES.values())
@given(st.integers(1, 27), st.integers(0, 2))
def test_n_experts_are_given(rule: Any, n: int, low: int) -> None:
    scores = {task: dict(zip(NAMES, map(float, range(9)))) for task in "abc"}
    counts = rule(scores, n, low)
    assert sum(counts.values()) == max(n, 9 * low) and min(counts.values()) >= low


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 80))
def test_proportional_is_hamiltons_method(scores: list[int], total: int) -> None:
    names = [f"m.{i}.w" for i in range(len(scores))]
    found = proportional({"t": dict(zip(names, map(float, scores)))}, total)
    counts = [found[name] for name in names]
    quotas = [Fraction(total * score, sum(scores)) for score in scores]
    assert sum(counts) == total
    assert all(count in (math.floor(quota), math.ceil(quota))
               for count, quota in zip(counts, quotas, strict=True))
    rests = [(quota % 1, count > math.floor(quota))
             for count, quota in zip(counts, quotas, strict=True)]
    rounded_up, down = ([rest for rest, up in rests if up is side] for side in (True, False))
    assert min(rounded_up, default=1) >= max(down, default=0)  # none with less went first


def test_proportional_gives_each_task_the_same_say_and_each_group_its_size() -> None:
    q, v, up = "h.0.attn.q", "h.0.attn.v", "h.0.mlp.up"
    scores = {"loud": {q: 3e9, v: 1e9, up: 5e9}, "quiet": {q: 1e-9, v: 3e-9, up: 1e-12}}
    assert proportional(scores, 12) == {q: 4, v: 4, up: 4}
    a, b, c = "h.0.attn.a", "h.0.attn.b", "h.0.attn.c"
    lifted = proportional({"t": {a: 6.0, b: 4.0, c: 0.0}}, 10, low=2)
    assert lifted == {a: 5, b: 3, c: 2}          # the two that c needs are taken one from each


def test_proportional_sees_equal_shares_as_equal_in_any_order() -> None:
    scores = {"a": {"x": 1.0, "y": 4.0, "z": 2.0}, "b": {"x": 2.0, "y": 1.0, "z": 4.0},
              "c": {"x": 4.0, "y": 2.0, "z": 1.0}}  # 7ths: their sums round differently
    for order in itertools.permutations(scores):
        found = proportional({task: scores[task] for task in order}, 2)
        assert found == {"x": 1, "y": 1, "z": 0}


def test_groups_settle_no_ties_of_proportional() -> None:
    names = [f"h.{layer}.{kind}" for layer in (0, 1) for kind in ("attn.q", "mlp.up")]
    found = proportional({"t": dict.fromkeys(names, 1.0)}, 2)
    assert [name for name, count in found.items() if count] == ["h.0.attn.q", "h.0.mlp.up"]


def test_mola_climbs_from_two_to_eight() -> None:
    scores = {"t": {f"h.{layer}.{kind}": 1.0 for kind in "ab" for layer in (0, 1, 2, 3)}}
    found = mola(scores, 40)
    assert [found[f"h.{layer}.b"] for layer in range(4)] == [2, 4, 6, 8]


@given(st.integers(1, 200), st.integers(0, 1))
def test_mola_never_falls_with_the_layer(n: int, low: int) -> None:
    found = mola({"t": dict.fromkeys(NAMES, 1.0)}, n, low)
    for kind in ("attn.q", "mlp.down", "mlp.up"):
        column = [found[f"h.{layer}.{kind}"] for layer in (9, 10, 11)]
        assert column == sorted(column)


def test_random_is_uniform_seeded_and_bounded() -> None:
    names = [f"h.{i}.w" for i in range(4)]
    scores = {"a": dict.fromkeys(names, 1.0), "b": dict.fromkeys(names, 1.0)}
    draws = [draw(scores, 5, seed=seed) for seed in range(400)]
    assert all(450 < sum(found[name] for found in draws) < 550      # 500 expected; 50 is over 4
               for name in names)                                   # standard deviations
    assert {max(found.values()) for found in draws} == {2}          # no more than the tasks
    assert len({tuple(found.values()) for found in draws}) == 16    # each way to place five
    for total in range(1, 8):
        less, more = (Counter(draw(scores, each)) for each in (total, total + 1))
        assert sum((more - less).values()) == 1                     # one more, and none moved
    assert draw(scores, 40) == dict.fromkeys(names, 2)
