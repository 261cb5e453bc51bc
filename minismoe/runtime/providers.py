"""onnxruntime's execution providers: its own, and plugins, which are packages; and its sessions."""

import json
import os
import platform
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime as ort

from ..io.files import naming
from ..io.process import processors
from ..io.text import clean, clip

CPU = "CPUExecutionProvider"
PLUGINS = {                 # module, the package that brings it, onnxruntime's name of its provider
    "cuda": ("onnxruntime_ep_cuda", "onnxruntime-gpu", "CUDAExecutionProvider"),
    "webgpu": ("onnxruntime_ep_webgpu", "onnxruntime-ep-webgpu", "WebGpuExecutionProvider"),
    "openvino": ("onnxruntime_ep_openvino", "onnxruntime-ep-openvino", "OpenVINOExecutionProvider"),
    "qnn": ("onnxruntime_qnn", "onnxruntime-qnn", "QNNExecutionProvider")}
# What onnxruntime itself has; later, it would list plugins that are loaded as well.
OWN = {ep.lower().removesuffix("executionprovider"): ep for ep in ort.get_available_providers()}
KINDS = ("GPU", "NPU", "CPU")                # of devices, the preferred ones first
MEMORY = {"cuda": "cuda", "webgpu": "webgpu"}            # of a cache; others: "cpu"
OPTIONS = {"openvino": {"load_config": json.dumps(                   # else it rounds as it likes
    dict.fromkeys(KINDS, {"EXECUTION_MODE_HINT": "ACCURACY"}))}}
# On x86-64, qnn emulates an NPU: the results are a device's, the speed is not.
EMULATED = platform.machine().lower() in ("x86_64", "amd64")
SOC = 60                                     # Snapdragon X Elite, unless a folder says another one
load_library = cache(ort.register_execution_provider_library)        # twice is an error
capturing = threading.Lock()                 # one thread: it redirects the whole process's output


class Device(NamedTuple):
    """One device of a provider."""

    name: str = "cpu"                        # of the provider, as find_device takes it
    ep: str = CPU                            # the same as onnxruntime calls it
    plugin: Any = None                       # its OrtEpDevice; None where onnxruntime lists none
    memory: tuple[str, int] = ("cpu", 0)     # where a cache stays: kind and number
    options: Mapping[str, str] = {}          # of the provider


def find_device(wanted: str | None, chip: int = SOC) -> Device:
    """The device that NAME[:KIND][:NUMBER] means, as webgpu:1 or openvino:GPU; None: the CPU.

    qnn's number is that of a chip, or else `chip`. Raises ImportError if onnxruntime is too old to
    share memory, or a package is missing; ValueError for a name or a device that is not here.
    """
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 30):              # it would crash
        raise ImportError(f"onnxruntime {ort.__version__} is too old: install 1.30 or later, which "
                          "needs Python 3.11 or later")
    parts = re.fullmatch(r"([a-z]+?)(?:executionprovider)?(?::([a-z]+))?(?::(\d+))?",
                         (wanted or "cpu").lower())
    name, kind, number = parts.groups("") if parts else (wanted or "", "", "")
    plugins = {name for name, (module, *_) in PLUGINS.items() if find_spec(module)}
    if name not in OWN.keys() | PLUGINS:
        raise ValueError(f"no provider {name}; here are {', '.join(sorted({*OWN, *plugins}))}; pip "
                         "install onnxruntime-gpu or 'minismoe[accelerators]' brings more")
    module, package, ep = PLUGINS.get(name, ("", "onnxruntime", OWN.get(name, "")))
    where, options, index = MEMORY.get(name, "cpu"), OPTIONS.get(name, {}), int(number or 0)
    if name in plugins or name not in OWN:
        plugin = _load(module, package, ep)
        if name == "qnn":
            chosen = {"soc_model": number or str(chip)} if EMULATED else {}
            options = {"backend_path": plugin.get_qnn_htp_path()} | chosen
            kind, index = kind or ("" if EMULATED else "npu"), 0
    elif not kind and (where == "cuda" or not number):      # onnxruntime lists few of its own
        return Device(name, OWN[name], None, (where, index), {"device_id": number} if index else {})
    listed = [d for d in ort.get_ep_devices() if d.ep_name == ep]
    devices = sorted((d for d in listed if kind.upper() in ("", d.device.type.name)),
                   key=lambda d: KINDS.index(d.device.type.name))
    if index >= len(devices):
        raise ValueError(f"there is no device {wanted}, or its driver is missing: {package} finds "
                         f"{', '.join(d.device.type.name for d in listed) or 'none'}")
    return Device(name, ep, devices[index], (where, 0 if name == "webgpu" else index), options)


