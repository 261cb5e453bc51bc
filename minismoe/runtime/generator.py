"""The Generator: prompts in, tokens and text out.

Letters: B prompts, V vocabulary.
"""

import ctypes
import math
import os
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import onnxruntime as ort

from .cache import CachedModel
from .choices import Answer, likeliest, written
from .folder import FLOAT, INT64

CHUNK = 512                                  # prompt tokens a step: bounds activation memory


class Generator(CachedModel):
    """A model that `export.py --layout onnx` wrote, with its tokenizer.

    provider: an execution provider of onnxruntime, as "CUDAExecutionProvider" or "cuda"; threads:
    default, the physical cores; task: an adapter of the folder; verify: compare hashes as well as
    sizes. `ended` says why the last generation ended: "stop" (a stop token), "max_tokens" or
    "context". It has one cache, so it is for one thread: give each thread a generator of its own.
    Raises FileNotFoundError or ValueError for a folder that is incomplete or broken.
    """

    ended = ""
    prompt_tokens = 0                        # tokens the last generation read, cached ones excluded
    kept_tokens = 0                          # those that were in the cache
    _turn = 0                                # the number of the generation that owns the cache

    def use(self, task: str | None) -> None:
        """Switch to the adapter of a task; None: the model without an adapter."""
        self._turn += 1                      # ends a generation: its cache is emptied here
        super().use(task)

    def _read(self, prompts: Sequence[Sequence[int]], new: int) -> ort.OrtValue:
        """Read prompts, with room for `new` tokens after them; returns their last logits (B, 1, V).

        A single prompt that begins like the last one, as in a chat, is read from the first token
        that differs. A cache that cannot be cut is kept only if the prompt extends it.
        """
        kept, asked = 0, list(prompts[0][:-1])               # the logits of its last are wanted
        if len(prompts) == len(self._seen) == 1 and not self.static:
            kept = len(os.path.commonprefix([self._seen[0], asked]))
            if self._moving and kept < len(self._seen[0]):
                kept = 0
        if kept:
            self.cut(kept)
        else:
            self.reset(len(prompts), None if len(prompts) == 1 else max(map(len, prompts)) + new)
        self.kept_tokens, self.prompt_tokens = kept, sum(map(len, prompts)) - kept
        rows = self._pad([prompt[kept:] for prompt in prompts])
        T = self.static[1] if self.static else CHUNK if len(rows) == 1 else len(rows[0])
        for start in range(0, len(rows[0]), T):
            logits = self.step([row[start:start + T] for row in rows])
        return logits

    def _choose(self, logits: ort.OrtValue, rng: random.Random, temperature: float, top_p: float,
                top_k: int) -> Iterator[int]:
        """Choose the next token of each row from logits (B, 1, V), as it is asked for."""
        B, size = logits.shape()[0], self.candidates
        best, ids = (ctypes.c_float * (B * size))(), (ctypes.c_int64 * (B * size))()
        io = self._sampler.io_binding()
        io.bind_ortvalue_input("logits", logits)
        io.bind_output("values", "cpu", 0, FLOAT, [B, size], ctypes.addressof(best))
        io.bind_output("indices", "cpu", 0, INT64, [B, size], ctypes.addressof(ids))
        self._sampler.run_with_iobinding(io)
        if math.isnan(sum(best)):
            raise ArithmeticError("the model's logits are not numbers")
        for n in range(0, B * size, size):
            yield ids[n] if temperature == 0 else ids[
                n + _draw(best[n:n + (top_k or size)], rng, temperature, top_p)]

    def _tokens(self, prompts: Sequence[str | Sequence[int]], max_tokens: int | None, *,
                temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
                seed: int | None = None) -> Iterator[list[Any]]:
        """Yield the next token of each prompt, step by step; None for a prompt that has stopped."""
        if not (0 <= temperature < math.inf and 0 < top_p <= 1 and isinstance(top_k, int)
                and 0 <= top_k <= self.candidates and (max_tokens or 0) >= 0):
            raise ValueError(f"max_tokens {max_tokens}, temperature {temperature}, top-p {top_p}, "
                             f"top-k {top_k}: needed are max_tokens >= 0, temperature >= 0, 0 < "
                             f"top-p <= 1 and 0 <= top-k <= {self.candidates}")
        rows = self.encoded(prompts)
        room = self.room(max(map(len, rows)))
        steps = room if max_tokens is None else min(room, max_tokens)
        choose = partial(self._choose, rng=random.Random(seed), temperature=temperature,
                         top_p=top_p, top_k=top_k)
        stops = set(self.tokenizer.stop_ids)
        running, chosen, self.ended = [True] * len(rows), list[int](), "stop"
        with self.owned() as turn:
            logits = self._read(rows, steps)
            for n in range(steps):
                if n:
                    logits = self.step(self._pad([[token] for token in chosen]))
                chosen = [*choose(logits)]
                running = [r and token not in stops for r, token in zip(running, chosen)]
                if not any(running):
                    return
                yield [token if r else None for r, token in zip(running, chosen)]
                if self._turn != turn:
                    raise RuntimeError("another generation or adapter began before this one ended")
            self.ended = "max_tokens" if steps == max_tokens else "context"

    @contextmanager
    def owned(self) -> Iterator[int]:
        """The number of a generation that owns the cache until the next one begins."""
        self._turn = turn = self._turn + 1
        try:
            yield turn
        except (Exception, KeyboardInterrupt):
            if self._turn == turn:
                self.reset()                 # a step that was cut off leaves the cache half written
            raise

    def encoded(self, prompts: Sequence[str | Sequence[int]], new: int = 1) -> list[list[int]]:
        """Token ids of prompts; raises ValueError if `new` more do not fit the context."""
        rows = [self.tokenizer.encode(p)[0] if isinstance(p, str) else list(p) for p in prompts]
        vocab, answer = self.info["vocab_size"], f" for an answer of {new}" if new > 1 else ""
        for number, row in enumerate(rows, 1):
            prompt = f"prompt {number} of {len(rows)}" if len(rows) > 1 else "the prompt"
            if not row:
                raise ValueError(f"{prompt} is empty")
            if not 0 <= min(row) <= max(row) < vocab:
                raise ValueError(f"{prompt} has tokens outside of the model's {vocab}")
            if self.room(len(row) + new - 1) < 1:
                raise ValueError(f"{prompt} has {len(row)} tokens, which leaves no room{answer} in "
                                 f"the context of {self.context}: shorten it, or export with a "
                                 "longer --context or, of a static graph, past")
        return rows

    def room(self, length: int) -> int:
        """How many tokens may follow a prompt of `length` tokens."""
        return (self.context - length) // (self.static[1] if self.static and not self._npu else 1)

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[ort.OrtValue]:
        """Logits (1, 1, V) after a prompt, and after each of the tokens that follow it."""
        self.reset()
        yield self._read([prompt], len(tokens))
        for token in tokens:
            yield self.step(self._pad([[token]]))

    def generate(self, prompt: str | Sequence[int], max_tokens: int | None = None,
                 **sampling: Any) -> Iterator[int]:
        """Yield the tokens that follow a prompt, up to and without a stop token.

        prompt: token ids, or text as the model reads it (`tokenizer.render` formats a chat);
        sampling: temperature (default 0: greedy), top_p, top_k (0: `candidates`), and a seed.
        Raises ValueError for a wrong prompt or argument at the first next(), ArithmeticError for
        NaN logits, and RuntimeError once another generation or adapter has begun.
        """
        for token, in self._tokens([prompt], max_tokens, **sampling):
            yield token

    def batch(self, prompts: Sequence[str | Sequence[int]], max_tokens: int | None = None,
              rows: int | None = None, **sampling: Any) -> list[list[int]]:
        """The tokens that follow each prompt; arguments as for `generate`.

        rows: how many prompts are padded to one length and read at once. Default: all on a GPU, and
        one on a CPU; a static graph fixes it.
        """
        size = self.static[0] if self.static else rows or (
            1 if self._device == "cpu" else max(1, len(prompts)))
        found: list[list[int]] = []
        for start in range(0, len(prompts), size):
            part = prompts[start:start + size]
            if start and sampling.get("seed") is not None:
                sampling["seed"] += size                       # other draws than the part before
            steps = list(self._tokens(part, max_tokens, **sampling))
            found += [[s[i] for s in steps if s[i] is not None] for i in range(len(part))]
        return found

    def choose(self, prompt: str | Sequence[int], choices: Sequence[str], best: int = 1,
               ) -> list[Answer]:
        """The `best` likeliest of the answers `choices` to a prompt, with log-probabilities.

        Raises ValueError for answers that `written` refuses, for `best` below 1, and for a prompt
        too long for the longest answer.
        """
        if best < 1:
            raise ValueError(f"the {best} best answers: expected at least 1")
        answers = written(self.tokenizer, tuple(choices))
        tokens, = self.encoded([prompt], max(map(len, answers)))
        with self.owned():
            return likeliest(lambda shared: self._read([[*tokens, *shared]], 1), answers, best)

    def text(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of tokens in whole characters."""
        # The previous piece, with the text `told`, is decoded again before what is new, since some
        # tokenizers decode a token differently without its neighbours.
        piece: list[int] = []
        new, told = [], ""
        for token in tokens:
            new.append(token)
            text = self.tokenizer.decode(piece + new)
            if len(text) > len(told) and not text.endswith("\ufffd"):
                yield text[len(told):]
                piece, new = new, []
                told = self.tokenizer.decode(piece)
        if rest := self.tokenizer.decode(piece + new)[len(told):]:
            yield rest


def _draw(logits: Sequence[float], rng: random.Random, temperature: float, top_p: float) -> int:
    """Draw an index of `logits`, sorted from the largest, by softmax within the nucleus top_p."""
    masses = [*accumulate(math.exp((value - logits[0]) / temperature) for value in logits)]
    del masses[bisect_left(masses, top_p * masses[-1]) + 1:]
    return rng.choices(range(len(masses)), cum_weights=masses)[0]
