"""The benchmarks of speed and memory still run: each measures a tiny model once."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_bytes_model, write_lines

import train
from minismoe.io.files import read_json
from minismoe.model.checkpoint import load_model

if sys.platform != "linux":
    pytest.skip("they read peak memory as Linux tells it", allow_module_level=True)
import decode_speed
import family_speed
import few
import growth
import merging
import probe_speed
import rounding
import train_speed


@pytest.mark.parametrize("side", decode_speed.OURS)
def test_decode_speed_exports_a_side_and_measures_it(side, tmp_path, monkeypatch, capsys) -> None:
    model = save_bytes_model(tmp_path / "model", hidden_size=64, intermediate_size=64,
                             num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    decode_speed.export(model, tmp_path / side, side)
    monkeypatch.setenv("STARTED", "0")
    decode_speed.child(side, tmp_path / side, threads=1, tokens=4)
    seen = json.loads(capsys.readouterr().out)
    assert seen.pop("tokens") == 4
    assert seen.keys() == {"first", "peak", "rate", "prefill28", "prefill512"}
    assert all(value > 0 for value in seen.values())


def test_family_speed_measures_every_family(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["family_speed", "--layers", "4", "--width", "128",
                                      "--rounds", "1", "--tokens", "3"])
    family_speed.main()
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [*family_speed.OWN]
    assert all(float(ratio) > 0 for row in rows for ratio in row.split()[2:])


def arguments(inputs: list[str], **more: object) -> argparse.Namespace:
    return argparse.Namespace(model=inputs[1], data=inputs[3], tasks=None, batch_size=4, **more)


def test_train_speed_measures_our_side(inputs, capsys) -> None:
    train_speed.child(arguments(inputs, steps=2, side="ours", dtype="float32", experts=2))
    assert min(json.loads(capsys.readouterr().out).values()) > 0


def test_probe_speed_times_three_sides(inputs, capsys) -> None:
    probe_speed.measure(arguments(inputs, batches=2, rounds=1), "float32")
    assert "samples x 14 matrices, 1 rounds" in (said := capsys.readouterr().out)
    assert "x cheaper" in said


def test_merging_has_a_row_for_the_mixture_and_for_its_fits(inputs, tmp_path, capsys) -> None:
    train.main([*inputs, "--strategy", "uniform", "--budget-params", "9999", "--lr", "0.1",
                "--epochs", "20", "--rank", "2", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    merging.main([str(tmp_path / "run")])
    head, _, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert head.split() == ["exact", "match", "sum", "upper", "mean", "missed"]
    assert [re.split("  +", row)[0] for row in rows] == [
        "mixture", "merged", "merged for each task"]
    both, each = (float(row.split()[-2]) for row in rows[1:])
    assert 0 <= each <= both < 100 and both > 0, rows


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one task, which has two answers."""
    tmp_path = tmp_path_factory.mktemp("odd")
    model = save_bytes_model(tmp_path / "model", hidden_size=128, intermediate_size=128,
                             num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    for name, first, count in (("train", 0, 36), ("valid", 36, 4), ("test", 40, 6)):
        write_lines(tmp_path / "data" / "odd" / f"{name}.jsonl", (
            (f"odd {i}", ("no", "yes")[i % 2]) for i in range(first, first + count)))
    train.main(["--model", str(model), "--data", str(tmp_path / "data"), "--samples", "2",
                "--epochs", "6", "--lr", "0.02", "--rank", "2",
                "--dtype", "float32", "--out", str(tmp_path / "run")])
    return tmp_path / "run"


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


def test_growth_makes_a_checkpoint_of_a_shape_and_measures_commands(inputs, tmp_path) -> None:
    (folder := tmp_path / "base").mkdir()
    growth.make_checkpoint(folder, (32, 48, 3, 4, 2), Path(inputs[1]))
    model = load_model(folder, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == (
        259 * 32 + 32 + 3 * (2 * 32 + 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48))
    result = growth.measured(["-c", "b = bytes(10 ** 8); print('{\"rate\": 7}')"], tmp_path / "log")
    assert result["rate"] == 7 and result["seconds"] > 0 and 0.1 < result["peak"] < 2
    with pytest.raises(RuntimeError, match="exit.3.* failed: see .*log"):
        growth.measured(["-c", "exit(3)"], tmp_path / "log")
