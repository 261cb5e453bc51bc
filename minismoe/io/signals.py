"""Ctrl-C and SIGTERM, which end a process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked the process to end; the text says how far the process came."""

    def __init__(self, progress: str = "", number: int = signal.SIGINT):
        super().__init__(progress)
        self.number = number


def interrupt(number: int, frame: object = None) -> None:
    """A signal handler that raises Interrupted."""
    raise Interrupted(number=number)


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to `handler` meanwhile. Only the main thread may have it so; in another
    one they stay with the program's own handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def waiting() -> Iterator[list[int]]:
    """Collect signals in a list, so that a training step can end first; says so after Ctrl-C.

    A second Ctrl-C raises Interrupted at once; SIGTERM often comes twice as a session ends.
    """
    came: list[int] = []

    def handler(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            interrupt(number)
        if number == signal.SIGINT:                      # print() may be what it interrupts
            os.write(2, b"\nending after this step; Ctrl-C again ends at once\n")
        came.append(number)

    with handling(handler):
        yield came
