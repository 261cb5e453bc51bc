"""When a model may answer by itself: the least probability of an answer above which few are wrong.

Of lines that the model was not trained on, each has the log-probability of the model's answer, and
whether it is right. Thresholds of a fixed grid are tested from the strictest on. One passes if so
few of the answers above it are wrong that a share of `max_error` would give no more in one of ten
cases (the bound of Clopper and Pearson, 1934). The last threshold before the first that fails is
taken, so that all tests together hold with 90 % confidence (fixed sequence testing, as in
Angelopoulos et al. 2021, "Learn then Test", arXiv 2110.01052). Thresholds that too few answers
exceed to pass at all are left out: this depends on the probabilities alone.
"""

import math
from collections.abc import Sequence

CONFIDENCE = 0.9
GRID = [-math.log1p(math.exp(-x / 4)) for x in range(48, -49, -1)]    # log-odds 12, 11.75, ... -12


def fewest(max_error: float) -> int:
    """How many answers, all of them right, show that at most a share of `max_error` is wrong."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-max_error))


def at_most(wrong: int, count: int, share: float) -> float:
    """Probability of at most `wrong` wrong answers of `count`, if a share of them is wrong."""
    return math.fsum(math.exp(
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(share) + (count - k) * math.log1p(-share)) for k in range(wrong + 1))


def least_logprob(answers: Sequence[tuple[float, bool]], max_error: float) -> float | None:
    """The log-probability from which on at most a share of `max_error` of answers is wrong, from
    (log-probability, right) of some answers; None if they show this for no threshold."""
    found = None
    for threshold in GRID:
        above = [right for logprob, right in answers if logprob >= threshold]
        if len(above) < fewest(max_error):
            continue
        if at_most(len(above) - sum(above), len(above), max_error) > 1 - CONFIDENCE:
            break
        found = threshold
    return found
