"""The plan of each task: its passes, what counts in its loss, and how it is judged."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minismoe.data.tasks import Example
from minismoe.training.plan import (
    TrainConfig,
    plan_tasks,
    planned_batches,
    prompt_weight,
)

DRAW = random.Random(0)
END = 9999


def line(task: str, prompt: list[int], answer: list[int], index: int = 0) -> Example:
    """A prompt, all of which a user wrote, and an answer that ends."""
    return Example(task, [*prompt, *answer, END], [-100] * len(prompt) + [*answer, END], index,
                   asked=[*range(len(prompt))])


def words(count: int) -> list[int]:
    return [DRAW.randrange(5000) for _ in range(count)]


def labels(count: int, kinds: int = 6, task: str = "labels") -> list[Example]:
    return [line(task, words(12), [8000 + DRAW.randrange(kinds)], i) for i in range(count)]


def copies(count: int, task: str = "json") -> list[Example]:
    """As JSON is: a frame that all lines share around texts of the prompt, 40 tokens in all."""
    lines = list[Example]()
    for i in range(count):
        prompt = words(14)
        lines.append(line(task, prompt, [*range(7000, 7012), *prompt[:8], *range(7012, 7020),
                                         *prompt[8:], *range(7020, 7026)], i))
    return lines


def free_text(count: int, length: int = 30, task: str = "chat") -> list[Example]:
    return [replace(line(task, words(12), words(length), i), new_words=0.6) for i in range(count)]


@pytest.mark.parametrize("lines, passes", [(50, 17), (100, 12), (200, 8), (400, 6), (1200, 3),
                                           (5000, 3)])
def test_passes_follow_the_number_of_lines(lines: int, passes: int) -> None:
    for examples in labels(lines), copies(lines):
        plan, = plan_tasks(examples, [], TrainConfig()).values()
        assert (plan.lines, plan.passes) == (lines, passes)
        assert plan.judged == "answers"
    plan, = plan_tasks(free_text(lines), [], TrainConfig()).values()
    assert (plan.passes, plan.judged) == (2, "loss")


def test_a_task_has_the_plan_that_it_has_alone() -> None:
    tasks = [labels(50), copies(200), free_text(12), labels(2000, 77, "many")]
    valid = labels(60)
    together = plan_tasks([e for task in tasks for e in task], valid, TrainConfig())
    assert together == {name: plan for task in tasks for name, plan in plan_tasks(
        task, valid, TrainConfig()).items()}
    assert [together[task[0].task].valid for task in tasks] == [60, 0, 0, 0]
    assert {p.passes for p in plan_tasks(labels(50), [], TrainConfig(epochs=5)).values()} == {5}


def test_from_labels_to_free_text_nothing_changes_at_once() -> None:
    """As more and more words of the answers are new."""
    plans = [plan_tasks([replace(e, new_words=share / 100) for e in labels(100)], [],
                        TrainConfig())["labels"] for share in range(0, 101, 3)]
    passes = [plan.passes for plan in plans]
    assert passes[0] == 12 and passes[-1] == 2 and passes == sorted(passes, reverse=True)
    assert max(a - b for a, b in zip(passes, passes[1:])) <= 3
    assert [plan.judged for plan in plans] == ["answers"] * 13 + ["loss"] * 21
    assert {plan.passes for plan in plans if plan.new_words <= 0.3} == {12}
    assert {plan.passes for plan in plans if plan.new_words >= 0.45} == {2}


@given(st.integers(1, 60), st.integers(0, 900), st.floats(0, 2))
def test_the_loss_of_a_prompt_is_bounded_by_that_of_its_answer(answer: int, prompt: int,
                                                               most: float) -> None:
    e = line("t", [1] * prompt, [2] * answer)
    weight = prompt_weight(e, most)
    assert 0 <= weight <= most and weight * prompt <= 3 * e.supervised + 1e-9
    assert weight == most or weight * prompt == pytest.approx(3 * e.supervised)


@pytest.mark.parametrize("tokens, share", [(2, 0.1), (10, 0.1), (20, 0.05), (50, 0.02)])
def test_the_longer_an_answer_the_less_its_targets_are_smoothed(tokens: int, share: float) -> None:
    lines = [line("t", words(9), words(tokens - 1), i) for i in range(20)]
    plan, = plan_tasks(lines, [], TrainConfig()).values()
    batches = planned_batches(lines, {"t": plan}, TrainConfig())
    assert plan.smoothing == share
    assert {round(e.smoothing, 6) for batch in batches for e in batch} == {share}


def test_batches_draw_each_line_as_often_as_its_plan_says_and_mixed() -> None:
    few, many = labels(50), labels(800, task="many")
    plans, cfg = plan_tasks(few + many, [], TrainConfig()), TrainConfig(seed=3)
    batches = planned_batches(few + many, plans, cfg)
    drawn = Counter((e.task, e.index) for batch in batches for e in batch)
    assert drawn == {("labels", i): 17 for i in range(50)} | {("many", i): 4 for i in range(800)}
    quarter = len(batches) // 4
    shares = [sum(e.task == "labels" for batch in batches[i:i + quarter] for e in batch)
              for i in range(0, 4 * quarter, quarter)]
    assert min(shares) > 0.2 * 17 * 50           # in each quarter of the run nearly a quarter
    assert {(e.smoothing, e.prompt_weight) for batch in batches for e in batch} == {(0.1, 0.2)}
    assert planned_batches(few + many, plans, cfg) == batches
    assert planned_batches(few + many, plans, TrainConfig(seed=4)) != batches
