"""What goes wrong, through the scripts themselves: one line on stderr, the exit code, and the files
that were there before as they were.
"""

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import ROOT, cut, edit_tensors, exit_code, python, save_bytes_model

import export
import probe
import train
from minismoe.cli.script import run_script
from minismoe.io.text import error_line
from minismoe.method import experts
from minismoe.model import checkpoint
from minismoe.runtime import __main__ as terminal

MODEL = {"hidden_size": 64, "max_position_embeddings": 128}
SHORT = ("--samples", "2", "--epochs", "1", "--batch-size", "8", "--dtype", "float32")
Q = "model.layers.0.self_attn.q_proj"
BAR = re.compile(r"^\s*$|^(evaluate|probe|train|freeze|round)[^:]*: "
                 r".*(\d+/\d+|\d+%|/s|sample)")


@dataclass
class World:
    """Folders that work, which a test may spoil."""

    model: Path
    data: Path
    run: Path
    export: Path

    @property
    def inputs(self) -> tuple[str, ...]:
        return "--model", str(self.model), "--data", str(self.data)


def lines(count: int, end: str = "") -> str:
    return "".join(json.dumps({"prompt": f"say {i}{end}", "completion": f"N{i}{end}"}) + "\n"
                   for i in range(count))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    world = World(root / "model", root / "data", root / "run", root / "export")
    save_bytes_model(world.model, **MODEL)
    (world.data / "t").mkdir(parents=True)
    for name, count in (("train", 24), ("test", 3)):
        (world.data / "t" / f"{name}.jsonl").write_text(lines(count))
    assert script(train.main, *world.inputs, *SHORT, "--out", world.run) == (0, "")
    assert script(export.main, world.run, "--out", world.export) == (0, "")
    return world


@pytest.fixture
def world(original: World, tmp_path: Path) -> World:
    """A copy, whose run names the copied model and data."""
    root = Path(shutil.copytree(original.model.parent, tmp_path / "w"))
    copied = World(root / "model", root / "data", root / "run", root / "export")
    config = json.loads((copied.run / "config.json").read_text())
    config["arguments"] |= {"model": str(copied.model), "data": str(copied.data)}
    (copied.run / "config.json").write_text(json.dumps(config))
    return copied


def script(main: Callable[[Sequence[str]], None], *args: object) -> tuple[int, str]:
    """Exit code and stderr without its bars, of a script's main as the command line calls it."""
    err, command = io.StringIO(), terminal.run if main is terminal.main else partial(
        run_script, main)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = exit_code(command, *args)
    return code, "\n".join(line for line in err.getvalue().split("\n") if not BAR.match(line))


def hashes(*folders: Path) -> dict[Path, str]:
    """What lies in folders, symbolic links as themselves."""
    return {p: os.readlink(p) if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest()
            for folder in folders for p in sorted(folder.rglob("*")) if not p.is_dir()}


def fails(main: Callable[[Sequence[str]], None], *args: object, says: str, folder: Path) -> None:
    """It ends with 1 and one line that `says` so, and leaves everything in `folder` as it was."""
    before = hashes(folder)
    code, err = script(main, *args)
    assert code == 1 and re.fullmatch(rf"error: .*{says}.*", err), err
    assert hashes(folder) == before


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


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
    before, out = hashes(world.model.parent), world.run.parent / "new"
    what = ([world.run, "--precision", "fp32"] if main is export.main else
            [*world.inputs, *SHORT[:2]])
    with files_up_to(size):
        code, err = script(main, *what, "--out", out)
    assert code == 1 and re.fullmatch("error: .*(ulimit|too large|os error 27).*", err)
    now = hashes(world.model.parent)
    assert {p: h for p, h in now.items() if p in before} == before
    assert not [p for p in now if ".tmp" in str(p)]
    assert main is not export.main or not out.exists()


