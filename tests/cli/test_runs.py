"""What a run reads, notes and prints: inputs, configuration, probe and results."""

import hashlib
import json
import random
import re
import shutil
import string
from types import SimpleNamespace

import pytest
import torch
from tiny import QUICK, encode, finish, write_lines
from torch import nn

import export
import train
from minismoe.cli import inputs as cli
from minismoe.cli import probing, results, runs
from minismoe.cli.flags import AllocationConfig, InputConfig, RunConfig
from minismoe.data.lines import with_system
from minismoe.data.tasks import Example, Task
from minismoe.data.tokenizer import load_tokenizer
from minismoe.io.files import read_json, write_json
from minismoe.runtime.folder import trained_system


def test_results_hold_shares_intervals_and_their_mean() -> None:
    def judged(loss, token_accuracy, *exact):
        return {"loss": loss, "token_accuracy": token_accuracy, "samples": [],
                **dict(zip(("correct", "examples"), exact))}

    before = {"a": judged(2.0, 0.1, 1, 4), "b": judged(3.0, 0.2, 0, 3), "text": judged(2.5, 0.3)}
    after = {"a": judged(1.0, 0.5, 3, 4), "b": judged(1.5, 0.6, 3, 3), "text": judged(2.0, 0.4)}
    found = results.results_json(before, after, {"experts": 5})
    assert found["tasks"]["a"] == {
        "before": 0.25, "after": 0.75, "examples": 4, "interval": [0.3006, 0.9544],
        "loss": {"before": 2.0, "after": 1.0}, "token_accuracy": {"before": 0.1, "after": 0.5}}
    assert found["tasks"]["text"].keys() == {"loss", "token_accuracy"}
    assert found["mean"] == {"before": 0.125, "after": 0.875}
    assert results.results_json({"text": before["text"]}, {"text": after["text"]}, {})["mean"] == {}


def test_free_text_is_judged_by_its_tokens(inputs, tmp_path, succeed) -> None:
    """Answers are generated for the samples alone; one prompt fills the context."""
    draw, context = random.Random(0), 2048
    for name, first, more in ("train", 0, []), ("test", 30, [("x" * 2 * context, "y")]):
        write_lines(tmp_path / "t" / f"{name}.jsonl", more + [
            (f"tell {i}", "".join(draw.choices(string.printable[:90], k=70)))
            for i in range(first, first + 8)])
    run = tmp_path / "run"
    out = succeed(train.main, *inputs[:2], "--data", tmp_path / "t", *QUICK, "--out", run)
    assert "1 test lines left out: their prompts fill the model's context" in out
    task = read_json(run / "results.json")["tasks"]["t"]
    assert "after" not in task and 0 <= task["token_accuracy"]["after"] <= 1
    (answers,) = read_json(run / "after.json").values()
    assert [s.keys() for s in answers["samples"]] == [{"prompt", "expected", "before", "after"}] * 5
    assert [s["prompt"] for s in answers["samples"]] == [f"tell {i}" for i in range(30, 35)]
    assert out.count("t: prompt:") == 5 and "mean" not in out
    out = succeed(train.main, "--init", run, "--epochs", "0", "--exact-match", "on", "--out",
                  tmp_path / "compared")
    assert re.search(r" 0\.000 +0\.000 +0\.000 to \S+ +8", out)


def test_a_run_without_a_test_shows_answers_to_validation_lines(inputs, tmp_path, succeed) -> None:
    """But to none that is so long that no answer fits behind it."""
    for name, prompts in ("train", "ab"), ("valid", ("x" * 4096, "c")):
        write_lines(tmp_path / "t" / f"{name}.jsonl", ((prompt, "y") for prompt in prompts))
    out = succeed(train.main, *inputs[:2], "--data", tmp_path / "t", "--epochs", "1",
                  "--limit-test", "0", "--out", tmp_path / "run")
    assert "1 validation lines left out: their prompts fill" in out
    assert out.count("t: prompt:") == 1 and "perplexity" not in out
    found = read_json(tmp_path / "run" / "results.json")
    assert found["mean"] == {} and found["tasks"]["t"]["loss"]["after"] is None


