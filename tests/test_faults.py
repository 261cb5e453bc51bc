"""What goes wrong, through the scripts themselves: one line on stderr, the exit code, and the files
that were there before as they were.
"""

import contextlib
import ctypes
import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUICK, ROOT, cut, edit_tensors, exit_code, save_bytes_model, write_lines

import export
import probe
import train
from minismoe.cli.script import run_script
from minismoe.data.tokenizer import FileTokenizer
from minismoe.io.files import read_json, write_json
from minismoe.runtime import __main__ as terminal

MODEL = {"hidden_size": 64, "max_position_embeddings": 128}
SHORT = (*QUICK, "--batch-size", "8", "--dtype", "float32")
BAR = re.compile(r"^\s*$|^(evaluate|probe|train|round)[^:]*: " r".*(\d+/\d+|\d+%|/s|sample)")


@dataclass
class World:
    """Folders that work, which a test may spoil."""

    model: Path
    data: Path
    run: Path
    export: Path

    @property
    def root(self) -> Path:
        return self.model.parent

    @property
    def new(self) -> Path:
        return self.root / "new"

    @property
    def inputs(self) -> tuple[str, ...]:
        return "--model", str(self.model), "--data", str(self.data)

    def given(self, main: Any, *flags: str) -> tuple[object, ...]:
        """What a script reads: a run if it exports, else inputs and these flags."""
        return (self.run,) if main is export.main else (*self.inputs, *flags)

    def fails(self, main: Any, *args: object, says: str) -> None:
        """A script ends with 1 and one line that `says` so, and leaves all files as they were."""
        before = contents(self.root)
        code, err = script(main, *args)
        assert code == 1 and re.fullmatch(rf"error: .*{says}.*", err), err
        assert contents(self.root) == before


def numbered(count: int, end: str = "") -> list[tuple[str, str]]:
    return [(f"say {i}{end}", f"N{i}{end}") for i in range(count)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    world = World(root / "model", root / "data", root / "run", root / "export")
    save_bytes_model(world.model, **MODEL)
    for name, count in (("train", 24), ("test", 3)):
        write_lines(world.data / "t" / f"{name}.jsonl", numbered(count))
    assert script(train.main, *world.inputs, *SHORT, "--out", world.run) == (0, "")
    assert script(export.main, world.run, "--out", world.export) == (0, "")
    return world


@pytest.fixture
def world(original: World, tmp_path: Path) -> World:
    """A copy, whose run names the copied model and data."""
    root = Path(shutil.copytree(original.model.parent, tmp_path / "w"))
    copied = World(root / "model", root / "data", root / "run", root / "export")
    edit(copied.run / "config.json", lambda c: c["arguments"].update(
        model=str(copied.model), data=str(copied.data)))
    return copied


def script(main: Callable[[Sequence[str]], None], *args: object) -> tuple[int, str]:
    """Exit code and stderr without its bars, of a script's main as the command line calls it."""
    err, command = io.StringIO(), terminal.run if main is terminal.main else partial(
        run_script, main)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = exit_code(command, *args)
    return code, "\n".join(line for line in err.getvalue().split("\n") if not BAR.match(line))


def contents(*folders: Path) -> dict[Path, bytes]:
    """The files in folders; of a link, where it points."""
    return {p: os.fsencode(os.readlink(p)) if p.is_symlink() else p.read_bytes()
            for folder in folders for p in folder.rglob("*") if p.is_symlink() or p.is_file()}


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    value = read_json(file)
    change(value)
    write_json(file, value)


# Disks and permissions

@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond that many bytes, as on a disk that is full but for them."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("main, size", [
    (probe.main, 200), (train.main, 2000), (train.main, 10_000), (export.main, 4000),
    (export.main, 100_000)], ids=["probe", "train", "train later", "export", "export later"])