def test_a_full_disk_ends_in_one_line_and_leaves_no_part_of_a_file(
        world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small tmpfs, where one can be mounted; else only the writers of Python are made to fail."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode == 0
    if not mounted:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, "fsync", full)
    # What else runs fills it after an export has seen that there is room.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 ** 9))
    try:
        for name, main, *args in (("run", train.main, *world.inputs, *SHORT),
                                  ("onnx", export.main, world.run)):
            before = hashes(world.model.parent)
            code, err = script(main, *args, "--out", disk / name)
            assert code == 1 and re.fullmatch("error: .*([Nn]o space left|os error 28).*", err)
            assert main is not export.main or str(disk / name) in err
            now = hashes(world.model.parent)
            assert {p: h for p, h in now.items() if p.parents[1] != disk} == before
            assert not [p for p in disk.rglob("*") if ".tmp" in p.name]
        assert not (disk / "onnx").exists()
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


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
    out = world.run.parent / "new"
    what = [world.run] if main is export.main else [*world.inputs, *SHORT[:2]]
    out.mkdir(mode=0o500)
    with permissions_count():
        code, err = script(main, *what, "--out", out / "x")
        assert code == 1 and re.fullmatch(r"error: .*new/\.?x.*: Permission denied: choose .*", err)
        world.model.chmod(0)
        code, err = script(main, *what, "--out", out / "x")
        world.model.chmod(0o700)
        assert code == 1 and re.fullmatch("error: .*model/config.json: Permission denied.*", err)
    assert not list(out.iterdir())


def test_a_read_only_model_and_data_are_enough(world: World) -> None:
    paths = [p for folder in (world.model, world.data) for p in (folder, *folder.rglob("*"))]
    before, out = hashes(world.model, world.data), world.run.parent / "new"
    for path in paths:
        path.chmod(0o500 if path.is_dir() else 0o400)
    with permissions_count():
        assert script(train.main, *world.inputs, *SHORT, "--out", out) == (0, "")
        assert script(export.main, out, "--out", out / "onnx") == (0, "")
    for path in paths:
        path.chmod(0o700)
    assert hashes(world.model, world.data) == before


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
@pytest.mark.parametrize("name, closed", [
    ("train.py", ""), ("-m minismoe.runtime", ""), ("-m minismoe.runtime", "2>&1 "),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("train.py", "2>&1 "), ("probe.py", ""), ("export.py", ""), ("export.py", "2>&1 ")))])
def test_a_closed_pipe_ends_without_a_traceback(world: World, name: str, closed: str) -> None:
    """Where nothing of stdout is read, and where stderr goes the same way."""
    out = world.run.parent / "new"
    what = {"train.py": [*world.inputs, *SHORT, "--out", out], "export.py": [world.run, "--out",
            out], "probe.py": [*world.inputs, "--out", out]}.get(name, [world.export, "a"])
    command = " ".join([sys.executable, "-u", name if name[0] == "-" else str(ROOT / name),
                        *map(str, what)])
    done = subprocess.run(["bash", "-c", f"{command} {closed}| true; exit ${{PIPESTATUS[0]}}"],
                          text=True, capture_output=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    if not closed:
        *_, said = [x for x in re.split(r"[\r\n]", done.stderr) if not BAR.match(x)]
        assert said.startswith("error: nobody reads the output any more")


def test_output_to_a_full_device_fails_in_one_line(world: World) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "minismoe.runtime", world.export, "a"],
                              text=True, stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
    assert done.returncode == 1 and re.fullmatch("error: No space left .*\n", done.stderr)


@pytest.mark.parametrize("raised", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 1 GB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate "
                 "memory: you tried to allocate 1 bytes"),
    MemoryError()], ids=lambda e: str(e)[:4])
def test_out_of_memory_names_the_flags_that_help(world: World, monkeypatch: pytest.MonkeyPatch,
                                                 raised: Exception) -> None:
    def gradients(*_: object) -> None:
        raise raised
    monkeypatch.setattr("minismoe.training.loop.Trainer.gradients", gradients)
    fails(train.main, *world.inputs, *SHORT, "--out", world.run.parent / "new",
          folder=world.model.parent / "model",
          says="out of memory.*--micro-batch-size.*--max-length.*--recompute.*--base-bits")


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused_by_name(world: World, device: str) -> None:
    with contextlib.suppress(AssertionError, RuntimeError):    # what torch says differs by device
        torch.empty(1, device=device)
        pytest.skip(f"{device} is there")
    for main, flags in ((train.main, SHORT), (probe.main, ()), (export.main, ())):
        inputs = (world.run,) if main is export.main else world.inputs
        fails(main, *inputs, *flags, "--device", device, "--out", world.run.parent / "new",
              folder=world.model.parent, says=f"torch finds no device {device} here")


