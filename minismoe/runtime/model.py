"""The graphs of an exported folder, opened, and the cache of what they have read.

Letters: B prompts, T new, P past tokens, V vocabulary.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import onnxruntime as ort

from ..data.tokenizer import load_tokenizer
from ..io.files import naming
from ..io.process import give_back_memory, huge_page_ranges, use_huge_pages
from .cache import FixedCache, GrowingCache, Row, SharedCache
from .folder import graph_of, plain_file, read_info
from .npu import NpuSteps, SlotCache
from .providers import CPU, Device, find_device, nodes_by_provider, open_session, preferred

CHUNK = 512                                  # tokens of a prompt that one step reads: bounds memory
LARGE = 32 << 20                             # bytes of a model: more than most caches hold


class CachedModel:
    """The graphs of a folder, and a cache of what they have read; arguments as of `Generator`."""

    _cache: GrowingCache
    _begun = 0                   # how often the cache was emptied or cut: what it held is gone

    def __init__(self, folder: str | Path, provider: str | None = None,
                 threads: int | None = None, task: str | None = None, verify: bool = False):
        self.folder = Path(folder)
        self.info = read_info(self.folder, verify)
        self.static: list[int] | None = self.info.get("static")              # B, T, P
        self.context: int = min([self.info["context"], *(self.static or [])[2:]])
        self.tasks: dict[str, str] = self.info.get("adapters") or {}
        if provider == "auto":               # of those that gave the CPU's texts to export.py
            provider = preferred(self.info.get("providers", []), self.folder / "sampler.onnx")
        before = huge_page_ranges()
        self._npu = NpuSteps(self.folder, self.info, provider, threads) if (
            self.info["target"] == "npu") else None
        device = find_device(None if self._npu else provider)
        self.session = self._npu.one if self._npu else open_session(
            self.folder / graph_of(self.info), device, threads)
        self.nodes = nodes_by_provider(self.session)
        shares = self.info.get("contract", {}).get("shared_buffer", self.info["target"] == "ort")
        self._kind: Callable[..., GrowingCache] = (
            partial(SlotCache, self._npu) if self._npu else FixedCache if self.static else
            SharedCache if shares else GrowingCache)
        # The cache is where attention is: CUDA's takes 16 bits only, and leaves others to the CPU.
        on_cpu = self._kind is SharedCache and "GroupQueryAttention" in self.nodes.get(CPU, "")
        self._memory = ("cpu", 0) if on_cpu else device.memory
        # WebGPU on Vulkan attends wrongly to 32 new tokens: Dawn does not zero a loop's variables.
        self._vulkan = device.name == "webgpu" and sys.platform not in ("win32", "darwin")
        batch = self.session.get_inputs()[0].shape[0]
        self._batch = batch if isinstance(batch, int) else 1 if self._vulkan else None
        large = sum(entry["bytes"] for entry in self.info["files"].values()) > LARGE
        self._huge_pages = threading.Thread(target=use_huge_pages, daemon=True, args=(
            huge_page_ranges() - before,)) if large else None
        self._sampler = open_session(self.folder / "sampler.onnx", Device(), 1)
        best = self._sampler.get_outputs()[0].shape
        self.candidates: int = best[1] if len(best) == 2 else 0              # tokens to draw from
        self._bytes_per_token = 2 * self.info["layers"] * self.info["kv_heads"] * (
            self.info["head_dim"] * (2 if self.info["cache_type"] == "float16" else 4))
        self._fits()
        # After the session, which gives back much of the memory that it takes as it opens.
        self.tokenizer = load_tokenizer(self.folder)
        give_back_memory()
        self.use(task)

    def _fits(self) -> None:
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

    def reset(self, rows: int = 1, capacity: int | None = None) -> None:
        """Empty the cache, and make room for `rows` prompts of `capacity` tokens (the context).

        A generation that goes on raises RuntimeError at its next token.
        """
        self._begun += 1
        B, _, P = self.static or (rows, 0, capacity or self.context)
        P = 0 if self._kind is GrowingCache else P
        if "_cache" not in vars(self) or self._cache.size != (B, P) or not self._cache.cut(0):
            vars(self).pop("_cache", None)   # first, as both may not fit a GPU
            self._cache = self._kind(
                self.session, self.info, self._memory, self._adapter, B, P)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache to the tokens that a prompt begins with, and return how many these are.

        The prompt's last token is to be read in any case, since the logits after it are wanted. A
        cache that cannot be cut there is emptied.
        """
        self._begun += 1
        tokens, *others = self._cache.tokens
        equal = [read == new for read, new in zip(tokens, prompt[:-1])]      # pads are None
        same = 0 if others else [*equal, False].index(False)
        if same and self._cache.cut(same):
            return same
        self.reset()
        return 0

    def read(self, rows: Sequence[Sequence[int]]) -> ort.OrtValue:
        """Read more tokens of each prompt in the cache; returns their last logits (B, 1, V).

        Several are padded to one length: on the left; for target ort on the right, and then only
        after `reset`. A static graph reads T tokens a step, others a chunk of a single prompt.
        An error, or Ctrl-C, empties the cache.
        """
        longest = max(map(len, rows))
        chunk = longest if len(rows) > 1 else 31 if self._vulkan else CHUNK
        B, T, _ = self.static or (len(rows), chunk, 0)
        if self.static:
            T = 1 if self._npu and longest == 1 else T       # an NPU has a graph for one token
            longest = -(-longest // T) * T
        gaps = [[None] * (longest - len(row)) for row in rows]
        right = self._cache.shares
        padded = [[*row, *gap] if right else [*gap, *row] for row, gap in zip(rows, gaps)]
        padded += padded[-1:] * (B - len(rows))
        try:
            for start in range(0, longest, T):
                logits = self.step([row[start:start + T] for row in padded])
        except (Exception, KeyboardInterrupt):
            self.reset()                     # a step that was cut off leaves it half written
            raise
        return logits

    def step(self, rows: Sequence[Row]) -> ort.OrtValue:
        """Run the graph once, on rows (B, T); returns its logits."""
        logits = self._cache.step(rows)
        if self._huge_pages and not self._huge_pages.ident:  # not earlier: the first token waits
            self._huge_pages.start()
        return logits
