"""The page of layout web in headless Chromium: a tiny export, served as a user does."""

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from browser import Browser, needs_browser, vendor
from safetensors.torch import save_file

import export
from minismoe.data.tokenizer import load_tokenizer
from minismoe.model.decoder import CausalLM, Config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"model_type": "llama", "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "tie_word_embeddings": True, "eos_token_id": 257, "max_position_embeddings": 4096}
PRINTABLE = [*range(32, 127)]
GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")         # one in software
pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported page of a random model that answers in letters, and a task."""
    root = tmp_path_factory.mktemp("page")
    save_random(root / "base", CONFIG)
    export.main(["--model", str(root / "base"), "--layout", "web", "--context", "2048",
                 "--out", str(root / "web")])
    write_tasks(root / "web")
    return root / "web"


def save_random(folder: Path, config: dict[str, Any]) -> None:
    """Write a random checkpoint that answers in letters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = CausalLM(Config.from_dict(config))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=1.0 * p.shape[1] ** -0.5)
    with torch.no_grad():
        others = [i for i in range(259) if i not in PRINTABLE]
        model.model.embed_tokens.weight[others] *= 0.01
    save_file(dict(model.named_parameters()), folder / "model.safetensors")


def write_tasks(folder: Path) -> None:
    """Add a task, as a run has them."""
    (folder / "tasks.json").write_text(json.dumps(
        {"count": {"choices": [], "instruction": "Count: "}}))
    file = folder / "export.json"
    info = json.loads(file.read_text())
    info["files"]["tasks.json"] = {"bytes": 0, "sha256": ""}
    file.write_text(json.dumps(info))


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """The address at which the runtime serves a folder; Ctrl-C ends it in one line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minismoe.runtime", str(folder), "--serve", *flags], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield line.split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (130, "interrupted\n")


def says(folder: Path, text: str, count: int, name: str = "model_quantized.onnx") -> str:
    """The greedy answer of a graph by onnxruntime itself, one token a run."""
    session = ort.InferenceSession(str(folder / "onnx" / name))
    tokenizer = load_tokenizer(folder)
    new = tokenizer.encode(tokenizer.render([{"role": "user", "content": text}], True))[0]
    past = {x.name: torch.zeros([d if isinstance(d, int) else 0 for d in x.shape]).numpy()
            for x in session.get_inputs()[2:]}
    tokens, seen = [], 0
    names = [x.name.replace("present.", "past_key_values.").replace("present_", "past_")
             for x in session.get_outputs()]
    for _ in range(count):
        seen += len(new)
        found = dict(zip(names, session.run(None, {
            "input_ids": torch.tensor([new]).numpy(),
            "attention_mask": torch.ones(1, seen, dtype=torch.int64).numpy(), **past})))
        new = [int(found.pop("logits")[0, -1].argmax())]
        assert found.pop("tokens", torch.tensor(new).numpy()).ravel().tolist() == new
        past = found
        tokens += new
    return tokenizer.decode(tokens)


def test_a_web_folder_holds_what_a_browser_loads(web: Path) -> None:
    assert {f.name for f in (web / "onnx").iterdir()} == {
        f"model_{name}.onnx{part}" for name in ("quantized", "q4f16") for part in ("", "_data")}
    config = json.loads((web / "config.json").read_text())["transformers.js_config"]
    assert config["dtype"] == "q8" and config["device_config"] == {"webgpu": {"dtype": "q4f16"}}
    info = json.loads((web / "export.json").read_text())
    assert {"index.html", "worker.js", "onnx/model_q4f16.onnx"} <= info["files"].keys()
    for name in ("quantized", "q4f16"):          # the pipeline would pad others on the wrong side
        graph = onnx.load(web / "onnx" / f"model_{name}.onnx", load_external_data=False).graph
        assert {v.type.tensor_type.shape.dim[0].dim_value for v in graph.input} == {1}
    worker = (web / "worker.js").read_text()
    links = re.findall(r"https?://[^`\"']+", worker + (web / "index.html").read_text())
    assert links == ["https://cdn.jsdelivr.net/npm/@huggingface/transformers@${VERSION}/${file}"]


def test_the_server_gives_only_files_of_the_folder(web: Path) -> None:
    (web.parent / "secret").write_text("secret")
    (web / "link").symlink_to(web.parent / "secret")
    with served(web, "0") as address:
        def get(path: str, host: str = "localhost") -> tuple[int, http.client.HTTPMessage, bytes]:
            connection = http.client.HTTPConnection(address.split("/")[2], timeout=30)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

        status, headers, content = get("/")
        assert status == 200 and content == (web / "index.html").read_bytes()
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert get("/worker.js")[1]["Content-Type"] == "text/javascript"
        for path in ("/../secret", "/%2e%2e/secret", "/link", "/onnx/../../secret", "/onnx/",
                     f"/{web.parent}/secret", "/nothing", "/%00"):
            status, _, content = get(path)
            assert status in (403, 404) and b"secret" not in content.replace(b"/secret", b"")
        assert get("/", "evil.example")[0] == get("/", "[")[0] == 403
        assert get("/", address.split("/")[2])[0] == get("/", "LocalHost")[0] == 200
        port = address.rsplit(":")[-1].strip("/")
        taken = subprocess.run([sys.executable, "-m", "minismoe.runtime", str(web), "--serve",
                                port], cwd=ROOT, capture_output=True, text=True)
        assert taken.returncode == 1 and f"port {port} cannot be opened" in taken.stderr
        (web / "large").write_bytes(bytes(1 << 26))
        with socket.create_connection(("127.0.0.1", int(port))) as tab:      # closed in between
            tab.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert tab.recv(100).startswith(b"HTTP/1.0 200 OK")
            tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert get("/")[0] == 200
    (web / "link").unlink()
    (web / "large").unlink()


def test_a_folder_without_a_page_is_not_served(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "minismoe.runtime", str(tmp_path), "--serve"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "holds no index.html; export.py --layout web writes one" in done.stderr


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


@needs_browser
def test_the_page_in_a_browser(web: Path) -> None:
    """It answers as onnxruntime does, stops, opens offline, and asks no other machine."""
    vendor(web)
    with proxy() as (outside, asked), Browser(f"--proxy-server={outside}",
                                              "--proxy-bypass-list=127.0.0.1") as tab:
        with served(web) as address:
            tab.open(address)
            assert "WASM" in tab.wait_status("Ready")
            assert tab.js("crossOriginIsolated")
            assert tab.js("document.querySelector('#task').value") == "count"    # the first task
            tab.js("document.querySelector('#task').value = ''")
            tab.type("Hello")
            tab.press("Enter", 13)
            said = tab.wait_status("First token after")
            assert re.fullmatch(r"First token after [\d.]+ s, [\d.]+ tokens/s on WASM, .*", said)
            answer = tab.text(".assistant")
            assert len(answer) > 1900 and answer[:200] == says(web, "Hello", 200)

            tab.js("document.querySelector('#anew').click()")
            tab.js("document.querySelector('#task').value = 'count'")
            tab.js("document.querySelector('#text').focus()")
            tab.type("to")
            tab.click("#send")
            tab.wait("!document.querySelector('#stop').hidden")
            tab.click("#stop")
            tab.wait_status("First token after")
            stopped = tab.text(".assistant")
            assert 0 < len(stopped) < 1900 and stopped == says(web, "Count: to", len(stopped))
        tab.open(address)                    # the server is gone
        tab.wait_status("Ready")
        tab.js("document.querySelector('#task').value = ''")
        tab.type("Hello")
        tab.press("Enter", 13)
        tab.wait_status("First token after")
        assert tab.text(".assistant") == answer
        own = ("google.com", "googleapis.com", "gvt1.com", "duckduckgo.com")    # Chromium
        # An empty line is a connection that was opened ahead, and asked for nothing.
        assert not [line for line in asked if line and not any(host in line for host in own)]


@needs_browser
def test_gated_delta_nets_in_a_browser(tmp_path: Path) -> None:
    """Qwen3.5's memories go from step to step as keys and values do."""
    config = CONFIG | {
        "model_type": "qwen3_5_text", "head_dim": 64, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    save_random(tmp_path / "base", config)
    export.main(["--model", str(tmp_path / "base"), "--layout", "web", "--precision", "q8",
                 "--context", "224", "--out", str(tmp_path / "web")])
    vendor(tmp_path / "web")
    with Browser() as tab, served(tmp_path / "web") as address:
        tab.open(address)
        tab.wait_status("Ready", seconds=120)
        tab.type("Hello")
        tab.press("Enter", 13)
        tab.wait_status("First token after")
        answer = tab.text(".assistant")
        assert len(answer) > 20 and answer == says(tmp_path / "web", "Hello", len(answer))


@needs_browser
@pytest.mark.parametrize("precision, flags, setting", [
    ("fp32", (), "WASM"), pytest.param("int4", GPU, "WebGPU", marks=pytest.mark.slow)])
def test_a_graph_that_writes_one_token_a_run(web: Path, tmp_path: Path, precision: str,
                                             flags: tuple[str, ...], setting: str) -> None:
    """The same text on WebGPU as on WASM; stopped in between, and offline."""
    text = "A prompt that WebGPU reads in several steps. " * 2
    export.main(["--model", str(web.parent / "base"), "--layout", "web", "--precision",
                 precision, "--context", "160", "--out", str(tmp_path / "web")])
    vendor(tmp_path / "web")
    with Browser(*flags) as tab:
        with served(tmp_path / "web") as address:
            tab.open(address)
            assert tab.wait_status("Ready", seconds=120).startswith(f"Ready on {setting}")
            tab.type(text)
            tab.press("Enter", 13)
            assert f"on {setting}" in tab.wait_status("First token after", seconds=120)
            answer = tab.text(".assistant")
            name = "model.onnx" if precision == "fp32" else "model_q4.onnx"
            assert len(answer) > 20 and answer == says(tmp_path / "web", text, len(answer), name)
        tab.open(address)                    # the server is gone
        tab.wait_status("Ready", seconds=120)
        tab.type(text)
        tab.press("Enter", 13)
        tab.wait("document.querySelector('.assistant')?.textContent.length > 1", seconds=120)
        tab.press("Escape", 27)
        tab.wait_status("First token after")
        assert answer.startswith(tab.text(".assistant"))


@needs_browser
def test_a_gpu_without_float16_is_left_for_wasm(web: Path) -> None:
    """As Chromium's in software is; the page's graph for WebGPU has float16."""
    vendor(web)
    with served(web) as address, Browser(*GPU) as tab:
        tab.open(address)
        said = tab.wait_status("Ready")
        assert re.fullmatch(r"Ready on WASM, \d+ threads?, as this GPU has no float16", said)
        tab.js("document.querySelector('#task').value = ''")
        tab.type("Hello")
        tab.press("Enter", 13)
        tab.wait("document.querySelector('.assistant')?.textContent.length > 20")
        tab.press("Escape", 27)
        tab.wait_status("First token after")
        answer = tab.text(".assistant")
        assert answer == says(web, "Hello", len(answer))


@needs_browser
@pytest.mark.parametrize("name", ["onnx/model_quantized.onnx_data", "export.json", "worker.js"])
def test_a_missing_file_is_named(web: Path, tmp_path: Path, name: str) -> None:
    (web / name).rename(tmp_path / "away")
    vendor(web)
    try:
        with served(web) as address, Browser() as tab:
            tab.open(address)
            tab.wait("document.querySelector('#below')?.className === 'wrong'")
            said = tab.text("#status")
            assert name in said and "missing" in said and "\n" not in said
    finally:
        (tmp_path / "away").rename(web / name)
