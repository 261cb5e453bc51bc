"""Serve an exported folder of layout web to browsers of this machine."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..io.text import clean

HOST = "127.0.0.1"
# A browser keeps a page and its model by port, so that a folder is best found at the same one.
PORT, PORTS = 8471, 100                      # the first that is tried, and how many
HEADERS = {                  # the first two let a page share memory, which threads need
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


class _Files(SimpleHTTPRequestHandler):
    """Files of one folder, for pages of this machine only."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript",
                      ".mjs": "text/javascript", ".wasm": "application/wasm"}

    def send_head(self):                                     # type: ignore[no-untyped-def]
        """Answer with headers; returns the open file, or None if the request is refused."""
        folder, file = Path(self.directory).resolve(), Path(self.translate_path(self.path))
        # Another site may have its name lead to 127.0.0.1, but the browser still sends that name.
        name = self.headers.get("Host", "").partition(":")[0].lower()
        if name not in (HOST, "localhost") or "\0" in str(file) or (
                not file.resolve().is_relative_to(folder)):
            self.send_error(403)
            return None
        if file.is_dir() and file != Path(self.directory):   # no lists of files
            self.send_error(404)
            return None
        return super().send_head()

    def copyfile(self, source, outputfile):                  # type: ignore[no-untyped-def]
        """Send a file; a page that was closed meanwhile is no error."""
        with suppress(ConnectionError):
            super().copyfile(source, outputfile)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page asks for many files."""


class _Server(ThreadingHTTPServer):
    allow_reuse_address = os.name != "nt"    # there, it would take a port that is in use


def open_server(port: int | None, handler: Callable[..., BaseHTTPRequestHandler]) -> _Server:
    """A server at 127.0.0.1:port, at a free port if it is 0; None: PORT, or the next free one.

    Raises OSError if the port is taken, or all of them.
    """
    for number in range(PORT, PORT + PORTS) if port is None else [port]:
        try:
            return _Server((HOST, number), handler)
        except (OSError, OverflowError) as e:
            reason = e
    raise OSError(f"port {number} cannot be opened: {reason}; give --serve another one") from None


def serve_page(folder: Path, port: int | None) -> None:
    """Serve the folder at the port, as `open_server` chooses it, until Ctrl-C.

    Raises FileNotFoundError if the folder holds no page, OSError if the port is taken.
    """
    if not (folder / "index.html").is_file():
        raise FileNotFoundError(f"{folder} holds no index.html; export.py --layout web writes "
                                "one")
    with open_server(port, partial(_Files, directory=str(folder))) as server:
        print(f"http://{HOST}:{server.server_port}/ shows {clean(folder)}; Ctrl-C ends it",
              flush=True)
        server.serve_forever()
