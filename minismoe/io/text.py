"""Text for a terminal: cleaned of control characters, aligned as a table, errors in one line."""

import contextlib
import errno
import io
import os
import sys
import traceback
import unicodedata
from collections.abc import Sequence

LONGEST = 2000           # characters of an error's line, which may quote what a file holds
ADVICE = {
    errno.ENOSPC: "free some space or choose another folder; earlier files are unchanged",
    errno.EDQUOT: "your quota is used up: free some space or choose another folder",
    errno.EFBIG: "files may not be that large here (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose a place that you may read and write"),
    errno.EROFS: "choose a place that can be written",
}
MEMORY_ADVICE = ("in training, half the --batch-size or half the --max-length halves the "
                 "activations, --recompute saves half of them or more, and --base-bits 8 or 4 "
                 "shrinks the weights")


def clean(text: object, keep: str = "") -> str:
    """Text that is safe to print: control, bidi and other invisible characters become '\ufffd'.

    Spaces of any width, the joiners of Persian, Hindi and emoji, and characters of `keep` stay.
    """
    return "".join(c if c.isprintable() or c in "\u200c\u200d" + keep
                   or unicodedata.category(c) == "Zs" else "\ufffd" for c in str(text))


def clip(text: str, width: int) -> str:
    """A text of at most `width` characters."""
    return text if len(text) <= width else text[:width - 1] + "…"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text: the first column, of names, to the left, and numbers to the right."""
    columns: list[list[str]] = []
    for column in zip(header, *rows, strict=True):
        texts = [clean(cell) for cell in column]
        width = max(map(_width, texts))
        texts.insert(1, "-" * width)
        gaps = [" " * (width - _width(text)) for text in texts]
        columns.append([gap + text if columns else text + gap for text, gap in zip(texts, gaps)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character, none for an accent."""
    return sum(0 if unicodedata.combining(c) else
               2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def error_line(e: BaseException) -> str:
    """One line without control characters: what went wrong and, where known, what helps."""
    line = str(e) or type(e).__name__
    if out_of_memory(e):
        line = f"out of memory ({line.split('. ')[0][:150]}): {MEMORY_ADVICE}"
    elif isinstance(e, BrokenPipeError):
        line = "nobody reads the output any more: it was closed before the end"
    elif isinstance(e, OSError) and e.strerror:
        line = ": ".join(str(part) for part in (e.filename, e.strerror, ADVICE.get(e.errno or 0))
                         if part)
    line = clean(" ".join(line.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}… ({len(line):,} characters)"


def out_of_memory(e: BaseException) -> bool:
    """Whether memory ran out; many allocators raise a plain RuntimeError that says so."""
    return isinstance(e, MemoryError) or isinstance(e, RuntimeError) and any(
        sign in str(e) for sign in ("out of memory", "can't allocate memory", "alloc_cpu",
                                    "ALLOC_FAILED", "Invalid buffer size"))      # cuBLAS; MPS


def replace_unknown_characters() -> None:
    """Write, and read, "?" for a character that the encoding of a standard stream lacks."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_error(e: BaseException, debug: bool = False) -> None:
    """Print `error_line` on stderr, with `debug` after the traceback."""
    with contextlib.suppress(OSError):               # stderr may be closed as well
        if debug:
            print(clean("".join(traceback.format_exception(e)), "\n"), file=sys.stderr)
        print(f"error: {error_line(e)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:      # send the rest to nowhere, or Python complains about it as it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def duration(seconds: float) -> str:
    """A time in words, in the unit that suits it."""
    for unit, size in ("h", 3600), ("min", 60):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {unit}"
    return f"{seconds:.0f} s"
