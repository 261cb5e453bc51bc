"""A server of an exported folder: OpenAI's protocol (api.py), and the page of layout web.

It answers programs and pages of this machine; on another host, whoever has the key.
"""

import json
import os
import threading
from contextlib import suppress
from errno import EACCES, EADDRINUSE
from functools import partial
from hmac import compare_digest
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import MSG_PEEK
from typing import Any

from ..io.files import naming
from ..io.text import clean
from .api import Api, Json, RequestError, request_error

HOST = "127.0.0.1"
# A browser keeps a page and its model by port, so that a folder is best found at the same one.
PORT, PORTS = 8471, 100                      # the first that is tried, and how many
LARGEST = 8 << 20                            # bytes of a request
PATIENCE = 10                                # seconds that a client may neither send nor take bytes
HEADERS = {                  # the first two let a page share memory, which threads need
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


class _Server(ThreadingHTTPServer):
    """A thread for each request. `turn` is held by the one that the generator answers."""

    allow_reuse_address = os.name != "nt"    # there, it would take a port that is in use
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], api: Api, key: str | None):
        self.folder = api.folder.resolve()
        super().__init__(address, partial(_Handler, directory=str(self.folder)))
        self.api, self.key, self.turn = api, key, threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client left."""


class _Handler(SimpleHTTPRequestHandler):
    """One request: GET of a file or of the model's name, or POST of what is to be answered."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript",
                      ".mjs": "text/javascript", ".wasm": "application/wasm"}
    timeout = PATIENCE
    server: _Server

    def _check(self) -> None:
        """Raise RequestError for a request of another site, or without the key."""
        key, host = self.server.key, self.headers.get("Host", "")
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if key and (scheme.lower() != "bearer" or not compare_digest(given.encode(), key.encode())):
            raise RequestError("the API key is missing or wrong", 401, "invalid_api_key")
        # Another site may have its name lead to 127.0.0.1, but the browser still sends that name.
        if not key and host.partition(":")[0].lower() not in (HOST, "localhost"):
            raise RequestError("the request is for another host", 403)
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise RequestError("the request comes from another site", 403)

    def _check_client(self) -> None:
        """Raise ConnectionError if the client has left."""
        self.connection.settimeout(0)
        with suppress(BlockingIOError):
            if not self.connection.recv(1, MSG_PEEK):
                raise ConnectionError("the client has left")
        self.connection.settimeout(PATIENCE)

    def send_head(self):                                     # type: ignore[no-untyped-def]
        """Answer with headers; returns the open file, or None if there is none to send."""
        folder, file = self.server.folder, Path(self.translate_path(self.path))
        try:
            self._check()
            if self.path.startswith("/v1/"):
                return self._send(self.server.api.models(self.path))
            if "\0" in str(file) or not file.resolve().is_relative_to(folder):
                raise RequestError("the file is not in the folder", 403)
            if not (folder / "index.html").is_file() or (    # no lists of files, either
                    file.is_dir() and file != folder):
                raise RequestError("there is no such page", 404)
        except OSError:                                      # a name that is too long for a file
            return self._send(RequestError("there is no such page").body, 404)
        except RequestError as e:
            return self._send(e.body, e.status)
        return super().send_head()

    def do_POST(self) -> None:
        """Answer as a whole or as a stream of events."""
        streams = False
        try:
            body = self._body()              # first, for a client sends it before it reads answers
            self._check()
            request = self._request(body)
            with self.server.turn:
                for part in self.server.api.answer(self.path, request, self._check_client):
                    if not request.get("stream"):
                        self._send(part)
                        return
                    if not streams:          # not earlier: a request may be refused
                        self._send(None, kind="text/event-stream")
                        streams = True
                    self._event(json.dumps(part))
                self._event("[DONE]")
        except (ConnectionError, TimeoutError):          # the client left, or takes nothing
            return
        except Exception as e:               # onnxruntime raises bare Exceptions
            failed = request_error(e)
            if streams:
                self._event(json.dumps(failed.body))
            else:
                self._send(failed.body, failed.status)

    def _body(self) -> bytes:
        """The body of a request. Raises RequestError if it is too long, or of unknown length."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError("the request has no Content-Length", 411)
        body = self.rfile.read(min(int(length), LARGEST))
        if int(length) > LARGEST:
            for _ in range(min(int(length), 1 << 30) - LARGEST >> 16):
                self.rfile.read(1 << 16)
            raise RequestError(f"the request has {length} bytes: at most {LARGEST} are read", 413)
        return body

    def _request(self, body: bytes) -> Json:
        """The JSON object of a request. Raises what `request_error` takes."""
        # A page of another site may post text, but not this type.
        if self.headers.get_content_type() != "application/json":
            raise RequestError("the request's Content-Type is not application/json", 415)
        with naming("the request is no JSON", ValueError, RecursionError):
            request = json.loads(body)
        if not isinstance(request, dict):
            raise ValueError("the request is no JSON object")
        return request

    def _send(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
        """Send headers and, unless it is None, a value as JSON."""
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if value is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page asks for many files."""


def serve(api: Api, host: str | None = None, port: int | None = None, key: str | None = None,
          ) -> None:
    """Serve the generator and its folder's page until Ctrl-C: at the port, at a free one if it is
    0; default: PORT, or the next that is free. With a host, requests need the key, which no browser
    sends for a page. Raises OSError if the port is taken, or for a host of another machine."""
    ports = range(PORT, PORT + PORTS) if port is None else [port]
    for number in ports:
        try:
            server = _Server((host or HOST, number), api, key)
            break
        except (OSError, OverflowError) as e:
            if number == ports[-1] or getattr(e, "errno", None) not in (EADDRINUSE, EACCES):
                raise OSError(f"port {number} of {host or HOST} cannot be opened: {e}; give "
                              "--serve another port, or --host an address of this machine"
                              ) from None
    with server:
        address = f"http://{host or HOST}:{server.server_port}/"
        has_page = not key and (server.folder / "index.html").is_file()
        page = f"{address} shows a page, and " if has_page else ""
        print(f"{page}{address}v1 answers as OpenAI's API from {clean(api.folder)}; "
              "Ctrl-C ends it", flush=True)
        server.serve_forever()
