"""The Generator: prompts in, tokens and text out. How an answer comes about:

    tokens = encoded(prompt)                 refused if it is empty, too long or wrong
    cut the cache to what these begin with, and read the rest of them: `prefill`
    while there is room:
        penalize the logits of tokens that the text has; mask them by a grammar, if there is one
        token = sample(logits)
        stop if this token ends the answer
        new = token and, by a grammar, those tokens that alone may follow it
        yield new                            `text` makes whole characters of tokens
        logits = read(new)
    ended = why

Letters: V vocabulary.
"""

import ctypes
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from typing import Any

import onnxruntime as ort

from ..data.tools import Function, Message, with_tools
from .choices import Answer, Tokens, answer_tokens, likeliest
from .folder import FLOAT, INT64
from .grammar import CALLS, call_grammar, follow, grammar_tokens, new_matcher
from .model import CachedModel
from .sampling import Sampling, floats_of, log_of_sum, penalized, permitted


class Generator(CachedModel):
    """A model that `export.py --layout onnx` wrote, with its tokenizer.

    provider: as `find_device` takes it, or "auto": the best of those that the export was checked
    on; threads: default, the physical cores; task: an adapter of the folder; verify: compare hashes
    as well as sizes; spare_bytes: what the caches of earlier prompts may take beside the one in
    use, so that a chat goes on after another prompt. Give each thread a generator of its own.
    Raises FileNotFoundError or ValueError for a folder that is incomplete or broken.
    """

    # Why the tokens of the last generation ended: "stop" (a stop token, or the end of a grammar),
    # "max_tokens" or "context"; "" while they go on, and if the caller, or `text` at a stop text,
    # took no more of them.
    ended = ""
    prompt_tokens = 0                        # tokens the last generation read, cached ones excluded

    @cached_property
    def _answer_tokens(self) -> Callable[[tuple[str, ...]], dict[Tokens, str]]:
        """`answer_tokens` of this tokenizer, which remembers the last sets of answers."""
        return lru_cache(8)(partial(answer_tokens, self.tokenizer))

    def generate(self, prompt: str | Sequence[int], max_tokens: int | None = None,
                 grammar: str = "", fast_forward: bool = True, **sampling: Any) -> Iterator[int]:
        """Yield the tokens that follow a prompt, up to and without a stop token.

        prompt: token ids, or text as the model reads it (`tokenizer.render` formats a chat);
        grammar: of the answer, as grammar.py writes it; fast_forward: read tokens that alone may
        follow together with those before them, without `logprobs`; sampling: fields of `Sampling`.
        Raises ValueError for a wrong prompt or argument at the first next(), ArithmeticError for
        NaN logits, and RuntimeError once another generation or adapter has begun.
        """
        settings = Sampling(max_tokens, **sampling)
        if settings.top_k > self.candidates:
            raise ValueError(f"top_k {settings.top_k}: the sampler gives {self.candidates} tokens")
        tokens, = self.encoded([prompt])
        matcher = self.matcher(grammar) if grammar else None
        room = self.room(len(tokens))
        steps = room if max_tokens is None else min(room, max_tokens)
        rng, stops = random.Random(settings.seed), {*self.tokenizer.stop_ids}
        read, written = {*tokens}, Counter[int]()
        self.ended, ended = "", "max_tokens" if steps == max_tokens else "context"
        logits = self.prefill(tokens)
        begun, self.prompt_tokens = self._begun, len(tokens) - self.cached_tokens
        while steps:
            with penalized(logits, read, written, settings):
                token = self._sample(logits, settings, rng, matcher and matcher.compute_bitmask())
            if token in stops:
                ended = "stop"
                break
            new = [token, *follow(matcher, token, steps - 1 if fast_forward else 0)] if (
                matcher) else [token]
            for token in new:
                yield token
                if self._begun != begun:
                    raise RuntimeError("another generation or adapter began, or the cache was "
                                       "emptied, before this one ended")
            written.update(new)
            steps -= len(new)
            if matcher and matcher.is_stopped():
                ended = "stop"
                break
            if steps:
                logits = self.read(new)
        self.ended = ended

    def _sample(self, logits: ort.OrtValue, sampling: Sampling, rng: random.Random,
                mask: bytes | None) -> int:
        """Choose the next token from logits (1, 1, V), among those of the mask, if there is one."""
        size = self.candidates
        best, ids = (ctypes.c_float * size)(), (ctypes.c_int64 * size)()
        io = self._sampler.io_binding()
        io.bind_ortvalue_input("logits", logits)
        io.bind_output("values", "cpu", 0, FLOAT, [1, size], ctypes.addressof(best))
        io.bind_output("indices", "cpu", 0, INT64, [1, size], ctypes.addressof(ids))
        self._sampler.run_with_iobinding(io)
        if not sum(best) < math.inf:         # nan, too
            raise ArithmeticError("the model's logits are not numbers")
        self._last, values, tokens = logits, [*best], [*ids]
        if mask is not None:
            values, tokens = permitted(logits, values, tokens, mask)
        return tokens[sampling.draw(values, rng)]

    def logprobs(self, token: int, count: int) -> list[tuple[str, float]]:
        """Text and log-probability of the token that was given last and, after it, of the `count`
        likeliest tokens: among all, without penalties, temperature and grammar.

        It takes about as long as a step of a small model: Python sums over the vocabulary.
        """
        logits = floats_of(self._last).tolist()
        total = log_of_sum(logits)
        likeliest = heapq.nlargest(count, range(len(logits)), logits.__getitem__)
        return [("".join(self._pieces([i])), logits[i] - total) for i in (token, *likeliest)]

    def call_grammar(self, tools: Sequence[Function], must: bool = False,
                     most: int = CALLS) -> str:
        """The grammar of answers that may call, or `must` call, `tools`, up to `most` times.

        Without llguidance, or where the template writes calls otherwise than as JSON, "", which is
        any text, unless they must: ValueError.
        """
        with suppress(*() if must else (ModuleNotFoundError, ValueError)):
            self._grammar_tokens             # noqa: B018
            return call_grammar(self.tokenizer, tools, must, most)
        return ""

    def matcher(self, grammar: str) -> Any:
        """What holds an answer to a grammar; ValueError if it cannot be compiled."""
        return new_matcher(self._grammar_tokens, grammar)

    @cached_property
    def _grammar_tokens(self) -> Any:
        return grammar_tokens(self.tokenizer, self.info["vocab_size"])

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
        padded = self.static and self.info["target"] != "npu"    # T places for each token
        return (self.context - length) // (self.static[1] if self.static and padded else 1)

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[ort.OrtValue]:
        """Logits (1, 1, V) after a prompt, and after each of the tokens that follow it."""
        yield self.prefill(prompt)
        for token in tokens:
            yield self.read([token])

    def reply(self, messages: Sequence[Message], tools: Sequence[Function] = (),
              stop: Sequence[str] = (), **options: Any) -> Message:
        """The assistant's next message of a chat, with tool_calls if it calls any of `tools`.

        Messages and tools are as transformers has them, stop as of `text`, options of `generate`.
        """
        if not messages:
            raise ValueError("the chat is empty: give at least one message")
        chat = with_tools(messages, tools)
        if tools:
            options.setdefault("grammar", self.call_grammar(tools))
        tokens = self.generate(self.tokenizer.render(chat, True), **options)
        return self.tokenizer.parse(chat, "".join(self.text(tokens, stop)))

    def batch(self, prompts: Sequence[str | Sequence[int]], max_tokens: int | None = None,
              seed: int | None = None, **sampling: Any) -> list[list[int]]:
        """The tokens that follow each prompt, one prompt after another; arguments as for
        `generate`. A wrong prompt is named before any is read; a seed draws anew for each."""
        return [[*self.generate(tokens, max_tokens, **sampling,
                                seed=None if seed is None else seed + number)]
                for number, tokens in enumerate(self.encoded(prompts))]

    def choose(self, prompt: str | Sequence[int], choices: Sequence[str], best: int = 1,
               ) -> list[Answer]:
        """The `best` likeliest of the answers `choices` to a prompt, with log-probabilities.

        Raises ValueError for answers that `answer_tokens` refuses, and for a prompt too long for
        the longest answer.
        """
        if isinstance(choices, str):
            raise ValueError(f"the answers are the text {choices!r}: give a list of texts")
        answers = self._answer_tokens(tuple(choices))
        tokens, = self.encoded([prompt], max(map(len, answers)))
        return likeliest(lambda start: self.prefill([*tokens, *start]), answers, best)

    def text(self, tokens: Iterable[int], stop: Sequence[str] = (), strip: bool = False,
             ) -> Iterator[str]:
        """Yield the text of tokens in whole characters, up to and without any of the texts `stop`.

        As many characters are kept back as may begin one of these. strip: leave out the white space
        before the text, which some templates write before an answer.
        """
        if isinstance(stop, str):
            raise ValueError(f"stop is the text {stop!r}: give a list of texts")
        kept, back = "", max(map(len, stop), default=1) - 1
        for piece in self._pieces(tokens):
            kept += piece.lstrip() if strip else piece
            strip = strip and not kept
            if ends := [at for end in stop if (at := kept.find(end)) >= 0]:
                kept = kept[:min(ends)]
                break
            if len(kept) > back:
                yield kept[:len(kept) - back]
                kept = kept[len(kept) - back:]
        if kept:
            yield kept

    def _pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of tokens, which follow others, in whole characters.

        The previous piece is decoded again before what is new, since tokenizers decode a token by
        its neighbours: those as of Llama 2 leave out the first space of a text. (The library's
        DecodeStream raises where bytes are no characters.)
        """
        piece, new = self.tokenizer.encode("a")[0], list[int]()      # for what comes before
        length = len(self.tokenizer.decode(piece))
        for token in tokens:
            new.append(token)
            text = self.tokenizer.decode(piece + new)
            if len(text) > length and not text.endswith("\ufffd"):
                yield text[length:]
                piece, new = new, []
                length = len(self.tokenizer.decode(piece))
        if rest := self.tokenizer.decode(piece + new)[length:]:
            yield rest
