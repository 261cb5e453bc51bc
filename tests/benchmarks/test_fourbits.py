"""The benchmark of four bits: its table, and a run of it."""

from pathlib import Path

import fourbits
import pytest
from tiny import save_bytes_model, write_lines

import train
from minismoe.io.files import read_json

SIZES = {"hidden_size": 64, "max_position_embeddings": 128}      # heads of 16, as attention takes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_bytes_model(tmp_path_factory.mktemp("fourbits") / "model", **SIZES)


def test_the_table_has_a_line_a_row_and_means_over_runs() -> None:
    first, second, *_ = fourbits.ROWS

    def seen(a: float, b: float, **more: object) -> dict[str, object]:
        return {"table": "4", "tasks": {"a": a, "b": b}, **more}
    said = fourbits.report({"runs": {
        "seed0": {second.name: seen(0.5, 1, MB=87.6, seconds=3.2, rates=[9, 100, 50]),
                  first.name: seen(0.2, 0.4)},
        "seed1": {second.name: seen(0.6, 0.7, MB=87.6, seconds=3.2),
                  first.name: {"table": "4", "tasks": {"a": 0.1}}}}}).splitlines()      # not ready
    assert said[0] == ("|  | bits of embedding and head | MB | a | b | mean | each run | tokens/s "
                       "| made in s |")
    assert said[2:] == [f"| {first.name} | 4 |  | 20.0 | 40.0 | 30.0 | 30.0 |  |  |",
                        f"| {second.name} | 4 | 88 | 55.0 | 85.0 | 70.0 | 75.0 65.0 | 50 | 3 |"]


def test_it_measures_a_run_says_what_it_left_out_and_goes_on(checkpoint, tmp_path, monkeypatch,
                                                             capsys) -> None:
    for part, first in ("train", 0), ("test", 30):
        write_lines(tmp_path / "data" / "number" / f"{part}.jsonl", (
            (f"number {i}", f"N{i % 3}") for i in range(first, first + 8)))
    run = tmp_path / "run"
    train.main(["--model", str(checkpoint), "--data", str(tmp_path / "data"), "--only-tasks",
                "number", "--strategy", "uniform", "--budget-params", "4000", "--rank", "2",
                "--epochs", "9", "--lr", "0.05", "--out", str(run)])
    rows = [r for r in fourbits.ROWS if r.name == "minismoe int4, blocks of 32"]
    broken = fourbits.Row("broken", "ours", "4", "-c 1/0")
    monkeypatch.setattr(fourbits, "ROWS", [*rows, broken])
    flags = ["--run", str(run), "--out", str(tmp_path / "out"), "--threads", "1", "--rounds", "0"]
    fourbits.main(flags)
    said = capsys.readouterr()
    assert "left out: broken: ZeroDivisionError: division by zero" in said.err
    record = read_json(tmp_path / "out" / "fourbits.json")
    assert list(record["runs"]["run"]) == [rows[0].name]
    found = record["runs"]["run"][rows[0].name]
    assert found["tasks"].keys() == {"number"} and found["MB"] > 0
    # once more: nothing that is there is made or measured again
    monkeypatch.setattr(fourbits, "ROWS", rows)
    monkeypatch.setattr(fourbits, "call", None)
    fourbits.main(flags)
    assert capsys.readouterr().out.splitlines()[-3:] == said.out.splitlines()[-3:]