@pytest.mark.parametrize("length", [40, 27, 26])
def test_the_length_limit_bounds_every_loss(inputs, capsys, length: int) -> None:
    """40 tokens cut nothing, 27 some answers, and 26 remove some."""
    config = cli.resolve_auto(InputConfig(model=inputs[1], data=inputs[3], max_length=length))
    loaded, tasks = cli.load_inputs(config), cli.read_tasks(config)
    for split, found in ("valid", loaded.valid), ("test", loaded.test):
        for task in tasks:
            whole = [encode(task.name, line, loaded.tokenizer) for line in getattr(task, split)]
            cut = [(e.ids[:length], e.labels[:length]) for e in whole]
            assert [(e.ids, e.labels) for e in found[task.name]] == [
                (ids, labels) for ids, labels in cut if any(x >= 0 for x in labels)]
    assert ("test lines have no loss" in capsys.readouterr().out) == (length == 26)


def test_the_context_bounds_the_length_limit(inputs, tmp_path) -> None:
    shutil.copytree(inputs[1], tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    write_json(tmp_path / "model" / "config.json", config | {"max_position_embeddings": 27})
    loaded = cli.load_inputs(cli.resolve_auto(InputConfig(
        model=str(tmp_path / "model"), data=inputs[3], max_length=40)))
    assert max(len(e.ids) for lines in loaded.encoded.values() for e in lines) == 27


def test_a_run_whose_links_lead_out_of_it_is_refused(run, tmp_path) -> None:
    """A run may come from others: an export would read or replace what the link names."""
    (run / "adapter").rename(tmp_path / "elsewhere")
    for name in ("export", "adapter"):
        (run / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"{name} is a link that leads out of"):
            runs.read_run(run)
        (run / name).unlink()


def test_limits_draw_lines_by_the_seed(tmp_path) -> None:
    """A file may be sorted by its answers; lines that are drawn keep their order."""
    for name in ("train", "valid", "test"):
        write_lines(tmp_path / "t" / f"{name}.jsonl", (
            (f"{name} {i}", "no" if i < 100 else "yes") for i in range(200)))
    def answers(**config) -> list[list[str]]:
        (task,) = cli.read_tasks(InputConfig(model="m", data=str(tmp_path), **config))
        assert all(lines == sorted(lines, key=lambda m: int(m[0]["content"].split()[1]))
                   for lines in (task.train, task.valid, task.test))
        return [[m[-1]["content"] for m in lines] for lines in (task.train, task.valid, task.test)]
    train, valid, test = answers(limit_train=40, limit_test=20)
    assert (len(train), len(valid), len(test)) == (40, 64, 20)
    assert all({*lines} == {"no", "yes"} for lines in (train, valid, test))
    again = answers(limit_train=40, limit_test=20, seed=1)
    assert again[0] != train and again[2] != test
    assert [train, valid, test] == answers(limit_train=40, limit_test=20)
    assert list(map(len, answers())) == [200, 64, 200]


@pytest.mark.parametrize("free, beside, valid, held", [
    (500, 9, 50, True), (499, 9, 50, False), (400, 9, 50, False), (500, 9, 49, False),
    (500, 500, 0, False)])
def test_lines_are_held_out_of_free_text_if_each_task_then_has_50(free: int, beside: int,
                                                                  valid: int, held: bool) -> None:
    """Beside a task of labels, which holds none out."""
    line = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tasks = [Task("free", [line] * free, [], has_valid=False),
             Task("labels", [line] * beside, [], [line] * valid, has_valid=False)]
    tasks[0].new_words = 0.6
    assert cli.held_out_of(tasks) == tasks[:held]
    tasks[0].has_valid = True
    assert cli.held_out_of(tasks) == []


def test_what_is_cut_and_left_out_is_counted(inputs, capsys) -> None:
    line = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    examples = [Example("t", [1] * 9, [-100] * 6 + [1] * 3, i, cut=i < 2) for i in range(4)]
    cli.print_data(load_tokenizer(inputs[1]), [Task("t", [line] * 5, [line])], {"t": examples})
    assert capsys.readouterr().out.splitlines()[2].split() == [
        "t", "5", "0", "1", "9", "9", "3.0", "3", "1"]


def test_a_test_line_is_part_of_a_runs_identity() -> None:
    def identity(answer: str) -> dict[str, str]:
        line = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        return cli.Inputs(None, SimpleNamespace(fingerprint="f"), None, [Task("t", [], [line])],
                          {"t": [Example("t", [1, 2], [-100, 2])]}, {"t": []}, {}, {}).identity
    assert identity("a") == identity("a") != identity("b")


def test_a_rank_that_a_file_overrules_is_said(inputs, tmp_path, capsys) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"format": "minismoe.allocation/1", "rank": 2,
                                "experts": {"model.layers.0.mlp.up_proj": 1}}))
    for rank, said in ((3, True), (2, False), (8, False)):         # 8 is the default
        probing.read_allocation(RunConfig(rank=rank, allocation=str(file)))
        assert ("says rank 2, which is taken, and not 3" in capsys.readouterr().err) == said


