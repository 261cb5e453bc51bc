"""How the next token is chosen from logits.

Letters: V vocabulary.
"""

import ctypes
import heapq
import math
import random
from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from ..io.flags import Checked, flag, fraction, natural, number, wrong_value

factor = Checked(float, lambda x: 0.01 <= x <= 100, "is not in [0.01, 100]")     # others overflow


@dataclass(frozen=True)
class Sampling:
    """How many tokens an answer has at most, and how each is chosen among the likeliest.

    Fields are flags of the command line, except for the seed, which starts the draws; None: another
    one each time. Raises ValueError for a value that its flag refuses.
    """

    max_tokens: int | None = flag(None, "tokens that an answer has at most (default: until the "
                                  "context is full)", natural, metavar="N")
    temperature: float = flag(0.0, "0 (default) takes the likeliest token, others draw", number)
    # Sums over the whole vocabulary would take as long as a step of a small model.
    top_p: float = flag(1.0, "draw among the likeliest tokens that together have the share P of "
                        "the probability of the 64 likeliest (default: 1)", fraction, metavar="P")
    repetition_penalty: float = flag(
        1.0, "make tokens of the prompt and the answer less likely: above 1, such as 1.1 "
        "(default: 1)", factor, metavar="F")
    seed: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata and (wrong := wrong_value(f, getattr(self, f.name))):
                raise ValueError(f"{f.name} {wrong}")

    def draw(self, logits: Sequence[float], rng: random.Random) -> int:
        """Choose an index of `logits`, which are sorted from the largest."""
        if self.temperature == 0:
            return 0
        masses = [*accumulate(math.exp((x - logits[0]) / self.temperature) for x in logits)]
        del masses[bisect_left(masses, self.top_p * masses[-1]) + 1:]
        return rng.choices(range(len(masses)), cum_weights=masses)[0]


def floats_of(logits: Any, row: int = -1) -> "memoryview[float]":
    """A row (V,) of an OrtValue of floats (1, N, V), in the memory of the value, which it keeps."""
    _, rows, size = logits.shape()
    place = logits.data_ptr() + ctypes.sizeof(ctypes.c_float) * size * (rows + row)
    floats: Any = (ctypes.c_float * size).from_address(place)
    floats.owner = logits
    return memoryview(floats).cast("B").cast("f")


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Log-probabilities; ArithmeticError if a logit is no number."""
    highest = max(logits)
    total = highest + math.log(sum([math.exp(x - highest) for x in logits]))
    if math.isnan(total):
        raise ArithmeticError("the model's logits are not numbers")
    return [x - total for x in logits]


def penalize(floats: "memoryview[float]", tokens: Set[int], factor: float) -> None:
    """Make tokens less likely in logits (V,): divide those above 0 by the factor, multiply others
    (Keskar et al. 2019)."""
    for token in tokens:
        value = floats[token]
        floats[token] = value * factor if value < 0 else value / factor


def permitted(floats: "memoryview[float]", values: Sequence[float], tokens: Sequence[int],
              mask: bytes) -> tuple[list[float], list[int]]:
    """Those candidates that a mask permits; if it permits none, the likeliest of other tokens.

    mask: a bit a token, the lowest first; at least one is set. Values are sorted from the largest.
    """
    def allowed(token: int) -> int:
        return mask[token >> 3] >> (token & 7) & 1

    kept = [(value, token) for value, token in zip(values, tokens) if allowed(token)]
    if not kept:
        kept = heapq.nlargest(len(tokens), ((floats[token], token) for token in range(len(floats))
                                            if allowed(token)))
    return [value for value, _ in kept], [token for _, token in kept]
