"""The graphs of an NPU folder, on a CPU or on Qualcomm's HTP, and the cache that they append to.

On x86-64 the HTP is emulated: the results are a device's, the speed is not. There, and while a
folder holds no context binary, a graph is compiled when it is opened.

Letters: T new tokens, P slots of the cache, K key/value heads, C head size, D hidden, V vocabulary.
"""

import ctypes
import os
import platform
import re
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..io.text import clean
from .folder import INT64
from .session import CPU, open_session

QNN = "QNNExecutionProvider"
EMULATED = platform.machine().lower() in ("x86_64", "amd64")
SOC = 60                                     # Snapdragon X Elite, unless a folder says another one
# The CPU unpacks these weights once. Else it would fuse nodes, round activations to 8 bits, and
# unpack 8-bit weights for every token.
EXACT = (("session.disable_quant_qdq", "1"),)
HALF = 2                                     # bytes of a float16


def htp() -> tuple[str, list[Any]]:
    """QNN's library for the HTP, and its devices. Raises ImportError if onnxruntime-qnn is missing,
    and ValueError if there is no device."""
    try:
        import onnxruntime_qnn
    except ImportError:
        raise ImportError("QNN needs onnxruntime-qnn (Python 3.11 and glibc 2.35 or later): "
                          "pip install 'minismoe[npu]'") from None
    if QNN not in (device.ep_name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(QNN, onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == QNN and (
        EMULATED or d.device.type == ort.OrtHardwareDeviceType.NPU)]
    if not devices:
        raise ValueError("QNN finds no NPU here: leave out --provider or --compile")
    return onnxruntime_qnn.get_qnn_htp_path(), devices


def qnn_session(file: Path, soc: int, entries: Sequence[tuple[str, str]] = (),
                ) -> ort.InferenceSession:
    """Compile or load a graph for QNN's HTP, all of it: nothing falls back to the CPU.

    soc: the chip, by Qualcomm's number. Raises ValueError with the nodes that QNN refuses.
    """
    backend, devices = htp()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, text in ("session.disable_cpu_ep_fallback", "1"), *entries:
        options.add_session_config_entry(key, text)
    options.add_provider_for_devices(devices, {
        "backend_path": backend, **({"soc_model": str(soc)} if EMULATED else {})})
    said: list[str] = []
    try:
        with _captured(said):
            session = ort.InferenceSession(str(file), options)
    except Exception as e:                   # onnxruntime raises bare Exceptions
        refused = dict.fromkeys(re.findall(r"name: (.*?), type: (\w+)", "".join(said)))
        nodes = ", ".join(f"{kind} of {name or 'a node without a name'}" for name, kind in refused)
        reason = f"it refuses {nodes}" if nodes else str(e).splitlines()[0]
        hint = ("; if this is another chip, export again with --compile and its number"
                if file.name.endswith(".qnn.onnx") else "")
        raise ValueError(f"QNN cannot open {file} for the chip {soc}: {clean(reason)}{hint}"
                         ) from None
    session.disable_fallback()               # else a failure would print, and run on the CPU
    return session


@contextmanager
def _captured(said: list[str]) -> Iterator[None]:
    """Add what native code writes to standard output and error to `said`, instead of showing it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number, before in enumerate(kept, start=1):
                os.dup2(before, number)
                os.close(before)
            file.seek(0)
            said.append(file.read().decode("utf-8", "replace"))


class NpuSteps:
    """Steps of T tokens and of one, whose keys and values are appended to one cache of P slots."""

    def __init__(self, folder: Path, info: Mapping[str, Any], provider: str | None,
                 threads: int | None):
        self.info = info
        name = (provider or "cpu").lower().replace("executionprovider", "")
        if not (found := re.fullmatch(r"cpu|qnn(?::(\d+))?", name)):
            raise ValueError(f"a folder of target npu runs on cpu, qnn or qnn:SOC, not {provider}")
        kind, made_for, asked = name[:3], info.get("soc"), int(found[1] or 0)
        if made_for and asked and asked != made_for:
            raise ValueError(f"{folder} was compiled for the chip {made_for}, not {asked}: export "
                             f"again with --compile qnn:{asked}")
        if kind == "qnn" and EMULATED:
            print("the HTP is emulated here: its answers are a device's, its speed is not",
                  file=sys.stderr)

        end, soc = ".qnn.onnx" if made_for else ".onnx", made_for or asked or SOC
        self.embed = open_session(folder / "embed.onnx", CPU, threads, EXACT)
        self.one, self.several = (
            qnn_session(folder / f"{name}{end}", soc) if kind == "qnn"
            else open_session(folder / f"{name}.onnx", CPU, threads, EXACT)
            for name in ("model", "prompt"))

    def step(self, tokens: Sequence[int | None], seen: int, cache: Mapping[str, Any]) -> Any:
        """Logits (1, 1, V) after T tokens, None on the left for padding, that follow `seen` others.

        cache: {input of the graph: keys or values (1, K, P, C)}; the new ones are appended to them.
        """
        T, new, P = len(tokens), sum(t is not None for t in tokens), self.info["static"][2]
        session = self.one if T == 1 else self.several
        look, run = self.embed.io_binding(), session.io_binding()
        ids = array("q", [t or 0 for t in tokens])
        mask = array("q", [1] * seen + [0] * (P + T - seen - new) + [1] * new)
        positions = array("q", [max(0, seen + new - T + n) for n in range(T)])
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
            self._append(value, present, seen, new)
        return logits

    def _append(self, cache: Any, present: Any, seen: int, new: int) -> None:
        """Copy the last `new` of (1, K, T, C) to slot `seen` of (1, K, P, C), head by head."""
        (_, K, T, C), P = present.shape(), cache.shape()[2]
        if cache.shape() != [1, K, P, C] or not new <= T <= self.info["static"][1] or (
                seen + new > P or present.data_type() != "tensor(float16)"):
            raise ValueError("prompt.onnx or model.onnx is not what export.json says: export again")
        for head in range(K):
            ctypes.memmove(cache.data_ptr() + HALF * C * (head * P + seen),
                           present.data_ptr() + HALF * C * (head * T + T - new), HALF * C * new)
