"""Speculation: tokens that a text had before are drafted, and one step tells how many are right.

A step reads the last token and its drafts as a batch, one token a row, whose rows all see one
cache: their memory is one. Each row writes its key and value, then attends up to itself.

    cache   [ prompt and answer | a | b | c ]      row 0 reads a, which is sure, and gives b' after
    row 0   [ ----------------- | a ]              it; row 1 reads the draft b, and gives c' after
    row 1   [ ----------------- | a | b ]          it; row 2 reads the draft c. If b' is b, then c'
    row 2   [ ----------------- | a | b | c ]      counts; if it is not, b and c are cut off.

Rows of one token run the very kernels of plain decoding, so logits are the same to the last bit,
and so are the tokens, greedy or drawn. A chunk of several tokens would be faster to read, but its
attention rounds differently, and int8 activations make another text of that within few tokens.

Letters: K key/value heads, P positions of the cache, C head size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import accumulate, cycle, islice, takewhile, zip_longest
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

    from .cache import CachedModel
    from .generator import Generator

ROWS = 6                                     # tokens that one step reads at most
MATCH = 2                                    # tokens that a match has at least
LONGEST = 8                                  # longer matches count as this long
PLACES = 16                                  # earlier places of a match to try, the latest first
SHARE = 0.4                                  # of a plain step's time, for a draft: until measured
Choose = Callable[["ort.OrtValue"], Iterator[int]]


class SharedRows:
    """Memory of float32 (1, K, P, C), and once `share` was called of (ROWS, K, P, C): equal rows.

    `shape` and `data_ptr` are as of an OrtValue. P is rounded up until a row fills whole pages.
    The memory is taken once, but a process's resident size counts it once for each row in use.
    """

    def __init__(self, shape: Sequence[int]):
        _, K, P, C = shape
        pages = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, 4 * K * C)
        self._shape = [1, K, -(-P // pages) * pages, C]
        self._size = 4 * math.prod(self._shape)
        self._memory = mmap.mmap(-1, ROWS * self._size)      # it is unmapped with this object
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def shape(self) -> list[int]:
        return self._shape

    def data_ptr(self) -> int:
        return self._first

    def share(self) -> None:
        """Make all rows the first one. Raises OSError where that cannot be: only Linux has it."""
        if sys.platform != "linux":
            raise OSError("no mremap")
        mremap = ctypes.CDLL(None).mremap
        mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int,
                           ctypes.c_void_p]
        mremap.restype = ctypes.c_void_p
        for place in range(self._first + self._size, self._first + ROWS * self._size, self._size):
            # From size 0, the old pages are there as well. 3: MREMAP_MAYMOVE | MREMAP_FIXED.
            if mremap(self._first, 0, self._size, 3, place) != place:
                raise OSError("mremap failed")


def obstacle(model: CachedModel) -> str:
    """What a graph and its cache lack for speculation; empty if they have all."""
    if not model._shared:                # a portable cache cannot be cut
        return "a folder of target ort"
    if model._moving:                    # nor can a convolution's
        return "a model without convolutions"
    if (model._device, model.info["cache_type"]) != ("cpu", "float32"):
        return "a cache in float32 on the CPU"
    if os.environ.get("ORT_GQA_DISABLE_FLASH_ATTENTION"):
        return "onnxruntime's flash attention"       # it alone writes all rows before any attends
    # With more threads than heads, it splits one row's cache but not several rows': sums differ.
    threads = model._session.get_session_options().intra_op_num_threads or os.cpu_count() or 1
    if threads > (heads := model.info.get("heads", model.info["kv_heads"])):
        return f"at most as many threads as attention heads ({heads} here)"
    try:
        SharedRows([1, 1, 1, 1]).share()
    except OSError:
        return "Linux"
    return ""


class Drafts:
    """What may follow a text: the tokens after the longest of its ends that it had before.

    rates: of matches 0 to LONGEST tokens long, how often the next token is the same too.
    """

    def __init__(self, tokens: Sequence[int], stops: Sequence[int]):
        self.text: list[int] = []
        self.stops = set(stops)
        self.places: dict[tuple[int, ...], list[int]] = {}   # that come after these MATCH tokens
        self.rates = [min(0.9, 0.2 + 0.1 * n) for n in range(LONGEST + 1)]
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.text.append(token)
            if len(self.text) >= MATCH:
                self.places.setdefault(tuple(self.text[-MATCH:]), []).append(len(self.text))

    def find(self, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens that may come next, without a stop token, and the match's length."""
        text, best, length = self.text, len(self.text), 0
        for place in self.places.get(tuple(text[-MATCH:]), [])[-2:-2 - PLACES:-1]:
            n = MATCH
            while n < LONGEST and n < place and text[place - n - 1] == text[-n - 1]:
                n += 1
            if n > length:
                best, length = place, n
        again = islice(cycle(text[best:best + most]), most)  # a text that repeats runs into itself
        return [*takewhile(lambda token: token not in self.stops, again)], length

    def learn(self, length: int, right: Sequence[bool]) -> None:
        """right: of each draft that was compared, after a match of that length, whether it was."""
        for n, hit in enumerate(right, start=length):
            n = min(n, LONGEST)
            self.rates[n] += 0.1 * (hit - self.rates[n])

    def worth(self, length: int, most: int, share: float) -> int:
        """How many drafts, up to `most`, promise the most tokens a second.

        share: what each of them adds to the time of a step that reads one token.
        """
        rates = [self.rates[min(length + n, LONGEST)] for n in range(most)]
        tokens = accumulate(accumulate(rates, mul, initial=1.0))     # a step, for 0, 1, ... drafts
        speeds = [count / (1 + n * share) for n, count in enumerate(tokens)]
        return speeds.index(max(speeds))


