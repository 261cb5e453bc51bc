"""The split-half overlap of a probe, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from minismoe.cli.probing import overlap


def top(count: int) -> Any:
    return lambda scores: set(sorted(scores, key=scores.__getitem__)[-count:])


@pytest.mark.parametrize(("even", "odd", "count", "expected"), [
    ([1, 2, 3, 4], [1, 2, 3, 4], 2, 1.0),
    ([1, 2, 3, 4], [4, 3, 2, 1], 2, 0.0),
    ([1, 2, 3, 4], [1, 4, 2, 3], 2, 0.5),                   # {c, d} and {b, d}
    ([1, 2, 3, 4], [3, 2, 1, 4], 3, 2 / 3),                 # {b, c, d} and {a, b, d}
    ([1, 2, 3, 4], [4, 3, 2, 1], 4, 1.0),
])
def test_overlap_of_two_samples(even: list[int], odd: list[int], count: int,
                                expected: float) -> None:
    assert overlap(torch.tensor([even, odd]), "abcd", top(count)) == pytest.approx(expected)


def test_overlap_sums_even_and_odd_samples() -> None:
    samples = torch.tensor([[5.0, 0, 1], [0, 1, 9], [0, 4, 1], [0, 9, 1], [0, 3, 0]])
    assert overlap(samples, "abc", top(1)) == 0             # even (5, 7, 2): b; odd (0, 10, 10): c
    seen: list[dict[str, float]] = []
    assert overlap(samples, "abc", lambda s: seen.append(s) or {"a", "b"}) == 1
    assert seen == [{"a": 5, "b": 7, "c": 2}, {"a": 0, "b": 10, "c": 10}]


def test_overlap_of_nothing_is_0() -> None:
    assert overlap(torch.ones(4, 2), "ab", lambda scores: set()) == 0


def test_a_single_sample_has_no_halves() -> None:
    assert math.isnan(overlap(torch.ones(1, 3), "abc", top(1)))
