"""Answers above the threshold are wrong as rarely as it was asked, in nine of ten samples."""

import math
import random
from fractions import Fraction

import pytest

from minismoe.method.sure import at_most, fewest, least_logprob


@pytest.mark.parametrize("error, count", [(0.01, 230), (0.02, 114), (0.05, 45), (0.1, 22)])
def test_the_fewest_answers_are_those_of_the_exact_bound(error, count) -> None:
    assert fewest(error) == count
    assert 1 - 0.1 ** (1 / count) <= error < 1 - 0.1 ** (1 / (count - 1))
    sure = [(-1e-9, True)] * count
    assert least_logprob(sure, error) is not None and least_logprob(sure[1:], error) is None
    assert least_logprob([*sure, (-1e-9, False)], error) is None


@pytest.mark.parametrize("count, share", [(7, Fraction(1, 10)), (60, Fraction(1, 50))])
def test_the_probability_of_few_wrong_answers_is_exact(count, share) -> None:
    """As one answer after another gives it, in fractions."""
    wrong = [Fraction(1)]                    # probability of 0, 1, ... wrong answers so far
    for _ in range(count):
        wrong = [a * (1 - share) + b * share for a, b in zip([*wrong, 0], [0, *wrong])]
    for most in range(count + 1):
        assert at_most(most, count, float(share)) == pytest.approx(float(sum(wrong[:most + 1])))
    assert at_most(1500, 5000, 0.3) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("error, sharpness", [(0.02, 1.0), (0.05, 1.0), (0.1, 0.6), (0.1, 2.0)])
def test_the_error_among_sure_answers_is_within_the_bound_in_nine_of_ten_splits(
        error, sharpness) -> None:
    """Answers whose log-odds say, more or less sharply, how often they are right."""
    rng = random.Random(0)

    def answers(count: int) -> list[tuple[float, float]]:
        odds = [rng.gauss(3, 2.5) for _ in range(count)]
        return [(-math.log1p(math.exp(-x)), 1 / (1 + math.exp(-sharpness * x))) for x in odds]
    world, kept, found = answers(20_000), 0, 0
    for _ in range(200):
        seen = [(logprob, rng.random() < share) for logprob, share in answers(300)]
        least = least_logprob(seen, error)
        wrong = [1 - share for logprob, share in world if least is not None and logprob >= least]
        kept += not wrong or sum(wrong) / len(wrong) <= error
        found += least is not None
    assert kept >= 180 and found >= 40
