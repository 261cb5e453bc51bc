"""The page of a folder of layout web, served to the browsers of this machine alone."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..io.text import clean

HOST = "127.0.0.1"
HEADERS = {                      # the first two let a page share memory, which WASM's threads need
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


class _Files(SimpleHTTPRequestHandler):
    """The files of a folder, but no hidden ones, no lists of them, and none outside of it."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | dict.fromkeys(    # systems differ
        (".js", ".mjs"), "text/javascript")

    def handle(self) -> None:
        with suppress(ConnectionError, ValueError):      # the browser is gone; a path with %00
            super().handle()

    def send_head(self) -> Any:
        if status := self._refusal():
            self.send_error(status)
            return None
        return super().send_head()

    def _refusal(self) -> int:
        """The status of a request that is refused, or else 0."""
        file, home = Path(self.translate_path(self.path)), Path(self.directory)
        host = self.headers.get("Host", "").partition(":")[0].lower()
        if host not in (HOST, "localhost"):  # another site may have its name lead here
            return 403
        hidden = any(part.startswith(".") for part in file.relative_to(home).parts)
        inside = file.resolve().is_relative_to(home.resolve())
        return 0 if inside and not hidden else 404

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def serve(folder: Path, ports: Sequence[int]) -> None:
    """Serve a folder at the first of the ports that is free, 0 being any, until Ctrl-C.

    Raises FileNotFoundError for a folder without a page, OSError if all ports are taken.
    """
    if not (folder / "index.html").is_file():
        raise FileNotFoundError(f"{folder} has no page; export.py --layout web writes one")
    for port in ports:
        try:
            server = ThreadingHTTPServer((HOST, port), partial(_Files, directory=str(folder)))
            break
        except (OSError, OverflowError) as e:
            if port == ports[-1]:
                raise OSError(f"port {port} cannot be opened: {e}; give --serve another one"
                              ) from None
    with server:
        print(f"http://{HOST}:{server.server_port}/ shows the page of {clean(folder)}; "
              "Ctrl-C ends it", flush=True)
        server.serve_forever()
