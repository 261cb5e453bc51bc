"""Runs that are killed, interrupted, damaged or held by another process, and what comes of them."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ROOT, edit_tensors, examples, finish, interrupt_in, python, tiny

import minismoe.training.loop as training
import probe
import train
from minismoe.io.files import read_json, write_json
from minismoe.io.signals import ENDING, Interrupted
from minismoe.training import resume
from minismoe.training.plan import TrainConfig

CFG = TrainConfig(epochs=2, batch_size=4, micro_batch_size=4, lr=1e-2, checkpoint_every=4)
QUICK = ("--epochs", "1", "--batch-size", "8", "--rank", "2", "--dtype", "float32")
posix = pytest.mark.skipif(sys.platform == "win32", reason="fork, terminals and their signals")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of 12 steps with its checkpoint, and its parameters."""
    run, model = tmp_path_factory.mktemp("trained"), tiny()
    training.train(model, examples(), CFG, run, pad_id=0)
    return run, dict(model.named_parameters())


def goes_on(run: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Resume a copy of `trained`, and see that the parameters are the same to the last bit, and
    that a line of a step that is done again stands once."""
    model = tiny()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 13}\n')
    training.train(model, examples(), CFG, run, pad_id=0, resume=True)
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())
    assert (run / "metrics.jsonl").read_text().count("\n") == 12


def state_of(run: Path) -> dict[str, Any]:
    with safe_open(run / resume.NAME, "pt") as saved:
        return json.loads(saved.metadata()["state"])


@pytest.mark.parametrize("damage", ["cut", "no state", "empty"])
def test_a_damaged_checkpoint_is_named_in_one_line(trained, tmp_path, damage: str) -> None:
    """Without it, the run trains from the first step on, to the same experts."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    file = run / resume.NAME
    if damage == "no state":
        save_file(load_file(file), file)
    else:
        os.truncate(file, file.stat().st_size - 3 if damage == "cut" else 0)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged \(.*\): remove it"):
        goes_on(run, trained[1])
    file.unlink()
    goes_on(run, trained[1])


def test_lost_metrics_are_refused_and_cost_no_checkpoint(trained, tmp_path) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_text()
    for left in (metrics[:-20], None):
        (run / "metrics.jsonl").unlink()
        if left:
            (run / "metrics.jsonl").write_text(left)
        with pytest.raises(ValueError, match="metrics.jsonl has not all that .*: put it back"):
            goes_on(run, trained[1])
        assert state_of(run)["step"] == 12
        (run / "metrics.jsonl").write_text(metrics)
    goes_on(run, trained[1])


def test_resuming_with_other_experts_or_steps_is_refused(trained, tmp_path) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    for model, lines in (tiny(), examples(30)), (tiny(2), examples()):
        with pytest.raises(ValueError, match="other experts or for another number of steps"):
            training.train(model, lines, CFG, run, pad_id=0, resume=True)


def test_seconds_add_up_over_resumes(tmp_path, monkeypatch) -> None:
    """By a clock on which each step takes 25 s."""
    now, step = [0.0], training.Trainer.gradients

    def slow(*args):
        now[0] += 25.0
        return step(*args)

    monkeypatch.setattr(training.Trainer, "gradients", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for resumed in False, True:
        assert training.train(tiny(), examples(), CFG, tmp_path, 0, resumed)["seconds"] == 300
        now[0] += 1000


def test_every_ending_signal_lets_the_step_end_and_saves_it(inputs, tmp_path, capsys,
                                                            monkeypatch, signals) -> None:
    run = tmp_path / "a run"
    for saved, number in zip((2, 4), ENDING):
        interrupt_in(monkeypatch, "gradients", 3, number)     # the first one is timed
        args = ["--resume"] if run.exists() else [*inputs, *QUICK]
        code, _, err = finish(train.main, *args, "--out", run, capsys=capsys)
        assert code == 128 + number
        assert err.splitlines()[-1] == (f"interrupted: saved after step {saved} of 7; go on with: "
                                        f"python train.py --resume --out '{run}'")
        assert state_of(run)["step"] == saved


def test_resuming_with_other_inputs_is_refused_and_says_which(inputs, run, tmp_path, capsys, fails,
                                                              ) -> None:
    model, data = (shutil.copytree(inputs[i], tmp_path / f"copy-{i}") for i in (1, 3))
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    fails(train.main, "--resume", "--out", tmp_path, says="holds no run: config.json is missing")
    (data / "upper" / "train.jsonl").write_text('{"prompt": "say 1", "completion": "N2"}\n')
    edit_tensors(model / "model.safetensors", lambda t: t["model.norm.weight"][0].add_(1))
    allocation = read_json(run / "allocation.json")
    write_json(run / "allocation.json", {**allocation, "alpha": 7})
    code, _, err = finish(train.main, "--resume", "--out", run, "--model", model, "--data", data,
                          capsys=capsys)
    last = err.splitlines()[-1]
    assert code == 1 and ("began with other inputs, which differ in the model, task upper, the "
                          "allocation. ") in last
    write_json(run / "allocation.json", allocation)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_run_interrupted_while_probing_can_start_anew(inputs, tmp_path, capsys,
                                                        monkeypatch, succeed) -> None:
    def interrupted(*_: object) -> None:
        raise Interrupted()

    flags = (*inputs, "--samples", "20", "--out", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr("minismoe.method.sensitivity.sample_norms", interrupted)
        code, _, err = finish(probe.main, *flags, capsys=capsys)
    assert code == 130 and "go on with: python probe.py --model" in err
    assert [f.name for f in (tmp_path / "run").iterdir()] == [".lock"]
    succeed(probe.main, *flags)
    begin = (*inputs, *QUICK, "--out", str(tmp_path / "trained"))
    with monkeypatch.context() as patch:
        patch.setattr("minismoe.method.sensitivity.sample_norms", interrupted)
        assert finish(train.main, *begin, capsys=capsys)[0] == 130
    assert not (tmp_path / "trained").exists()
    succeed(train.main, *begin)


def kill_resume(inputs: Sequence[str], *flags: str) -> str:
    """What the tool prints. It forks, and in a process with threads, as this one, that may hang."""
    done = python(ROOT / "tests" / "tools" / "kill_resume.py", *flags, "--", *inputs, *QUICK,
                  timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@posix
@pytest.mark.slow
def test_a_run_killed_at_any_rename_ends_with_the_same_bytes(inputs) -> None:
    """The process ends, without a chance to clean up, at the first, second ... file it renames."""
    few = (*inputs, "--limit-train", "16", "--limit-test", "2")
    found = re.search(r"the same after (\d+) renames", kill_resume(few, "--renames"))
    assert found and 10 <= int(found[1]) < 40


@posix
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(inputs) -> None:
    """What the tool does at length."""
    said = kill_resume(inputs, "--runs", "1", "--dtype", "bfloat16")
    assert re.search("0: the same, killed [1-4] times", said)
