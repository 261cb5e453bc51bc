"""The benchmark of four bits: a folder read back, the distances, the table, and a run of it."""

import json
import math
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import save_bytes_model

import train
from minismoe.export import graph
from minismoe.export.scales import round_weights
from minismoe.export.weights import GraphFormat
from minismoe.io.files import read_json
from minismoe.model.checkpoint import load_model

sys.path.insert(0, str(Path(__file__).parent))
import fourbits  # noqa: E402
import fourbits_drift  # noqa: E402

SIZES = {"hidden_size": 64, "max_position_embeddings": 128}      # heads of 16, as attention takes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_bytes_model(tmp_path_factory.mktemp("fourbits") / "model", **SIZES)


@pytest.mark.parametrize(("precision", "block"), [("fp32", 32), ("int8", 32), ("int4-8", 128),
                                                  ("int4", 64)])
def test_a_folder_read_back_is_the_model_with_rounded_weights(precision, block, checkpoint,
                                                              tmp_path) -> None:
    model = load_model(checkpoint)
    weights = dict(model.named_parameters())
    graph.write_decoder(tmp_path / "model.onnx", model.config, lambda n: weights[n].detach(), {},
                        GraphFormat("ort", precision, 64, block))
    other = deepcopy(model)                  # what the graph lacks must not come from it unseen
    for p in other.parameters():
        p.data.mul_(0 if p.ndim > 1 else 1)
    found = fourbits_drift.read_back(tmp_path, other)
    wanted = model if precision == "fp32" else round_weights(
        load_model(checkpoint), precision, block)
    for name, p in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), p, rtol=0, atol=1e-6)


def test_divergence_is_that_of_torch_and_zero_for_the_base(checkpoint) -> None:
    base, model = load_model(checkpoint), round_weights(load_model(checkpoint), "int4", 32)
    prompts, wanted = [[5, 9, 2, 70, 33, 8], [5, 9, 4]], []
    for ids in prompts:
        given, true = (m(torch.tensor([ids]))[0, 2:].log_softmax(-1) for m in (model, base))
        wanted.append(F.kl_div(given, true, log_target=True, reduction="none").sum(-1))
    found = fourbits_drift.divergence(base, model, prompts, 2)
    assert found == pytest.approx(torch.cat(wanted).mean().item(), rel=1e-3)
    assert fourbits_drift.divergence(base, base, prompts, 0) == 0


def test_likeliest_compares_the_probabilities_of_whole_answers(checkpoint) -> None:
    model, answers = load_model(checkpoint), [[7, 8], [7, 9], [40]]
    prompts, right = [[3, 4], [50, 60, 70], [8, 8]], []
    for prompt in prompts:                   # the likeliest answer, token by token
        chances = []
        for answer in answers:
            chance = 0.0
            for n, token in enumerate(answer):
                logits = model(torch.tensor([prompt + answer[:n]]))[0, -1]
                chance += math.log(logits.softmax(-1)[token])
            chances.append(chance)
        right.append(answers[chances.index(max(chances))])
    wrong = [next(a for a in answers if a != r) for r in right]
    found = fourbits_drift.likeliest(model, prompts + prompts, right + wrong, answers)
    assert found == 0.5


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


def test_the_table_of_drift_has_means_over_tasks_and_runs() -> None:
    def seen(a: float, b: float, right: float) -> dict[str, dict[str, float]]:
        return {"base": {"x": a, "y": b}, "mixture": {"x": 0, "y": 0}, "exact": {"x": right},
                "likeliest": {"x": 1}}
    said = fourbits_drift.report({"seed0": {"merged": seen(0.1, 0.3, 0.5)},
                                  "seed1": {"merged": seen(0.5, 0.7, 0.7)}}).splitlines()
    assert said[0].count("|") == 6 and said[0].endswith("| x, exact match | x, likeliest answer |")
    assert said[2:] == ["| merged | 0.400 | 0.000 | 60.0 | 100.0 |"]


def test_it_measures_a_run_says_what_it_left_out_and_goes_on(checkpoint, tmp_path, monkeypatch,
                                                             capsys) -> None:
    for name in ("number", "boolq"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part in ("train", "test"):
            (tmp_path / "data" / name / f"{part}.jsonl").write_text("".join(
                json.dumps({"prompt": f"{name} {i}", "completion": f"N{i % 3}"}) + "\n"
                for i in range(8)))
    run = tmp_path / "run"
    train.main(["--model", str(checkpoint), "--data", str(tmp_path / "data"), "--tasks", "number",
                "--strategy", "uniform", "--budget-experts", "28", "--rank", "2", "--epochs",
                "9", "--lr", "0.05", "--out", str(run)])
    rows = [r for r in fourbits.ROWS if r.name == "minismoe int4, blocks of 32"]
    broken = fourbits.Row("broken", "ours", "4", "-c 1/0")
    monkeypatch.setattr(fourbits, "ROWS", [*rows, broken])
    flags = ["--run", str(run), "--out", str(tmp_path / "out"), "--threads", "1", "--drift"]
    fourbits.main(flags)
    said = capsys.readouterr()
    assert "left out: broken: ZeroDivisionError: division by zero" in said.err
    record = read_json(tmp_path / "out" / "fourbits.json")
    assert list(record["runs"]["run"]) == [rows[0].name]
    found = record["drift"]["run"]
    assert list(found) == ["base", "mixture", rows[0].name]
    assert found["base"]["base"] == found["mixture"]["mixture"] == {"boolq": 0}
    assert found["base"]["mixture"]["boolq"] > 0 < found["mixture"]["base"]["boolq"]
    # once more: nothing that is there is made or measured again
    monkeypatch.setattr(fourbits, "ROWS", rows)
    monkeypatch.setattr(fourbits, "call", None)
    monkeypatch.setattr(fourbits_drift, "divergence", None)
    fourbits.main(flags)
    assert capsys.readouterr().out.splitlines()[-7:] == said.out.splitlines()[-7:]
