"""One answer, token by token:

    logits = reader.read_prompt()            what the cache has of the prompt is not read again
    while there is room:
        token = choose(logits)               by penalties, a grammar, and sampling
        stop if this token ends the answer
        new = token and, by a grammar, those tokens that alone may follow it
        yield new
        logits = reader.advance(new)         reads what the last step has not read as drafts

Letters: V vocabulary.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from .drafts import SHORT, drafted
from .grammar import allowed, follow
from .model import CachedModel
from .sampling import Sampling, floats_of, penalize, permitted


class Reader:
    """What a model has read: a prompt, its answer, and drafts of what may follow (drafts.py).

    A step reads new tokens and drafts together. Drafts that the answer then repeats are read, and
    the logits after them are known; the others are cut off the cache.
    """

    steps = 0                    # of the graph, after the prompt
    cached_tokens = 0            # of the prompt, which the cache had

    def __init__(self, model: CachedModel, prompt: list[int]):
        self.model, self.prompt = model, prompt
        self.text, self.drafts = list[int](), list[int]()    # what is read of an answer, and may be

    def read_prompt(self) -> memoryview[float]:
        """Logits (V,) after the prompt."""
        self.logits, self.cached_tokens = self.model.prefill(self.prompt)
        self.version = self.model.version
        return floats_of(self.logits)

    def advance(self, new: list[int], room: int) -> memoryview[float]:
        """Logits (V,) after the next tokens of the answer, which up to `room` more may follow.

        Raises RuntimeError if the cache is not that of this answer any more.
        """
        if self.model.version != self.version:
            raise RuntimeError("another generation began, or the cache was emptied, before this "
                               "one ended")
        self.text += new
        right = len(os.path.commonprefix([new, self.drafts]))
        self.drafts, unread = self.drafts[right:], new[right:]
        if unread:
            self.model.cut(len(self.prompt) + len(self.text) - len(unread))
            self.drafts = self._drafted(min(room, SHORT - len(unread)))
            # Kernels round a step of one token otherwise: a text would depend on its drafts.
            if self.model.drafts is not None and len(unread + self.drafts) == 1:
                self.drafts = unread
            self.logits = self.model.read(unread + self.drafts)
            self.steps += 1
        return floats_of(self.logits, -1 - len(self.drafts))

    def _drafted(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow, none of which ends the answer."""
        if not self.model.drafts or most <= 0:
            return []
        stops = self.model.tokenizer.stop_ids
        drafts = drafted(self.prompt, self.text, self.model.drafts)[:most]
        return [*takewhile(lambda token: token not in stops, drafts)]


class Generation(Iterator[int]):
    """One answer: its tokens, up to and without a stop token, are written as one iterates over it.

    `Generator.generate` makes it. Iterating raises ArithmeticError for logits that are not numbers,
    ValueError for a grammar that is too complex, and RuntimeError once another one has begun.
    """

    # "stop" (a stop token, or the end of a grammar), "max_tokens" or "context"; "" while tokens
    # come, and if the caller took no more of them.
    ended = ""
    logprob = 0.0                # of the tokens and the stop token together, after penalties

    def __init__(self, model: CachedModel, prompt: list[int], room: int, settings: Sampling,
                 matcher: Any):
        self.model, self.settings, self.matcher = model, settings, matcher
        self.reader, self.rng = Reader(model, prompt), random.Random(settings.seed)
        self.known = {*prompt}               # tokens of the prompt and the answer
        self._tokens = self._write(room)

    def __next__(self) -> int:
        return next(self._tokens)

    @property
    def steps(self) -> int:
        """How often the graph has run after the prompt."""
        return self.reader.steps

    def _write(self, room: int) -> Iterator[int]:
        """Yield the tokens, of which there is room for so many in the context."""
        limit, ended = self.settings.max_tokens, "context"
        if limit is not None and limit <= room:
            room, ended = limit, "max_tokens"
        logits = self.reader.read_prompt()
        while room:
            token = self._choose(logits)
            if token in self.model.tokenizer.stop_ids:
                ended = "stop"
                break
            new = [token]
            if self.matcher:
                new += follow(self.matcher, token, room - 1)
            yield from new
            if self.matcher and self.matcher.is_stopped():
                ended = "stop"
                break
            self.known.update(new)
            room -= len(new)
            if room:
                logits = self.reader.advance(new, room)
        self.ended = ended

    def _choose(self, logits: memoryview[float]) -> int:
        """The next token, whose log-probability counts in that of the answer."""
        if self.settings.repetition_penalty != 1:
            penalize(logits, self.known, self.settings.repetition_penalty)
        values, tokens, total = self.model.likeliest(logits)
        if self.matcher:
            values, tokens = permitted(logits, values, tokens, allowed(self.matcher))
        chosen = self.settings.draw(values, self.rng)
        self.logprob += values[chosen] - total
        return tokens[chosen]
