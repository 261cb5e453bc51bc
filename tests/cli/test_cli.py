"""The scripts as a user runs them, on a tiny checkpoint; and once on the built-in toy."""

import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT, finish, python, succeed

import export
import probe
import train
from minismoe.cli import probing, runs
from minismoe.cli.flags import InputConfig
from minismoe.cli.inputs import load_base, load_inputs, resolve_auto
from minismoe.method.experts import expert_layers


def allocation_file(folder: Path, value: dict) -> str:
    (folder / "settings.json").write_text(json.dumps(value))
    return str(folder / "settings.json")


def test_probe_writes_its_three_files(inputs, tmp_path, capsys) -> None:
    out = succeed(probe.main, *inputs, "--out", str(tmp_path), "--samples", "8", "--rank", "4",
                  capsys=capsys)
    sensitivity = json.loads((tmp_path / "sensitivity.json").read_text())
    allocation = json.loads((tmp_path / "allocation.json").read_text())
    assert sensitivity["format"] == "minismoe.sensitivity/1"
    assert {t: v["samples"] for t, v in sensitivity["tasks"].items()} == {"sum": 8, "upper": 8}
    assert all(len(v["scores"]) == 14 for v in sensitivity["tasks"].values())
    assert allocation["format"] == "minismoe.allocation/1" and allocation["rank"] == 4
    assert all(1 <= e <= 2 for e in allocation["experts"].values())
    assert ET.parse(tmp_path / "allocation.svg").getroot().tag.endswith("svg")
    assert "split-half overlap" in out and "experts a matrix" in out
    assert ("sum: 30 lines of instruction and output; no test.jsonl: 3 of 30 training lines held "
            "out; no valid.jsonl: 3 of 27 training lines held out\n") in out


def test_train_end_to_end(inputs, tmp_path, capsys) -> None:
    out_dir = tmp_path / "run"
    out = succeed(train.main, *inputs, "--out", str(out_dir), "--samples", "8", "--epochs", "1",
                  capsys=capsys)
    results = json.loads((out_dir / "results.json").read_text())
    allocation = json.loads((out_dir / "allocation.json").read_text())
    adapter = load_file(out_dir / "adapter" / "adapter.safetensors")
    assert results["format"] == "minismoe.results/1" and results["metric"] == "exact_match"
    assert results["experts"] == sum(allocation["experts"].values())
    assert results["trainable_parameters"] == allocation["trainable_parameters"]
    assert results["trainable_parameters"] == sum(t.numel() for t in adapter.values())
    assert {n: t["examples"] for n, t in results["tasks"].items()} == {"sum": 3, "upper": 6}
    assert set(results["mean"]) == {"before", "after"} and set(results["seconds"]) == {
        "probe", "train"}
    config = json.loads((out_dir / "config.json").read_text())
    rate = config["arguments"]["lr"]
    assert f"learning rate: {rate}, by the size of the base's weights" in out
    assert 'a turn is "User: ...", and an answer "Assistant: ...<|end|>" (--show 1' in out
    assert 1e-4 < rate < 1e-2 and config["arguments"]["dtype"] != "auto"
    assert len((out_dir / "metrics.jsonl").read_text().splitlines()) == 6        # 46 examples / 8
    after = json.loads((out_dir / "after.json").read_text())
    for name, task in results["tasks"].items():
        assert task["after"] == round(sum(after[name]["right"]) / task["examples"], 4)
        assert len(after[name]["wrong"]) == after[name]["right"].count(0)
        assert all(w.keys() == {"prompt", "expected", "given"} for w in after[name]["wrong"])
    assert str(out_dir) in out
    assert out.count("no matrix has more than 2 experts, and 2 are active for each token") == 1

    assert out.endswith(f"Next:\n  python export.py {out_dir}\n")

    code, _, err = finish(train.main, *inputs, "--out", str(out_dir), capsys=capsys)
    assert code == 1 and "holds a run already" in err
    code, _, err = finish(probe.main, *inputs, "--out", str(out_dir), capsys=capsys)
    assert code == 1 and "is a run of train.py" in err
    assert json.loads((out_dir / "allocation.json").read_text()) == allocation


