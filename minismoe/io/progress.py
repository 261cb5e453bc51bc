"""Progress bars: redrawn in place at a terminal; in a file, a line every few seconds."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 10                             # between two lines in a file
print_above_bar = tqdm.write             # prints a line on standard output, above any bar


class _Lines:
    """Standard error; each state of a bar that tqdm writes to it becomes a line."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*arguments: Any, **settings: Any) -> Any:
    """A bar with the arguments of tqdm. Where standard error is no terminal, it prints a line every
    10 s and a last one at its end, and nothing if it ends sooner."""
    if not sys.stderr.isatty():
        settings |= {"file": _Lines(), "delay": SECONDS, "mininterval": SECONDS, "miniters": 1}
    return tqdm(*arguments, **settings)
