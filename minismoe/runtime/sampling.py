"""How the next token is chosen from logits.

Letters: B prompts, V vocabulary.
"""

import ctypes
import heapq
import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen among the likeliest, the candidates.

    temperature: 0 takes the likeliest; else tokens are drawn by softmax, among the `top_k`
    likeliest (0: all candidates), those that together reach `top_p`, and those that are at least
    `min_p` times as likely as the likeliest. repetition_penalty: what divides a positive logit of a
    token that is in the prompt or the answer, and multiplies a negative one (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def check(self, candidates: int) -> None:
        """Raise ValueError for a value out of range."""
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1
                and isinstance(self.top_k, int) and 0 <= self.top_k <= candidates
                and 0 <= self.min_p <= 1 and 0 < self.repetition_penalty < math.inf):
            values = ", ".join(f"{name} {value}" for name, value in vars(self).items())
            raise ValueError(f"{values}: needed are temperature >= 0, 0 < top_p <= 1, 0 <= top_k "
                             f"<= {candidates}, 0 <= min_p <= 1 and repetition_penalty > 0")

    def draw(self, logits: Sequence[float], rng: random.Random) -> int:
        """Choose an index of `logits`, which are sorted from the largest."""
        if self.temperature == 0:
            return 0
        weights = [math.exp((x - logits[0]) / self.temperature)
                   for x in logits[:self.top_k or len(logits)]]
        masses = [*accumulate(takewhile(lambda weight: weight >= self.min_p, weights))]
        del masses[bisect_left(masses, self.top_p * sum(weights)) + 1:]
        return rng.choices(range(len(masses)), cum_weights=masses)[0]


def floats_of(logits: Any) -> Any:
    """The values of an OrtValue of floats (B, 1, V) in one row, in its own memory."""
    size = math.prod(logits.shape())
    return ctypes.cast(logits.data_ptr(), ctypes.POINTER(ctypes.c_float * size))[0]


def penalize(logits: Any, seen: Sequence[Iterable[int]], penalty: float) -> None:
    """Change logits (B, 1, V) in place: by a repetition penalty, of the tokens that a row has."""
    floats, V = floats_of(logits), logits.shape()[-1]
    for row, tokens in enumerate(seen):
        for place in (row * V + token for token in tokens):
            floats[place] *= penalty if floats[place] < 0 else 1 / penalty


def permitted(logits: Any, values: Sequence[float], tokens: Sequence[int], mask: bytes,
              ) -> tuple[list[float], list[int]]:
    """Those candidates that a mask permits; if it permits none, the likeliest of other tokens.

    mask: a bit a token, the lowest first; at least one is set. Values are sorted from the largest.
    """
    def allowed(token: int) -> int:
        return mask[token >> 3] >> (token & 7) & 1

    kept = [(value, token) for value, token in zip(values, tokens) if allowed(token)]
    if not kept:
        floats = floats_of(logits)
        kept = heapq.nlargest(len(tokens), ((floats[token], token) for token in range(len(floats))
                                            if allowed(token)))
    return [value for value, _ in kept], [token for _, token in kept]
