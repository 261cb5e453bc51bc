"""Slow: a page of another site in a browser, and two thousand requests."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from exported import export, random_model
from test_serve import ASK, GOOD, HEAD, address, completed, post, said, serving

from minismoe.runtime import Generator

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = export(random_model(seed=3), tmp_path_factory.mktemp("clients") / "tiny", context=2048)
    return Generator(folder, threads=1, caches=4)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_a_page_of_another_site(generator: Generator, tmp_path: Path) -> None:
    """It may ask if it is named, or has the key; a browser asks for leave first."""
    (tmp_path / "index.html").write_text("<title>another site</title>")

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *given: object):
            super().__init__(*given, directory=str(tmp_path))

        def log_message(self, *args: object) -> None:
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{site.server_port}"
    for settings, allowed in (({}, False), ({"origins": [origin]}, True), ({"key": "k"}, True)):
        with serving(generator, **settings) as client, Browser() as tab:
            tab.open(origin)
            tab.wait("document.title === 'another site'")
            asked = {"method": "POST", "body": json.dumps({"messages": ASK, "max_tokens": 20}),
                     "headers": {"Content-Type": "application/json", "Authorization": "Bearer k"}}
            found = tab.js(f"fetch('{client.base_url}chat/completions', {json.dumps(asked)})"
                           ".then(r => r.json()).then(r => r.choices[0].message.content)"
                           ".catch(e => e.name)")
            assert found == (said(generator, 20).strip() if allowed else "TypeError")
    site.shutdown()
    site.server_close()


def test_two_thousand_requests_of_eight_clients_three_of_them_broken(generator: Generator) -> None:
    """None is lost, and memory does not grow."""
    from minismoe.io.process import peak_resident

    with serving(generator) as client, ThreadPoolExecutor(8) as pool:
        def ask(number: int) -> object:
            prompt, kind = f"{number % 50}: ", number % 8
            if kind == 0:                    # leaves in the middle of a stream
                stream = completed(client, prompt, 100, stream=True)
                next(iter(stream))
                return stream.close()
            if kind == 1:                    # sends half a request, and hangs up
                with socket.create_connection(address(client)) as half:
                    return half.sendall(HEAD % 99 + GOOD)
            if kind == 2:
                return post(client, b'{"messages": 7')[0]
            if kind == 3:
                return completed(client, "hello", 4).id
            if kind == 4:
                return "".join(part.choices[0].delta.content for part in completed(
                    client, prompt, 4, stream=True))
            return completed(client, prompt, 4).choices[0].message.content
        first = [*pool.map(ask, range(1000))]
        before = peak_resident()
        second = [*pool.map(ask, range(1000))]
        assert peak_resident() - before < 8 << 20, (before, peak_resident())
        for number in range(1000):
            if number % 8 > 3:
                assert first[number] == second[number]
