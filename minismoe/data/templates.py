"""A checkpoint's chat template, rendered in jinja2's sandbox inside a process of its own.

The sandbox denies a template files and code, but not time and memory: one call in C, such as
{{ 'a' * 10 ** 10 }}, can take all of both, and only a process can be killed during it. One process
serves all templates by JSON lines. It exits if one takes over SECONDS; the next call starts anew.
"""

import atexit
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECONDS = 1.0                # of CPU time for one rendering (of the clock, on Windows)
WAIT = 10.0                  # seconds of the clock: enough for a good template on a busy machine
MEMORY = 1 << 30             # bytes of the process's address space (on Linux)
LENGTH = 1 << 24             # characters of the rendered text
TODAY = datetime(2024, 7, 26)    # Llama 3's default; a real date would change prompts on --resume


# In this process

_lock = threading.RLock()
_process: Any = None                             # a subprocess.Popen, or None


class Refused(ValueError):
    """The template raised an exception for these values."""


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text of a template with `values`, which JSON must be able to hold.

    Raises Refused, ValueError if the template is broken or beyond a limit, and ModuleNotFoundError.
    """
    request = json.dumps([template, values]).encode() + b"\n"
    with _lock:
        process, reply = start(), b""
        try:
            with suppress(OSError):              # it has ended itself
                process.stdin.write(request)
                process.stdin.flush()
                reply = process.stdout.readline()
        finally:
            if not reply.endswith(b"\n"):        # or the next call would read this answer
                stop()
    if not reply.endswith(b"\n"):
        raise ValueError(f"the chat template takes more than {SECONDS} s or {MEMORY >> 20} MB")
    text, problem, refused = json.loads(reply)
    if problem:
        raise (Refused if refused else ValueError)(f"the chat template {problem}")
    return str(text)


def start() -> Any:
    """The running process, or a new one, which is ready about 0.1 s after its start."""
    global _process
    with _lock:
        if _process is None or _process.poll() is not None:
            if find_spec("jinja2") is None:
                raise ModuleNotFoundError("the chat template needs jinja2: pip install jinja2")
            # Same import path as here: no module of the working directory is imported by mistake.
            paths = os.pathsep.join(map(os.path.abspath, sys.path))
            _process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
                env={**os.environ, "PYTHONPATH": paths})
        return _process


def stop() -> None:
    """Kill the process, if it runs."""
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


def _forget() -> None:
    """After a fork, in the child: leave the process to the parent, which may be using it."""
    global _lock, _process
    _lock, _process = threading.RLock(), None


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# In the other process

def serve() -> None:
    """For each line [template, values], write a line [text, problem, whether it is a refusal]."""
    with suppress(ImportError):                      # _compiled says so
        import jinja2.sandbox  # noqa: F401 (before the clock runs)

    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C reaches the whole group
    with suppress(ImportError, OSError, ValueError):     # Windows, macOS: only time is limited
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counted = hasattr(signal, "setitimer")
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin.buffer:
            # A C thread and a signal end the process; neither waits for the Python interpreter.
            faulthandler.dump_traceback_later(WAIT if counted else SECONDS, exit=True, file=nowhere)
            if counted:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = json.dumps(_answer(*json.loads(line)))
            if counted:
                signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(reply.encode() + b"\n")
            sys.stdout.buffer.flush()


def _answer(template: str, values: Mapping[str, Any]) -> tuple[str, str, bool]:
    compiled, text = None, ""
    try:
        compiled = _compiled(template)
        for part in compiled.generate(values):
            text += part
            if len(text) > LENGTH:
                return "", f"gives more than {LENGTH >> 20} M characters", False
        return text, "", False
    except MemoryError:
        return "", f"takes more than {MEMORY >> 20} MB", False
    except Exception as e:                           # a template can raise anything
        said = " ".join(f"{type(e).__name__}: {e}"[:400].split())
        return "", f"{'fails' if compiled else 'is broken'}: {said}", compiled is not None


@lru_cache(8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks supervised text in some templates; its tags are ignored here."""
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # White space is trimmed as in transformers, for which templates are written.
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[
        Generation, "jinja2.ext.loopcontrols"])
    env.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return env.from_string(template)


if __name__ == "__main__":
    serve()
