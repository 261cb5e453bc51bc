"""The control of compare.py against its definition, and the sum of sensitivities."""

import itertools
from collections import Counter
from typing import Any

import controls
import pytest
from controls import draw, shares
from hypothesis import given
from hypothesis import strategies as st

NAMES = [f"h.{layer}.{kind}" for layer in (9, 10, 11) for kind in ("attn.q", "mlp.down", "mlp.up")]


@given(st.data())
def test_a_budget_is_met_in_any_order_of_tasks_and_modules(data: Any) -> None:
    low, side = data.draw(st.integers(0, 2)), st.integers(1, 40)
    shapes = {module: (data.draw(side), data.draw(side)) for module in NAMES}
    scores = {task: {module: float(data.draw(st.integers(0, 6))) for module in NAMES}
              for task in "abc"[:data.draw(st.integers(1, 3))]}
    settings: dict[str, Any] = {"strategy": "random", "rank": 4, "min_experts": low, "seed": 3}
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


@given(st.integers(1, 27), st.integers(0, 2))
def test_n_experts_are_given(n: int, low: int) -> None:
    counts = draw({task: dict.fromkeys(NAMES, 1.0) for task in "abc"}, n, low)
    assert sum(counts.values()) == max(n, 9 * low) and min(counts.values()) >= low


def test_each_task_has_the_same_say_and_the_order_of_tasks_none() -> None:
    scores = {"loud": {"x": 3e9, "y": 1e9}, "quiet": {"x": 1e-9, "y": 3e-9}, "none": {
        "x": 0.0, "y": 0.0}}
    assert shares(scores, [["x", "y"]]) == pytest.approx({"x": 3.0, "y": 3.0})
    scores = {"a": {"x": 1.0, "y": 4.0, "z": 2.0}, "b": {"x": 2.0, "y": 1.0, "z": 4.0},
              "c": {"x": 4.0, "y": 2.0, "z": 1.0}}  # 7ths: their sums round differently
    for order in itertools.permutations(scores):
        parts = shares({task: scores[task] for task in order}, [["x", "y", "z"]])
        assert len({*parts.values()}) == 1


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
