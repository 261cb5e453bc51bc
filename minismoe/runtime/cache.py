"""A graph with its sampler and its key/value cache, which is never copied.

Keys and values stay on the session's device, in OrtValues that are bound to the session:

    ort        one buffer for the whole context is the past and the present: attention writes into
               it. Its memory is taken as it is written, and then stays.
    portable   the present of a step is the past of the next step.
    static     like portable, with fixed sizes: T tokens a step, and a past of the last P positions.
    npu        one buffer of P slots, into which the new keys and values are copied.

The last inputs of convolutions and the memory of delta nets go from step to step as in portable,
whatever the target.

Letters: B prompts, T new, P past tokens, S = P + T, K key/value heads, C head size, V vocabulary.
"""

import ctypes
import os
import sys
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..data.tokenizer import load_tokenizer
from ..io.files import naming
from ..io.process import use_huge_pages
from .folder import CACHE_TYPES, FLOAT, INT64, plain_file, read_info
from .npu import NpuSteps
from .providers import CPU, Device, find_device, nodes_by_provider, open_session, preferred

CHUNK = 512                                  # tokens of a prompt that one step reads: bounds memory
LARGE = 32 << 20                             # bytes of a model: more than most caches hold

Row = Sequence["int | None"]                 # new tokens of a prompt; None is padding


