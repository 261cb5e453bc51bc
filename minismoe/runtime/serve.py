"""A server of an exported folder on starlette and uvicorn: OpenAI's protocol (api.py), and the page
of layout web.

It answers programs and pages of this machine, and those of other sites that are named. If there is
a key, it answers whoever has it.
"""

import asyncio
import json
import mimetypes
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, closing
from errno import EACCES, EADDRINUSE
from hmac import compare_digest
from typing import Any

try:
    import anyio.from_thread
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
    from starlette.datastructures import Headers, MutableHeaders
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
from .api import CHAT, TEXT, Api, Call, Json, RequestError

HOST = "127.0.0.1"
LARGEST = 4 << 20                            # bytes of a request
CLIENTS = 64                                 # connections at once
PATIENCE = 10                                # seconds that a client may neither send nor take bytes
HEADERS = {                  # the first two let a page share memory, which threads need
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
for end, kind in (("js", "javascript"), ("mjs", "javascript")):
    mimetypes.add_type(f"text/{kind}", f".{end}")        # some systems have other types


class _Guard:
    """What each request passes: it is checked before its body is read, and noted at its end."""

    def __init__(self, app: Any, key: str | None, origins: Sequence[str], quiet: bool):
        self.app, self.key, self.origins, self.quiet = app, key, origins, quiet

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start, status = time.perf_counter(), 0

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            with anyio.fail_after(PATIENCE):
                await send(message)

        try:
            self._check(Headers(scope=scope))
            await self.app(scope, receive, sending)
        except RequestError as e:
            await _refusal(None, e)(scope, receive, sending)
        except TimeoutError:                 # the client takes nothing
            pass
        finally:                             # not when Python collects it: it holds the turn
            if parts := scope.get("parts"):
                await parts.aclose()
        if not self.quiet:
            call: Call | None = scope.get("call")
            tokens = f" {call.usage['prompt_tokens']} tokens, {call.cached} of them cached, and " \
                     f"{call.written} written," if call else ""
            print(f"{scope['method']} {clean(scope['path'])} {status}{tokens} "
                  f"{time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)

    def _check(self, headers: Headers) -> None:
        """Raise RequestError for a request without the key or, if there is none, of other sites."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.key:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not compare_digest(
                    given.encode("latin-1"), self.key.encode()):
                raise RequestError("the API key is missing or wrong", 401, "invalid_api_key")
        # Another site may have its name lead to 127.0.0.1, but the browser still sends that name.
        elif host.partition(":")[0].lower() not in (HOST, "localhost"):
            raise RequestError("the request is for another host", 403)
        elif not {origin, "*"} & {None, f"http://{host}", *self.origins}:
            raise RequestError(f"the request comes from another site: --cors {origin} allows it",
                               403)


class _Protocol(H11Protocol):
    """A connection, which is closed if no whole request comes in time."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            PATIENCE, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)         # as uvicorn does, but a part of a request ends no wait
        self.handle_events()


class _Endpoints:
    """What is answered."""

    def __init__(self, api: Api):
        self.api, self.turn = api, asyncio.Lock()            # of the request that has the generator

    async def models(self, request: Request) -> Response:
        return JSONResponse(self.api.models(request.path_params.get("name", "")))

    async def complete(self, request: Request) -> Response:
        """Answer as a whole or as a stream of events."""
        try:
            body = await _body(request)
            call = request.scope["call"] = await run_in_threadpool(
                self.api.read, request.url.path, body)
            parts = request.scope["parts"] = self._parts(request, call)
            first = await anext(parts)       # before anything is sent, as it may raise
            if call.stream:
                return StreamingResponse(_events(first, parts), media_type="text/event-stream")
            await parts.aclose()
            return JSONResponse(first)
        except ClientDisconnect:
            return Response(status_code=499)                     # which the log alone sees
        except Exception as e:               # onnxruntime raises bare Exceptions
            return _refusal(request, e)

    async def _parts(self, request: Request, call: Call) -> AsyncGenerator[Json, None]:
        """Yield the parts of an answer, for which requests wait in turn."""
        def check() -> None:
            if anyio.from_thread.run(request.is_disconnected):
                raise ClientDisconnect

        async with self.turn:
            with closing(self.api.answer(call, check)) as answer:      # before the next one begins
                async for part in iterate_in_threadpool(answer):
                    yield part


async def _body(request: Request) -> Json:
    """The JSON object of a request."""
    # A page of another site may post text, but not this type.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RequestError("the request's Content-Type is not application/json", 415)
    body, size = bytearray(), 0
    try:
        with anyio.fail_after(PATIENCE):
            async for part in request.stream():
                size += len(part)            # all is read: a client sends it before it listens
                body += part if size <= LARGEST else b""
        if size > LARGEST:
            raise RequestError(f"the request has {size} bytes: at most {LARGEST} are read", 413)
        found = json.loads(body)
    except TimeoutError:
        raise RequestError("the request does not end", 408) from None
    except (ValueError, RecursionError) as e:
        raise RequestError(f"the request is no JSON: {error_line(e)}") from None
    if not isinstance(found, dict):
        raise RequestError("the request is no JSON object")
    return found


async def _events(first: Json, parts: AsyncGenerator[Json, None]) -> AsyncIterator[str]:
    """The parts of a stream as server-sent events."""
    try:
        async with aclosing(parts):
            yield f"data: {json.dumps(first)}\n\n"
            async for part in parts:
                yield f"data: {json.dumps(part)}\n\n"
        yield "data: [DONE]\n\n"
    except ClientDisconnect:                 # nobody is left to hear what ended the answer
        pass
    except Exception as e:
        yield f"data: {bytes(_refusal(None, e).body).decode()}\n\n"


def _refusal(request: Any, e: Exception) -> Response:
    """The answer that says why there is none; what no request is to blame for goes to the log."""
    if isinstance(e, HTTPException):
        e = RequestError(f"there is no {request.method} {request.url.path}", e.status_code)
    elif not isinstance(e, RequestError):
        print_error(e, "--debug" in sys.argv, f" ({type(e).__name__})")
        e = RequestError("out of memory: export again, with a smaller --context" if (
            isinstance(e, MemoryError)) else error_line(e), 500)
    # Whoever does not end a request must not go on with it.
    return JSONResponse(e.body, e.status, {"Connection": "close"} if e.status == 408 else None)


def make_server(api: Api, key: str | None = None, origins: Sequence[str] = (), quiet: bool = True,
                ) -> uvicorn.Server:
    """The server, which `run` starts. With a key, pages of any site may ask, and there is no page
    of the folder, for which no browser sends a key. origins: sites, such as https://example.com,
    whose pages may ask without one."""
    endpoints = _Endpoints(api)
    routes: list[Any] = [Route("/v1/models", endpoints.models),
                         Route("/v1/models/{name:path}", endpoints.models),
                         *(Route(path, endpoints.complete, methods=["POST"])
                           for path in (CHAT, TEXT))]
    if not key and (api.folder / "index.html").is_file():
        routes.append(Mount("/", StaticFiles(directory=api.folder, html=True)))
    app = Starlette(routes=routes, exception_handlers={
        HTTPException: _refusal, RequestError: _refusal})
    return uvicorn.Server(uvicorn.Config(
        CORSMiddleware(_Guard(app, key, origins, quiet), ["*"] if key else origins,
                       ["GET", "POST"], ["*"], allow_private_network=True),
        http=_Protocol, ws="none", lifespan="off", log_config=None, log_level="critical",
        access_log=False, server_header=False,
        limit_concurrency=CLIENTS, timeout_keep_alive=PATIENCE,
        timeout_graceful_shutdown=1))


def serve(api: Api, ports: Sequence[int], host: str | None = None, key: str | None = None,
          origins: Sequence[str] = (), quiet: bool = False) -> None:
    """Serve the generator and its folder's page until Ctrl-C, at the first of the ports that is
    free; 0 is any. Raises OSError if all are taken, or for a host of another machine."""
    for number in ports:
        try:
            listening = socket.create_server((host or HOST, number), backlog=2 * CLIENTS)
            break
        except (OSError, OverflowError) as e:
            if number == ports[-1] or getattr(e, "errno", None) not in (EADDRINUSE, EACCES):
                raise OSError(f"port {number} of {host or HOST} cannot be opened: {e}; give "
                              "--serve another port, or --host an address of this machine"
                              ) from None
    with listening:
        address = f"http://{host or HOST}:{listening.getsockname()[1]}/"
        has_page = not key and (api.folder / "index.html").is_file()
        page = f"{address} shows a page, and " if has_page else ""
        print(f"{page}{address}v1 answers as OpenAI's API from {clean(api.folder)}; "
              "Ctrl-C ends it", flush=True)
        make_server(api, key, origins, quiet).run([listening])
