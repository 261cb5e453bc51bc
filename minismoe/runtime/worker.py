"""The server's worker: the one thread that uses the generator, and the queue of its jobs.

    event loop    puts a Job into the queue, unless too many wait
    worker        takes job after job: reads the request, and gives the job the parts of its answer
    event loop    sends the parts as they come, or notes that the client is gone: the worker skips
                  such a job, or ends it before the generator's next step
"""

import asyncio
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from ..io.text import error_line
from .api import Api, Call, Json

WAITING = 32                                 # jobs in the queue
PATIENCE = 5                                 # seconds that `stop` waits for a step to end
UNREAD = 1000                                # parts of an answer that nobody has taken yet


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """A request, and the parts of its answer, behind which comes None or the error that ended it.

    An event loop makes it and takes the parts; the worker gives them.
    """

    def __init__(self, path: str, body: bytes):
        self.path, self.body, self.is_gone = path, body, False
        self.call: Call | None = None        # once the worker has read the request
        self.start = time.perf_counter()
        self.watch: asyncio.Task[None] | None = None         # sets is_gone; kept, or it would end
        self.loop, self.parts = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def give(self, part: Json | Exception | None) -> None:
        with suppress(RuntimeError):         # the loop has ended
            self.loop.call_soon_threadsafe(self.parts.put_nowait, part)


class Worker(threading.Thread):
    """Answers jobs, one after another, from `start` until `stop`. quiet: log none of them."""

    def __init__(self, api: Api, quiet: bool):
        super().__init__(daemon=True)
        self.api, self.quiet, self.jobs = api, quiet, queue.Queue[Job | None]()
        self.is_ending = False

    def put(self, job: Job) -> None:
        """Put a job into the queue; queue.Full if WAITING clients wait that have not left."""
        if sum(not (other is None or other.is_gone) for other in [*self.jobs.queue]) >= WAITING:
            raise queue.Full
        self.jobs.put(job)

    def run(self) -> None:
        while job := self.jobs.get():
            end: Exception | None = None
            try:
                self._answer(job)
            except Exception as e:           # onnxruntime raises bare Exceptions
                end = e
            job.give(end)
            if not self.quiet:
                self._log(job, end)

    def _answer(self, job: Job) -> None:
        """Give a job the parts of its answer. Raises Gone, and what `Api` raises."""
        def check() -> None:
            if self.is_ending or job.is_gone or job.parts.qsize() > UNREAD:
                raise Gone("the client is gone, or reads too slowly")

        check()
        job.call = self.api.read(job.body)
        for part in self.api.answer(job.call, check):
            job.give(part)

    def _log(self, job: Job, end: Exception | None) -> None:
        call, seconds = job.call, time.perf_counter() - job.start
        tokens = f"{call.usage['prompt_tokens']} tokens, {call.cached} of them cached, and " \
                 f"{call.written} written, " if call else ""
        print(f"{job.path}: {tokens}{seconds:.2f} s{f', {error_line(end)}' if end else ''}",
              file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the thread after the step that it computes, or leave it to the process's end."""
        self.is_ending = True
        self.jobs.put(None)
        self.join(PATIENCE)
