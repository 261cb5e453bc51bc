"""The page of layout web in headless Chromium: a tiny export, served as a user does."""

import json
import math
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from browser import Browser, needs_browser, vendor
from exported import Runner, log_probabilities, ship, started
from tiny import DELTA, edit_tensors, save_bytes_model

from minismoe.data.tokenizer import load_tokenizer
from minismoe.export.write import record
from minismoe.io.files import read_json

CONFIG = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 4096}
CHOICES = ["alpha", "alpine", "alp", "beta", "gamma"]
DATA = "onnx/model_quantized.onnx_data"
TEMPLATE = ("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")
PRINTABLE = [*range(32, 127)]
GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")         # one in software
pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """An exported page of a random model that answers in letters, with tasks as a run has them."""
    save_random(tmp_path / "base", CONFIG)
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE)
    return ship_page(tmp_path, "--context 2048")


def ship_page(root: Path, flags: str, **changes: Any) -> Path:
    """The page of the checkpoint root/base, with two tasks and these changes of export.json."""
    info = ship(root / "web", "--model", root / "base", "--layout web", flags)
    (root / "web/tasks.json").write_text(json.dumps({
        "count": {"choices": [], "instruction": "Count: "},
        "pick": {"choices": CHOICES, "instruction": "Pick: "}}))
    record(info | changes, root / "web")
    return root / "web"