def test_a_finished_run_is_left_as_it_is(finished, tmp_path, succeed, monkeypatch) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(train, "load_inputs", lambda *_: pytest.fail("it loads"))
    out = succeed(train.main, "--resume", "--out", run)
    assert out == f"nothing is missing: {run} holds its results\n"
    shutil.rmtree(run / "adapter")
    with pytest.raises(pytest.fail.Exception, match="it loads"):
        succeed(train.main, "--resume", "--out", run)


def test_a_resumed_run_may_change_few_flags(run, capsys, succeed) -> None:
    more = "--resume", "--out", run, "--recompute"
    code, _, err = finish(train.main, *more, "--lr", "0.5", "--epochs", "2", capsys=capsys)
    assert code == 1 and re.search(r"flags: --epochs 2 \(was 1\), --lr 0.5 \(was .*\)\. It may "
                                   "change --model, --data, --recompute, --device; another run "
                                   f".*: --init {run}$", err)
    succeed(train.main, *more)
    assert runs.saved_config(run)["arguments"]["recompute"] is True


def test_a_run_goes_on_where_its_model_and_data_moved_to(inputs, finished, tmp_path, succeed, fails,
                                                         ) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    model, data = (shutil.copytree(inputs[i], tmp_path / f"copy-{i}") for i in (1, 3))
    before = read_json(run / "results.json")["tasks"]
    moved = "--resume", "--out", run, "--model", model, "--data", data
    succeed(train.main, *moved)                          # finished, but now elsewhere
    arguments = runs.saved_config(run)["arguments"]
    assert (arguments["model"], arguments["data"]) == (str(model), str(data))
    assert read_json(run / "results.json")["tasks"] == before
    assert "nothing is missing" in succeed(train.main, *moved)
    (run / "results.json").unlink()
    (file := next(data.rglob("test.jsonl"))).write_text(file.read_text().split("\n")[0] + "\n")
    fails(train.main, *moved, says="began with other inputs, which differ in task upper")


def measured(monkeypatch, count: int, modules: str, seed: int = 0, samples: int = 6,
             ) -> list[list[float]]:
    """Rows of the probe of modules a to d; token i of a sample stands for row i of the norms."""
    norms = torch.rand(count, 4, generator=torch.Generator().manual_seed(count)).double()
    model = nn.Module()
    for name in "abcd":                      # all in one group
        setattr(model, name, nn.Linear(3, 3))
    model.lm_head = nn.Linear(3, 3)
    data = SimpleNamespace(model=model, tokenizer=SimpleNamespace(pad_id=0), encoded={
        "t": [Example("t", [i], [i]) for i in range(count)]})
    monkeypatch.setattr(probing, "probe", lambda _, tasks: SimpleNamespace(
        samples={"t": norms[tasks["t"][0][0][:, 0]]}))
    config = AllocationConfig(samples=samples, seed=seed)
    shapes = dict.fromkeys(modules, (3, 3))
    return probing.run_probe(config, data, shapes).samples["t"].tolist()