@pytest.mark.parametrize("units", [(), ("amx_tile",), ("avx512_bf16",), ("vnni",)])
def test_a_cpu_computes_in_what_it_multiplies(inputs, monkeypatch, capsys, units) -> None:
    """And where it is told to compute in bfloat16 all the same, it says what that costs."""
    for unit in ("amx_tile", "avx512_bf16", "vnni"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda u=unit: u in units,
                            raising=False)
    config = resolve_auto(train.parse([*inputs, "--device", "cpu"]).inputs)
    multiplies = bool({"amx_tile", "avx512_bf16"} & set(units))
    assert config.dtype == ("bfloat16" if multiplies else "float32")
    assert resolve_auto(InputConfig(device="cpu")).dtype == "float32"        # of the toy
    load_base(replace(config, dtype="bfloat16"), Path(inputs[1]))
    assert ("--dtype bfloat16: this CPU has no instr" in capsys.readouterr().out) != multiplies


def test_the_seed_draws_the_experts(inputs) -> None:
    """Whatever was drawn before, as by a probe."""
    def drawn(seed: int) -> torch.Tensor:
        config = train.parse([*inputs, "--strategy", "uniform", "--seed", str(seed)])
        loaded = load_inputs(resolve_auto(config.inputs))
        torch.rand(3)
        train.give_experts(config, loaded, {})
        return torch.cat([layer.lora_A.flatten() for layer in expert_layers(loaded.model).values()])
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("main", [train.main, probe.main])
def test_samples_are_a_number(inputs, tmp_path, capsys, main) -> None:
    for wrong in ("0", "some", "auto"):
        code, _, err = finish(main, *inputs, "--samples", wrong, "--out", str(tmp_path / "run"),
                              capsys=capsys)
        assert code == 2 and "--samples" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("bare", [False, True])
def test_train_takes_an_allocation_as_it_is(inputs, tmp_path, capsys, bare) -> None:
    experts = {"model.layers.1.mlp.up_proj": 3, "model.layers.0.self_attn.q_proj": 1}
    value = experts if bare else {"format": "minismoe.allocation/1", "rank": 2, "alpha": 5,
                                  "top_k": 3, "strategy": "mine", "experts": experts}
    (tmp_path / "a.json").write_text(json.dumps(value))
    succeed(train.main, *inputs, "--allocation", str(tmp_path / "a.json"), "--out",
            str(tmp_path / "run"), "--epochs", "1", "--rank", "3", capsys=capsys)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    rank = 3 if bare else 2
    assert {n: tuple(t.shape) for n, t in adapter.items()} == {
        "model.layers.1.mlp.up_proj.lora_A": (3, rank, 32),
        "model.layers.1.mlp.up_proj.lora_B": (3, rank, 48),
        "model.layers.1.mlp.up_proj.router": (3, 32),
        "model.layers.0.self_attn.q_proj.lora_A": (1, rank, 32),
        "model.layers.0.self_attn.q_proj.lora_B": (1, rank, 32)}
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())["allocation"]
    assert (saved["alpha"], saved["top_k"], saved["strategy"]) == (
        (6, 2, "custom") if bare else (5, 3, "mine"))


def test_an_allocation_leaves_nothing_to_choose_or_to_probe(inputs, tmp_path, capsys) -> None:
    file = allocation_file(tmp_path, {"model.layers.1.mlp.up_proj": 3})
    code, _, err = finish(train.main, *inputs, "--allocation", file, "--target-modules", "q_proj",
                          capsys=capsys)
    assert code == 2 and "says what these would choose: leave out --target-modules" in err
    code, _, err = finish(probe.main, *inputs, "--allocation", file, capsys=capsys)
    assert code == 2 and "is an allocation already: nothing is left to probe" in err