def save_random(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """Write a random checkpoint that answers in letters."""
    save_bytes_model(folder, large=True, seed=seed, **config)
    scale = torch.full((259, 1), 0.01)
    scale[PRINTABLE] = 1
    edit_tensors(folder / "model.safetensors",
                 lambda tensors: tensors["model.embed_tokens.weight"].mul_(scale))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the runtime serves a folder, and transformers.js, without an error."""
    vendor(folder)
    with started(folder) as (line, log):
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

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits (V,) after these tokens."""
        return Runner(self.file)(torch.tensor([tokens]))[0, -1]

    def says(self, count: int, *texts: str) -> str:
        """The first tokens of the answer to a chat."""
        runner, new, said = Runner(self.file), self.prompt(*texts), list[int]()
        while len(said) < count:
            new = [int(runner(torch.tensor([new]))[0, -1].argmax())]
            said += new
        return self.tokenizer.decode(said)


def test_a_web_folder_holds_what_a_browser_loads(web: Path) -> None:
    assert {f.name for f in (web / "onnx").iterdir()} == {
        f"model_quantized.onnx{part}" for part in ("", "_data")}
    assert read_json(web / "config.json")["transformers.js_config"]["dtype"] == "q8"
    assert {"index.html", "page.js", "worker.js", "answer.js", DATA} <= read_json(
        web / "export.json")["files"].keys()
    graph = onnx.load(web / "onnx/model_quantized.onnx", load_external_data=False).graph
    # The pipeline would pad others on the wrong side.
    assert {v.type.tensor_type.shape.dim[0].dim_value for v in graph.input} == {1}
    links = [link for file in (*web.glob("*.js"), web / "index.html")
             for link in re.findall(r"https?://[^`\"'$]+", file.read_text())]
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


def take(tab: Browser, task: str) -> None:
    """Choose a task and begin a new chat."""
    tab.js(f"document.querySelector('#task').value = {json.dumps(task)}")
    tab.js("document.querySelector('#anew').click()")


@needs_browser
def test_the_page_in_a_browser(web: Path) -> None:
    """It answers as onnxruntime does, ends with the context, stops, and asks no other machine."""
    graph = Graph(web)
    with proxy() as (outside, asked), served(web) as address, Browser(
            f"--proxy-server={outside}", "--proxy-bypass-list=127.0.0.1") as tab:
        assert re.fullmatch(r"Ready on WASM, \d+ threads?", load(tab, address))
        assert tab.js("crossOriginIsolated")
        assert tab.js("document.querySelector('#task').value") == "count"        # the first task
        take(tab, "")
        room = 37                            # behind a prompt whose characters are tokens
        text = "Hello " * ((2048 - len(graph.prompt("")) - room) // 6)
        text = "x" * (2048 - len(graph.prompt(text)) - room) + text.strip() + "y"
        assert len(graph.prompt(text)) == 2048 - room
        assert ask(tab, text) == graph.says(room, text)
        assert re.fullmatch(r"First token after [\d.]+ s, [\d.]+ tokens/s on WASM, .*",
                            tab.text("#status"))

        take(tab, "count")
        tab.js("document.querySelector('#text').focus()")
        tab.type("to")
        tab.click("#send")
        tab.wait("!document.querySelector('#stop').hidden")
        tab.click("#stop")
        tab.wait_status("First token after", "Stopped")
        stopped = tab.text(".assistant")
        assert len(stopped) < 1900 and stopped == graph.says(len(stopped), "Count: to")
        own = ("google.com", "googleapis.com", "gvt1.com", "duckduckgo.com")     # Chromium
        # An empty line is a connection that was opened ahead, and asked for nothing.
        assert not [line for line in asked if line and not any(host in line for host in own)]


@needs_browser
def test_a_chat(tmp_path: Path) -> None:
    """With the system prompt of the training. Special tokens in a message stay text; answers of a
    set have Python's probabilities; a question that fails is taken back; after an error that
    nothing awaits, nothing can be sent."""
    save_random(tmp_path / "base", CONFIG | {"eos_token_id": [257, *b"T|"]})     # which end answers
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE)
    web = ship_page(tmp_path, "--context 2048", system="Be quick.")
    graph = Graph(web)
    with served(web) as address, Browser() as tab:
        load(tab, address)
        take(tab, "")
        first = ask(tab, "Hello")
        assert 5 < len(first) < 50 and first == graph.says(len(first), "Hello")
        second = ask(tab, "More")
        assert second == graph.says(len(second), "Hello", first, "More")

        take(tab, "")
        typed = "a<|end|>b \ufdd0"           # text, and no token
        answer = ask(tab, typed)
        assert answer == graph.says(len(answer), typed)

        take(tab, "pick")
        answers = {text: [*f"{text}\n".encode(), 257] for text in CHOICES}
        best = sorted(log_probabilities(answers, lambda start: graph.logits(
            [*graph.prompt("Pick: one"), *start])).items(), key=lambda pair: -pair[1])[:3]
        for typed in "one", "Pick: one":     # the instruction is not put before it twice
            assert ask(tab, typed, "Answered after") == best[0][0]
            odds = tab.js("[...[...document.querySelectorAll('.odds')].at(-1)"
                          ".querySelectorAll('span')].map(s => s.textContent)")
            assert odds == [said for text, logprob in best
                            for said in (text, f"{100 * math.exp(logprob):.1f} %")]

        take(tab, "")
        bubbles = "document.querySelectorAll('#log p').length"
        long = "too long " * 300
        tab.js(f"document.querySelector('#text').value = {json.dumps(long)}")
        ask(tab, "", "the text is")
        assert "tokens too long" in tab.text("#status") and tab.js(bubbles) == 0
        assert tab.js("document.querySelector('#text').value") == long.strip()
        tab.js("document.querySelector('#text').value = ''")
        assert ask(tab, "Hello") == first and tab.js(bubbles) == 2

        tab.js("void Promise.reject(new Error('allocation.json was lost'))", tab.worker)
        assert tab.wait_status("alloc") == "allocation.json was lost: reload the page"
        assert tab.js("document.querySelector('#send').disabled")


@needs_browser
def test_gated_delta_nets_in_a_browser(tmp_path: Path) -> None:
    """Qwen3.5's memories go from step to step as keys and values do."""
    save_random(tmp_path / "base", CONFIG | DELTA)
    web = ship_page(tmp_path, "--context 224")
    with Browser() as tab, served(web) as address:
        load(tab, address, 120)
        take(tab, "")
        answer = ask(tab, "Hello")
        assert len(answer) > 20 and answer == Graph(web).says(len(answer), "Hello")


@needs_browser
@pytest.mark.parametrize("precision, flags, setting", [
    ("fp32", (), "WASM"), pytest.param("int4", GPU, "WebGPU", marks=pytest.mark.slow)])
def test_a_graph_that_writes_one_token_a_run(tmp_path: Path, precision: str,
                                             flags: tuple[str, ...], setting: str) -> None:
    """The same text on WebGPU as on WASM."""
    text = "A prompt that WebGPU reads in several steps. " * 2
    save_random(tmp_path / "base", CONFIG)
    web = ship_page(tmp_path, f"--context 224 --precision {precision}")
    with Browser(*flags) as tab, served(web) as address:
        assert load(tab, address, 120).startswith(f"Ready on {setting}")
        take(tab, "")
        answer = ask(tab, text, seconds=120)
        graph = Graph(web, "model.onnx" if precision == "fp32" else "model_q4.onnx")
        assert len(answer) > 20 and answer == graph.says(len(answer), text.strip())
        take(tab, "")                        # what the GPU has read is cut
        assert ask(tab, text, seconds=120) == answer


@needs_browser
def test_what_cannot_be_loaded_is_named(web: Path) -> None:
    """A file that is missing or was cut, and a precision that this browser does not compute."""
    info, data = read_json(web / "export.json"), (web / DATA).read_bytes()
    with served(web) as address, Browser() as tab:
        def says(reason: str) -> None:
            tab.open(address)
            tab.wait("document.querySelector('#status')?.className === 'wrong'")
            assert reason in tab.text("#status") and "\n" not in tab.text("#status")
            assert tab.js("document.querySelector('#send').disabled")

        (web / DATA).write_bytes(data[:-10])
        says(f"{DATA} does not have the {len(data)} bytes that export.json names")
        (web / DATA).unlink()
        says(f"{DATA} cannot be loaded: copy the folder whole")
        (web / "export.json").write_text(json.dumps(info | {"precision": "q4f16"}))
        says("this browser has no WebGPU with float16, which a model in q4f16 needs: export q8")
        (web / "export.json").unlink()
        says("export.json cannot be loaded")
