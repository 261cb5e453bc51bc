"""The Generator: prompts in, tokens and text out. How an answer comes about:

    tokens = encoded(prompt)                 refused if it is empty, too long or wrong
    cut the cache to what these begin with, and read the rest of them: `prefill`
    while there is room:
        penalize the logits of tokens that the text has; mask them by a grammar, if there is one
        token = sample(logits)
        stop if this token ends the answer
        new = token and, by a grammar, those tokens that alone may follow it
        yield new                            `text` makes whole characters of tokens
        if the last step has read `new` as drafts, its logits after them are there: go on
        cut the cache to what is written, and draft what may follow (drafts.py)
        logits = read(new and the drafts)
    answer.ended = why

Letters: V vocabulary.
"""

import ctypes
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from itertools import takewhile
from typing import Any

import onnxruntime as ort

from ..data.tools import Function, Message, with_tools
from .choices import Answer, Tokens, answer_tokens, likeliest
from .drafts import SHORT, drafted
from .folder import FLOAT, INT64
from .grammar import allowed, call_grammar, follow, grammar_tokens, new_matcher
from .model import CachedModel
from .sampling import Sampling, floats_of, penalize, permitted

# A chat, which the template renders up to where the next answer begins and where it alone writes
# special tokens; or a text that is read as it is, or token ids.
Prompt = Sequence[Message] | str | Sequence[int]


class Generation(Iterator[int]):
    """One answer: its tokens, up to and without a stop token, are written as one iterates over it.

    `generate` makes it. Iterating raises ArithmeticError for logits that are not numbers,
    ValueError for a grammar that is too complex, and RuntimeError once another generation or
    adapter has begun.
    """

    # "stop" (a stop token, or the end of a grammar), "max_tokens" or "context"; "" while tokens
    # come, and if the caller, or `text` at a stop text, took no more of them.
    ended = ""
    logprob = 0.0                # of the tokens and the stop token together, after penalties
    steps = 0                    # of the graph, after the prompt
    read_tokens = 0              # tokens of the prompt that were read
    cached_tokens = 0            # tokens of the prompt that were in a cache

    def __init__(self, write: Callable[["Generation"], Iterator[int]]):
        self._written = write(self)

    def __next__(self) -> int:
        return next(self._written)


