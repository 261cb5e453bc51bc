"""A server of an exported folder on starlette and uvicorn: OpenAI's protocol (api.py), and the page
of layout web. worker.py says how a request gets its answer.

It answers programs and pages of this machine, and those of other sites that are named. If there is
a key, it answers whoever has it.
"""

import asyncio
import json
import mimetypes
import os
import queue
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from errno import EACCES, EADDRINUSE
from hmac import compare_digest
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise ModuleNotFoundError(
        "--serve needs starlette and uvicorn: pip install 'minismoe[serve]'") from None

from ..io.text import clean, error_line, print_error
from .api import CHAT, Api, RequestError
from .worker import WAITING, Gone, Job, Worker

HOST = "127.0.0.1"
LARGEST = 4 << 20                            # bytes of a request
CLIENTS = 64                                 # connections at once
PATIENCE = 10            # seconds that a request may take to come, and a connection be silent
HEADERS = [                  # the first two let a page share memory, which threads need
    ("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Embedder-Policy", "require-corp"),
    ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-cache")]
for end, kind in (("js", "javascript"), ("mjs", "javascript")):
    mimetypes.add_type(f"text/{kind}", f".{end}")        # some systems have other types


class _Impatient(H11Protocol):
    """A connection, which is closed if no whole request comes within PATIENCE seconds."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self._give_up, self.cycle)

    def on_response_complete(self) -> None:
        self.loop.call_later(PATIENCE, self._give_up, self.cycle)
        super().on_response_complete()

    def _give_up(self, last: Any) -> None:
        if self.cycle is last:               # no request has come since that one
            self.transport.close()


async def _note_leaving(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.is_gone, job.body = True, b""


async def _events(part: Any, job: Job) -> AsyncIterator[str]:
    """The parts of an answer, of which one is here already, as server-sent events."""
    while isinstance(part, dict):
        yield f"data: {json.dumps(part)}\n\n"
        part = await job.parts.get()
    end = "[DONE]" if part is None else bytes(_refusal(None, part).body).decode()
    yield f"data: {end}\n\n"


async def _body(request: Request) -> bytes:
    """The body of a request; RequestError if it is too long or too slow, or no JSON by its type."""
    # A page of another site may post text, but not this type.
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
        raise RequestError("the request's Content-Type is not application/json", 415)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                size += len(part)            # all is read: a client sends it before it listens
                body += part if size <= LARGEST else b""
    except TimeoutError:
        raise RequestError("the request does not end", 408) from None
    if size > LARGEST:
        raise RequestError(f"the request has {size} bytes: at most {LARGEST} are read", 413)
    return bytes(body)


def _refusal(request: Any, e: Exception) -> Response:
    """The answer that says why there is none; what no request is to blame for goes to the log."""
    if isinstance(e, ClientDisconnect | Gone):           # only a slow reader sees it
        e = RequestError("the answer was not read as it came", 499)
    elif isinstance(e, HTTPException):
        e = RequestError(f"there is no {request.method} {request.url.path}", e.status_code)
    elif not isinstance(e, RequestError):
        print_error(e, "--debug" in sys.argv, f" ({type(e).__name__})")
        e = RequestError("out of memory: export again, with a smaller --context" if (
            isinstance(e, MemoryError)) else error_line(e), 500)
    # Whoever does not end a request must not go on with it.
    return JSONResponse(e.body, e.status, {"Connection": "close"} if e.status == 408 else None)


def _refused(headers: Headers, key: str | None, origins: Sequence[str]) -> RequestError | None:
    """Why a request is not read: it lacks the key or, if there is none, comes from another site."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if key:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not compare_digest(
                given.encode("latin-1"), key.encode()):
            return RequestError("the API key is missing or wrong", 401, "invalid_api_key")
    # Another site may have its name lead to 127.0.0.1, but the browser still sends that name.
    elif host.partition(":")[0].lower() not in (HOST, "localhost"):
        return RequestError("the request is for another host", 403)
    elif not {origin, "*"} & {None, f"http://{host}", *origins}:
        return RequestError(f"the request comes from another site: --cors {origin} allows it", 403)
    return None


class _Page(StaticFiles):
    """The files of a folder, without hidden ones."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        hidden = any(part.startswith(".") for part in Path(path).parts)
        return ("", None) if hidden else super().lookup_path(path)


def make_server(api: Api, key: str | None = None, origins: Sequence[str] = (), quiet: bool = True,
                ) -> uvicorn.Server:
    """The server, which `run` starts. With a key, pages of any site may ask, and there is no page
    of the folder, for which no browser sends a key. origins: sites, such as https://example.com,
    whose pages may ask without one; quiet: log no requests."""
    worker = Worker(api, quiet)

    @asynccontextmanager
    async def working(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    async def models(request: Request) -> Response:
        return JSONResponse(api.models(request.path_params.get("name", "")))

    async def complete(request: Request) -> Response:
        job = Job(request.url.path, await _body(request))
        try:
            worker.put(job)
        except queue.Full:
            raise RequestError(f"{WAITING} requests wait already: ask again later", 503) from None
        job.watch = asyncio.create_task(_note_leaving(request, job))
        first = await job.parts.get()        # before anything is sent, as it may be an error
        if isinstance(first, Exception):
            return _refusal(request, first)
        return StreamingResponse(_events(first, job), media_type="text/event-stream") if (
            job.call and job.call.stream) else JSONResponse(first)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        refused = scope["type"] == "http" and _refused(Headers(scope=scope), key, origins)
        await (_refusal(None, refused) if refused else app)(scope, receive, send)

    routes: list[Any] = [Route("/v1/models", models), Route("/v1/models/{name:path}", models),
                         Route(CHAT, complete, methods=["POST"])]
    if api.has_page and not key:
        routes.append(Mount("/", _Page(directory=api.folder, html=True)))
    app = Starlette(routes=routes, lifespan=working, exception_handlers=dict.fromkeys(
        (HTTPException, RequestError, ClientDisconnect), _refusal))
    return uvicorn.Server(uvicorn.Config(
        CORSMiddleware(guarded, ["*"] if key else origins, ["GET", "POST"], ["*"],
                       allow_private_network=True),
        http=_Impatient, ws="none", log_config=None, log_level="critical", access_log=False,
        server_header=False, headers=HEADERS, limit_concurrency=CLIENTS,
        timeout_keep_alive=PATIENCE, timeout_graceful_shutdown=1))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at a port of this machine; 0 is any that is free."""
    listening = socket.create_server((host, port), backlog=2 * CLIENTS)
    # Else the second packet of an answer waits until the client acknowledges the first: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve(api: Api, ports: Sequence[int], host: str | None = None, key: str | None = None,
          origins: Sequence[str] = (), quiet: bool = False) -> None:
    """Serve the generator and its folder's page until Ctrl-C, at the first of the ports that is
    free; 0 is any. Raises OSError if all are taken, or for a host of another machine."""
    for number in ports:
        try:
            listening = listen(host or HOST, number)
            break
        except (OSError, OverflowError) as e:
            if number == ports[-1] or getattr(e, "errno", None) not in (EADDRINUSE, EACCES):
                raise OSError(f"port {number} of {host or HOST} cannot be opened: {e}; give "
                              "--serve another port, or --host an address of this machine"
                              ) from None
    with listening:
        address = f"http://{host or HOST}:{listening.getsockname()[1]}/"
        page = f"{address} shows a page, and " if api.has_page and not key else ""
        print(f"{page}{address}v1 answers as OpenAI's API from {clean(api.folder)}; "
              "Ctrl-C ends it", flush=True)
        make_server(api, key, origins, quiet).run([listening])
