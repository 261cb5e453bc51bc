"""The Generator of an exported folder: prompts in, answers out (generation.py writes them)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from typing import Any

import onnxruntime as ort

from ..data.tools import Function, Message, with_tools
from .choices import Answer, Tokens, answer_tokens, likeliest
from .generation import Generation
from .grammar import call_grammar, grammar_tokens, new_matcher
from .model import CachedModel
from .sampling import Sampling

# A chat, which the template renders up to where the next answer begins and where it alone writes
# special tokens; or a text that is read as it is, or token ids.
Prompt = Sequence[Message] | str | Sequence[int]


class Generator(CachedModel):
    """A model that `export.py --layout onnx` wrote, with its tokenizer.

    provider: as `find_device` takes it; threads: default, the physical cores; verify: compare
    hashes as well as sizes. Give each thread a generator of its own. Raises FileNotFoundError
    or ValueError for a folder that is incomplete or broken.
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
        settings, tokens = Sampling(max_tokens, **sampling), self.encoded(prompt)
        matcher = self.matcher(grammar) if grammar else None
        return Generation(self, tokens, self.room(len(tokens)), settings, matcher)

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
        return grammar_tokens(self.tokenizer, self.vocab_size)

    def encoded(self, prompt: Any, new: int = 1, name: str = "the prompt") -> list[int]:
        """Token ids of a prompt; raises ValueError if `new` more do not fit the context."""
        if prompt and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode_chat(prompt, True).ids
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)[0]
        else:
            ids = [*prompt]
        if self.room(len(ids) + new - 1) < 1:
            answer = f" for an answer of {new}" if new > 1 else ""
            raise ValueError(f"{name} has {len(ids):,} tokens, which leaves no room{answer} in the "
                             f"context of {self.context}: shorten it, or export with a longer "
                             "--context or, of a static graph, past")
        if not ids:
            raise ValueError(f"{name} is empty")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"{name} has tokens outside of the model's {self.vocab_size}")
        return ids

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
              **options: Any) -> Message:
        """The assistant's next message of a chat, with tool_calls if it calls any of `tools`.

        Messages and tools are as transformers has them, options are those of `generate`.
        """
        if not messages:
            raise ValueError("the chat is empty: give at least one message")
        chat = with_tools(messages, tools)
        if tools:
            options.setdefault("grammar", self.call_grammar(tools))
        return self.tokenizer.parse(chat, "".join(self.text(self.generate(chat, **options))))

    def batch(self, prompts: Sequence[Prompt], *args: Any, **options: Any) -> list[list[int]]:
        """The tokens that follow each prompt, one prompt after another; arguments as for
        `generate`. A wrong prompt is named before any is read."""
        encoded = [self.encoded(prompt, name=f"prompt {number} of {len(prompts)}")
                   for number, prompt in enumerate(prompts, 1)]
        return [[*self.generate(tokens, *args, **options)] for tokens in encoded]

    def choose(self, prompt: Prompt, choices: Sequence[str], best: int = 1) -> list[Answer]:
        """The `best` likeliest of the answers `choices` to a prompt, with log-probabilities.

        Raises ValueError for answers that `answer_tokens` refuses, and for a prompt too long for
        the longest answer.
        """
        if isinstance(choices, str):
            raise ValueError(f"the answers are the text {choices!r}: give a list of texts")
        answers = self._answer_tokens(tuple(choices))
        tokens = self.encoded(prompt, max(map(len, answers)))
        return likeliest(lambda start: self.prefill([*tokens, *start])[0], answers, best)

    def text(self, tokens: Iterable[int], strip: bool = False) -> Iterator[str]:
        """Yield the text of tokens in whole characters. strip: leave out the white space before it,
        which some templates write before an answer."""
        for piece in self._pieces(tokens):
            text = piece.lstrip() if strip else piece
            if text:
                strip = False
                yield text

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
