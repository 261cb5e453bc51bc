"""A checkpoint's chat template, rendered in jinja2's sandbox and in a process of its own.

The sandbox keeps a template away from files, code and the objects that it is given, but not from
taking all time and memory, which one call in C can do: {{ 'a' * 10 ** 10 }}, [[x, x], [x, x]]
doubled and compared. A process can be ended in the midst of that. One serves all templates: JSON
lines go in and out, it ends itself after SECONDS, and the next rendering starts another.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECONDS = 1.0                # of its processor, where the system counts them, for one rendering
WAIT = 10.0                  # of the clock: a good template has that long on a busy machine
MEMORY = 1 << 30             # bytes of the process's address space, where the system keeps to that
LENGTH = 1 << 24             # characters of what is rendered


# In this process

_lock = threading.RLock()
_process: subprocess.Popen[bytes] | None = None


class Refused(ValueError):
    """The template raised an exception: these are no values for it."""


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text of a template; `values` are what JSON can hold.

    Raises Refused, ValueError for a template that is broken or goes beyond SECONDS, MEMORY or
    LENGTH, and ModuleNotFoundError where jinja2 is missing.
    """
    request = json.dumps([template, values]).encode() + b"\n"
    with _lock:
        process = start()
        try:
            process.stdin.write(request)             # type: ignore[union-attr]
            process.stdin.flush()                    # type: ignore[union-attr]
            reply = process.stdout.readline()        # type: ignore[union-attr]
        except OSError:
            reply = b""
        except BaseException:        # Ctrl-C: what comes now would be taken for the next one's
            stop()
            raise
        if not reply.endswith(b"\n"):
            stop()
            raise ValueError(f"the chat template takes more than {SECONDS} s or {MEMORY >> 20} MB")
    text, broken, refused = json.loads(reply)
    if broken:
        raise ValueError(f"the chat template {broken}")
    if refused:
        raise Refused(f"the chat template fails: {refused}")
    return str(text)


def start() -> subprocess.Popen[bytes]:
    """The process, which is ready some 0.1 s after its start; the one that runs already, if any."""
    global _process
    with _lock:
        if _process is None or _process.poll() is not None:
            if find_spec("jinja2") is None:
                raise ModuleNotFoundError("the chat template needs jinja2: pip install jinja2")
            # It imports what we would, and nothing from a working directory that we would not.
            paths = os.pathsep.join(map(os.path.abspath, sys.path))
            _process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
                env={**os.environ, "PYTHONPATH": paths})
        return _process


def stop() -> None:
    """End the process, if there is one."""
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


def _forget() -> None:
    """In a forked child: the process is the parent's, and may be answering it just now."""
    global _lock, _process
    _lock, _process = threading.RLock(), None


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# In the other process

def serve() -> None:
    """Answer each line, [template, values], by one: [text, what is broken, what it refuses]."""
    import jinja2.sandbox  # noqa: F401 (now, and not while a clock runs)

    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C reaches the whole group
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):       # Windows, macOS: time alone is limited
        pass
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin.buffer:
            # A thread of C, and a signal that ends the process: nothing in Python holds them up.
            counted = hasattr(signal, "setitimer")
            faulthandler.dump_traceback_later(WAIT if counted else SECONDS, exit=True, file=nowhere)
            if counted:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = json.dumps(_answer(*json.loads(line)))
            if counted:
                signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(reply.encode() + b"\n")
            sys.stdout.buffer.flush()


def _answer(template: str, values: Mapping[str, Any]) -> tuple[str, str, str]:
    compiled = None
    try:
        compiled = _compiled(template)
        parts, length = [], 0
        for part in compiled.generate(values):
            parts.append(part)
            length += len(part)
            if length > LENGTH:
                return "", f"gives more than {LENGTH >> 20} M characters", ""
        return "".join(parts), "", ""
    except MemoryError:
        return "", f"takes more than {MEMORY >> 20} MB", ""
    except Exception as e:                           # a template can raise anything
        said = " ".join(f"{type(e).__name__}: {e}"[:400].split())
        return ("", f"is broken: {said}", "") if compiled is None else ("", "", said)


@lru_cache(8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what is supervised in some templates; here it is plain text."""
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # Trimming as in transformers, for which templates are written.
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[
        Generation, "jinja2.ext.loopcontrols"])
    env.globals.update(raise_exception=raise_exception,
                       strftime_now=lambda form: datetime.now().strftime(form))
    env.filters["tojson"] = tojson
    return env.from_string(template)


if __name__ == "__main__":
    serve()
