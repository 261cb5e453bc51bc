"""A prefix kept: what the cache holds of a system prompt, read once and kept in a file.

Prompts that begin with its tokens are read from the first token that differs. The file is a
safetensors file: keys and values (1, K, n, C) of each layer for the n tokens; its header also holds
the tokens, a hash of the model's hashes, and one of the content. It must be byte for byte the
header that we would write, so nothing in it is trusted.

Letters: B rows, K key/value heads, n tokens of the prefix, P positions of a cache, C head size.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tokenizer import Message, Tokenizer
from ..io.files import replacing
from .folder import known_tasks, read_text

if TYPE_CHECKING:
    from .generator import Generator

KEPT = "minismoe.prefix/1"
DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2)}      # of safetensors, and bytes
LONGEST_HEADER = 1 << 24                     # bytes


class Prefix:
    """Tokens, and what a generator's cache holds of them: `data` is (2 * layers, K, n, C).

    It is loaded from `file` if that exists; else the tokens are read, and saved in `file` if given.
    In a folder that cannot be written, they are kept in memory alone.
    """

    def __init__(self, generator: Generator, tokens: Sequence[int], file: Path | None = None):
        info = generator.info
        self.tokens = list(tokens)
        self.dtype, self.size = DTYPES[info["cache_type"]]
        self.size *= info["head_dim"]        # bytes of a position of a head
        self.shape = [1, info["kv_heads"], len(tokens), info["head_dim"]]
        self.names = generator._caches       # 0.key, 0.value, 1.key, ...
        self.bytes = len(tokens) * self.size * info["kv_heads"]                # of a name
        self.data = (ctypes.c_char * (self.bytes * len(self.names)))()
        self.note = {"format": KEPT, "model": _identity(generator),
                     "tokens": " ".join(map(str, tokens))}
        self.loaded = file is not None and file.is_file()
        if file and self.loaded:
            self.load(file)
        else:
            self.take(generator)
            if file and (os.access(file.parent, os.W_OK) or not file.parent.exists()):
                self.save(file)

    def blocks(self, generator: Generator, count: int) -> Iterator[tuple[int, int]]:
        """Addresses in the cache and in `data` of the first `count` positions of each head.

        A static cache is filled from its end, and all of its B rows alike.
        """
        held = ctypes.addressof(self.data)
        for n, value in enumerate(generator._past.values()):
            B, K, P, _ = value.shape()
            first = P - count if generator.static else 0
            for head in range(B * K):
                yield (value.data_ptr() + (head * P + first) * self.size,
                       held + (n * K + head % K) * len(self.tokens) * self.size)

    def take(self, generator: Generator) -> None:
        """Read the tokens, and copy the cache."""
        with generator.owned():
            generator._prefix = None
            generator.reset()                # else pads may follow kept tokens
            generator._read([self.tokens], 0)
        for cached, held in self.blocks(generator, len(self.tokens)):
            ctypes.memmove(held, cached, len(self.tokens) * self.size)

    def fill(self, generator: Generator, count: int) -> None:
        """Make the cache of one prompt hold the first `count` tokens."""
        generator.reset(length=count)
        for cached, held in self.blocks(generator, count):
            ctypes.memmove(cached, held, count * self.size)
        for seen in generator._seen:
            seen += self.tokens[:count]

    def header(self) -> bytes:
        """The beginning of the file that holds `data`."""
        digest = hashlib.sha256(self.data).hexdigest()
        entries: dict[str, Any] = {"__metadata__": {**self.note, "sha256": digest}}
        for n, name in enumerate(self.names):
            entries[name] = {"dtype": self.dtype, "shape": self.shape,
                             "data_offsets": [n * self.bytes, (n + 1) * self.bytes]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def save(self, file: Path) -> None:
        """Write the file; it appears whole or not at all."""
        with replacing(file) as tmp, tmp.open("wb") as f:
            f.write(self.header())
            f.write(self.data)

    def load(self, file: Path) -> None:
        """Read the file. Raises ValueError if it is of another model or prefix, or damaged."""
        note: dict[str, Any] = {}
        with file.open("rb") as f:
            start = f.read(8)
            text = f.read(min(int.from_bytes(start, "little"), LONGEST_HEADER))
            whole = f.readinto(self.data) == len(self.data) and not f.read(1)
        with suppress(KeyError, RecursionError, TypeError, ValueError):
            note = dict(json.loads(text)["__metadata__"])
        for fits, wrong in (
                (note.get("format") == KEPT, "holds no prefix that the runtime kept"),
                (note.get("model") == self.note["model"], "is of another model"),
                (note.get("tokens") == self.note["tokens"], "is of another prefix"),
                (whole and self.header() == start + text, "is damaged")):
            if not fits:
                raise ValueError(f"{file} {wrong}: remove it, and the prefix is read again")


def _identity(generator: Generator) -> str:
    """A hash of the hashes that export.json has of the model and of the adapter in use."""
    files, adapter = generator.info["files"], generator.tasks.get(generator.task or "")
    used = [[name, files[name]["sha256"]] for name in sorted(files)
            if name.startswith("model.onnx") or name == adapter]
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()


def shared_tokens(tokenizer: Tokenizer, write: Callable[[str], str]) -> list[int]:
    """The tokens that write(text) begins with, whatever the text, which the last may merge with."""
    return list(os.path.commonprefix([
        tokenizer.encode(write(text))[0] for text in ("a", "1", "\n", "(", " ")]))


def opening(folder: Path, name: str, raw: bool) -> tuple[list[Message], str, Path]:
    """What --prefix opens every prompt with: system messages, or text; and the file of its cache.

    A file is a system message, or with `raw` text; its cache is kept beside it. A task is the
    instruction of its prompts; its cache is kept in the exported folder. Raises ValueError if
    `name` is neither, and for an empty file.
    """
    known = {task: instruction for task, (_, instruction) in known_tasks(folder).items()
             if instruction}
    if name in known:                        # a task's name may be no file name
        kept = hashlib.sha256(name.encode()).hexdigest()[:16]
        return [], known[name], folder / f"prefix-{kept}.safetensors"
    text, file = read_text(name, folder, known), Path(f"{name}.safetensors")
    if not text.strip():
        raise ValueError(f"{name} is empty: write the prefix into it")
    return ([], text, file) if raw else ([{"role": "system", "content": text}], "", file)