def test_the_seed_draws_the_samples(monkeypatch) -> None:
    rows = [measured(monkeypatch, 40, "abcd", seed, 3) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2] and len(rows[2]) == 3


def test_the_overlap_is_that_of_matrices_which_may_get_experts(monkeypatch, capsys) -> None:
    """Two of a, b and c are voted for, whatever d is."""
    rows = measured(monkeypatch, 6, "abc")
    least = [min(range(3), key=lambda m: sum(row[m] for row in half))
             for half in (rows[::2], rows[1::2])]
    assert capsys.readouterr().out.split()[-1] == ("1.00" if least[0] == least[1] else "0.50")


def test_a_system_prompt_is_added_and_remembered_by_the_export(inputs, tmp_path, succeed) -> None:
    config = InputConfig(model=inputs[1], data=inputs[3], system="Be brief.")
    for task in cli.read_tasks(config):
        for lines in (task.train, task.valid, task.test):
            assert all(line[0] == {"role": "system", "content": "Be brief."} for line in lines)
            assert all([m["role"] for m in line[1:]] == ["user", "assistant"] for line in lines)
    own = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "q"}]
    assert with_system(own, "Be brief.") == own
    run, out = tmp_path / "run", tmp_path / "out"
    succeed(train.main, *inputs, "--only-tasks", "sum", "--epochs", "1", "--system", "Be brief.",
            "--out", run)
    succeed(export.main, run, "--precision", "fp32", "--target", "portable", "--out", out)
    assert trained_system(out) == [{"role": "system", "content": "Be brief."}]


def test_a_run_goes_on_from_the_experts_of_another_or_judges_them(inputs, tmp_path, succeed,
                                                                  fails) -> None:
    """On the same lines: else it would be judged on lines that it was trained on."""
    quick = ("--rank", "2", "--dtype", "float32", "--exact-match", "off")
    first, judged, more = (tmp_path / name for name in ("first", "judged", "more"))
    succeed(train.main, *inputs, *quick, "--epochs", "4", "--lr", "0.02", "--seed", "3",
            "--system", "Be brief.", "--out", first)
    for flags, out in ((("--epochs", "0"), judged), (("--epochs", "1", "--lr", "1e-3"), more)):
        succeed(train.main, "--init", first, *flags, *quick[2:], "--out", out)
    tasks = [read_json(run / "results.json")["tasks"] for run in (first, judged, more)]
    for name, task in tasks[0].items():
        assert "after" not in task
        assert task["loss"]["after"] < task["loss"]["before"] - 0.1
        for later in tasks[1:]:
            assert later[name]["loss"]["before"] == pytest.approx(task["loss"]["after"], abs=2e-5)
        assert tasks[1][name]["loss"]["after"] == tasks[1][name]["loss"]["before"]
        assert tasks[2][name]["loss"]["after"] != tasks[2][name]["loss"]["before"]
    assert (first / "loss.svg").is_file() and not (judged / "loss.svg").exists()
    assert (more / "metrics.jsonl").read_text().startswith('{"step": 0, "valid_loss": ')
    assert (more / "loss.svg").is_file() and not (judged / "metrics.jsonl").read_text()
    adapters = [(run / "adapter" / "adapter.safetensors").read_bytes() for run in (first, judged)]
    assert adapters[0] == adapters[1]
    config = read_json(first / "config.json")
    for run in (judged, more):
        begun = read_json(run / "config.json")
        assert all(begun["arguments"][n] == config["arguments"][n] for n in runs.EXPORTED)
        assert begun["identity"] == config["identity"] | {
            "the adapter of --init": hashlib.sha256(adapters[0]).hexdigest()[:16]}
    (first / "adapter" / "adapter.json").unlink()
    for main, *flags in (train.main, "--init", first), (export.main, first):
        fails(main, *flags, says=f"{first} has not finished; go on with: python train.py --resume "
                                 f"--out {first}")
