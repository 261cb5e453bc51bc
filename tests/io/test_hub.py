"""Hub names: what is fetched, from where, and what a failure says."""

import hashlib
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import python, save_bytes_model

from minismoe.io.hub import resolve
from minismoe.model.checkpoint import load_model

FETCHED = ["config.json", "generation_config.json", "model.safetensors",
           "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
           "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE",
           "LICENSE.md", "NOTICE.txt", "USE_POLICY.md"]
LEFT = ["modeling_custom.py", "pytorch_model.bin", "model.pkl", "consolidated.safetensors",
        "original/model.safetensors", "onnx/model.onnx", "README.md", "model.gguf",
        "adapter_model.safetensors", "training_args.bin", "tokenizer.model", ".gitattributes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that a test may add files to."""
    return save_bytes_model(tmp_path / "model")


@pytest.fixture
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine that answers as the hub does, holding `folder` as org/name: its
    address, and the files that were asked for."""
    revision, asked = "0" * 40, []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, files = Path(self.path.split("?")[0]), list(folder.iterdir())
            if "tree" in path.parts:
                data = json.dumps([{"type": "file", "path": f.name, "size": f.stat().st_size,
                                    "oid": f.name} for f in files]).encode()
            elif "resolve" in path.parts:
                asked.append(path.name)
                data = (folder / path.name).read_bytes()
            elif path.is_relative_to("/api/models/org/name"):
                data = json.dumps({"id": "org/name", "sha": revision, "siblings": [
                    {"rfilename": f.name} for f in files]}).encode()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for name, value in (("Content-Length", len(data)), ("X-Repo-Commit", revision),
                                ("ETag", f'"{hashlib.sha256(data).hexdigest()}"')):
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_hubs_own_client_fetches_weights_and_text_only(hub: tuple[str, list[str]], folder: Path,
                                             tmp_path: Path) -> None:
    for name in FETCHED + LEFT:
        if "/" not in name and not (folder / name).exists():
            (folder / name).write_text("raise SystemExit('this was run')")
    address, asked = hub
    fetch = "from minismoe.io.hub import resolve\nprint(resolve('org/name'))"
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "NO_PROXY": "*"}
    fetched = python("-c", fetch, HF_HUB_OFFLINE="0", **environment)
    for name in FETCHED:
        copy = Path(fetched.stdout.strip()) / name
        assert copy.read_bytes() == (folder / name).read_bytes(), fetched.stderr
    assert {*asked} == {*FETCHED}
    count = len(asked)
    load = "from minismoe import load_model\nprint(load_model('org/name').name)"
    cached = python("-c", load, HF_HUB_OFFLINE="1", **environment)
    assert cached.stdout == "org/name\n" and len(asked) == count, cached.stderr


def test_a_folder_is_never_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path) == tmp_path
    for absent in ("./gone", "/no/such", "~/model", "gone", "a/b/c", "../up"):
        with pytest.raises(FileNotFoundError, match="no such model folder"):
            resolve(absent)


def test_a_failure_names_what_helps_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                ) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))     # it is empty
    with pytest.raises(FileNotFoundError, match="^org/name is no folder here, and the hub says: ."):
        resolve("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'minismoe\[hub\]'"):
        load_model("org/name")