def test_a_limit_on_file_size_ends_in_one_line_and_changes_no_file(
        world: World, main: Any, size: int) -> None:
    before, out = contents(world.root), world.new
    more = ("--precision", "fp32") if main is export.main else ()
    with files_up_to(size):
        code, err = script(main, *world.given(main), *more, "--out", out)
    assert code == 1 and re.fullmatch("error: .*(ulimit|too large|os error 27).*", err)
    now = contents(world.root)
    assert {p: content for p, content in now.items() if p in before} == before
    assert not [p for p in now if ".tmp" in str(p)]
    assert main is not export.main or not out.exists()


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """Root goes without what lets it read and write everything."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0 and sys.platform != "linux":
        pytest.skip("permissions mean nothing here")
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        assert libc.capget(header, sets) == 0
        effective = sets[0]
        sets[0] &= ~(1 << 1 | 1 << 2)                # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        if os.geteuid() == 0:
            sets[0] = effective
            assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("main", [train.main, probe.main, export.main],
                         ids=["train", "probe", "export"])
def test_missing_permissions_are_named_with_their_path(world: World, main: Any) -> None:
    out, what = world.new, world.given(main)
    out.mkdir(mode=0o500)
    with permissions_count():
        code, err = script(main, *what, "--out", out / "x")
        assert code == 1 and re.fullmatch(
            f"error: {out / 'x'} cannot be written: {out} is no folder that can be written", err)
        world.model.chmod(0)
        code, err = script(main, *what, "--out", out.parent / "other")
        world.model.chmod(0o700)
        assert code == 1 and re.fullmatch("error: .*model/config.json: Permission denied.*", err)
    assert not list(out.iterdir())


def test_a_read_only_model_and_data_are_enough(world: World) -> None:
    paths = [p for folder in (world.model, world.data) for p in (folder, *folder.rglob("*"))]
    before, out = contents(world.model, world.data), world.new
    for path in paths:
        path.chmod(0o500 if path.is_dir() else 0o400)
    with permissions_count():
        assert script(train.main, *world.inputs, *SHORT, "--out", out) == (0, "")
        assert script(export.main, out, "--out", out / "onnx") == (0, "")
    for path in paths:
        path.chmod(0o700)
    assert contents(world.model, world.data) == before


@pytest.mark.skipif(sys.platform != "linux", reason="pipes end otherwise there")
@pytest.mark.parametrize("name, to, says", [
    ("train.py", "", "nobody reads the output any more"),
    ("-m minismoe.runtime", "", "nobody reads the output any more"),
    ("-m minismoe.runtime", "> /dev/full ", "No space left"), ("-m minismoe.runtime", "2>&1 ", "")])
def test_output_that_cannot_be_written_ends_in_one_line(world: World, name: str, to: str,
                                                        says: str) -> None:
    """Where nothing of stdout is read, and where stderr goes the same way."""
    what = [*world.inputs, "--show", "9"] if name == "train.py" else [world.export, "a"]
    command = " ".join([sys.executable, "-u", name, *map(str, what)])
    done = subprocess.run(["bash", "-c", f"{command} {to}| true; exit ${{PIPESTATUS[0]}}"],
                          text=True, capture_output=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not says or done.stderr.splitlines()[-1].startswith(f"error: {says}")


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused_by_name(world: World, device: str) -> None:
    with contextlib.suppress(AssertionError, RuntimeError):    # what torch says differs by device
        torch.empty(1, device=device)
        pytest.skip(f"{device} is there")
    for main in (train.main, probe.main, export.main):
        world.fails(main, *world.given(main), "--device", device, "--out", world.new,
                    says=f"torch finds no device {device} here")


def test_a_loss_that_is_not_finite_ends_the_run_without_an_adapter(world: World) -> None:
    edit_tensors(world.model / "model.safetensors",
                 lambda t: t["model.layers.1.mlp.down_proj.weight"].fill_(math.inf))
    code, err = script(train.main, *world.inputs, *SHORT, "--out", world.new, "--allocation",
                       world.run / "allocation.json")
    assert code == 1 and re.fullmatch("error: the loss is nan and the norm .* nan at step 1, on "
                                      "the training lines t .*--lr.*", err)
    assert not (world.new / "adapter").exists() and not (world.new / "results.json").exists()


# Models, data and runs

def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << 4
    file.write_bytes(data)


# One input of each kind that a script reads; the rooms' own tests, and fuzz.py, have the others.
@pytest.mark.parametrize("main, spoil, says", [
    (train.main, lambda w: cut(w.model / "model.safetensors"), "model.*no valid safetensors file"),
    (probe.main, lambda w: edit(w.model / "config.json", lambda c: c.update(
        num_hidden_layers=10 ** 12)), "model.*num_hidden_layers = 1000000000000"),
    (export.main, lambda w: flip(w.run / "adapter" / "adapter.safetensors", -5),
     "is damaged: its hash"),
    (train.main, lambda w: (w.data / "t" / "train.jsonl").write_bytes(b'{"\\u001b[31m": 1}'),
     "train.jsonl:1: .* it has \ufffd.31m"),
    (train.main, lambda w: (w.data / "t" / "test.jsonl").write_bytes(b""),
     "task t has no test line: add a test.jsonl, or write ")])
def test_a_broken_input_is_refused(world: World, main: Any, spoil: Callable[[World], object],
                                   says: str) -> None:
    spoil(world)
    world.fails(main, *world.given(main), "--out", world.new, says=says)


@pytest.mark.parametrize("main, change, says", [
    (export.main, lambda c: c.pop("arguments"), "config.json is not of a run: "),
    (export.main, lambda c: c["arguments"].update(max_length=[9]), "argument --max-length: .*9"),
    (export.main, lambda c: c["arguments"].pop("max_length"), "is of another version of minismoe, "
     r"with other flags \(max_length\): train again"),
    (train.main, lambda c: c["arguments"].update(epochs="x"), "argument --epochs: .*'x'"),
    (train.main, lambda c: c["arguments"].update(recompute="y"), "argument --recompute: .*'y'"),
    (train.main, lambda c: c["arguments"].update(model=5), "argument --model: 5 is no str"),
    (train.main, lambda c: c["arguments"].update(help=True), r"other flags \(help\)")])
def test_a_run_with_a_hostile_or_older_config_is_refused(
        world: World, main: Any, change: Callable[[Any], object], says: str) -> None:
    edit(world.run / "config.json", change)
    (world.run / "results.json").unlink()
    flags = [world.run] if main is export.main else ["--resume", "--out", world.run]
    world.fails(main, *flags, says=says)


def test_one_example_trains(world: World) -> None:
    write_lines(world.data / "t" / "train.jsonl", numbered(1, "another"))
    assert script(train.main, *world.inputs, *SHORT, "--out", world.new) == (0, "")
    assert len((world.new / "metrics.jsonl").read_text().splitlines()) == 1


def test_odd_names_of_tasks_are_no_paths_and_no_terminal_commands(world: World) -> None:
    """No name becomes a path, and none reaches the terminal as a command to it."""
    names = ["-", "a..", "\x1b[31mred a", "nul.x", "t\u202etxt"]
    shutil.rmtree(world.data / "t")
    for name in names:
        write_lines(world.data / f"{name}.jsonl", numbered(6, "\x1b[31m\x9b\r\u202e"))
    before, out = contents(world.root), world.new
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for main, *args in ((train.main, *world.inputs, *SHORT, "--out", out),
                            (train.main, *world.inputs, "--show", "2"),
                            (export.main, out, "--out", out / "onnx")):
            assert exit_code(partial(run_script, main), *args) == 0
    assert all(c.isprintable() or c == "\n" for c in shown.getvalue())
    now = contents(world.root)
    assert {p: content for p, content in now.items() if out not in p.parents} == before
    assert sorted(read_json(out / "results.json")["tasks"]) == sorted(names)
    for name in names:
        assert script(terminal.main, out / "onnx", "a", f"--task={name}", "--max-tokens", "1"
                      )[0] == 0


# Exports

@pytest.mark.parametrize("place", ["../secret", "/SECRET"])
def test_external_data_outside_of_the_folder_is_refused(world: World, place: str) -> None:
    """A graph may name any file as its weights; what is outside is not read."""
    import onnx

    secret = shutil.copyfile(world.export / "model.onnx.data", world.root / "secret")
    graph = onnx.load(world.export / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place.replace("/SECRET", str(secret))
    onnx.save(graph, world.export / "model.onnx")
    content = (world.export / "model.onnx").read_bytes()
    edit(world.export / "export.json", lambda e: e["files"].update({"model.onnx": {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}))
    world.fails(terminal.main, world.export, "hello", "--verify",
                says="onnxruntime cannot open .*model.onnx")


def test_invalid_unicode_is_read_with_question_marks(world: World, bpe: Path) -> None:
    tokenizer = FileTokenizer(bpe)
    for odd in ("\udcff", "a\ud83d"):                     # of argv, and of a JSON string
        assert script(terminal.main, world.export, odd, "--max-tokens", "2")[0] == 0
        assert tokenizer.decode(tokenizer.encode(odd)[0]) == re.sub("[\ud800-\udfff]", "?", odd)


def test_no_network_unless_a_hub_name_is_given(world: World,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def connect(*args: object, **_: object) -> None:
        asked.append(args)
        raise OSError("no network")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(f"socket.socket.{name}", connect, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    out = world.new
    assert script(train.main, *world.inputs, *SHORT, "--out", out) == (0, "")
    assert script(export.main, out, "--out", out / "onnx") == (0, "")
    assert script(terminal.main, out / "onnx", "a", "--max-tokens", "2", "--verify") == (0, "")
    for place in ("file:///etc", "https://example.org/x"):           # test_hub.py has more
        world.fails(train.main, "--model", place, "--data", world.data,
                    says=f"no such model folder: {place}")
    assert not asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert script(train.main, "--model", "org/name", "--data", world.data)[0] == 1 and asked
