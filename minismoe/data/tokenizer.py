"""Text to tokens and back, and conversations to text. Nothing here imports torch.

The `tokenizers` library reads a checkpoint's tokenizer.json, and templates.py renders its chat
template. Without a tokenizer.json, tokens are bytes; without a template, DEFAULT_TEMPLATE is used.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ..io.files import inside, naming, read_json
from ..io.hub import resolve
from ..model.config import text_part
from . import templates
from .templates import DEFAULT_TEMPLATE, chat_template
from .tools import SHOWN, Message, read_answer

# Says that the next character is text, whatever it looks like; by Unicode no character of a text.
MARK = "\ufdd0"


class ByteTokenizer:
    """UTF-8 bytes and three special tokens, for models without a tokenizer.json."""

    special = {"<|bos|>": 256, "<|end|>": 257, "<|pad|>": 258}
    vocab_size = 259
    _special_text = re.compile(f"({'|'.join(map(re.escape, special))})")

    def encode(self, text: str, special: bool = True) -> tuple[list[int], list[int]]:
        """Token ids, and the index of the character where each starts. special: read the texts of
        special tokens as these tokens; else as text."""
        ids, starts, at = list[int](), list[int](), 0
        for piece in self._special_text.split(text) if special else [text]:
            if special and piece in self.special:
                ids.append(self.special[piece])
                starts.append(at)
            else:
                ids += piece.encode("utf-8", "replace")
                starts += [i for i, c in enumerate(piece, at) for _ in c.encode("utf-8", "replace")]
            at += len(piece)
        return ids, starts

    def decode(self, ids: Sequence[int]) -> str:
        """Text without the special tokens."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json, with the interface of ByteTokenizer.

    vocab_size is the model's, if known. ValueError, here or in `encode`, if a token is beyond it.
    """

    def __init__(self, file: Path, vocab_size: Any = None):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ModuleNotFoundError(
                f"{file} needs the tokenizers library: pip install 'minismoe[hub]'") from None
        with naming(f"{file} is no valid tokenizer", Exception):     # the library raises bare ones
            self.backend = Backend.from_file(str(file))
        self.backend.no_truncation()
        self.backend.no_padding()
        # Added tokens may be beyond the vocabulary (Gemma's for images): `encode` refuses them.
        size = self.backend.get_vocab_size(with_added_tokens=vocab_size is None)
        self.file, self.vocab_size = file, size if vocab_size is None else vocab_size
        if not isinstance(self.vocab_size, int) or size > self.vocab_size:
            raise ValueError(f"{file} has {size} tokens, and the model only {vocab_size!r}")

        self.special: dict[str, int] = {}        # text -> id
        self.mark_special([])

    def mark_special(self, tokens: Sequence[str]) -> None:
        """Make tokens special, if the vocabulary has them."""
        self.backend.add_special_tokens([         # adding one again would reset its spaces
            t for t in tokens
            if t not in self.special and self.backend.token_to_id(t) is not None])
        added = self.backend.get_added_tokens_decoder()
        self.special = {t.content: i for i, t in added.items() if t.special}

    def encode(self, text: str, special: bool = True) -> tuple[list[int], list[int]]:
        """As ByteTokenizer's; ValueError for a text or a token that file or model cannot take."""
        # Lone surrogates (half an emoji, invalid UTF-8 in argv) become "?", as in ByteTokenizer.
        text = text.encode("utf-8", "replace").decode("utf-8")
        if special == self.backend.encode_special_tokens:        # as text, by this odd name
            self.backend.encode_special_tokens = not special
        with naming(f"{self.file} cannot encode {text[:40]!r}", Exception):
            # It raises, for instance, for an unknown word without an unknown token.
            encoding = self.backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids                            # a new list each time
        if (largest := max(ids, default=0)) >= self.vocab_size:      # ids may have gaps
            raise ValueError(f"{self.file} encodes {text[:40]!r} with token {largest}, "
                             f"and the model has only {self.vocab_size}")
        return ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)


class Encoded(NamedTuple):
    """A text, its tokens, and the index in the text of each one's first character."""

    text: str
    ids: list[int]
    starts: list[int]