def test_a_file_steers_the_vote(inputs, tmp_path, capsys) -> None:
    """The paper's: a matrix without a vote has no expert."""
    file = allocation_file(tmp_path, {"keep": 0.25, "min_experts": 0, "top_k": 3})
    succeed(train.main, *inputs, "--samples", "2", "--epochs", "1", "--allocation", file, "--out",
            str(tmp_path / "run"), capsys=capsys)
    allocation = json.loads((tmp_path / "run" / "allocation.json").read_text())
    # Two tasks vote for 2 of 8 matrices of attention and 2 of 6 of MLPs.
    assert sum(allocation["experts"].values()) == 8 and allocation["top_k"] == 3
    assert allocation["keep"] == 0.25
    Path(file).unlink()                                  # a run goes on without its file
    (tmp_path / "run" / "results.json").unlink()
    succeed(train.main, "--resume", "--out", str(tmp_path / "run"), capsys=capsys)


def test_one_task_is_a_plain_lora_without_a_probe(inputs, tmp_path, capsys, monkeypatch) -> None:
    probe.main([*inputs, "--only-tasks", "sum", "--samples", "2", "--out", str(tmp_path / "probe")])
    assert "without a probe" not in capsys.readouterr().out      # who asks for a probe gets one
    monkeypatch.setattr("minismoe.method.sensitivity.sample_norms",
                        lambda *_: pytest.fail("it probes"))
    run = tmp_path / "run"
    out = succeed(train.main, *inputs, "--only-tasks", "sum", "--epochs", "1", "--rank", "4",
                  "--out", str(run), capsys=capsys)
    assert ("one task: a plain LoRA of rank 4, without a probe; several tasks share experts by "
            "votes\n") in out and "probe.py" not in out
    allocation = json.loads((run / "allocation.json").read_text())
    assert allocation["strategy"] == "lora" and set(allocation["experts"].values()) == {1}
    assert len(allocation["experts"]) == 14


def test_unknown_modules_are_all_listed(inputs, tmp_path, capsys) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"model.layers.9.x": 1, "lm_head": 1, "nope": 2}))
    code, _, err = finish(train.main, *inputs, "--allocation", str(tmp_path / "a.json"), "--out",
                          str(tmp_path / "run"), capsys=capsys)
    assert code == 1 and all(n in err for n in ("model.layers.9.x", "lm_head", "nope"))
    assert not (tmp_path / "run").exists()          # found before any work


@pytest.mark.parametrize("strategy", ["uniform", "lora"])
def test_no_probe_where_it_decides_nothing(inputs, tmp_path, capsys, monkeypatch, strategy) -> None:
    flags = *inputs, "--strategy", strategy, "--rank", "4", "--budget-params", "5000"
    probe.main([*flags, "--samples", "4", "--out", str(tmp_path / "probe")])
    monkeypatch.setattr("minismoe.method.sensitivity.sample_norms",
                        lambda *_: pytest.fail("it probes"))
    code, _, err = finish(train.main, *flags, "--epochs", "1", "--out", str(tmp_path / "run"),
                          capsys=capsys)
    assert code == 0 and not (tmp_path / "run" / "sensitivity.json").exists(), err
    found, wanted = (json.loads((tmp_path / d / "allocation.json").read_text())
                     for d in ("run", "probe"))
    assert found == wanted and found["experts"]


def test_what_was_probed_is_not_written_over(inputs, tmp_path, capsys) -> None:
    known = *inputs, "--samples", "4", "--out", str(tmp_path)
    probe.main(list(known))
    before = (tmp_path / "sensitivity.json").read_bytes()
    code, _, err = finish(train.main, *known, "--epochs", "1", capsys=capsys)
    assert code == 1 and "is what probe.py measured: choose another --out" in err
    assert (tmp_path / "sensitivity.json").read_bytes() == before


def test_a_run_that_came_meanwhile_is_not_written_over(inputs, tmp_path, capsys,
                                                       monkeypatch) -> None:
    run, measure = tmp_path / "run", probing.measure

    def slowly(*args):
        run.mkdir()
        (run / "config.json").write_text("another's")
        return measure(*args)
    monkeypatch.setattr(probing, "measure", slowly)
    code, _, err = finish(train.main, *inputs, "--samples", "2", "--epochs", "1", "--out", str(run),
                          capsys=capsys)
    assert code == 1 and "holds a run already" in err
    assert (run / "config.json").read_text() == "another's"


