"""The page of layout web in headless Chromium: a tiny export, served as a user does."""

import hashlib
import json
import math
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from browser import VENDORED, Browser, needs_browser, vendor
from exported import Runner, log_probabilities, ship, started
from tiny import DELTA, edit_tensors, save_bytes_model

from minismoe.data.tokenizer import load_tokenizer
from minismoe.io.files import read_json

CONFIG = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 4096}
CHOICES = ["alpha", "alpine", "alp", "beta", "gamma"]
DATA = "onnx/model_quantized.onnx_data"
TEMPLATE = ("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")
PRINTABLE = [*range(32, 127)]
GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")         # one in software
pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported page of a random model that answers in letters, and a task."""
    root = tmp_path_factory.mktemp("page")
    save_random(root / "base", CONFIG)
    (root / "base" / "chat_template.jinja").write_text(TEMPLATE)
    ship(root / "web", "--model", root / "base", "--layout web --context 2048")
    write_tasks(root / "web")
    return root / "web"


def save_random(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """Write a random checkpoint that answers in letters."""
    save_bytes_model(folder, large=True, seed=seed, **config)
    scale = torch.full((259, 1), 0.01)
    scale[PRINTABLE] = 1
    edit_tensors(folder / "model.safetensors",
                 lambda tensors: tensors["model.embed_tokens.weight"].mul_(scale))


def write_tasks(folder: Path) -> None:
    """Add tasks, as a run has them."""
    (folder / "tasks.json").write_text(json.dumps({
        "count": {"choices": [], "instruction": "Count: "},
        "pick": {"choices": CHOICES, "instruction": "Pick: "}}))
    relist(folder, "tasks.json")


def relist(folder: Path, name: str, shard: int = 0) -> None:
    """Say in export.json what a file holds now; shard: bytes that the page loads at once."""
    content = (folder / name).read_bytes()
    parts = [content[i:i + shard] for i in range(0, len(content), shard)] if shard else []
    info = read_json(folder / "export.json")
    info["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if shard:
        info["files"][name]["shards"] = {
            "bytes": shard, "sha256": [hashlib.sha256(part).hexdigest() for part in parts]}
    (folder / "export.json").write_text(json.dumps(info))


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """The address at which the runtime serves a folder, without an error."""
    with started(folder, *flags) as (line, log):
        yield line.split()[0]
    assert not log


class Graph:
    """A graph of a web folder, run by onnxruntime itself from an empty cache."""

    def __init__(self, folder: Path, name: str = "model_quantized.onnx"):
        self.file, self.tokenizer = folder / "onnx" / name, load_tokenizer(folder)
        self.system = read_json(folder / "export.json").get("system")

    def prompt(self, *texts: str) -> list[int]:
        """Tokens of a chat: what the user and the model said in turn."""
        roles = ("user", "assistant") * len(texts)
        chat = [{"role": "system", "content": self.system}] if self.system else []
        chat += [{"role": role, "content": text} for role, text in zip(roles, texts)]
        return self.tokenizer.encode_chat(chat, True).ids

    def logits(self, tokens: Sequence[int], more: Sequence[int] = ()) -> list[torch.Tensor]:
        """The logits (V,) after these tokens, and after each one of those that follow them."""
        runner = Runner(self.file)
        return [runner(torch.tensor([new]))[0, -1] for new in (tokens, *([m] for m in more))]

    def says(self, count: int, *texts: str) -> str:
        """The first tokens of the answer to a chat."""
        runner, new, said = Runner(self.file), self.prompt(*texts), list[int]()
        while len(said) < count:
            new = [int(runner(torch.tensor([new]))[0, -1].argmax())]
            said += new
        return self.tokenizer.decode(said)


def test_a_web_folder_holds_what_a_browser_loads(web: Path) -> None:
    assert {f.name for f in (web / "onnx").iterdir()} == {
        f"model_{name}.onnx{part}" for name in ("quantized", "q4f16") for part in ("", "_data")}
    config = read_json(web / "config.json")["transformers.js_config"]
    assert config["dtype"] == "q8" and config["device_config"] == {"webgpu": {"dtype": "q4f16"}}
    info = read_json(web / "export.json")
    assert {"index.html", "offline.js", "onnx/model_q4f16.onnx"} <= info["files"].keys()
    for name in ("quantized", "q4f16"):          # the pipeline would pad others on the wrong side
        graph = onnx.load(web / "onnx" / f"model_{name}.onnx", load_external_data=False).graph
        assert {v.type.tensor_type.shape.dim[0].dim_value for v in graph.input} == {1}
    links = re.findall(r"https?://[^`\"']+", (web / "index.html").read_text())
    assert links == ["https://cdn.jsdelivr.net/npm/"]


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """Where all requests to other machines go, and the first lines of those that came."""
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def listen() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(200).split(b"\r\n")[0].decode())

        threading.Thread(target=listen, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", seen
        server.shutdown(socket.SHUT_RDWR)


def load(tab: Browser, address: str, seconds: float = 60) -> str:
    """Open the page; its status line once the model is loaded."""
    tab.open(address)
    return tab.wait_status("Ready", seconds=seconds)


def ask(tab: Browser, text: str, *starts: str, seconds: float = 60) -> str:
    """Send a message; returns the answer once the status line starts with one of `starts`."""
    tab.js("document.querySelector('#text').focus()")
    tab.type(text)
    tab.press("Enter", 13)
    tab.wait_status(*(starts or ("First token after",)), seconds=seconds)
    return tab.text(".assistant")


def shares_of(graph: Graph, question: str, answer: str) -> list[float]:
    """How likely each token of an answer is, as a share of the likeliest token in its place."""
    written = answer.encode()
    rows = graph.logits(graph.prompt(question), written[:-1])
    return [float((row[token] - row.max()).exp()) for row, token in zip(rows, written)]


def take(tab: Browser, task: str) -> None:
    """Choose a task and begin a new chat."""
    tab.js(f"document.querySelector('#task').value = {json.dumps(task)}")
    tab.js("document.querySelector('#anew').click()")


@needs_browser
def test_the_page_in_a_browser(web: Path) -> None:
    """It answers as onnxruntime does, stops, opens offline, and asks no other machine."""
    vendor(web)
    graph = Graph(web)
    with proxy() as (outside, asked), Browser(f"--proxy-server={outside}",
                                              "--proxy-bypass-list=127.0.0.1") as tab:
        with served(web) as address:
            assert "WASM" in load(tab, address)
            assert tab.js("crossOriginIsolated")
            assert tab.js("document.querySelector('#task').value") == "count"    # the first task
            take(tab, "")
            answer = ask(tab, "Hello")
            assert re.fullmatch(r"First token after [\d.]+ s, [\d.]+ tokens/s on WASM, .*",
                                tab.text("#status"))
            assert len(answer) > 1900 and answer[:200] == graph.says(200, "Hello")

            take(tab, "count")
            tab.js("document.querySelector('#text').focus()")
            tab.type("to")
            tab.click("#send")
            tab.wait("!document.querySelector('#stop').hidden")
            tab.click("#stop")
            tab.wait_status("First token after")
            stopped = tab.text(".assistant")
            assert 0 < len(stopped) < 1900
            assert stopped[:100] == graph.says(min(100, len(stopped)), "Count: to")
        tab.open(address)                    # the server is gone
        tab.wait_status("Ready")
        take(tab, "")
        assert ask(tab, "Hello") == answer
        own = ("google.com", "googleapis.com", "gvt1.com", "duckduckgo.com")    # Chromium
        # An empty line is a connection that was opened ahead, and asked for nothing.
        assert not [line for line in asked if line and not any(host in line for host in own)]


@needs_browser
def test_a_chat(tmp_path: Path) -> None:
    """It is read from its first new token; a temperature draws; answers of a set have Python's
    probabilities; a question that fails is taken back; after an error that nothing awaits, nothing
    can be sent."""
    save_random(tmp_path / "base", CONFIG | {"eos_token_id": [257, *b"Tv"]})     # which end answers
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE)
    web = tmp_path / "web"
    ship(web, "--model", tmp_path / "base", "--layout web --context 2048")
    write_tasks(web)
    vendor(web)
    graph = Graph(web)
    with served(web) as address, Browser() as tab:
        load(tab, address)
        take(tab, "")
        first = ask(tab, "Hello")
        assert 5 < len(first) < 50 and first == graph.says(len(first), "Hello")
        second = ask(tab, "More")
        assert second == graph.says(len(second), "Hello", first, "More")
        title = tab.js("document.querySelector('#status').title")
        # The last token of an answer is chosen, but not read.
        length, new = len(graph.prompt("Hello", first, "More")), len("?\nuser:More\nassistant:")
        assert title == f"The chat has {length} of 2048 tokens; {new} of them were new"

        take(tab, "")
        typed = "a<|end|>b \ufdd0"           # text, and no token
        answer = ask(tab, typed)
        assert answer == graph.says(len(answer), typed)
        length = len(graph.prompt(typed))
        assert f" {length} of 2048" in tab.js("document.querySelector('#status').title")

        drawn = set()
        for temperature, least in [(0.5, 0.01)] * 3 + [(-1, 0.99)]:
            tab.js(f"document.querySelector('#temperature').value = {temperature}")
            take(tab, "")
            drawn.add(answer := ask(tab, "Hello"))
            # At least 0.05 times as likely as the likeliest ones are drawn, but browsers round.
            assert min(shares_of(graph, "Hello", answer[:100])) ** 2 > least
        assert answer == first and len(drawn) > 1
        tab.js("document.querySelector('#temperature').value = 0")

        take(tab, "pick")
        answers = {text: [*f"{text}\n".encode(), 257] for text in CHOICES}
        best = sorted(log_probabilities(answers, lambda start: graph.logits(
            [*graph.prompt("Pick: one"), *start])[0]).items(), key=lambda pair: -pair[1])[:3]
        assert ask(tab, "one", "Answered after") == best[0][0]
        assert tab.js("[...document.querySelectorAll('.odds span')].map(s => s.textContent)") == [
            text for text, logprob in best for text in (text, f"{100 * math.exp(logprob):.1f} %")]

        take(tab, "")
        bubbles = "document.querySelectorAll('#log p').length"
        long = "too long " * 300
        tab.js(f"document.querySelector('#text').value = {json.dumps(long)}")
        ask(tab, "", "the text is")
        assert "tokens too long" in tab.text("#status") and tab.js(bubbles) == 0
        assert tab.js("document.querySelector('#text').value") == long.strip()
        tab.js("document.querySelector('#text').value = ''")
        assert ask(tab, "Hello") and tab.js(bubbles) == 2

        tab.js("void Promise.reject(new Error('allocation.json was lost'))", tab.worker)
        assert tab.wait_status("alloc") == "allocation.json was lost: reload the page"
        assert tab.js("document.querySelector('#send').disabled")


class Host(ThreadingHTTPServer):
    """A host of static files as there are many: browsers may keep them for a year, and parts of
    a file may be asked for if `ranges`. `requests` lists what was asked for. Of the file `cut[0]`,
    only the first `cut[1]` bytes come."""

    def __init__(self, folder: Path, ranges: bool = True):
        self.folder, self.ranges, self.cut = folder, ranges, ("", 0)
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answer)
        self.address = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Answer(SimpleHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        name = self.path.split("?")[0].lstrip("/") or "index.html"
        start = int((self.headers["Range"] or "=0-").split("=")[1].rstrip("-"))
        start = start if self.server.ranges else 0
        self.server.requests.append(f"{name} from {start}" if start else name)
        file = self.server.folder / name
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", self.guess_type(name))
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Cache-Control", "max-age=31536000")
        self.end_headers()
        end = self.server.cut[1] if name == self.server.cut[0] else len(content)
        with suppress(ConnectionError):
            self.wfile.write(content[start:end])
            time.sleep(0.5 * (end < len(content)))       # a browser drops what it has not read yet

    def log_message(self, format: str, *args: object) -> None:
        pass


@needs_browser
def test_a_new_export_replaces_the_old(web: Path, tmp_path: Path) -> None:
    """Though the browser may keep files for a year. Then another program takes the port."""
    save_random(tmp_path / "base", CONFIG, seed=1)
    ship(tmp_path / "new", "--model", tmp_path / "base",
         "--layout web --precision q8 --context 256")
    for folder in (web, tmp_path / "new"):
        vendor(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("<title>other</title>another program")
    hashes = "caches.keys().then(k => caches.open(k[0])).then(c => c.keys())" \
             ".then(all => all.map(r => r.url.split('/').at(-1)))"
    with Host(web) as host, Browser() as tab:
        for folder in (web, tmp_path / "new"):
            host.folder = folder
            tab.open(host.address)
            tab.wait(f"document.querySelector('#name')?.textContent === {json.dumps('base')}")
            tab.wait_status("Ready")
            take(tab, "")
            assert ask(tab, "Hello")[:20] == Graph(folder).says(20, "Hello")
            files = read_json(folder / "export.json")["files"].values()
            kept = {h for h in tab.js(hashes) if len(h) == 64}
            ours = {f["sha256"] for f in files}
            assert len(kept & ours) > 5 and len(kept - ours) == 3        # transformers.js
        host.cut = ("export.json", 20)           # the connection breaks: as if there were no server
        load(tab, host.address)
        assert ask(tab, "Hello")[:20] == Graph(folder).says(20, "Hello")
        host.folder = tmp_path / "other"
        tab.open(host.address)
        tab.wait("document.body?.textContent === 'another program'")
        assert not tab.js("navigator.serviceWorker.getRegistrations().then(all => all.length)")


@needs_browser
def test_a_load_that_broke_off_goes_on(web: Path, tmp_path: Path) -> None:
    """From the part that broke off, with a server that knows ranges and with one that does not.

    Chats begin with the system prompt of the training.
    """
    web = shutil.copytree(web, tmp_path / "web")
    vendor(web)
    shard = (web / DATA).stat().st_size // 4
    relist(web, DATA, shard)
    info = read_json(web / "export.json")
    (web / "export.json").write_text(json.dumps(info | {"system": "Be brief."}))
    with Host(web) as host, Browser() as tab:
        for host.ranges in (True, False):
            host.cut = (DATA, 2 * shard + 1)
            tab.open(host.address)
            assert "reload" in tab.wait_status(f"the connection broke at {DATA}")
            host.cut, host.requests = ("", 0), []
            load(tab, host.address)
            assert host.requests.count("export.json") == 1
            assert any(f"{DATA} from " in r for r in host.requests) == host.ranges
            take(tab, "")
            assert ask(tab, "Hello")[:20] == Graph(web).says(20, "Hello")
            tab.js("document.querySelector('#forget').click()")
            tab.wait_status("This browser keeps nothing")
            assert not tab.js("caches.keys().then(keys => keys.length)")
            assert not tab.js("navigator.serviceWorker.getRegistrations().then(all => all.length)")


@needs_browser
def test_a_large_model_is_asked_for(web: Path, tmp_path: Path) -> None:
    web = shutil.copytree(web, tmp_path / "web")
    vendor(web)
    info = read_json(web / "export.json")
    info["files"][DATA]["bytes"] = 200_000_000
    (web / "export.json").write_text(json.dumps(info))
    with Host(web) as host, Browser() as tab:
        tab.open(host.address)
        said = tab.wait_status("2")
        assert re.fullmatch(r"2\d\d MB to load, and about 2.6 GB of this device's memory", said)
        assert DATA not in host.requests
        tab.click("#go")
        tab.wait_status("the connection broke")      # the file is shorter
        assert DATA in host.requests


@needs_browser
def test_gated_delta_nets_in_a_browser(tmp_path: Path) -> None:
    """Qwen3.5's memories go from step to step as keys and values do."""
    save_random(tmp_path / "base", CONFIG | DELTA)
    ship(tmp_path / "web", "--model", tmp_path / "base",
         "--layout web --precision q8 --context 224")
    vendor(tmp_path / "web")
    with Browser() as tab, served(tmp_path / "web") as address:
        load(tab, address, 120)
        answer = ask(tab, "Hello")
        assert len(answer) > 20 and answer == Graph(tmp_path / "web").says(len(answer), "Hello")


