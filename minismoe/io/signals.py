"""Signals that end a process."""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
          if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked the process to end; the text says how far the process came."""

    def __init__(self, progress: str = "", number: int = signal.SIGINT):
        super().__init__(progress)
        self.number = number


def interrupt(number: int, frame: object = None) -> None:
    """A signal handler that raises Interrupted."""
    _hang_up(number)
    raise Interrupted(number=number)


def end_quietly() -> None:
    """Let Ctrl-C end the process in one line: loading modules may swallow a KeyboardInterrupt."""
    def end(number: int, frame: object) -> None:
        os.write(2, b"\ninterrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)


def _hang_up(number: int) -> None:
    """After SIGHUP send output to nowhere: the terminal is gone, and writing to it would raise."""
    if number == getattr(signal, "SIGHUP", None):
        for fd in (1, 2):
            with suppress(OSError):          # a stream that is closed
                if stat.S_ISCHR(os.fstat(fd).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP go to `handler` meanwhile, unless nohup has them ignored. Only the
    main thread may have it so; in another one they stay with the program's own handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in ENDING
              if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def waiting() -> Iterator[list[int]]:
    """Collect signals in a list, so that a training step can end first; says so after Ctrl-C.

    A second Ctrl-C raises Interrupted at once; other signals often come twice as a session ends.
    """
    came: list[int] = []

    def handler(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            interrupt(number)
        _hang_up(number)
        if number == signal.SIGINT:                      # print() may be what it interrupts
            os.write(2, b"\nending after this step; Ctrl-C again ends at once\n")
        came.append(number)

    with handling(handler):
        yield came
