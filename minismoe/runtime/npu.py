"""The graphs of an NPU folder, on a CPU or on Qualcomm's HTP, and the cache that they append to.

On x86-64 the HTP is emulated: the results are a device's, the speed is not. There, and while a
folder holds no context binary, a graph is compiled when it is opened.

Letters: T new tokens, P slots of the cache, K key/value heads, C head size, D hidden, V vocabulary.
"""

import ctypes
import sys
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cache import ONE, ZERO, GraphCache
from .folder import INT64
from .providers import EMULATED, SOC, Device, find_device, open_session

# The CPU unpacks these weights once. Else it would fuse nodes, round activations to 8 bits, and
# unpack 8-bit weights for every token.
EXACT = (("session.disable_quant_qdq", "1"),)
HALF = 2                                     # bytes of a float16


class NpuSteps:
    """Steps of T tokens and of one, whose keys and values are appended to one cache of P slots."""

    def __init__(self, folder: Path, info: Mapping[str, Any], provider: str | None,
                 threads: int | None):
        self.info, chip = info, info.get("soc")
        device = find_device(provider, chip or SOC)
        if chip and device.options.get("soc_model", str(chip)) != str(chip):
            raise ValueError(f"{folder} was compiled for the chip {chip}: export again with "
                             f"--provider {provider}")
        if device.name == "qnn" and EMULATED:
            print("the NPU is emulated here: its answers are a device's, its speed is not",
                  file=sys.stderr)
        end = ".qnn.onnx" if chip and device.name == "qnn" else ".onnx"
        self.embed, self.one, self.prompt = (
            open_session(folder / name, where, threads, EXACT if where.name == "cpu" else ())
            for name, where in (("embed.onnx", Device()), (f"model{end}", device),
                                (f"prompt{end}", device)))

    def step(self, tokens: Sequence[int], filled: int, cache: Mapping[str, Any]) -> Any:
        """Logits (1, 1, V) after one token, or up to T with padding before them, that follow
        `filled` others.

        cache: {input of the graph: keys or values (1, K, P, C)}; the new ones are appended to them.
        """
        new, (_, T, P) = len(tokens), self.info["static"]
        T, session = (1, self.one) if new == 1 else (T, self.prompt)
        look, run = self.embed.io_binding(), session.io_binding()
        padding = ZERO * (T - new)
        ids = padding + array("q", tokens)
        mask = ONE * filled + ZERO * (P - filled) + padding + ONE * new
        positions = padding + array("q", range(filled, filled + new))
        for io, name, values in ((look, "input_ids", ids), (run, "attention_mask", mask),
                                 (run, "position_ids", positions)):
            io.bind_input(name, "cpu", 0, INT64, [1, len(values)], values.buffer_info()[0])
        look.bind_output("hidden")
        self.embed.run_with_iobinding(look)
        run.bind_ortvalue_input("hidden", look.get_outputs()[0])
        run.bind_output("logits")
        for name, value in cache.items():
            run.bind_ortvalue_input(name, value)
            run.bind_output(name.replace("past_key_values", "present"))
        session.run_with_iobinding(run)
        logits, *presents = run.get_outputs()                    # in the order of binding
        for value, present in zip(cache.values(), presents):
            self._append(value, present, filled, new)
        return logits

    def _append(self, cache: Any, present: Any, filled: int, new: int) -> None:
        """Copy the last `new` of (1, K, T, C) to slot `filled` of (1, K, P, C), head by head."""
        (_, K, T, C), P = present.shape(), cache.shape()[2]
        if cache.shape() != [1, K, P, C] or not new <= T <= self.info["static"][1] or (
                filled + new > P or present.data_type() != "tensor(float16)"):
            raise ValueError("prompt.onnx or model.onnx is not what export.json says: export again")
        for head in range(K):
            ctypes.memmove(cache.data_ptr() + HALF * C * (head * P + filled),
                           present.data_ptr() + HALF * C * (head * T + T - new), HALF * C * new)


class SlotCache(GraphCache):
    """P slots, of which the graphs read only what the mask says; `steps` fills them."""

    def __init__(self, steps: NpuSteps, *others: Any):
        super().__init__(*others, P=steps.info["static"][2])
        self.steps = steps

    def cut(self, n: int) -> bool:
        del self.tokens[n:]
        return True

    def step(self, tokens: Sequence[int]) -> Any:
        logits = self.steps.step(tokens, len(self.tokens), self.past)
        self.tokens += tokens
        return logits