@needs_browser
@pytest.mark.parametrize("precision, flags, setting", [
    ("fp32", (), "WASM"), pytest.param("int4", GPU, "WebGPU", marks=pytest.mark.slow)])
def test_a_graph_that_writes_one_token_a_run(web: Path, tmp_path: Path, precision: str,
                                             flags: tuple[str, ...], setting: str) -> None:
    """The same text on WebGPU as on WASM; stopped in between, and offline."""
    text = "A prompt that WebGPU reads in several steps. " * 2
    ship(tmp_path / "web", "--model", web.parent / "base", "--layout web --context 160",
         "--precision", precision)
    vendor(tmp_path / "web")
    with Browser(*flags) as tab:
        with served(tmp_path / "web") as address:
            assert load(tab, address, 120).startswith(f"Ready on {setting}")
            tab.type(text)
            tab.press("Enter", 13)
            assert f"on {setting}" in tab.wait_status("First token after", seconds=120)
            answer = tab.text(".assistant")
            name = "model.onnx" if precision == "fp32" else "model_q4.onnx"
            graph = Graph(tmp_path / "web", name)
            assert len(answer) > 20 and answer == graph.says(len(answer), text)
            tab.js("document.querySelector('#anew').click()")    # what the GPU has read is cut
            assert ask(tab, text, seconds=120) == answer
        tab.open(address)                    # the server is gone
        tab.wait_status("Ready", seconds=120)
        tab.type(text)
        tab.press("Enter", 13)
        tab.wait("document.querySelector('.assistant')?.textContent.length > 1", seconds=120)
        tab.press("Escape", 27)
        tab.wait_status("First token after")
        assert answer.startswith(tab.text(".assistant"))


