"""A graph with its sampler and its key/value cache, read in steps; the cache is never copied.

Keys and values stay on the session's device, in bound OrtValues:

    ort        one buffer of the whole context, bound as past and as present; memory is taken as it
               is written, and kept. Prompts of a batch are padded on the right, else on the left.
    portable   the present of a step is the past of the next step.
    static     like portable, with fixed sizes: T tokens a step, and a past of the last P positions.
    npu        one buffer of P slots, which the new keys and values are copied into.

The last inputs of convolutions go from step to step as in portable, whatever the target.

Letters: B prompts, T new, P past tokens, S = P + T, K key/value heads, C head size, V vocabulary.
"""

import ctypes
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..data.tokenizer import load_tokenizer
from ..io.process import use_huge_pages
from .folder import CACHE_TYPES, INT64, plain_file, read_info
from .npu import NpuSteps
from .session import CPU, enough_onnxruntime, execution_provider, open_session, opened

LARGE = 32 << 20                             # bytes of a model: more than most caches hold

Row = Sequence["int | None"]                 # new tokens of a prompt; None is padding


class CachedModel:
    """The graphs of a folder, and a cache of what they have read; arguments as of `Generator`."""

    def __init__(self, folder: str | Path, provider: str | None = None,
                 threads: int | None = None, task: str | None = None, verify: bool = False):
        enough_onnxruntime()
        self.folder = Path(folder)
        self.info = read_info(self.folder, verify)
        # First: the graph takes the memory that this frees.
        self.tokenizer = load_tokenizer(self.folder)
        self.static: list[int] | None = self.info.get("static")              # B, T, P
        self.context: int = min([self.info["context"], *(self.static or [])[2:]])
        self.tasks: dict[str, str] = self.info.get("adapters") or {}
        self._shared = self.info["target"] == "ort" and not self.static
        self._npu = NpuSteps(self.folder, self.info, provider, threads) if (
            self.info["target"] == "npu") else None
        name = execution_provider(None if self._npu else provider)
        self._device = "cuda" if name == "CUDAExecutionProvider" else "cpu"
        if self._shared and self._device == "cuda" and self.info["cache_type"] == "float32":
            self._device = "cpu"             # CUDA's attention takes 16 bits only: it runs here
        self._session = self._npu.one if self._npu else open_session(
            self.folder / "model.onnx", name, threads)
        large = sum(entry["bytes"] for entry in self.info["files"].values()) > LARGE
        self._pages = threading.Thread(target=use_huge_pages, daemon=True) if large else None
        self._sampler = open_session(self.folder / "sampler.onnx", CPU, 1)
        best = self._sampler.get_outputs()[0].shape
        self.candidates: int = best[1] if len(best) == 2 else 0              # tokens to draw from
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._caches = [name.removeprefix("past_").removeprefix("key_values.")      # 0.key, conv.1
                        for name in self._inputs if name.startswith("past_")]
        # Those that a step gives back in another buffer.
        self._moving = [n for n in self._caches if not self._shared or n.startswith("conv")]
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
        self._file = None if task is None else opened(        # it owns the parameters' memory
            ort.AdapterFormat.read_adapter, plain_file(self.folder, self.tasks[task]))
        self._adapter = self._file.get_parameters() if self._file else {}
        self._shape = list[int]()            # of the cache, which is to be bound anew
        self.reset()

    def reset(self, rows: int = 1, capacity: int | None = None) -> None:
        """Empty the cache, and make room for `rows` prompts of `capacity` tokens."""
        rows, _, P = self.static or (
            rows, 0, (capacity or self.context) if self._shared else 0)
        # The tokens that the cache holds, by row; None is padding.
        self._seen = [list[Any]() for _ in range(rows)]
        shape = [rows, self.info["kv_heads"], P, self.info["head_dim"]]
        if shape == self._shape and not self._moving:
            return                           # attention reads only what is written after this
        self._shape, self._past = shape, dict[str, Any]()
        for name in self._caches:
            conv, moves = name.startswith("conv"), name in self._moving
            value = self._past[name] = ort.OrtValue.ortvalue_from_shape_and_type(
                [rows, *self._inputs[f"past_{name}"].shape[1:]] if conv else shape,
                CACHE_TYPES[self.info["cache_type"]], "cpu" if moves else self._device)
            if moves and (conv or P):                            # old memory: 0 * nan is nan
                ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
        self._io = io = self._session.io_binding()
        for name, value in self._adapter.items():
            io.bind_ortvalue_input(name, value)
        io.bind_output("logits")                                 # output 0, as step expects
        for name, value in self._past.items():
            if name not in self._moving:
                io.bind_ortvalue_input(f"past_key_values.{name}", value)
                io.bind_ortvalue_output(f"present.{name}", value)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens of the one prompt in the cache, and forget the others."""
        del self._seen[0][length:]

    def step(self, rows: Sequence[Row]) -> ort.OrtValue:
        """Read T more tokens of each prompt in the cache, (B, T), and return the graph's logits.

        None pads shorter rows: on the left; for target ort on the right, and only in the first step
        after `reset`. A static graph fixes B and T.
        """
        if self._npu:
            logits = self._npu.step(rows[0], len(self._seen[0]), self._past)
            self._seen[0] += [t for t in rows[0] if t is not None]
            return logits
        B, io = len(rows), self._io
        positions, masks, zero, one = array("q"), array("q"), array("q", [0]), array("q", [1])
        for seen, row in zip(self._seen, rows):
            at = len(seen) - seen.count(None) - 1
            positions.extend(max(0, at := at + (token is not None)) for token in row)
            seen += [t for t in row if t is not None] if self._shared else row
        S = sum(self.static[1:]) if self.static else max(map(len, self._seen))
        for seen in self._seen:
            if self._shared:
                masks += one * len(seen) + zero * (S - len(seen))
            else:
                masks += zero * (S - len(seen)) + array("q", [t is not None for t in seen[-S:]])
        inputs = {"input_ids": array("q", [t or 0 for row in rows for t in row]),
                  "attention_mask": masks}
        if "position_ids" in self._inputs:
            inputs["position_ids"] = positions
        for name, values in inputs.items():
            io.bind_input(name, "cpu", 0, INT64, [B, len(values) // B], values.buffer_info()[0])
        io.bind_output("logits")
        for name in self._moving:
            past, new = ("past_", "present_") if name.startswith("conv") else (
                "past_key_values.", "present.")
            io.bind_ortvalue_input(past + name, self._past[name])
            io.bind_output(new + name, self._device)
        self._session.run_with_iobinding(io)
        if self._pages and not self._pages.ident:     # not earlier: the first token would wait
            self._pages.start()
        outputs = io.get_outputs_as_ortvaluevector()             # in the order of binding
        for i, name in enumerate(self._moving, start=len(outputs) - len(self._moving)):
            self._past[name] = ort.OrtValue(outputs[i])
        return ort.OrtValue(outputs[0])

    def _pad(self, rows: Sequence[Row]) -> list[Row]:
        """Pad rows to one length; for a static graph to a multiple of its T, and to B rows."""
        B, T, _ = self.static or (len(rows), 1, 0)
        if self._npu and len(rows[0]) == 1:
            T = 1                            # its second graph
        longest = -(-max(map(len, rows)) // T) * T
        gaps = [[None] * (longest - len(row)) for row in rows]
        rows = [[*row, *gap] if self._shared else [*gap, *row] for row, gap in zip(rows, gaps)]
        return rows + rows[-1:] * (B - len(rows))
