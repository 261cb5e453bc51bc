"""The graphs of an exported folder, opened, and the cache of what they have read.

Letters: T new tokens, P past positions, V vocabulary.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import onnxruntime as ort

from ..data.tokenizer import load_tokenizer
from ..io.files import naming
from ..io.process import give_back_memory, huge_page_ranges, use_huge_pages
from .cache import Cache, FixedCache, GrowingCache, SharedCache
from .folder import graph_of, plain_file, read_info
from .npu import NpuSteps, SlotCache
from .providers import CPU, Device, find_device, nodes_by_provider, open_session, preferred

CHUNK = 512                                  # tokens of a prompt that one step reads: bounds memory
LARGE = 32 << 20                             # bytes of a model: more than most caches hold


class CachedModel:
    """The graphs of a folder, and a cache of what they have read; arguments as of `Generator`."""

    _cache: Cache
    _begun = 0                   # how often the cache was emptied or cut: what it held is gone

    def __init__(self, folder: str | Path, provider: str | None = None,
                 threads: int | None = None, task: str | None = None, verify: bool = False):
        self.folder = Path(folder)
        self.info = read_info(self.folder, verify)
        self.static: list[int] | None = self.info.get("static")              # 1, T, P
        self.context: int = min([self.info["context"], *(self.static or [])[2:]])
        self.tasks: dict[str, str] = self.info.get("adapters") or {}
        # The decoder comes first: much of the memory that it takes to open is free afterwards, and
        # then the tokenizer takes it.
        self._open_decoder(provider, threads)
        self._sampler = open_session(self.folder / "sampler.onnx", Device(), 1)
        best = self._sampler.get_outputs()[0].shape
        self.candidates: int = best[1] if len(best) == 2 else 0              # tokens to draw from
        self._check_graphs()
        self.tokenizer = load_tokenizer(self.folder)
        give_back_memory()
        self.use(task)

    def _open_decoder(self, provider: str | None, threads: int | None) -> None:
        """Open the decoder, and decide what its cache is, where, and how much a step reads."""
        info, ranges_before = self.info, huge_page_ranges()
        if provider == "auto":               # of those that gave the CPU's texts to export.py
            provider = preferred(info.get("providers", []), self.folder / "sampler.onnx")
        is_npu = info["target"] == "npu"
        device = Device() if is_npu else find_device(provider)
        steps = NpuSteps(self.folder, info, provider, threads) if is_npu else None
        self.session = steps.one if steps else open_session(
            self.folder / graph_of(info), device, threads)
        self.nodes = nodes_by_provider(self.session)
        in_place = info.get("contract", {}).get("shared_buffer", info["target"] == "ort")
        self._kind: Callable[..., Cache] = (
            partial(SlotCache, steps) if steps else FixedCache if self.static else
            SharedCache if in_place else GrowingCache)
        # The cache is where attention is: CUDA's takes 16 bits only, and leaves others to the CPU.
        on_cpu = self._kind is SharedCache and "GroupQueryAttention" in self.nodes.get(CPU, "")
        self._memory = ("cpu", 0) if on_cpu else device.memory
        # WebGPU on Vulkan attends wrongly to 32 new tokens: Dawn does not zero a loop's variables.
        vulkan = device.name == "webgpu" and sys.platform not in ("win32", "darwin")
        self._step_tokens = self.static[1] if self.static else 31 if vulkan else CHUNK
        large = sum(entry["bytes"] for entry in info["files"].values()) > LARGE
        self._huge_pages = threading.Thread(target=use_huge_pages, daemon=True, args=(
            huge_page_ranges() - ranges_before,)) if large else None

    def _check_graphs(self) -> None:
        """Raise ValueError if export.json disagrees with the graphs."""
        info, inputs = self.info, self.session.get_inputs()
        keys = [(i.type, *i.shape[1::2]) for i in inputs if i.name.endswith(".key")]
        logits = self.session.get_outputs()[0]
        kind = {"float32": "tensor(float)", "float16": "tensor(float16)"}[info["cache_type"]]
        if (len(keys) != info["layers"] or logits.shape[-1:] != [info["vocab_size"]]
                or {*keys} != {(kind, info["kv_heads"], info["head_dim"])}
                or ("position_ids" in {i.name for i in inputs}) == (info["target"] == "ort")
                or not (isinstance(self.candidates, int) and self.candidates)):
            raise ValueError(f"{self.folder / 'export.json'} is not of this model.onnx and "
                             "sampler.onnx: export again")

    def close(self) -> None:
        """Free the graph and its cache; another `session`, and then `use`, have to follow."""
        del self.session, self._cache

    def use(self, task: str | None) -> None:
        """Switch to the adapter of a task; None: the model without an adapter."""
        if task is not None and task not in self.tasks:
            raise ValueError(f"{self.folder} has no adapter {task!r}; present: "
                             f"{', '.join(self.tasks) or 'none'}")
        # Bound as graph inputs: onnxruntime's RunOptions take adapters only without binding.
        with naming(f"onnxruntime cannot open {task}'s adapter in {self.folder}", RuntimeError):
            self._file = None if task is None else ort.AdapterFormat.read_adapter(
                str(plain_file(self.folder, self.tasks[task])))
        self._adapter = self._file.get_parameters() if self._file else {}      # in its memory
        vars(self).pop("_cache", None)       # another adapter, or session, is to be bound
        self.reset()

    def reset(self) -> None:
        """Empty the cache. A generation that goes on raises RuntimeError at its next token."""
        self._begun += 1
        if "_cache" not in vars(self) or not self._cache.cut(0):
            vars(self).pop("_cache", None)   # first, as both may not fit a GPU
            self._cache = self._kind(
                self.session, self.info, self._memory, self._adapter, self._step_tokens)

    def prefill(self, prompt: Sequence[int]) -> ort.OrtValue:
        """Read a prompt, from the first token that differs from what the cache holds; returns its
        last logits (1, 1, V). The prompt's last token is read in any case, for its logits.

        A cache that cannot be cut there is emptied.
        """
        self._begun += 1
        self.cached_tokens = len(os.path.commonprefix([self._cache.tokens, [*prompt[:-1]]]))
        if not self._cache.cut(self.cached_tokens):
            self.reset()
            self.cached_tokens = 0
        self.prompt_tokens = len(prompt) - self.cached_tokens
        return self.read(prompt[self.cached_tokens:])

    def read(self, tokens: Sequence[int]) -> ort.OrtValue:
        """Read more tokens into the cache; returns the logits (1, 1, V) after them.

        A step reads T tokens, and the first one what is left over. An error, or Ctrl-C, empties the
        cache, as a step that was cut off leaves it half written.
        """
        T = self._cache.T
        try:
            for end in range((len(tokens) - 1) % T + 1, len(tokens) + 1, T):
                logits = self.step(tokens[max(0, end - T):end])
        except (Exception, KeyboardInterrupt):
            self.reset()
            raise
        return logits

    def step(self, tokens: Sequence[int]) -> ort.OrtValue:
        """Run the graph once, on 1 to T tokens; returns its logits (1, 1, V)."""
        logits = self._cache.step(tokens)
        if self._huge_pages and not self._huge_pages.ident:  # not earlier: the first token waits
            self._huge_pages.start()
        return logits
