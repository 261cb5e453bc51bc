"""Several processes against one, and what is left when one of them is killed."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, needs_other_device

import train
from minismoe.io.files import read_json
from minismoe.training import distributed

# The last micro-batch of an epoch has fewer examples than four processes.
FLAGS = ["--samples", "20", "--batch-size", "6", "--micro-batch-size", "4", "--epochs", "2",
         "--dtype", "float32", "--device", "cpu"]


# train.py, but process {victim} sends itself a signal in a step. Each process draws other experts:
# all have to take those of the first.
STRUCK = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import train
from minismoe.cli import script
from minismoe.training import loop as training

def step(trainer, number, *args, original=training.Trainer.step):
    if number == {step} - 1 and os.environ["RANK"] == "{victim}":
        os.kill(os.getpid(), {signal})
    return original(trainer, number, *args)

def add_experts(*args, original=train.add_experts):
    torch.manual_seed(int(os.environ["RANK"]))
    return original(*args)

training.Trainer.step = step
train.add_experts = add_experts
script.run_script(train.main)
"""


def start(*command: str, **settings: object) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in settings.items()}}
    return subprocess.Popen([sys.executable, *command], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def torchrun(count: int, *command: str) -> subprocess.Popen[str]:
    return start("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
                 *command)


def by_hand(count: int, *command: str) -> list[subprocess.Popen[str]]:
    """The same without torchrun, which would itself end the others where one fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [start(*command, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=count, RANK=i,
                  LOCAL_RANK=i) for i in range(count)]


def far(a: Path, b: Path) -> float:
    """The largest difference of two runs' adapters."""
    first, second = (load_file(run / "adapter" / "adapter.safetensors") for run in (a, b))
    assert first.keys() == second.keys()
    found = [(first[n] - second[n]).abs().max().item() for n in first]
    assert all(map(math.isfinite, found))
    return max(found)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory) -> Path:
    """The run of a single process."""
    run = tmp_path_factory.mktemp("one") / "run"
    train.main([*inputs, *FLAGS, "--out", str(run)])
    return run


def test_a_failed_exchange_names_its_reason(monkeypatch) -> None:
    gloo = "[/a/b.cc:553] Connection closed by peer [127.0.0.1]:9. It may have ended. Good luck!"
    nccl = "NCCL error in: /c/d.cpp:3690, invalid usage\nLast error:\nDuplicate GPU detected"
    for said, reason in ((gloo, r"(Connection closed by peer [127.0.0.1]:9)"),
                         (nccl, "(Duplicate GPU detected)"), ("", "(no reason given)")):
        with pytest.raises(ConnectionError) as e, distributed._peers():
            raise RuntimeError(said)
        assert str(e.value).endswith(reason)
    with pytest.raises(RuntimeError, match="out of memory"), distributed._peers():
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="--device cuda:1: each process takes"):
        distributed.join_others(torch.device("cuda:1"))


@pytest.mark.parametrize("count, flags", [
    (2, ""), pytest.param(4, "", marks=pytest.mark.slow),
    pytest.param(2, "--device other", marks=[pytest.mark.slow, needs_other_device])])
def test_several_processes_give_the_result_of_one(inputs, one, tmp_path, count, flags) -> None:
    run = tmp_path / "run"
    command = [str(ROOT / "train.py"), *inputs, *FLAGS, *flags.split(), "--out", str(run)]
    if "other" in flags:
        command.insert(0, str(ROOT / "tests" / "tools" / "other_device.py"))
    processes = by_hand(count, *command) if count == 4 or flags else [torchrun(2, *command)]
    ends = [p.communicate(timeout=120) for p in processes]
    assert not any(p.returncode for p in processes), ends
    out = "".join(out for out, _ in ends)
    assert out.count("exact match") == out.count("experts a matrix") == 1    # one of them prints
    assert far(one, run) < 1e-5
    assert (one / "allocation.json").read_text() == (run / "allocation.json").read_text()
    after = [read_json(r / "after.json") for r in (one, run)]
    for task, judged in after[0].items():
        theirs = after[1][task]
        # Sums in another order round the last digit of a loss otherwise.
        assert judged.pop("loss") == pytest.approx(theirs.pop("loss"), abs=2e-5)
        assert judged == theirs
    scores = [read_json(r / "sensitivity.json")["tasks"] for r in (one, run)]
    for task, values in scores[0].items():
        assert values["samples"] == scores[1][task]["samples"] == 20
        assert scores[1][task]["scores"] == pytest.approx(values["scores"], rel=1e-6)
    lines = [read(r / "metrics.jsonl") for r in (one, run)]
    assert [line["step"] for line in lines[1]] == list(range(1, 19))
    for a, b in zip(*lines, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["balance"] == pytest.approx(b["balance"], abs=1e-4)
        assert a["loss_by_task"] == pytest.approx(b["loss_by_task"], abs=1e-4)


def struck(folder: Path, victim: int, number: signal.Signals, step: int = 10) -> str:
    file = folder / "struck.py"
    file.write_text(STRUCK.format(root=str(ROOT), victim=victim, signal=int(number), step=step))
    return str(file)


@pytest.mark.slow
def test_if_one_process_is_killed_the_other_ends_and_the_run_resumes(inputs, one, tmp_path) -> None:
    run = tmp_path / "run"
    alive, _ = processes = by_hand(2, struck(tmp_path, 1, signal.SIGKILL), *inputs, *FLAGS,
                                   "--checkpoint-every", "4", "--out", str(run))
    assert processes[1].wait(100) == -signal.SIGKILL
    _, err = alive.communicate(timeout=30)
    assert alive.returncode == 1 and "Traceback" not in err
    assert "another process of this run has ended" in err.splitlines()[-1]
    assert f"--resume --out {run}" in err.splitlines()[-1]
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "step-00000008"
    train.main(["--resume", "--out", str(run)])
    assert far(one, run) < 1e-5
    assert [line["step"] for line in read(run / "metrics.jsonl")] == list(range(1, 19))


@pytest.mark.slow
def test_if_one_process_is_interrupted_both_stop_after_that_step(inputs, one, tmp_path) -> None:
    run = tmp_path / "run"
    processes = by_hand(2, struck(tmp_path, 1, signal.SIGINT), *inputs, *FLAGS, "--out", str(run))
    ends = [p.communicate(timeout=100)[1] for p in processes]
    assert [p.returncode for p in processes] == [130, 130]
    assert "saved after step 10 of 18" in ends[0] and "saved" not in ends[1]
    train.main(["--resume", "--out", str(run)])
    assert far(one, run) < 1e-5


@pytest.mark.slow
def test_torchrun_ends_all_if_one_is_killed_and_three_resume(inputs, one, tmp_path) -> None:
    run = tmp_path / "run"
    process = torchrun(2, struck(tmp_path, 0, signal.SIGKILL), *inputs, *FLAGS,
                       "--checkpoint-every", "4", "--out", str(run))
    _, err = process.communicate(timeout=100)
    assert process.returncode not in (0, None) and "SIGKILL" in err
    before = read(run / "metrics.jsonl")[:8]             # of before the checkpoint
    process = torchrun(3, str(ROOT / "train.py"), "--resume", "--out", str(run))
    assert process.communicate(timeout=100) and process.returncode == 0
    assert far(one, run) < 1e-5 and read(run / "metrics.jsonl")[:8] == before
