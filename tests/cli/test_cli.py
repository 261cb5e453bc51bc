"""The scripts as a user runs them, on a tiny checkpoint."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import QUICK, edit_tensors, finish

import export
import probe
import train
from minismoe.cli import inputs as cli_inputs
from minismoe.cli import probing, results, runs
from minismoe.cli.flags import InputConfig
from minismoe.cli.inputs import load_base, load_inputs, resolve_auto
from minismoe.data import toy
from minismoe.io.files import read_json, write_json
from minismoe.method.experts import expert_layers


def allocation_file(folder: Path, value: dict) -> Path:
    write_json(folder / "settings.json", value)
    return folder / "settings.json"


def test_probe_writes_its_files_and_keeps_what_it_measured(inputs, tmp_path, succeed, fails,
                                                           ) -> None:
    out = succeed(probe.main, *inputs, "--out", tmp_path, "--samples", "8", "--rank", "4")
    sensitivity = read_json(tmp_path / "sensitivity.json")
    allocation = read_json(tmp_path / "allocation.json")
    assert sensitivity["format"] == "minismoe.sensitivity/1"
    assert {t: v["samples"] for t, v in sensitivity["tasks"].items()} == {"sum": 8, "upper": 8}
    assert all(len(v["scores"]) == 14 for v in sensitivity["tasks"].values())
    assert allocation["format"] == "minismoe.allocation/1" and allocation["rank"] == 4
    assert all(1 <= e <= 2 for e in allocation["experts"].values())
    assert "split-half overlap (by chance: 0.60)" in out and "experts a matrix" in out
    assert "chat template: the checkpoint brings none, so a turn is" in out
    assert ("sum: 30 lines of instruction and output; no test.jsonl: 3 of 30 training lines held "
            "out\n") in out
    fails(train.main, *inputs, "--out", tmp_path,
          says="is what probe.py measured: choose another --out")
    assert read_json(tmp_path / "sensitivity.json") == sensitivity
    fails(probe.main, *inputs, "--out", tmp_path, "--samples", "2", "--budget-params", "1",
          says="a budget of 1 trainable parameters is too small: the nearest possible is")
    assert read_json(tmp_path / "sensitivity.json")["tasks"]["sum"]["samples"] == 2
    assert not (tmp_path / "allocation.json").exists()   # that of the earlier probe is gone


def test_train_refuses_a_budget_that_no_scores_fit_before_it_probes(inputs, tmp_path, monkeypatch,
                                                                    fails) -> None:
    monkeypatch.setattr(probing, "probe", lambda *_: pytest.fail("the probe has begun"))
    fails(train.main, *inputs, "--out", tmp_path / "run", "--budget-params", "1",
          says="a budget of 1 trainable parameters is too small: the nearest possible is")


def test_train_end_to_end(inputs, tmp_path, succeed, fails) -> None:
    out_dir = tmp_path / "run"
    out = succeed(train.main, *inputs, "--out", out_dir, "--epochs", "1")
    results = read_json(out_dir / "results.json")
    allocation = read_json(out_dir / "allocation.json")
    adapter = load_file(out_dir / "adapter" / "adapter.safetensors")
    assert results["format"] == "minismoe.results/1" and results["metric"] == "exact_match"
    assert results["experts"] == sum(allocation["experts"].values())
    assert results["trainable_parameters"] == allocation["trainable_parameters"]
    mixtures = [t for name, t in adapter.items() if name.endswith(".lora_A") and len(t) > 1]
    routers = sum(len(A) * A.shape[2] for A in mixtures)         # they were trained, and are gone
    assert results["trainable_parameters"] == routers + sum(t.numel() for t in adapter.values())
    assert f"froze {len(mixtures)} mixtures after step 6 of 7: the median LoRA misses" in out
    assert read_json(out_dir / "adapter" / "adapter.json")["routing"] == "frozen" and mixtures
    assert {n: t["examples"] for n, t in results["tasks"].items()} == {"sum": 3, "upper": 6}
    shown = [len(of_task["samples"]) for of_task in read_json(out_dir / "after.json").values()]
    assert sorted(shown) == [2, 3]                       # five of all tasks
    assert set(results["mean"]) == {"before", "after"} and set(results["seconds"]) == {
        "probe", "train"}
    config = read_json(out_dir / "config.json")
    rate = config["arguments"]["lr"]
    assert f"learning rate: {rate}, by the size of the base's weights" in out
    assert [line.split() for line in out.splitlines()[1:5]] == [row.split() for row in (
        "task   train  valid  test  tokens  longest  supervised  cut  left out",
        "-----  -----  -----  ----  ------  -------  ----------  ---  --------",
        "sum       27      0     3      30       31         3.7    0         0",
        "upper     22      2     6      29       30         4.5    0         0")]
    assert 'a turn is "User: ...", and an answer "Assistant: ...<|end|>" (--show 1' in out
    assert 1e-4 < rate < 1e-2 and config["arguments"]["dtype"] != "auto"
    assert len((out_dir / "metrics.jsonl").read_text().splitlines()) == 7        # 49 examples / 8
    after = read_json(out_dir / "after.json")
    for name, task in results["tasks"].items():
        assert task["after"] == round(sum(after[name]["right"]) / task["examples"], 4)
        assert len(after[name]["wrong"]) == after[name]["right"].count(0)
        assert all(w.keys() == {"prompt", "expected", "given"} for w in after[name]["wrong"])
    assert str(out_dir) in out
    assert out.count("no matrix has more than 2 experts: all are active for each token") == 1

    assert out.endswith(f"Next:\n  python export.py {out_dir}\n")

    fails(train.main, *inputs, "--out", out_dir,
          says="holds a run already: go on with --resume, or choose another --out")
    fails(probe.main, *inputs, "--out", out_dir, says="is a run of train.py")
    assert read_json(out_dir / "allocation.json") == allocation


@pytest.mark.parametrize("units", [(), ("amx_tile",), ("avx512_bf16",), ("vnni",)])
def test_a_cpu_computes_in_what_it_multiplies(inputs, monkeypatch, capsys, multiplies_bfloat16,
                                              units) -> None:
    """And where it is told to compute in bfloat16 all the same, it says what that costs."""
    monkeypatch.setattr(cli_inputs, "_multiplies_bfloat16", multiplies_bfloat16)
    for unit in ("amx_tile", "avx512_bf16", "vnni"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda u=unit: u in units,
                            raising=False)
    config = resolve_auto(runs.configure([*inputs, "--device", "cpu"], None))
    multiplies = bool({"amx_tile", "avx512_bf16"} & set(units))
    assert config.dtype == ("bfloat16" if multiplies else "float32")
    assert resolve_auto(InputConfig(device="cpu")).dtype == "float32"        # of the toy
    load_base(replace(config, dtype="bfloat16"), Path(inputs[1]))
    assert ("--dtype bfloat16: this CPU has no instr" in capsys.readouterr().out) != multiplies


def test_torch_says_what_this_cpu_multiplies(multiplies_bfloat16) -> None:
    """By names that are private to torch: without them, every CPU would compute in float32."""
    for name in "_is_amx_tile_supported", "_is_avx512_bf16_supported":
        assert isinstance(getattr(torch.cpu, name)(), bool)
    if (file := Path("/proc/cpuinfo")).exists():         # of Linux
        units = {"avx512_bf16", "amx_tile"} & {*file.read_text().split()}
        assert multiplies_bfloat16(torch.device("cpu")) == bool(units)


def test_the_seed_draws_the_experts(inputs) -> None:
    """Whatever was drawn before, as by a probe."""
    def drawn(seed: int) -> torch.Tensor:
        config = runs.configure([*inputs, "--strategy", "uniform", "--seed", str(seed)], None)
        loaded = load_inputs(resolve_auto(config))
        torch.rand(3)
        train.give_experts(config, loaded)
        return torch.cat([layer.lora_A.flatten() for layer in expert_layers(loaded.model).values()])
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("bare", [False, True])
def test_train_takes_an_allocation_as_it_is(inputs, tmp_path, succeed, bare) -> None:
    """Only routers to the end are kept."""
    experts = {"model.layers.1.mlp.up_proj": 3, "model.layers.0.self_attn.q_proj": 1}
    value = experts if bare else {"format": "minismoe.allocation/1", "rank": 2, "alpha": 5,
                                  "top_k": 3, "strategy": "mine", "experts": experts}
    succeed(train.main, *inputs, "--allocation", allocation_file(tmp_path, value), "--out",
            tmp_path / "run", "--epochs", "1", "--rank", "3",
            *(["--routing", "dynamic"] if bare else []))
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    rank = 3 if bare else 2
    assert {n: tuple(t.shape) for n, t in adapter.items()} == {
        "model.layers.1.mlp.up_proj.lora_A": (3, rank, 32),
        "model.layers.1.mlp.up_proj.lora_B": (3, rank, 48),
        **({"model.layers.1.mlp.up_proj.router": (3, 32)} if bare else {}),
        "model.layers.0.self_attn.q_proj.lora_A": (1, rank, 32),
        "model.layers.0.self_attn.q_proj.lora_B": (1, rank, 32)}
    meta = read_json(tmp_path / "run" / "adapter" / "adapter.json")
    saved = meta["allocation"]
    assert meta["routing"] == ("dynamic" if bare else "frozen")
    assert (saved["alpha"], saved["top_k"], saved["strategy"]) == (
        (6, 2, "custom") if bare else (5, 3, "mine"))


@pytest.mark.parametrize("flags", ["--only-tasks sum", "--strategy lora", "--strategy uniform"])
def test_no_probe_where_it_decides_nothing(inputs, tmp_path, monkeypatch, succeed, flags) -> None:
    """As for one task, which gets a plain LoRA; who asks for a probe gets one all the same."""
    known, run = (*inputs, "--rank", "4"), tmp_path / "run"
    only = ("--only-tasks", "sum")
    said = succeed(probe.main, *known, *only, "--samples", "2", "--out", tmp_path / "probe")
    assert "split-half overlap" in said and "without a probe" not in said
    monkeypatch.setattr("minismoe.method.sensitivity.sample_norms",
                        lambda *_: pytest.fail("it probes"))
    said = succeed(train.main, *known, *flags.split(), "--epochs", "1", "--out", run)
    found, probed = (read_json(folder / "allocation.json") for folder in (run, tmp_path / "probe"))
    assert not (run / "sensitivity.json").exists() and found == probed
    assert ("one task: a plain LoRA of rank 4, without a probe; several tasks share experts by "
            "votes\n" in said) == ("only" in flags)
    assert "no matrix has a router: there is nothing to freeze\n" in said
    assert "experts a matrix" not in said and found["strategy"] == "lora"
    assert [*found["experts"].values()] == [1] * 14 and found["rank"] == 4


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_came_meanwhile_is_left_as_it_is(inputs, tmp_path, fails, succeed, monkeypatch,
                                                    named) -> None:
    """An --out that was named is refused; else the run takes another name."""
    run, measure = tmp_path / "runs" / "model-1", probing.run_probe

    def slowly(*args):
        run.mkdir(parents=True)
        (run / "config.json").write_text("another's")
        return measure(*args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "run_probe", slowly)
    if named:
        fails(train.main, *inputs, *QUICK, "--out", run, says="holds a run already")
    else:
        succeed(train.main, *inputs, *QUICK)
        assert (tmp_path / "runs" / "model-2" / "results.json").exists()
    assert (run / "config.json").read_text() == "another's"
    assert {file.name for file in run.iterdir()} - {".lock"} == {"config.json"}


@pytest.mark.parametrize("script", [train, probe])
def test_show_marks_the_supervised_tokens(script, inputs, succeed, fails) -> None:
    out = succeed(script.main, *inputs, "--show", "2")
    assert "Assistant:[[ N0<|end|>]]" in out and out.count("---") == 4
    fails(script.main, *inputs, "--show", "2", "--only-tasks", "no", says="has no task no")
    for flags, names in (((), {*toy.TASKS}), (("--only-tasks", "count"), {"count"})):
        shown = succeed(script.main, "--show", "1", *flags)
        assert {line.split()[1] for line in shown.splitlines() if line.startswith("---")} == names


def test_debug_shows_the_traceback(inputs, tmp_path, capsys) -> None:
    code, _, err = finish(train.main, *inputs, "--model", tmp_path / "x", "--debug", capsys=capsys)
    assert code == 1 and err.startswith("Traceback") and "no such model folder" in err


def test_matrices_below_the_rank_are_left_out(inputs, tmp_path, succeed) -> None:
    """Keys and values have 16 rows, as have two matrices of Qwen3.5's delta nets."""
    known = *inputs, "--rank", "20"
    for main, more in (probe.main, ()), (train.main, ("--epochs", "1")):
        run = tmp_path / main.__module__
        out = succeed(main, *known, *more, "--out", run)
        assert "4 matrices get no experts, as they have a side below --rank 20: k_proj, v_" in out
        experts = read_json(run / "allocation.json")["experts"]
        assert {name.rpartition(".")[2] for name in experts} == {
            "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} and len(experts) == 10


def test_a_probe_of_a_broken_checkpoint_is_one_line(inputs, tmp_path, fails) -> None:
    shutil.copytree(inputs[1], tmp_path / "model")
    edit_tensors(tmp_path / "model" / "model.safetensors",
                 lambda tensors: tensors["model.norm.weight"][0].fill_(math.nan))
    fails(probe.main, "--model", tmp_path / "model", *inputs[2:],
          says="error: the probe of sum, upper found gradients that are not finite: is the "
               "checkpoint whole? If it is, try --dtype float32")


def test_a_folder_that_holds_anything_is_not_written_to(inputs, tmp_path, fails) -> None:
    """It may be a project's own folder, or what is left of another run."""
    (tmp_path / "metrics.jsonl").write_text("precious")
    fails(train.main, *inputs, "--out", tmp_path,
          says="is not empty (it holds metrics.jsonl): choose another")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_a_damaged_before_json_is_one_clear_line(run, succeed, fails) -> None:
    before = (run / "before.json").read_text()
    for damaged, says in (("[]", "before.json holds no JSON object"), ("{}", "lacks: 'sum'"),
                          (before.replace('"loss"', '"x"'), "before.json is damaged: remove it")):
        (run / "before.json").write_text(damaged)
        fails(train.main, "--resume", "--out", run, says=says)
    (run / "before.json").unlink()
    succeed(train.main, "--resume", "--out", run)
    assert (run / "before.json").read_text() == before


def test_a_run_goes_on_in_less_memory_and_on_another_machine(run, succeed) -> None:
    (run / "checkpoint.safetensors").unlink()
    config = read_json(run / "config.json")
    config["arguments"]["device"] = "cuda"
    write_json(run / "config.json", config)
    for flags in (("--recompute", "--device", "cpu"), ()):
        succeed(train.main, "--resume", "--out", run, *flags)
        saved = read_json(run / "config.json")["arguments"]      # now they are the run's own
        assert (saved["device"], saved["recompute"]) == ("cpu", True)
        (run / "results.json").unlink()


def test_a_place_that_cannot_be_written_is_seen_before_the_probe(inputs, tmp_path, fails,
                                                                 monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minismoe.method.sensitivity.sample_norms",
                        lambda *_: pytest.fail("it probes"))
    for flags, says in (["--out", "file"], "is a file: choose another --out"), (
            ["--out", "file/run"], "file is no folder that can be written"), (
            [], "runs is no folder that can be written"):
        fails(train.main, *inputs, *flags, says=says)


def test_a_run_on_few_bits(inputs, tmp_path, succeed, monkeypatch) -> None:
    """Of a model in this folder, which names the run."""
    run = shutil.copytree(inputs[1], tmp_path / "mine") / "runs" / "mine-1"
    monkeypatch.chdir(tmp_path / "mine")
    out = succeed(train.main, "--model", ".", *inputs[2:], "--base-bits", "4", *QUICK)
    assert "linear layers in 4 bits" in out
    assert read_json(run / "adapter" / "adapter.json")["base_bits"] == 4
    out = succeed(train.main, "--init", run, "--epochs", "0", "--out", tmp_path / "judged")
    assert "linear layers in 4 bits" in out
    succeed(export.main, run, "--layout", "hf", "--out", tmp_path / "hf")
    # The export holds other weights than these, whose answers it does not take for the run's.
    loaded = load_inputs(resolve_auto(runs.read_run(run)))
    assert results.read_after(run, loaded) == {}
    edit = read_json(run / "config.json")
    write_json(run / "config.json", edit | {"arguments": edit["arguments"] | {"base_bits": None}})
    assert results.read_after(run, loaded).keys() == {"sum", "upper"}


def test_a_run_and_its_export_read_the_same_columns_up_to_the_same_length(
        inputs, tmp_path, succeed, capsys) -> None:
    rows = "".join(f"say {i},skipped,{'long ' * (i % 2)}N{i}\n" for i in range(30))
    (tmp_path / "t.csv").write_text(f"asked,note,said\n{rows}")
    run = tmp_path / "run"
    out = succeed(train.main, *inputs[:2], "--data", tmp_path / "t.csv", "--columns",
                  "asked,said", "--max-length", "28", "--epochs", "1", "--out", run)
    cut = out.splitlines()[3].split()[-2]
    assert 0 < int(cut) < 27
    code, out, err = finish(export.main, run, "--layout", "peft", "--out", tmp_path / "out",
                            capsys=capsys)
    assert code == 0, err
    assert "not what the run was trained on" not in err
    assert out.splitlines()[4].split()[-2] == cut