class Generator(CachedModel):
    """A model that `export.py --layout onnx` wrote, with its tokenizer.

    provider: as `find_device` takes it, or "auto": the best of those that the export was checked
    on; threads: default, the physical cores; verify: compare hashes as well as sizes. Give each
    thread a generator of its own.
    Raises FileNotFoundError or ValueError for a folder that is incomplete or broken.
    """

    @cached_property
    def _answer_tokens(self) -> Callable[[tuple[str, ...]], dict[Tokens, str]]:
        """`answer_tokens` of this tokenizer, which remembers the last sets of answers."""
        return lru_cache(8)(partial(answer_tokens, self.tokenizer))

    def generate(self, prompt: Prompt, max_tokens: int | None = None,
                 grammar: str = "", **sampling: Any) -> Generation:
        """The tokens that follow a prompt, to iterate over.

        grammar: of the answer, as grammar.py writes it; sampling: fields of `Sampling`. Raises
        ValueError for a wrong prompt or argument.
        """
        settings = Sampling(max_tokens, **sampling)
        if settings.top_k > self.candidates:
            raise ValueError(f"top_k {settings.top_k}: the sampler gives {self.candidates} tokens")
        tokens, = self.encoded([prompt])
        matcher = self.matcher(grammar) if grammar else None
        return Generation(partial(self._write, tokens, settings, matcher))

    def _write(self, prompt: list[int], settings: Sampling, matcher: Any, answer: Generation,
               ) -> Iterator[int]:
        """Yield the tokens of `answer`, and fill in its fields."""
        room, limit = self.room(len(prompt)), settings.max_tokens
        steps = room if limit is None else min(room, limit)
        ended = "max_tokens" if steps == limit else "context"
        rng, stops = random.Random(settings.seed), {*self.tokenizer.stop_ids}
        known = {*prompt}                    # tokens of the prompt and the answer
        text, drafts = list[int](), list[int]()      # written; read, and not known to be right
        logits, answer.cached_tokens = self.prefill(prompt)
        version, answer.read_tokens = self._version, len(prompt) - answer.cached_tokens
        while steps:
            row = floats_of(logits, -1 - len(drafts))
            if settings.repetition_penalty != 1:
                penalize(row, known, settings.repetition_penalty)
            token, logprob = self._sample(row, settings, rng, matcher and allowed(matcher))
            answer.logprob += logprob
            if token in stops:
                ended = "stop"
                break
            new = [token, *follow(matcher, token, steps - 1)] if matcher else [token]
            for token in new:
                yield token
                if self._version != version:
                    raise RuntimeError("another generation or adapter began, or the cache was "
                                       "emptied, before this one ended")
            known.update(new)
            text += new
            steps -= len(new)
            if matcher and matcher.is_stopped():
                ended = "stop"
                break
            right = len(os.path.commonprefix([new, drafts]))
            drafts = drafts[right:]
            if steps and right < len(new):
                self.cut(len(prompt) + len(text) - len(new) + right)
                unread = new[right:]
                drafts = self._drafts(prompt, text, min(steps - 1, SHORT - len(unread)), matcher)
                # Kernels round a step of one token otherwise: a text would depend on its drafts.
                if self.drafts is not None and len(unread + drafts) == 1:
                    drafts = [token]
                logits = self.read(unread + drafts)
                answer.steps += 1
        answer.ended = ended

    def _drafts(self, prompt: list[int], text: list[int], most: int, matcher: Any) -> list[int]:
        """Up to `most` tokens that may follow a prompt and the text of its answer, and that the
        matcher, if there is one, permits; none that ends the answer."""
        drafts = drafted(prompt, text, self.drafts)[:most] if self.drafts and most > 0 else []
        drafts = [*takewhile(lambda token: token not in self.tokenizer.stop_ids, drafts)]
        return drafts[:matcher.validate_tokens(drafts)] if matcher and drafts else drafts

    def _candidates(self, floats: "memoryview[float]") -> tuple[list[float], list[int], float]:
        """The largest of the logits (V,), sorted, their tokens, and log(sum(exp(logits))).
        Raises ArithmeticError if the logits are not numbers."""
        size = self.candidates
        values, logprobs, tokens = (ctypes.c_float * size)(), (ctypes.c_float * size)(), (
            ctypes.c_int64 * size)()
        io = self._sampler.io_binding()
        io.bind_input("logits", "cpu", 0, FLOAT, [1, 1, len(floats)],
                      ctypes.addressof(ctypes.c_char.from_buffer(floats)))
        for name, kind, array in (("values", FLOAT, values), ("indices", INT64, tokens),
                                  ("logprobs", FLOAT, logprobs)):
            io.bind_output(name, "cpu", 0, kind, [1, size], ctypes.addressof(array))
        self._sampler.run_with_iobinding(io)
        if not sum(values) < math.inf:       # nan, too
            raise ArithmeticError("the model's logits are not numbers")
        return [*values], [*tokens], values[0] - logprobs[0]

    def _sample(self, floats: "memoryview[float]", sampling: Sampling, rng: random.Random,
                mask: bytes | None) -> tuple[int, float]:
        """Choose the next token from logits (V,), among those of the mask, if there is one; returns
        it, and its log-probability."""
        values, tokens, total = self._candidates(floats)
        if mask is not None:
            values, tokens = permitted(floats, values, tokens, mask)
        chosen = sampling.draw(values, rng)
        return tokens[chosen], values[chosen] - total

    def call_grammar(self, tools: Sequence[Function]) -> str:
        """The grammar of answers that may call `tools`; "", which is any text, without llguidance,
        or where the template writes calls otherwise than as JSON."""
        with suppress(ModuleNotFoundError, ValueError):
            self._grammar_tokens             # noqa: B018
            return call_grammar(self.tokenizer, tools)
        return ""

    def matcher(self, grammar: str) -> Any:
        """What holds an answer to a grammar; ValueError if it cannot be compiled."""
        return new_matcher(self._grammar_tokens, grammar)

    @cached_property
    def _grammar_tokens(self) -> Any:
        return grammar_tokens(self.tokenizer, self.info["vocab_size"])

    def encoded(self, prompts: Sequence[Prompt], new: int = 1) -> list[list[int]]:
        """Token ids of prompts; raises ValueError if `new` more do not fit the context."""
        return [self._encoded(prompt, new, f"prompt {number} of {len(prompts)}" if len(prompts) > 1
                              else "the prompt") for number, prompt in enumerate(prompts, 1)]

    def _encoded(self, prompt: Any, new: int, name: str) -> list[int]:
        chat = prompt if prompt and isinstance(prompt[0], Mapping) else None
        text = self.tokenizer.render(chat, True) if chat else prompt
        ids, is_long = prompt, False
        if isinstance(text, str):            # too many characters are refused before they take time
            is_long = len(text) > self.context and (
                len(text) > self.context * self.tokenizer.backend.longest)
            ids = [] if is_long else self.tokenizer.encode_chat(chat, True).ids if chat else (
                self.tokenizer.encode(text)[0])
        if is_long or self.room(len(ids) + new - 1) < 1:
            size = f"{len(text):,} characters" if is_long else f"{len(ids):,} tokens"
            answer = f" for an answer of {new}" if new > 1 else ""
            raise ValueError(f"{name} has {size}, which leaves no room{answer} in the context of "
                             f"{self.context}: shorten it, or export with a longer --context or, "
                             "of a static graph, past")
        if not ids:
            raise ValueError(f"{name} is empty")
        if not 0 <= min(ids) <= max(ids) < self.info["vocab_size"]:
            raise ValueError(f"{name} has tokens outside of the model's {self.info['vocab_size']}")
        return [*ids]

    def room(self, length: int) -> int:
        """How many tokens may follow a prompt of `length` tokens."""
        padded = self.static and self.info["target"] != "npu"    # T places for each token
        return (self.context - length) // (self.static[1] if self.static and padded else 1)

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[ort.OrtValue]:
        """Logits (1, N, V) after a prompt, and after each of the tokens that follow it. The last
        row is that of the last token; N is 1 to 3."""
        yield self.prefill(prompt)[0]
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
        tokens = self.generate(chat, **options)
        return self.tokenizer.parse(chat, "".join(self.text(tokens, stop)))

    def batch(self, prompts: Sequence[Prompt], max_tokens: int | None = None,
              seed: int | None = None, **sampling: Any) -> list[list[int]]:
        """The tokens that follow each prompt, one prompt after another; arguments as for
        `generate`. A wrong prompt is named before any is read; a seed draws anew for each."""
        return [[*self.generate(tokens, max_tokens, **sampling,
                                seed=None if seed is None else seed + number)]
                for number, tokens in enumerate(self.encoded(prompts))]

    def choose(self, prompt: Prompt, choices: Sequence[str], best: int = 1) -> list[Answer]:
        """The `best` likeliest of the answers `choices` to a prompt, with log-probabilities.

        Raises ValueError for answers that `answer_tokens` refuses, and for a prompt too long for
        the longest answer.
        """
        if isinstance(choices, str):
            raise ValueError(f"the answers are the text {choices!r}: give a list of texts")
        answers = self._answer_tokens(tuple(choices))
        tokens, = self.encoded([prompt], max(map(len, answers)))
        return likeliest(lambda start: self.prefill([*tokens, *start])[0], answers, best)

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
