"""`--serve`: the files of a folder with a page, to browsers of this machine alone."""

import http.client
import re
import shutil
from email.message import Message
from pathlib import Path

import pytest
from exported import command, describe, started
from tiny import python


@pytest.fixture
def web(folders, tmp_path) -> Path:
    """An exported folder with a page, and files that are not for browsers."""
    folder = shutil.copytree(folders["ort"], tmp_path / "web")
    (folder / "index.html").write_text("a page")
    (folder / "page.js").write_text("a script")
    describe(folder)
    return folder


def port_of(line: str) -> int:
    return int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", line)[1])


def test_browsers_of_this_machine_get_files_of_the_folder(web, signals) -> None:
    (web.parent / "secret").write_text("secret")
    with started(web, "0") as (line, log):
        for hidden in ".env", ".git/config", "vendor/.env":
            (web / hidden).parent.mkdir(exist_ok=True)
            (web / hidden).write_text("secret")
        (web / "link").symlink_to(web.parent / "secret")

        def get(path: str, host: str = "localhost") -> tuple[int, Message, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port_of(line), timeout=30)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

        status, headers, content = get("/")
        assert (status, content) == (200, b"a page")
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-cache"
        assert get("/page.js")[1]["Content-Type"].startswith("text/javascript")
        for path in ("/../secret", "/link", "/vendor/", "/nothing", "/.env", "/.git/config",
                     "/vendor/.env", "/%2eenv", "/vendor/../.env"):
            status, _, content = get(path)
            assert status == 404 and b"secret" not in content
        assert get("/", "evil.example")[0] == get("/", "[")[0] == 403
        assert get("/", f"127.0.0.1:{port_of(line)}")[0] == get("/", "LocalHost")[0] == 200
    assert not log


def test_the_port_is_the_same_unless_it_is_taken(web, signals) -> None:
    """Browsers keep a model by its address."""
    with started(web) as one, started(web) as other:
        first, second = (port_of(line) for line, _ in (one, other))
        assert 8471 <= first < second < 8571
        taken = python("-m", "minismoe.runtime", web, "--serve", first)
        assert taken.returncode == 1 and re.fullmatch(
            f"error: port {first} cannot be opened: .*\n", taken.stderr)


def test_a_folder_is_checked_before_it_is_served(folders, web, tmp_path) -> None:
    for where, said in (tmp_path, "no export.json"), (folders["ort"], "has no page; export.py"):
        done = command(where, "--serve", "0")
        assert done.returncode == 1 and re.fullmatch(f"error: .*{said}.*\n", done.stderr)
    flipped = (web / "model.onnx.data").read_bytes()[:-1] + b"x"
    for name, content, flags, says in (("model.onnx.data", flipped, ["--verify"], "hash differs"),
                                       ("model.onnx", b"cut", [], "it was cut or changed")):
        (web / name).write_bytes(content)
        done = command(web, "--serve", "0", *flags)
        assert done.returncode == 1 and says in done.stderr