class CachedModel:
    """The graphs of a folder, and a cache of what they have read; arguments as of `Generator`."""

    def __init__(self, folder: str | Path, provider: str | None = None,
                 threads: int | None = None, task: str | None = None, verify: bool = False):
        self.folder = Path(folder)
        self.info = read_info(self.folder, verify)
        # First: the graph takes the memory that this frees.
        self.tokenizer = load_tokenizer(self.folder)
        self.static: list[int] | None = self.info.get("static")              # B, T, P
        self.context: int = min([self.info["context"], *(self.static or [])[2:]])
        self.tasks: dict[str, str] = self.info.get("adapters") or {}
        # Whether attention writes new keys and values into the past.
        self._in_place = self.info["target"] == "ort" and not self.static
        if provider == "auto":               # of those that gave the CPU's texts to export.py
            provider = preferred(self.info.get("providers", []), self.folder / "sampler.onnx")
        self._npu = NpuSteps(self.folder, self.info, provider, threads) if (
            self.info["target"] == "npu") else None
        device = find_device(None if self._npu else provider)
        self._session = self._npu.one if self._npu else open_session(
            self.folder / "model.onnx", device, threads)
        self.nodes = nodes_by_provider(self._session)
        # The cache is where attention is: CUDA's takes 16 bits only, and leaves others to the CPU.
        on_cpu = self._in_place and "GroupQueryAttention" in self.nodes.get(CPU, "")
        self._memory = ("cpu", 0) if on_cpu else device.memory
        # WebGPU on Vulkan attends wrongly to 32 new tokens: Dawn does not zero a loop's variables.
        self._vulkan = device.name == "webgpu" and sys.platform not in ("win32", "darwin")
        large = sum(entry["bytes"] for entry in self.info["files"].values()) > LARGE
        self._huge_pages = threading.Thread(target=use_huge_pages, daemon=True) if large else None
        self._sampler = open_session(self.folder / "sampler.onnx", Device(), 1)
        best = self._sampler.get_outputs()[0].shape
        self.candidates: int = best[1] if len(best) == 2 else 0              # tokens to draw from
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        # {input of a past: output of its present}
        self._presents = {
            name: name.replace("past_key_values.", "present.").replace("past_", "present_")
            for name in self._inputs if name.startswith("past_")}
        # The pasts that a step gives back as new values, for the next step.
        self._fed_back = [past for past in self._presents
                          if not self._in_place or not past.startswith("past_key_values.")]
        self._fits()
        self.use(task)

    def _fits(self) -> None:
        """Raise ValueError if export.json disagrees with the graphs."""
        info = self.info
        keys = [(i.type, *i.shape[1::2]) for i in self._inputs.values() if i.name.endswith(".key")]
        logits = self._session.get_outputs()[0]
        kind = {"float32": "tensor(float)", "float16": "tensor(float16)"}[info["cache_type"]]
        if (len(keys) != info["layers"] or logits.shape[-1:] != [info["vocab_size"]]
                or {*keys} != {(kind, info["kv_heads"], info["head_dim"])}
                or ("position_ids" in self._inputs) == (info["target"] == "ort")
                or not (isinstance(self.candidates, int) and self.candidates)):
            raise ValueError(f"{self.folder / 'export.json'} is not of this model.onnx and "
                             "sampler.onnx: export again")

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
        self._size = (0, 0)                  # of the cache, (B, P): it is to be bound anew
        self.reset()

    def reset(self, rows: int = 1, capacity: int | None = None) -> None:
        """Empty the cache, and make room for `rows` prompts of `capacity` tokens (the context)."""
        B, _, P = self.static or (rows, 0, (capacity or self.context) if self._in_place else 0)
        # The tokens that the cache holds, by row; None is padding.
        self._seen = [list[Any]() for _ in range(B)]
        if self._size == (B, P) and not self._fed_back:
            return                           # attention reads only what is written after this
        self._size, self._past = (0, 0), dict[str, Any]()
        self._io = io = self._session.io_binding()
        for name, value in self._adapter.items():
            io.bind_ortvalue_input(name, value)
        for name in ("logits", *(self._presents[past] for past in self._fed_back)):
            io.bind_output(name)             # every step binds them again; here they become first
        for past, present in self._presents.items():
            keys, fed_back = past.startswith("past_key_values."), past in self._fed_back
            shape = [self.info["kv_heads"], P, self.info["head_dim"]] if keys else (
                self._inputs[past].shape[1:])
            value = self._past[past] = ort.OrtValue.ortvalue_from_shape_and_type(
                [B, *shape], FLOAT if past.startswith("past_recurrent.") else
                CACHE_TYPES[self.info["cache_type"]],
                *(("cpu", 0) if fed_back else self._memory))
            if fed_back:                     # old memory: 0 * nan is nan
                ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
            else:
                io.bind_ortvalue_input(past, value)
                io.bind_ortvalue_output(present, value)
        self._size = B, P

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache to the tokens that a prompt begins with, and return how many these are.

        The prompt's last token is to be read in any case, since the logits after it are wanted. A
        static cache is emptied, and so is one that is fed back, unless the prompt begins with all
        of it: it cannot be cut.
        """
        same = 0
        if len(self._seen) == 1 and not self.static:
            same = len(os.path.commonprefix([self._seen[0], list(prompt[:-1])]))
            if self._fed_back and same < len(self._seen[0]):
                same = 0
        if same:
            del self._seen[0][same:]
        else:
            self.reset()
        return same

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
        padded = [[*row, *gap] if self._in_place else [*gap, *row] for row, gap in zip(rows, gaps)]
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
        if self._npu:
            logits = self._npu.step(rows[0], len(self._seen[0]), self._past)
            self._seen[0] += [t for t in rows[0] if t is not None]
            return logits
        io, inputs = self._io, self._token_inputs(rows)      # their memory must outlive the run
        for name, values in inputs.items():
            io.bind_input(name, "cpu", 0, INT64, [len(rows), len(values) // len(rows)],
                          values.buffer_info()[0])
        io.bind_output("logits")
        for past in self._fed_back:
            io.bind_ortvalue_input(past, self._past[past])
            io.bind_output(self._presents[past], *self._memory)
        self._session.run_with_iobinding(io)
        if self._huge_pages and not self._huge_pages.ident:  # not earlier: the first token waits
            self._huge_pages.start()
        outputs = io.get_outputs_as_ortvaluevector()         # in the order of binding
        for n, past in enumerate(self._fed_back, start=1):
            self._past[past] = ort.OrtValue(outputs[n])
        return ort.OrtValue(outputs[0])

    def _token_inputs(self, rows: Sequence[Row]) -> "dict[str, array[int]]":
        """Add rows to `_seen`; returns tokens (B, T), mask (B, S) and perhaps positions (B, T)."""
        positions, mask, zero, one = array("q"), array("q"), array("q", [0]), array("q", [1])
        for seen, row in zip(self._seen, rows):
            at = len(seen) - seen.count(None) - 1
            positions.extend(max(0, at := at + (token is not None)) for token in row)
            seen += [t for t in row if t is not None] if self._in_place else row
        S = sum(self.static[1:]) if self.static else max(map(len, self._seen))
        for seen in self._seen:
            if self._in_place:
                mask += one * len(seen) + zero * (S - len(seen))
            else:
                mask += zero * (S - len(seen)) + array("q", [t is not None for t in seen[-S:]])
        found = {"input_ids": array("q", [t or 0 for row in rows for t in row]),
                 "attention_mask": mask}
        return found | {"position_ids": positions} if "position_ids" in self._inputs else found