class Tokenizer:
    """A tokenizer with its chat template and its special tokens.

    stop_ids are all tokens that end a turn: those that the checkpoint declares, and the one that
    its template puts after an assistant's message.
    """

    def __init__(self, backend: ByteTokenizer | FileTokenizer, template: str | None, bos: str,
                 eos: str, pad_id: int | None = None, stop_ids: Sequence[int] = ()):
        self.backend, self.bos, self.eos, self.special = backend, bos, eos, backend.special
        self.encode, self.decode = backend.encode, backend.decode
        self.template = template
        declared = [self.special[eos]] if eos in self.special else []
        written = self._turn_end()
        self.stop_ids = sorted({*stop_ids, *declared, *written})
        self.end_id = next(iter((*written, *declared, *self.stop_ids)), None)   # after an answer
        self.pad_id = pad_id if pad_id is not None else (self.stop_ids or [0])[0]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the model reads it. Raises what `templates.render` raises, and
        ValueError for tools that the template does not know."""
        turns = [{key: value for key, value in m.items() if value is not None} for m in messages]
        tools = next(iter(turns), {}).pop("tools", None)
        if self.template in (None, DEFAULT_TEMPLATE):        # what it renders, without jinja2
            texts = [f"Assistant: {m.get('content')}{self.eos}\n" if m["role"] == "assistant"
                     else f"{m['role'].capitalize()}: {m['content']}\n" for m in turns]
            text = self.bos + "".join(texts) + ("Assistant:" if add_generation_prompt else "")
        else:
            text = templates.render(self.template, {
                "messages": turns, "bos_token": self.bos, "eos_token": self.eos,
                "add_generation_prompt": add_generation_prompt,
                "tools": tools, "documents": None})              # as transformers passes them
        with suppress(templates.Refused):    # a template may do nothing without tools
            if tools and text == self.render(turns, add_generation_prompt):
                raise ValueError("the chat template knows no tools, and the conversation offers "
                                 "some: put one that does into the model's chat_template.jinja")
        return text

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = False,
                    ) -> Encoded:
        """The tokens of a conversation: only the template writes special tokens, and what messages
        say is text, also if it looks like one."""
        return self.encode_marked(self.render(self.mark(messages), add_generation_prompt))

    def mark(self, value: Any) -> Any:
        """A value of JSON with MARK before each character of its texts that looks like one of a
        special token, or as MARK."""
        if isinstance(value, str):
            return self._special_text.sub(lambda match: "".join(MARK + c for c in match[0]),
                                          value.replace(MARK, MARK + MARK))
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [*map(self.mark, value)] if isinstance(value, list | tuple) else value

    def encode_marked(self, text: str) -> Encoded:
        """The tokens of a text with marks, which are read and left out."""
        if MARK not in text:
            return Encoded(text, *self.encode(text))
        ids, starts, at = list[int](), list[int](), 0
        # What is not marked is encoded as one: tokenizers may treat the start of a text apart.
        for is_marked, run in groupby(self._special_text.split(text), lambda piece: MARK in piece):
            piece = unmark("".join(run))
            new, places = self.encode(piece, special=not is_marked)
            ids += new
            starts += [at + place for place in places]
            at += len(piece)
        return Encoded(unmark(text), ids, starts)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        """Matches the text of any special token."""
        return re.compile(f"({'|'.join(map(re.escape, self.special)) or '(?!)'})")   # (?!): nothing

    def parse(self, messages: Sequence[Message], answer: str) -> Message:
        """The assistant's message that answers `messages` with this text. It has tool_calls if they
        offer tools, and the template writes calls as JSON."""
        tools = messages[0].get("tools") or []
        return read_answer(answer, self.shown_call() if tools else "", tools)

    def shown_call(self) -> str:
        """The answer of SHOWN as the template writes it; "" if the template refuses the chat."""
        with suppress(templates.Refused):                # it wants a system message, for instance
            return self.decode(self.turn(SHOWN))
        return ""

    def turn(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the last message as the template writes it, without the token that ends it.

        They are cut out of the whole text, as in training: Llama 2's tokenizer puts a space before
        a text.
        """
        marked = self.mark(messages)
        whole, start = self.render(marked), self.render(marked[:-1], True)
        if not whole.startswith(start):
            whole, start = marked[-1].get("content", ""), ""
        _, ids, starts = self.encode_marked(whole)
        first = bisect_left(starts, len(unmark(start)))
        return [*takewhile(lambda i: i not in self.stop_ids, ids[first:])]

    def _turn_end(self) -> list[int]:
        """The first special token after an assistant's message in the template, if there is one."""
        user = {"role": "user", "content": "question"}
        try:
            whole = self.render([user, {"role": "assistant", "content": "answer"}])
            _, answer, tail = whole.rpartition("answer")
            if not answer:                   # the template changes the message's text
                tail = whole[len(self.render([user], True)):]
        except templates.Refused:            # such as a template that wants a system message first
            return []
        return [i for i in self.encode(tail)[0] if i in self.special.values()][:1]


def unmark(text: str) -> str:
    """A text without its marks."""
    return re.sub(f"(?s){MARK}(.)", r"\1", text) if MARK in text else text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder or hub name; bytes, if a model of bytes has no file.

    Raises ValueError for broken files, FileNotFoundError if tokenizer.json is missing, and
    ModuleNotFoundError, with the pip command, if a library is missing.
    """
    folder = resolve(folder)
    config, settings, generation, special = (
        read_json(file) if (file := inside(folder, f"{name}.json")).is_file() else {}
        for name in ("config", "tokenizer_config", "generation_config", "special_tokens_map"))
    config, settings = text_part(config), special | settings     # older checkpoints have the first
    ends = [config.get("eos_token_id"), generation.get("eos_token_id")]      # a number or a list
    stops = sorted({i for end in ends for i in (end if isinstance(end, list) else [end])
                    if isinstance(i, int) and i >= 0})
    file, template = inside(folder, "tokenizer.json"), chat_template(folder, settings)
    small = config.get("vocab_size") == ByteTokenizer.vocab_size     # a file may spell its bytes
    if small and (not file.is_file() or ByteTokenizer.special == {
            token["content"]: token["id"] for token in read_json(file)["added_tokens"]}):
        return Tokenizer(ByteTokenizer(), template, "<|bos|>", "<|end|>", 258, stops)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json")
    backend = FileTokenizer(file, config.get("vocab_size"))
    bos, eos, pad = (_content(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
    if not eos and stops and stops[0] < backend.vocab_size:      # only its number is given
        eos = backend.backend.id_to_token(stops[0]) or ""
    backend.mark_special([bos, eos, pad])
    return Tokenizer(backend, template, bos, eos, backend.special.get(pad), stops)


def _content(token: Any) -> str:
    """The text of a token, given as a string or as an object with "content"; else ""."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