def _load(module: str, package: str, ep: str) -> Any:
    """The module of a plugin's package, whose library onnxruntime has loaded."""
    try:
        plugin = import_module(module)
    except ImportError:
        raise ImportError(f"{ep} needs pip install {package}, and Python 3.11 or later") from None
    with captured(), naming(f"onnxruntime cannot load {package}", Exception):
        load_library(ep, plugin.get_library_path())
    return plugin


def open_session(file: Path, device: Device, threads: int | None,
                 entries: Sequence[tuple[str, str]] = ()) -> ort.InferenceSession:
    """Open a graph on a device. Nodes that its provider does not take run on the CPU, but on qnn.

    threads: default, the physical cores; entries: settings of the session. Raises ValueError if the
    provider cannot open the graph, or takes none of its nodes.
    """
    options, written = ort.SessionOptions(), list[str]()
    cores, allowed = os.cpu_count() or 1, processors()
    default = allowed if allowed < cores else 0              # 0: all physical cores
    # 100,000 threads hang.
    options.intra_op_num_threads = min(default if threads is None else threads, 8 * cores)
    options.log_severity_level = 3           # errors only
    for key, text in (*entries, ("session.record_ep_graph_assignment_info", "1"),
                      ("session.disable_cpu_ep_fallback", str(int(device.name == "qnn")))):
        options.add_session_config_entry(key, text)
    if device.plugin:
        options.add_provider_for_devices([device.plugin], device.options)
    providers: Any = None if device.plugin else [(device.ep, dict(device.options))]
    if device.name == "cuda":
        ort.preload_dlls()                   # those of pip's packages
    try:
        with captured() if device.ep != CPU else nullcontext(written) as written:
            # Without enable_fallback=0, a failure would print, and the CPU run the graph.
            session = ort.InferenceSession(str(file), options, providers, enable_fallback=0)
    except Exception as e:                   # onnxruntime raises bare Exceptions
        reason = clean(str(e).strip().split("\n")[-1])       # the last line says it shortest
        # What qnn raises names no operator, but the first error that it writes does.
        if errors := [line for line in written if device.name == "qnn" and "[E:" in line]:
            reason = clip(clean(errors[0].partition("] ")[2].partition("\x1b")[0]), 200)
        hint = "" if device.ep == CPU else ("; if it refuses operators, export with another "
                                            "--precision or --target (for qnn: npu)")
        raise ValueError(f"onnxruntime cannot open {file} on {device.name}: {reason}{hint}"
                         ) from None
    if device.ep not in nodes_by_provider(session):
        raise ValueError(f"{device.name} takes no node of {file}: a library or the device is "
                         "missing")
    return session


def nodes_by_provider(session: ort.InferenceSession) -> dict[str, str]:
    """{onnxruntime's name of a provider: how many nodes run there, and of which operators}."""
    operators: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        operators.setdefault(part.ep_name, Counter()).update(n.op_type for n in part.get_nodes())
    return {ep: f"{ops.total()} nodes ({', '.join(f'{n} {op}' for op, n in ops.most_common())})"
            for ep, ops in operators.items()}


@contextmanager
def captured() -> Iterator[list[str]]:
    """Show nothing of what native code writes to standard output and error; at the end, the list
    has its lines."""
    lines = list[str]()
    with capturing, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kept = {number: os.dup(number) for number in (1, 2)}
        for number in kept:
            os.dup2(file.fileno(), number)
        try:
            yield lines
        finally:
            for number, before in kept.items():
                os.dup2(before, number)
                os.close(before)
            file.seek(0)
            lines += file
