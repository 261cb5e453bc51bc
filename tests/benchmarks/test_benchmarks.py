"""The benchmarks of speed and memory still run: each measures a tiny model once."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from exported import export, random_model
from tiny import QUICK, save_bytes_model, write_lines

import export as export_script
import train
from minismoe.io.files import read_json
from minismoe.model.checkpoint import load_model

if sys.platform != "linux":
    pytest.skip("they read peak memory as Linux tells it", allow_module_level=True)
import few
import rounding
import speed
import speed_training
import strategies


@pytest.mark.parametrize("work", ["train", "probe"])
def test_speed_measures_sides_that_train(work, inputs, monkeypatch) -> None:
    args = speed.parse([work, "--model", inputs[1], "--data", inputs[3], "--tasks", "sum",
                        "--batch-size", "4", "--count", "2"])
    measure, sides = speed.WORKS[work]
    found = {side: measure(args, side) for side in sides}
    assert len({tuple(figures) for figures in found.values()}) == 1
    assert all(value > 0 for figures in found.values() for value in figures.values())


def test_speed_measures_every_family() -> None:
    args = speed.parse(["family", "--layers", "4", "--width", "128"])
    measure, sides = speed.WORKS["family"]
    assert [*sides] == [*speed_training.OWN]
    for side in ("llama", "lfm2", "qwen3_5_text"):
        assert min(measure(args, side).values()) > 0


def test_speed_measures_exports_and_reports_ratios(tmp_path, capsys) -> None:
    """Each side in a process of its own."""
    folder = export(random_model(max_position_embeddings=1024), tmp_path / "out", context=1024)
    speed.main(["decode", str(folder), "--count", "4", "--rounds", "2", "--threads", "1"])
    said, head, _, row = capsys.readouterr().out.splitlines()
    assert said.startswith("decode: medians of 2 rounds") and "tokens/s" in head
    assert row.split()[1:3] != ["0", "(1.00)"] and row.count("(1.00)") == 6
    seen = {"a": [{"s": 1.0}, {"s": 2.0}, {"s": 4.0}], "b": [{"s": 2.0}, {"s": 2.0}, {"s": 9.0}]}
    assert [line.split() for line in speed.report(seen).splitlines()[2:]] == [
        ["a", "2", "(1.00)"], ["b", "2", "(2.00)"]]


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one task, which has two answers."""
    tmp_path = tmp_path_factory.mktemp("odd")
    model = save_bytes_model(tmp_path / "model", hidden_size=128, intermediate_size=128,
                             num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    for name, first, count in (("train", 0, 36), ("valid", 36, 4), ("test", 40, 6)):
        write_lines(tmp_path / "data" / "odd" / f"{name}.jsonl", (
            (f"odd {i}", ("no", "yes")[i % 2]) for i in range(first, first + count)))
    train.main(["--model", str(model), "--data", str(tmp_path / "data"), "--epochs", "6",
                "--lr", "0.02", "--rank", "2", "--dtype", "float32", "--out",
                str(tmp_path / "run")])
    return tmp_path / "run"


def test_strategies_are_compared_over_seeds(inputs, tmp_path, capfd) -> None:
    """Finished runs are not run again."""
    args = [*inputs[:2], "--budget", "9999", "--out", str(tmp_path), "--strategies",
            "lora,uniform,votes", "--seeds", "2", "--", *inputs[2:], *QUICK]
    strategies.main(args)
    rows = [line.split() for line in capfd.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["lora", "uniform", "votes"]
    assert rows[0][2:] == ["+0.0", "0.0"]
    sizes = [read_json(run / "results.json")["trainable_parameters"]
             for run in sorted(tmp_path.glob("*-0"))]
    assert all(6000 < size <= 9999 for size in sizes), sizes
    for run in tmp_path.glob("*-?"):
        (run / "results.json").write_text('{"mean": {"after": %f}}' % ("uniform" in run.name))
    strategies.main(args)
    assert capfd.readouterr().out.splitlines()[-2].split() == ["uniform", "100.0", "+100.0", "0.0"]


def test_rounding_pairs_ways_line_by_line(odd_run, tmp_path, monkeypatch, capsys) -> None:
    """A run is measured once."""
    monkeypatch.setattr(rounding, "RECORD", tmp_path / "rounding.jsonl")
    ways = [way for way in rounding.WAYS if "all 4 bits" not in way]
    monkeypatch.setattr(rounding, "WAYS", {way: rounding.WAYS[way] for way in ways})
    rounding.main([str(odd_run)])
    said = capsys.readouterr().out
    records = [json.loads(line) for line in rounding.RECORD.read_text().splitlines()]
    trained, *found = (record["KL"]["mean"] for record in records)
    assert [record["way"] for record in records] == ["trained", *ways]
    assert trained == 0 < min(found) and records[1]["NLL"]["difference"] == [0, 0]
    monkeypatch.setattr(rounding, "record_run", lambda *_: pytest.fail("it was measured"))
    rounding.main([str(odd_run)])
    assert said.endswith(again := capsys.readouterr().out) and "means of 1 runs" in again


def test_few_lines_are_trained_and_shipped_once(odd_run, tmp_path, monkeypatch, capsys) -> None:
    """By the commands of a user; the record's figures are those of the run."""
    monkeypatch.setattr(few, "RECORD", tmp_path / "few.jsonl")
    monkeypatch.setattr(sys, "argv", [
        "few.py", "--model", str(odd_run.parent / "model"), "--data", str(odd_run.parent / "data"),
        "--tasks", "odd", "--lines", "8", "--draws", "3", "--ship", "--keep", str(tmp_path), "--",
        "--rank 2 --epochs 2"])
    few.main()
    (line,) = map(json.loads, (first := few.RECORD.read_text()).splitlines())
    (run,) = tmp_path.glob("base_odd_8_3*/run")
    results = read_json(run / "results.json")
    assert line["exact"] == {name: task["after"] for name, task in results["tasks"].items()}
    assert line["steps"] == 2 and line["shipped"].keys() == {"odd"}
    assert len((run.parent / "data" / "odd" / "train.jsonl").read_text().splitlines()) == 8
    few.main()                                       # nothing is missing
    assert few.RECORD.read_text() == first
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["few.py", "--table"])
    few.main()
    assert re.search(r"base +odd +8 +--rank 2 --epochs 2 +1 +2 ", capsys.readouterr().out)


def test_draws_of_few_lines_hold_no_line_twice(odd_run) -> None:
    folder = odd_run.parent / "data"
    first, second = (few.drawn(folder, "odd", 6, draw)[0] for draw in (0, 1))
    assert len({json.dumps(line) for line in first}) == 6 and first != second
    assert few.drawn(folder, "odd", 3, 0)[0] == first[:3]


def test_speed_asks_a_tasks_test_lines(odd_run, tmp_path, succeed) -> None:
    """Drafts change no text; all answers of the set are valid."""
    succeed(export_script.main, odd_run, "--out", tmp_path / "out")
    for work, figure in ("drafts", "sum"), ("answers", "valid %"):
        args = speed.parse([work, str(tmp_path / "out"), "--data", str(odd_run.parent / "data"),
                            "--tasks", "odd", "--count", "4", "--threads", "1"])
        measure, sides = speed.WORKS[work]
        found = {side: measure(args, side) for side in sides}
        if work == "drafts":
            assert found["plain"][figure] == found["drafted"][figure]
            assert found["plain"]["tokens a step"] <= found["drafted"]["tokens a step"]
        else:
            assert found["from the set"][figure] == 100


def test_growth_makes_a_checkpoint_of_a_shape(inputs, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(speed.SIZES, "tiny", (32, 48, 3, 4, 2))
    speed.checkpoint(tmp_path / "base", "tiny", inputs[1])
    model = load_model(tmp_path / "base", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == (
        259 * 32 + 32 + 3 * (2 * 32 + 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48))
