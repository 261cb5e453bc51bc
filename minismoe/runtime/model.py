"""The graphs of an exported folder, opened, and the cache of what they have read.

Letters: T new tokens, P past positions, V vocabulary, N last tokens that have logits.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import onnxruntime as ort

from ..data.tokenizer import load_tokenizer
from ..io.process import give_back_memory, huge_page_ranges, use_huge_pages
from .cache import FixedCache, GraphCache, SharedCache
from .drafts import read_drafts
from .folder import FLOAT, INT64, graph_of, read_info
from .npu import NpuSteps, SlotCache
from .providers import CPU, Device, find_device, nodes_by_provider, open_session

CHUNK = 512                                  # tokens of a prompt that one step reads: bounds memory
LARGE = 32 << 20                             # bytes of a model: more than most caches hold


class CachedModel:
    """The graphs of a folder, and the cache of what they have read; arguments as of `Generator`."""

    version = 0                 # how often the cache was emptied, cut or changed

    def __init__(self, folder: str | Path, provider: str | None = None,
                 threads: int | None = None, verify: bool = False):
        self.folder = Path(folder)
        self.info = read_info(self.folder, verify)
        self.static: list[int] | None = self.info.get("static")              # 1, T, P
        self.context: int = min([self.info["context"], *(self.static or [])[2:]])
        # The decoder comes first: much of the memory that it takes to open is free afterwards, and
        # then the tokenizer takes it.
        self._open_decoder(provider, threads)
        self._sampler = open_session(self.folder / "sampler.onnx", Device(), 1)
        self.candidates: int = self._sampler.get_outputs()[-1].shape[1]      # tokens to draw from
        *_, rows, self.vocab_size = self.session.get_outputs()[0].shape      # of logits: 1, N, V
        self.drafts = read_drafts(self.folder)       # {}: none, and the same text as with a table
        if rows == 1 and self.drafts is not None:
            raise ValueError(f"{self.folder}: drafts.json is of another model.onnx: export again")
        self.tokenizer = load_tokenizer(self.folder)
        give_back_memory()
        self.renew_cache()

    def _open_decoder(self, provider: str | None, threads: int | None) -> None:
        """Open the decoder, and decide what its cache is, where, and how much a step reads."""
        info, ranges_before = self.info, huge_page_ranges()
        is_npu = info["target"] == "npu"
        device = Device() if is_npu else find_device(provider)
        steps = NpuSteps(self.folder, info, provider, threads) if is_npu else None
        self.session = steps.one if steps else open_session(
            self.folder / graph_of(info), device, threads)
        self.nodes = nodes_by_provider(self.session)
        kinds: dict[str, Callable[..., GraphCache]] = {
            "shared": SharedCache, "growing": GraphCache, "fixed": FixedCache}
        self._kind = partial(SlotCache, steps) if steps else kinds[info["contract"]["cache"]]
        # The cache is where attention is: CUDA's takes 16 bits only, and leaves others to the CPU.
        on_cpu = self._kind is SharedCache and "GroupQueryAttention" in self.nodes.get(CPU, "")
        self._memory = ("cpu", 0) if on_cpu else device.memory
        # WebGPU on Vulkan attends wrongly to 32 new tokens: Dawn does not zero a loop's variables.
        vulkan = device.name == "webgpu" and sys.platform not in ("win32", "darwin")
        self._step_tokens = self.static[1] if self.static else 31 if vulkan else CHUNK
        large = sum(entry["bytes"] for entry in info["files"].values()) > LARGE
        self._huge_pages = threading.Thread(target=use_huge_pages, daemon=True, args=(
            huge_page_ranges() - ranges_before,)) if large else None

    def cut(self, n: int) -> None:
        """Take out of the cache what it holds beyond n tokens."""
        self.cache.cut(n)

    def close(self) -> None:
        """Free the graph and its cache; another `session` and `renew_cache` have to follow."""
        del self.session, self.cache

    def renew_cache(self) -> None:
        """Take an empty cache in place of the one that is there, if any."""
        self.version += 1
        self.__dict__.pop("cache", None)     # first: a GPU may not hold both
        self.cache = self._kind(self.session, self.info, self._memory, self._step_tokens)

    def reset(self) -> None:
        """Empty the cache. A generation that goes on raises RuntimeError at its next token."""
        self._share_cache([])

    def _share_cache(self, tokens: list[int]) -> None:
        """Let the cache hold a beginning of `tokens`, and nothing else: as much as it has of it or,
        if it cannot be cut, nothing."""
        self.version += 1
        if not self.cache.cut(len(os.path.commonprefix([self.cache.tokens, tokens]))):
            self.renew_cache()

    def prefill(self, prompt: Sequence[int]) -> tuple[ort.OrtValue, int]:
        """Read a prompt, from the first token that differs from what the cache holds; returns its
        last logits (1, N, V), and how many tokens were in the cache. The last token is read in any
        case, for its logits, and the last two with drafts, whose steps read two or more."""
        self._share_cache([*prompt[:-1 if self.drafts is None else -2]])
        cached = len(self.cache.tokens)
        return self.read(prompt[cached:]), cached

    def read(self, tokens: Sequence[int]) -> ort.OrtValue:
        """Read more tokens into the cache; returns the logits (1, N, V) after the last of them.

        A step reads T tokens, and the first one what is left over. An error in a step, or Ctrl-C,
        empties the cache, as it may be half written.
        """
        T = self.cache.T
        for end in range((len(tokens) - 1) % T + 1, len(tokens) + 1, T):
            try:
                logits = self.step(tokens[max(0, end - T):end])
            except (Exception, KeyboardInterrupt):
                self.reset()
                raise
        return logits

    def likeliest(self, logits: memoryview[float]) -> tuple[list[float], list[int], float]:
        """The largest of logits (V,), sorted, their tokens, and log(sum(exp(logits))).
        Raises ArithmeticError if the logits are not numbers."""
        size = self.candidates
        values, logprobs = (ctypes.c_float * size)(), (ctypes.c_float * size)()
        tokens = (ctypes.c_int64 * size)()
        io = self._sampler.io_binding()
        io.bind_input("logits", "cpu", 0, FLOAT, [1, 1, len(logits)],
                      ctypes.addressof(ctypes.c_char.from_buffer(logits)))
        for name, kind, array in (("values", FLOAT, values), ("indices", INT64, tokens),
                                  ("logprobs", FLOAT, logprobs)):
            io.bind_output(name, "cpu", 0, kind, [1, size], ctypes.addressof(array))
        self._sampler.run_with_iobinding(io)
        if not sum(values) < math.inf:       # nan, too
            raise ArithmeticError("the model's logits are not numbers")
        return [*values], [*tokens], values[0] - logprobs[0]

    def step(self, tokens: Sequence[int]) -> ort.OrtValue:
        """Run the graph once, on 1 to T tokens; returns its logits (1, N, V)."""
        logits = self.cache.step(tokens)
        if self._huge_pages and not self._huge_pages.ident:  # not earlier: the first token waits
            self._huge_pages.start()
        return logits
