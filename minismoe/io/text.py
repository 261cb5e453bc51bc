"""How a script fails: in one line that says what, where and what helps, fit for a terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Sequence

NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d*)?(e[-+]?\d+)?( ?[%A-Za-z]{1,3})?|nan|[-–—]?|n/a")


LENGTH = 2000                # of a line, in characters: what files hold may be quoted in it
HELP = {
    errno.ENOSPC: "free some space or choose another folder; what was there before is unchanged",
    errno.EDQUOT: "your quota is used up: free some space or choose another folder",
    errno.EFBIG: "files may not be that large here (ulimit -f)",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written",
}
MEMORY = ("out of memory ({}): --dtype bfloat16 halves the weights; in training, half the "
          "--micro-batch-size or half the --max-length halve what a step adds to them, and "
          "--recompute takes half or more off that")


def line(e: BaseException) -> str:
    """One line, without control characters, that says what a person can do."""
    said = str(e) or type(e).__name__
    if out_of_memory(e):
        said = MEMORY.format(said.split(". ")[0][:150])
    elif isinstance(e, BrokenPipeError):
        said = "nobody reads the output any more: it was closed before the end"
    elif isinstance(e, OSError) and e.strerror:
        said = f"{e.filename}: {e.strerror}" if e.filename else e.strerror
        said += f": {HELP[e.errno]}" if e.errno in HELP else ""
    said = clean(" ".join(said.split()))
    return said if len(said) <= LENGTH else f"{said[:LENGTH]}… ({len(said):,} characters)"


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception says so; the allocators of CPU and MPS raise a plain RuntimeError."""
    return isinstance(e, MemoryError) or isinstance(e, RuntimeError) and any(
        sign in str(e) for sign in ("out of memory", "can't allocate memory", "alloc_cpu"))


def say(e: BaseException, debug: bool = False, who: str = "") -> None:
    """Print one line on stderr, after a traceback with `debug`; `who` failed."""
    with contextlib.suppress(OSError):               # stderr may be closed as well
        if debug:
            print(clean("".join(traceback.format_exception(e)), "\n"), file=sys.stderr)
        print(f"error{who}: {line(e)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:      # what Python would complain of on its way out goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clean(text: object, keep: str = "") -> str:
    """Text that is safe to print: control, bidi and other invisible characters become '\ufffd',
    but for spaces of any width and the joiners of Persian, Hindi and emoji."""
    keep += "\u200c\u200d"
    return "".join(c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs"
                   else "\ufffd" for c in str(text))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text; a column of numbers goes right ('', '-', 'n/a' may be among them)."""
    columns = [[clean(cell) for cell in column] for column in zip(header, *rows, strict=True)]
    for i, (name, *cells) in enumerate(columns):
        width = max(map(_width, columns[i]))
        right = all(NUMBER.fullmatch(cell) for cell in cells)
        lines = (name, "-" * width, *cells)
        gaps = [" " * (width - _width(line)) for line in lines]
        columns[i] = [gap + line if right else line + gap for line, gap in zip(lines, gaps)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _width(text: str) -> int:
    """Places that a text takes on a terminal: two for a wide character, none for an accent."""
    return sum(0 if unicodedata.combining(c) else
               2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