@needs_browser
@pytest.mark.parametrize("broken, reason", [
    (False, "has no float16"), (True, "does not start the model")])
def test_a_gpu_that_is_of_no_use_is_left_for_wasm(web: Path, tmp_path: Path, broken: bool,
                                                  reason: str) -> None:
    """Chromium's in software lacks float16, which the page's graph for WebGPU has. Nor do the files
    of a model stay in memory once it has started."""
    web = shutil.copytree(web, tmp_path / "web")
    vendor(web)
    if broken:
        adapter = ("{ features: new Set(['shader-f16']), limits: {}, info: {}, "
                   "requestDevice: async () => { throw new Error('no device'); } }")
        gpu = ("Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: async () => ("
               + adapter + ") } });")
        file = web / "index.html"
        file.write_text(re.sub('(class="worker"[^>]*>)', rf"\1{gpu}", file.read_text(), count=1))
        relist(web, "index.html")
    with served(web) as address, Browser(*(() if broken else GPU)) as tab:
        said = load(tab, address)
        assert re.fullmatch(rf"Ready on WASM, \d+ threads?, as this GPU {reason}", said)
        assert tab.js("document.querySelectorAll('#task option').length") == 3
        take(tab, "")
        assert ask(tab, "Hello")[:20] == Graph(web).says(20, "Hello")
        tab.call("HeapProfiler.collectGarbage", tab.worker)
        assert tab.call("Runtime.getHeapUsage", tab.worker)["backingStorageSize"] < 4_000_000


@needs_browser
def test_files_that_are_not_the_exports(web: Path, tmp_path: Path) -> None:
    """A file that is missing or another one is named, and no other place is asked for it."""
    vendor(web)
    script = "vendor/node_modules/" + VENDORED[0]
    cases = [("export.json", None, "is missing"), (script, "broken(", "is not what npm has"),
             ("index.html", "<!-- -->", "take a server that adds no scripts"),
             (DATA, "another", "export.json"), (DATA, None, "is missing")]
    with proxy() as (outside, asked), served(web) as address, Browser(
            f"--proxy-server={outside}", "--proxy-bypass-list=127.0.0.1") as tab:
        for name, more, reason in cases:
            content = (web / name).read_bytes()
            if more is None:
                (web / name).unlink()
            else:
                (web / name).write_bytes(content[:-len(more)] + more.encode())
            tab.open(address)
            tab.wait("document.querySelector('#below')?.className === 'wrong'")
            said = tab.text("#status")
            (web / name).write_bytes(content)
            assert name.removeprefix("vendor/node_modules/").split("/")[0] in said, said
            assert reason in said and "\n" not in said
            assert tab.js("document.querySelector('#send').disabled")
        assert not [line for line in asked if "jsdelivr" in line]