def test_show_without_colours_marks_by_brackets(inputs, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for value, mark in (("1", "[["), ("", "\x1b[32m")):
        monkeypatch.setenv("NO_COLOR", value)
        code, out, err = finish(train.main, *inputs, "--show", "1", capsys=capsys)
        assert code == 0 and mark in out, err


def test_show_ends_each_of_several_processes_as_a_run_does(inputs, capsys, monkeypatch) -> None:
    """A usual end is at times an abort: torch's threads."""
    codes: list[int] = []
    monkeypatch.setattr("minismoe.training.distributed.exit_together", codes.append)
    succeed(train.main, *inputs, "--show", "1", capsys=capsys)
    assert codes == [0]


def test_show_marks_the_supervised_tokens(inputs, capsys) -> None:
    out = succeed(train.main, *inputs, "--show", "2", capsys=capsys)
    assert "Assistant:[[ N0<|end|>]]" in out and out.count("---") == 4


@pytest.mark.parametrize("args, code, says", [
    (["--no-such-flag"], 2, "unrecognized arguments"),
    (["--resume"], 2, "--resume needs --out"),
    (["--model", "nowhere-at-all"], 1, "no such model folder"),
    (["--model", "."], 1, "--model and --data go together"),
    (["--max-length", "3"], 1, "within 3 tokens (--max-length, or what the model was made for)"),
    (["--epochs", "0"], 2, "--epochs 0 trains nothing: name a run to judge by --init RUN"),
    (["--init", "x", "--rank", "4", "--target-modules", "q_proj"], 2,
     "leave out --target-modules, --rank"),
])
def test_failures_are_one_clear_line(inputs, args, code, says, tmp_path, capsys) -> None:
    extra = [] if args == ["--model", "."] else inputs
    ended, _, err = finish(train.main, *extra, *args, *(
        [] if "--resume" in args else ["--out", str(tmp_path / "r")]), capsys=capsys)
    assert ended == code and says in err
    assert "Traceback" not in err
    if code == 1:
        assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes streams")
def test_closed_streams_end_nothing(inputs) -> None:
    words = [sys.executable, str(ROOT / "train.py"), *inputs, "--show", "1"]
    done = subprocess.run(f"{shlex.join(words)} <&- >&- 2>&-", shell=True, capture_output=True)
    assert done.returncode == 0


def test_debug_shows_the_traceback(inputs, tmp_path) -> None:
    for more, shown in ((), False), (("--debug",), True):     # as a user starts it
        done = python("train.py", *inputs, "--model", str(tmp_path / "x"), *more)
        assert done.returncode == 1 and ("Traceback" in done.stderr) == shown
        assert "no such model folder" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_then_resume_gives_the_same_adapter(inputs, tmp_path, capsys) -> None:
    flags = [*inputs, "--samples", "4", "--epochs", "15", "--batch-size", "4", "--dtype", "float32"]
    assert python("train.py", *flags, "--out", str(tmp_path / "straight")).returncode == 0

    cut = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags, "--out", str(cut)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, deadline = cut / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 20):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume --out {cut}" in err
    assert not (cut / "results.json").exists()

    assert python("train.py", "--resume", "--out", str(cut)).returncode == 0
    first, second = (load_file(tmp_path / r / "adapter" / "adapter.safetensors")
                     for r in ("straight", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    a, b = (json.loads((tmp_path / r / "results.json").read_text()) for r in ("straight", "cut"))
    assert a["tasks"] == b["tasks"]


@pytest.mark.slow
def test_the_built_in_toy(tmp_path) -> None:
    """The README's promise: the whole method with no argument, and what it is worth."""
    done = python(ROOT / "train.py", folder=tmp_path, timeout=600, NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr                       # bars are lines in a file
    (folder,) = (tmp_path / "runs").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert len(results["tasks"]) >= 4
    assert all(t["before"] < 0.5 and t["after"] > 0.9 for t in results["tasks"].values())
    assert "experts a matrix" in done.stdout and "Next:" in done.stdout


@pytest.mark.parametrize("flags", [
    "--lr -0.001", "--lr nan", "--lr inf", "--alpha 0", "--batch-size auto", "--batch-size 0",
    "--micro-batch-size 0",
    "--model=", "--out=", "--seed 18446744073709551616", "--only-tasks=", "--allocation="])
def test_flags_that_cannot_be_meant(inputs, tmp_path, capsys, flags) -> None:
    code, _, err = finish(train.main, *inputs, "--out", str(tmp_path / "run"), *flags.split(),
                          capsys=capsys)
    assert code == 2 and flags.split("=")[0].split()[0] in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [train.main, probe.main])
@pytest.mark.parametrize("flags, says", [
    ("--target-modules nothing,", "no module"), ("min_experts -1", "min_experts"),
    ("min_experts 1100", "min_experts must be a whole number from 0 to 1024, got 1100"),
    ("--budget-params 13", "13 parameters (the budget) are too few for 'votes' with min_experts 1"),
    ("--rank 40", "more than the matrix itself has: model.layers.0.")])
def test_allocation_flags_are_checked_before_the_probe(inputs, tmp_path, capsys, monkeypatch, main,
                                                       flags, says) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minismoe.method.sensitivity.sample_norms",
                        lambda *_: pytest.fail("it probes"))
    words = flags.split()
    if not flags.startswith("--"):
        settings = dict(zip(words[::2], map(json.loads, words[1::2])))
        words = ["--allocation", allocation_file(tmp_path, settings)]
    code, _, err = finish(main, *inputs, *words, capsys=capsys)
    assert code == 1 and says in err and not list(tmp_path.glob("runs"))


def test_matrices_below_the_rank_are_left_out_unless_they_are_named(inputs, tmp_path, capsys,
                                                                    ) -> None:
    """Keys and values have 16 rows, as have two matrices of Qwen3.5's delta nets."""
    known = *inputs, "--samples", "2", "--rank", "20"
    for main in probe.main, train.main:
        run = tmp_path / main.__module__
        more = ("--epochs", "1") if main is train.main else ()
        out = succeed(main, *known, *more, "--out", str(run), capsys=capsys)
        assert ("4 matrices get no experts, as they have a side below --rank 20: k_proj, v_proj\n"
                ) in out
        experts = json.loads((run / "allocation.json").read_text())["experts"]
        assert {name.rpartition(".")[2] for name in experts} == {
            "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} and len(experts) == 10
    code, _, err = finish(train.main, *known, "--target-modules", "q_proj,k_proj", capsys=capsys)
    assert code == 1 and "rank 20 is more than the matrix itself has: model.layers.0.self" in err


@pytest.mark.parametrize("flags", ["--rank 40", "--strategy lora --budget-params 999999"])
def test_a_rank_that_no_matrix_has_leaves_no_run_behind(inputs, tmp_path, capsys, flags) -> None:
    known = *inputs, "--samples", "2", "--epochs", "1", "--out", str(tmp_path / "run")
    code, _, err = finish(train.main, *known, *flags.split(), capsys=capsys)
    assert code == 1 and "more than the matrix itself has: model.layers." in err
    assert not (tmp_path / "run" / "config.json").exists()
    succeed(train.main, *known, "--rank", "2", capsys=capsys)


def test_what_was_probed_is_kept_if_the_scores_do_not_fit(inputs, tmp_path, capsys,
                                                         monkeypatch) -> None:
    monkeypatch.setattr(probing, "known_allocation", lambda *_: None)
    finish(probe.main, *inputs, "--samples", "2", "--out", str(tmp_path), capsys=capsys)
    assert len([*tmp_path.glob("allocation.*")]) == 2
    code, _, err = finish(probe.main, *inputs, "--samples", "2", "--out", str(tmp_path),
                          "--budget-params", "1", "--allocation", allocation_file(
                              tmp_path.parent, {"min_experts": 0}), capsys=capsys)
    assert code == 1
    assert "1 parameters (the budget) are too few for 'votes' with min_experts 0: the" in err
    assert json.loads((tmp_path / "sensitivity.json").read_text())["tasks"].keys() == {
        "sum", "upper"}
    assert not [*tmp_path.glob("allocation.*")]          # those of an earlier probe are gone


def test_a_probe_of_a_broken_checkpoint_is_one_line(inputs, tmp_path, capsys) -> None:
    shutil.copytree(inputs[1], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    code, _, err = finish(probe.main, "--model", str(tmp_path / "model"), *inputs[2:], "--samples",
                          "2", "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 1 and err.splitlines()[-1] == (
        "error: the probe of sum, upper found gradients that are not finite: is the checkpoint "
        "whole? If it is, try --dtype float32")


@pytest.mark.parametrize("name", ["checkpoints/mine.pt", "metrics.jsonl", "before.json"])
def test_a_folder_that_holds_anything_is_not_written_to(inputs, tmp_path, capsys, name) -> None:
    """It may be a project's own folder, or what is left of another run."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    code, _, err = finish(train.main, *inputs, "--out", str(tmp_path), capsys=capsys)
    assert code == 1 and f"is not empty (it holds {name.partition('/')[0]}): choose another" in err
    assert (tmp_path / name).read_text() == "precious" and len([*tmp_path.iterdir()]) == 1


def test_init_takes_the_lines_of_its_run(inputs, tmp_path, capsys) -> None:
    """Else it would be judged on lines that it was trained on."""
    run, again = tmp_path / "run", tmp_path / "again"
    succeed(train.main, *inputs, "--samples", "2", "--epochs", "1", "--seed", "3", "--system",
            "Be brief.", "--out", str(run), capsys=capsys)
    size = json.loads((run / "results.json").read_text())["trainable_parameters"]
    code, out, err = finish(train.main, "--init", str(run), "--epochs", "0", "--out", str(again),
                            capsys=capsys)
    assert code == 0 and f"{size:,} trainable parameters" in out and "probed" not in out, err
    first, second = (json.loads((r / "config.json").read_text()) for r in (run, again))
    assert all(first["arguments"][name] == second["arguments"][name] for name in runs.EXPORTED)
    assert first["identity"].items() <= second["identity"].items()
    (run / "adapter" / "adapter.json").unlink()
    code, _, err = finish(train.main, "--init", str(run), capsys=capsys)
    says = f"{run} has not finished; go on with: python train.py --resume --out {run}"
    assert code == 1 and says in err
    code, _, err = finish(export.main, str(run), capsys=capsys)
    assert code == 1 and says in err


@pytest.mark.parametrize("settings, says", [
    ({"top_k": 1}, "top_k 1 would teach routers nothing but balance"),
    ({"format": "minismoe.allocation/1", "top_k": 1, "experts": {"model.layers.0.mlp.up_proj": 2}},
     "top_k 1 would teach routers nothing but balance"),
    ({"min_experts": "0"}, "min_experts must be a whole number >= 0, got '0'"),
    ({"min_expert": 0}, "holds no module, and min_expert besides settings: keep, min_experts")])
def test_settings_that_are_wrong_are_named(inputs, tmp_path, capsys, settings, says) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    code, _, err = finish(train.main, *inputs, "--allocation", str(tmp_path / "settings.json"),
                          capsys=capsys)
    assert code == 1 and says in err


def test_a_damaged_before_json_is_one_clear_line(inputs, tmp_path, capsys) -> None:
    known = *inputs, "--samples", "2", "--epochs", "1", "--out", str(tmp_path)
    succeed(train.main, *known, capsys=capsys)
    before = (tmp_path / "before.json").read_text()
    (tmp_path / "results.json").unlink()
    for damaged in ("[]", "{}", '{"sum": 1, "upper": 2}',
                    before.replace('"correct": 0', '"correct": "0"'),
                    before.replace('"examples": 3', '"examples": 0')):
        (tmp_path / "before.json").write_text(damaged)
        code, _, err = finish(train.main, *known, "--resume", capsys=capsys)
        assert code == 1 and "before.json is damaged: remove it" in err, err
    (tmp_path / "before.json").unlink()
    succeed(train.main, *known, "--resume", capsys=capsys)
    assert (tmp_path / "before.json").read_text() == before


def test_what_was_too_large_goes_on_in_less_memory(inputs, tmp_path, capsys) -> None:
    known = *inputs, "--samples", "2", "--epochs", "2", "--out", str(tmp_path)
    succeed(train.main, *known, capsys=capsys)
    (tmp_path / "results.json").unlink()
    for file in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(file)
    smaller = "--micro-batch-size", "4", "--recompute"
    for flags in (smaller, ()):                          # the second time they are the run's own
        code, _, err = finish(train.main, "--resume", "--out", str(tmp_path), *flags, capsys=capsys)
        assert code == 0 and (tmp_path / "results.json").exists(), err
        assert ("the last bits may differ: micro_batch_size 4 (was 8)\n" in err) == bool(flags)
        saved = json.loads((tmp_path / "config.json").read_text())["arguments"]
        assert (saved["micro_batch_size"], saved["recompute"]) == (4, True)
        (tmp_path / "results.json").unlink()


def test_a_place_that_cannot_be_written_is_seen_before_the_probe(inputs, tmp_path, capsys,
                                                                 monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minismoe.method.sensitivity.sample_norms",
                        lambda *_: pytest.fail("it probes"))
    for flags, says in (["--out", "file"], "is a file: choose another --out"), (
            ["--out", "file/run"], "file is no folder that can be written"), (
            [], "runs is no folder that can be written"):
        code, _, err = finish(train.main, *inputs, *flags, capsys=capsys)
        assert code == 1 and says in err
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    code, _, err = finish(train.main, *inputs, "--out", "new/run", capsys=capsys)
    assert code == 1 and f"new/run cannot be written: {tmp_path} is no folder" in err


def test_another_device_and_other_processes_are_said(inputs, tmp_path, capsys) -> None:
    known = *inputs, "--samples", "2", "--epochs", "1", "--out", str(tmp_path)
    succeed(train.main, *known, capsys=capsys)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["processes"] == 1
    arguments = config["arguments"] | {"device": "cuda"}
    (tmp_path / "config.json").write_text(json.dumps(
        config | {"threads": 7, "processes": 4, "arguments": arguments}))
    (tmp_path / "results.json").unlink()
    code, out, err = finish(train.main, "--resume", "--out", str(tmp_path), "--device", "cpu",
                            capsys=capsys)
    assert code == 0 and torch.get_num_threads() == config["threads"] and "threads:" not in out
    assert "the last bits may differ: device cpu (was cuda), processes 1 (was 4)" in err
    assert json.loads((tmp_path / "config.json").read_text())["arguments"]["device"] == "cpu"


def test_tasks_by_name(inputs, capsys) -> None:
    for names, says in (("sum, upper,", ""), ("sum,sum", "named twice"), ("no", "no task no")):
        code, _, err = finish(train.main, *inputs, "--only-tasks", names, "--show", "1",
                              capsys=capsys)
        assert code == (1 if says else 0) and says in err
    for names, says in (("count,count", "named twice"), ("no", "no task no; it has capitals")):
        code, _, err = finish(train.main, "--only-tasks", names, "--show", "1", capsys=capsys)
        assert code == 1 and says in err
    code, _, err = finish(train.main, *inputs[2:], capsys=capsys)
    assert code == 1 and "--model and --data go together" in err


def test_a_model_in_this_folder_names_the_run(inputs, tmp_path, capsys, monkeypatch) -> None:
    shutil.copytree(inputs[1], tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    code, _, err = finish(train.main, "--model", ".", *inputs[2:], "--samples", "2", "--epochs",
                          "1", capsys=capsys)
    assert code == 0 and [run.name for run in Path("runs").iterdir()] == ["mine-1"], err


@pytest.mark.parametrize("bits", ["16", "4"])
def test_a_run_on_few_bits(inputs, tmp_path, capsys, bits) -> None:
    out = succeed(train.main, *inputs, "--base-bits", bits, "--epochs", "1", "--samples", "4",
                  "--rank", "2", "--out", str(tmp_path / "run"), capsys=capsys)
    assert f"linear layers in {bits} bits" in out
    meta = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert meta["base_bits"] == int(bits)
    code, out, err = finish(train.main, "--init", str(tmp_path / "run"), "--epochs", "0", "--out",
                            str(tmp_path / "judged"), capsys=capsys)
    assert code == 0 and f"linear layers in {bits} bits" in out, err
    succeed(export.main, str(tmp_path / "run"), "--layout", "hf", "--out", str(tmp_path / "hf"),
            capsys=capsys)
