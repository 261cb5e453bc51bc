"""Sessions of onnxruntime: the providers that are here, and graphs that it opens."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

CPU = "CPUExecutionProvider"


def enough_onnxruntime() -> None:
    """Raise ImportError if onnxruntime is too old to share memory: it would crash."""
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 30):
        raise ImportError(f"onnxruntime {ort.__version__} is too old: install 1.30 or later, which "
                          "needs Python 3.11 or later")


def execution_provider(name: str | None) -> str:
    """onnxruntime's name of a provider, as "cuda" (None: the CPU); ValueError if it is not here."""
    present = {p.lower(): p for p in ort.get_available_providers()}
    wanted = (name or "cpu").lower().removesuffix("executionprovider") + "executionprovider"
    if wanted.startswith("qnn"):
        raise ValueError("the provider qnn needs a folder of export.py --target npu")
    if wanted not in present:
        raise ValueError(f"onnxruntime has no provider {name!r} here; present: "
                         f"{', '.join(present.values())}")
    return present[wanted]


def open_session(file: Path, provider: str, threads: int | None,
                 entries: Sequence[tuple[str, str]] = ()) -> ort.InferenceSession:
    """Open a graph. threads: default, the physical cores; entries: settings of the session."""
    options = ort.SessionOptions()
    if threads is None:                      # 0: physical cores; a number if we may use fewer
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        threads = allowed if allowed < (os.cpu_count() or 1) else 0
    options.intra_op_num_threads = min(threads, 8 * (os.cpu_count() or 1))     # 100,000 hang
    options.log_severity_level = 3           # errors only
    for key, text in entries:
        options.add_session_config_entry(key, text)
    providers = list(dict.fromkeys((provider, CPU)))
    if provider == "CUDAExecutionProvider":
        ort.preload_dlls()                   # those of pip's packages
    session = opened(lambda name: ort.InferenceSession(name, options, providers=providers), file)
    if provider not in session.get_providers():          # it falls back to the CPU in silence
        raise ValueError(f"onnxruntime cannot start {provider}: a library or the device is missing")
    return session


def opened(read: Callable[[str], Any], file: Path) -> Any:
    """read(file), by onnxruntime; ValueError if it cannot."""
    try:
        return read(str(file))
    except Exception as e:                   # onnxruntime raises bare Exceptions
        raise ValueError(f"onnxruntime cannot open {file}: {str(e).splitlines()[0]}") from None
