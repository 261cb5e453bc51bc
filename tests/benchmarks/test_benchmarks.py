"""The benchmarks of speed and memory still run: each measures a tiny model once."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from exported import CONFIG, export
from tiny import save_bytes_model

from minismoe.model.decoder import CausalLM, Config

if sys.platform != "linux":
    pytest.skip("they read peak memory as Linux tells it", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))
import decode_speed  # noqa: E402
import plan_accuracy  # noqa: E402
import probe_speed  # noqa: E402
import speculation  # noqa: E402
import train_speed  # noqa: E402


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


def test_speculation_compares_both_ways(tmp_path, monkeypatch, capsys) -> None:
    export(CausalLM(Config.from_dict(CONFIG)), tmp_path / "exported", context=256)
    for task, line in {
            "piqa": "question: how?\n\nSolution1: cut, cut\n\nSolution2: cut, cut\n\nAnswer",
            "boolq": "question: is it so?\n\nAnswer", "clinc": ""}.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "test.jsonl").write_text(json.dumps(
            {"instruction": line, "input": "hello"}))
    monkeypatch.setattr(sys, "argv", ["speculation", "--folder", str(tmp_path / "exported"),
                                      "--data", str(tmp_path), "--rounds", "1", "--tokens", "24"])
    speculation.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "ours" in line]
    assert [(row[1], row[2], row[-3:]) for row in rows] == [
        (kind, "2", ["2", "of", "2"]) for kind in ("copies", "answers", "others")]


def arguments(inputs: list[str], **more: object) -> argparse.Namespace:
    return argparse.Namespace(model=inputs[1], data=inputs[3], tasks=None, batch_size=4, **more)


def test_train_speed_measures_our_side(inputs, capsys) -> None:
    train_speed.child(arguments(inputs, steps=2, side="ours", dtype="float32", experts=2))
    assert min(json.loads(capsys.readouterr().out).values()) > 0


def test_probe_speed_times_three_sides(inputs, capsys) -> None:
    probe_speed.measure(arguments(inputs, batches=2, rounds=1), "float32")
    assert "samples x 14 matrices, 1 rounds" in (said := capsys.readouterr().out)
    assert "x cheaper" in said


def test_plan_accuracy_plans_and_measures(inputs) -> None:
    flags = [*inputs, "--dtype", "float32"]
    told = plan_accuracy.planned(flags)
    assert told["micro_batch_size"] == 8 and min(told.values()) > 0
    assert plan_accuracy.measured(flags, 8) > told["runtime"] / 2