def test_the_out_of_memory_error_of_torch_on_a_cpu_is_recognised() -> None:
    """The sentence that torch really says here is one that is known, and those of GPUs are."""
    with pytest.raises(RuntimeError) as said:
        torch.empty(1 << 60, dtype=torch.uint8)
    for text in (str(said.value), "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
                 "Invalid buffer size: 24.00 GiB"):              # of cuBLAS and MPS
        line = error_line(RuntimeError(text))
        assert "--micro-batch-size" in line and "bfloat16" not in line   # slow on many CPUs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_without_an_adapter(
        world: World, value: float) -> None:
    edit_tensors(world.model / "model.safetensors",
                 lambda t: t["model.layers.1.mlp.down_proj.weight"].fill_(value))
    out = world.run.parent / "new"
    fails(train.main, *world.inputs, *SHORT, "--out", out, "--allocation",
          world.run / "allocation.json", folder=world.run,
          says="the loss is nan and the norm .* nan at step 1, on the training lines t .*--lr")
    assert not (out / "adapter").exists() and not (out / "results.json").exists()


# Checkpoints

def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << 4
    file.write_bytes(data)


def config(**change: Any) -> Callable[[World], object]:
    return lambda w: edit(w.model / "config.json", lambda c: c.update(change))


def shard(place: str) -> Callable[[World], object]:
    """An index in place of the weights, which names another file."""
    def spoil(world: World) -> None:
        (world.model / "model.safetensors").unlink()
        (world.model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": place}}))
    return spoil


# One input of each kind that a script reads; the rooms' own tests, and fuzz.py, have the others.
# Name -> the script, what spoils its input, its arguments, and what it says.
BROKEN: dict[str, tuple[Any, Callable[[World], object], Callable[[World], Any], str]] = {
    "a checkpoint": (train.main, lambda w: cut(w.model / "model.safetensors"),
                     lambda w: w.inputs, "model.*no valid safetensors file"),
    "a configuration": (probe.main, config(num_hidden_layers=10 ** 12), lambda w: w.inputs,
                        "model.*num_hidden_layers = 1000000000000"),
    "a shard elsewhere": (train.main, shard("../data/x.safetensors"), lambda w: w.inputs,
                          "index.json points out of its folder"),
    "an adapter": (export.main, lambda w: flip(w.run / "adapter" / "adapter.safetensors", -5),
                   lambda w: [w.run], "is damaged: its hash"),
    "a rank": (train.main, lambda w: (w.model.parent / "a.json").write_text(json.dumps(
        {"format": "minismoe.allocation/1", "rank": 65, "experts": {Q: 1}})),
        lambda w: [*w.inputs, "--allocation", w.model.parent / "a.json"],
        r"rank 65 is more than the matrix itself has: .*q_proj \[64, 64\]"),
    "control characters": (train.main, lambda w: (w.data / "t" / "train.jsonl").write_bytes(
        b'{"\\u001b[31m": 1}'), lambda w: w.inputs, "train.jsonl:1: .* it has \ufffd.31m"),
    "a long prompt": (train.main, lambda w: (w.data / "t" / "train.jsonl").write_text(json.dumps(
        {"prompt": "x" * 500, "completion": "y"})), lambda w: w.inputs,
        "no example of t keeps a supervised token within 128 tokens "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_input_is_refused(world: World, name: str) -> None:
    main, spoil, inputs, says = BROKEN[name]
    spoil(world)
    fails(main, *inputs(world), "--out", world.run.parent / "new", says=says,
          folder=world.model.parent)


def test_links_as_the_hub_makes_them_are_followed(world: World) -> None:
    """A checkpoint in the hub's cache is links to ../../blobs; they are of our own making."""
    snapshot, blobs = (world.model.parent / "models--a" / name for name in ("snapshots/1", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (world.model / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert script(probe.main, "--model", snapshot, "--data", world.data, "--out",
                  world.run.parent / "new") == (0, "")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(world: World, bpe: Path) -> None:
    shutil.copyfile(bpe, world.model / "tokenizer.json")
    fails(train.main, *world.inputs, "--out", world.run.parent / "new", folder=world.model.parent,
          says="tokenizer.json has 3.. tokens, and the model only 259")


# Adapters, allocations and runs

def link_out(file: Path) -> None:
    """Move a file out of its folder, and leave a link."""
    other = file.parents[2] / file.name
    file.rename(other)
    file.symlink_to(other)


def test_top_k_over_the_experts_takes_them_all(world: World) -> None:
    file = world.model.parent / "a.json"
    file.write_text(json.dumps({"format": "minismoe.allocation/1", "top_k": 9, "experts": {Q: 2}}))
    out = world.run.parent / "new"
    assert script(train.main, *world.inputs, *SHORT, "--allocation", file, "--out", out) == (0, "")
    model = checkpoint.load_model(world.model)
    checkpoint.load_adapter(model, out / "adapter")
    assert experts.expert_layers(model)[Q].top_k == 2


@pytest.mark.parametrize("change, says", [
    (lambda c: c.pop("arguments"), "config.json is not of a run: "),
    (lambda c: c["arguments"].update(max_length=[9]), r"config.json: argument --max-length: .*9"),
    (lambda c: c["arguments"].pop("limit_valid"), "lacks limit_valid: another version of minismoe "
     "made this run, so train again with this one"),
    (lambda c: c["arguments"].update(tasks="sum"), "has tasks, which is no flag: another version")])
def test_exporting_a_run_with_a_wrong_or_older_config_is_refused(
        world: World, change: Callable[[Any], object], says: str) -> None:
    edit(world.run / "config.json", change)
    fails(export.main, world.run, "--out", world.run.parent / "new", folder=world.model.parent,
          says=says)


@pytest.mark.parametrize("change, says", [
    (lambda c: c["arguments"].update(epochs="x"), "config.json: argument --epochs: .*'x'"),
    (lambda c: c["arguments"].update(recompute="y"), "config.json: argument --recompute: .*'y'"),
    (lambda c: c["arguments"].update(model=5), "no such model folder: 5"),
    (lambda c: c["arguments"].update(help=True), "config.json has help, which is no flag")])
def test_resuming_a_run_with_a_hostile_config_is_refused(world: World,
                                                         change: Callable[[Any], object],
                                                         says: str) -> None:
    (world.run / "results.json").unlink()
    edit(world.run / "config.json", change)
    fails(train.main, "--resume", "--out", world.run, folder=world.run, says=says)


# Data

def test_unusable_test_lines_are_refused(world: World) -> None:
    test, out = world.data / "t" / "test.jsonl", world.run.parent / "new"
    test.write_bytes(b"")
    fails(train.main, *world.inputs, *SHORT, "--out", out, folder=world.run,
          says="task t has no test line: add a test.jsonl, or write ")


def test_one_example_trains_but_no_test_line_is_refused(world: World) -> None:
    (world.data / "t" / "train.jsonl").write_text(lines(1, "another"))
    out = world.run.parent / "new"
    assert script(train.main, *world.inputs, *SHORT, "--out", out) == (0, "")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    shutil.rmtree(world.data / "t")
    (world.data / "t.jsonl").write_text(lines(1))
    fails(train.main, *world.inputs, *SHORT, "--out", out.parent / "2", folder=world.run,
          says="task t has no test line: .* at least two lines into its only file")


@pytest.mark.parametrize("tasks, says", [
    ("../model", "has no task ../model; it has t"), ("..", r"has no task \.\.; it has t"),
    ("a/b", "has no task a/b"), ("t,t", "named twice: t, t")])
def test_wrong_names_of_tasks_are_refused(world: World, tasks: str, says: str) -> None:
    fails(train.main, *world.inputs, "--only-tasks", tasks, "--out", world.run.parent / "new",
          says=says, folder=world.model.parent)


def test_a_task_that_is_both_file_and_folder_is_refused(world: World) -> None:
    (world.data / "t.jsonl").write_text(lines(3))
    fails(train.main, *world.inputs, "--out", world.run.parent / "new", folder=world.model.parent,
          says="data holds t twice, as a folder and as a file")


def test_odd_names_of_tasks_are_no_paths_and_no_terminal_commands(world: World) -> None:
    """No name becomes a path, and none reaches the terminal as a command to it."""
    names = ["-", "..", "\x1b[31mred a", "nul.x", "t\u202etxt"]
    shutil.rmtree(world.data / "t")
    for name in names:
        (world.data / f"{name}.jsonl").write_text(lines(6, "\x1b[31m\x9b\r\u202e"))
    before, out = hashes(world.model.parent), world.run.parent / "new"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for main, *args in ((train.main, *world.inputs, *SHORT, "--out", out),
                            (train.main, *world.inputs, "--show", "2"),
                            (export.main, out, "--adapters", "--out", out / "onnx")):
            assert exit_code(partial(run_script, main), *args) == 0
    assert all(c.isprintable() or c == "\n" for c in shown.getvalue())
    now = hashes(world.model.parent)
    assert {p: h for p, h in now.items() if out not in p.parents} == before
    assert sorted(json.loads((out / "results.json").read_text())["tasks"]) == sorted(names)
    for name in names:
        assert script(terminal.main, out / "onnx", "a", f"--task={name}", "--max-tokens", "1"
                      )[0] == 0


# Exports

EXPORTS: dict[str, tuple[Callable[[Path], object], str]] = {         # more in tests/runtime
    "a bit of the chat": (lambda f: flip(f / "chat_template.jinja", 9),
                          "is not what was exported: its hash"),
    "an address": (lambda f: edit(f / "export.json", lambda e: e["files"].update(
        {"file:///etc/passwd": {}})), "is no plain file name"),
    "a link out": (lambda f: link_out(f / "model.onnx.data"), "leads out of"),
    "a large cache": (lambda f: edit(f / "export.json", lambda e: e.update(context=1 << 40)),
                      "not understood"),
    "deep": (lambda f: (f / "export.json").write_text("[" * 100_000), "not valid JSON"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_broken_export_is_refused(world: World, name: str) -> None:
    spoil, says = EXPORTS[name]
    spoil(world.export)
    fails(terminal.main, world.export, "hello", "--verify", says=says, folder=world.model.parent)


@pytest.mark.parametrize("place", ["../secret", "/SECRET", "file:///SECRET", "link", "missing"])
def test_external_data_outside_of_the_folder_is_refused(world: World, place: str) -> None:
    """A graph may name any file as its weights; what is outside is not read."""
    import onnx

    secret = world.export.parent / "secret"
    shutil.copyfile(world.export / "model.onnx.data", secret)
    if place == "link":
        (world.export / "link").symlink_to(secret)
    graph = onnx.load(world.export / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place.replace("/SECRET", str(secret))
    onnx.save(graph, world.export / "model.onnx")
    content = (world.export / "model.onnx").read_bytes()
    edit(world.export / "export.json", lambda e: e["files"].update({"model.onnx": {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}))
    fails(terminal.main, world.export, "hello", "--verify", folder=world.model.parent,
          says="link that leads out" if place == "link" else "onnxruntime cannot open .*model.onnx")


@pytest.mark.parametrize("args, says", [
    (("x" * 200,),
     "the prompt has .* tokens, which leaves no room in the context of 128: shorten it"),
    (("",), "the prompt is empty"),
    (("a", "--temperature", "1", "--top-k", "65"), "top_k 65"),
    (("a", "--task", "../x"), "no adapter '../x'")])
def test_wrong_requests_are_refused(world: World, args: tuple[str, ...], says: str) -> None:
    fails(terminal.main, world.export, *args, says=says, folder=world.export)


def test_invalid_unicode_is_read_with_question_marks(world: World, bpe: Path) -> None:
    from minismoe.data.tokenizer import FileTokenizer
    tokenizer = FileTokenizer(bpe)
    for odd in ("\udcff", "a\ud83d"):                     # of argv, and of a JSON string
        assert script(terminal.main, world.export, odd, "--max-tokens", "2")[0] == 0
        ids, starts = tokenizer.encode(odd)
        assert tokenizer.decode(ids) == re.sub("[\ud800-\udfff]", "?", odd)
        assert len(ids) == len(starts)
    done = python("-m", "minismoe.runtime", world.export, os.fsdecode(b"\xff\xfe"),
                  "--max-tokens", "2")
    assert done.returncode == 0, done.stderr


def test_control_characters_of_files_do_not_reach_the_terminal(world: World) -> None:
    """In what is said of a broken file, its own words are shown and not obeyed."""
    evil = "\x1b]0;owned\x07\r\x9b2J\u202e"
    edit(world.model / "config.json", lambda c: c.update(model_type=evil, hidden_act=evil))
    code, err = script(train.main, *world.inputs, "--out", world.run.parent / "new")
    assert code == 1 and all(c.isprintable() for c in err)
    file = world.model.parent / "a.json"
    file.write_text(json.dumps({evil: 1}))
    save_bytes_model(world.model.parent / "good", **MODEL)
    code, err = script(train.main, "--model", world.model.parent / "good", "--data", world.data,
                       "--allocation", file, "--out", world.run.parent / "new")
    assert code == 1 and "\ufffd]0;owned" in err and all(c.isprintable() for c in err)


def test_no_network_unless_a_hub_name_is_given(world: World,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def connect(*args: object, **_: object) -> None:
        asked.append(args)
        raise OSError("no network")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(f"socket.socket.{name}", connect, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    out = world.run.parent / "new"
    assert script(train.main, *world.inputs, *SHORT, "--out", out) == (0, "")
    assert script(export.main, out, "--out", out / "onnx") == (0, "")
    assert script(terminal.main, out / "onnx", "a", "--max-tokens", "2", "--verify") == (0, "")
    for place in ("file:///etc", "https://example.org/x", "../x/y", "~/x", "/nowhere", "x"):
        code, err = script(train.main, "--model", place, "--data", world.data)
        assert code == 1 and err == f"error: no such model folder: {place}"
    assert not asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert script(train.main, "--model", "org/name", "--data", world.data)[0] == 1 and asked