class Pace:
    """How long steps take: `plain` seconds of the CPU, and `share` of that more for each draft."""

    plain, share = 0.0, SHARE

    def learn(self, drafts: int, seconds: float) -> None:
        """A step took so long; a step that something else held up counts little."""
        if not drafts:
            before = self.plain or seconds
            self.plain = before + 0.1 * (min(seconds, 2 * before) - before)
            self.share += 0.01 * (SHARE - self.share)        # forgets, else it would never retry
        elif self.plain:
            share = (seconds / self.plain - 1) / drafts
            self.share += 0.1 * (min(max(share, 0), 2 * self.share) - self.share)


def read_rows(generator: Generator, tokens: Sequence[int], places: Sequence[int]) -> ort.OrtValue:
    """Logits (n, 1, V) after each of n tokens at these positions of the one prompt in the cache."""
    if generator._ios.keys() <= {(1, 0)}:    # since `reset`, there were plain steps only
        for value in generator._past.values():
            value.share()
    rows = copy(generator)
    rows._seen = [[0] * place for place in places]
    return rows.step([[token] for token in tokens])


def verified(generator: Generator, tokens: Sequence[int], choose: Choose) -> list[int]:
    """The tokens that come after the last one of a text and its drafts, read in one step."""
    seen, new = len(generator._seen[0]), []
    if len(tokens) > 1:
        logits = read_rows(generator, tokens, range(seen, seen + len(tokens)))
        generator._seen[0] += tokens
    else:
        logits = generator.step([tokens])
    for token, draft in zip_longest(choose(logits), tokens[1:]):
        new.append(token)
        if token != draft:
            break
    generator.cut(seen + len(new))
    return new


def rows_are_exact(generator: Generator, last: int, draft: int) -> bool:
    """Whether rows give the same logits as plain steps; not all processors do. Keeps the cache.

    All rows but the first read the same draft: kernels take some rows two or four at a time.
    """
    def data(logits: ort.OrtValue) -> bytes:
        return ctypes.string_at(logits.data_ptr(), logits.tensor_size_in_bytes())

    seen, more = len(generator._seen[0]), ROWS - 1
    rows = data(read_rows(generator, [last] + more * [draft], [seen] + more * [seen + 1]))
    one, two = data(generator.step([[last]])), data(generator.step([[draft]]))
    generator.cut(seen)
    return rows == one + more * two


def speculated(generator: Generator, logits: ort.OrtValue, prompt: Sequence[int], steps: int,
               choose: Choose) -> Iterator[list[int]]:
    """Yield the `steps` tokens that follow a prompt, one by one, as plain decoding does.

    logits: of the prompt; choose: gives the next token of each row of logits. The cache may hold
    tokens that are still to be yielded.
    """
    drafts, pace = Drafts(prompt, generator.tokenizer.stop_ids), generator._pace
    new, done = [next(choose(logits))], 1
    while True:
        yield from ([token] for token in new)
        if done == steps:
            return
        drafts.add(new)
        guesses, length = drafts.find(min(ROWS, steps - done) - 1)
        tokens = [new[-1], *guesses[:drafts.worth(length, len(guesses), pace.share)]]
        if len(tokens) > 1 and generator._exact is None:
            generator._exact = rows_are_exact(generator, *tokens[:2])        # once is enough
        if not generator._exact:
            del tokens[1:]
        start = time.thread_time()
        new = verified(generator, tokens, choose)
        pace.learn(len(tokens) - 1, time.thread_time() - start)
        generator.steps += 1
        drafts.learn(length, [token == guess for token, guess in zip(new, guesses)])
        done += len(new)
