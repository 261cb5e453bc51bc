"""The comparison of strategies: cells, budgets, the search, intervals, and what is written."""

import json
import math
import random
import sys

import compare
import compare_cells
import compare_report
import pytest
import torch
from compare_cells import SEARCH, Cell
from safetensors.torch import save_file

from minismoe.data import toy
from minismoe.data.tasks import Task
from minismoe.method.allocate import allocate

H, M, KV = 96, 256, 64
SHAPES = {f"model.layers.{i}.{part}": shape for i in range(4) for part, shape in {
    "self_attn.q_proj": (128, H), "self_attn.k_proj": (KV, H), "self_attn.v_proj": (KV, H),
    "self_attn.o_proj": (H, 128), "mlp.gate_proj": (M, H), "mlp.up_proj": (M, H),
    "mlp.down_proj": (H, M)}.items()}


def scores(seed: int = 0) -> dict[str, dict[str, float]]:
    rng = random.Random(seed)
    base = {m: rng.lognormvariate(0, 2) for m in SHAPES}
    return {f"t{t}": {m: s * rng.lognormvariate(0, 1) for m, s in base.items()} for t in range(5)}


def line(question: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def args(tmp_path, monkeypatch):
    """The flags of a small grid on made-up data, with a probe that is made up as well."""
    (tmp_path / "model").mkdir()
    save_file({f"{m}.weight": torch.zeros(shape) for m, shape in SHAPES.items()},
              tmp_path / "model" / "model.safetensors")
    for task in ("a", "b"):
        (tmp_path / "data" / task).mkdir(parents=True)
        for part, count in (("train", 40), ("test", 20)):
            (tmp_path / "data" / task / f"{part}.jsonl").write_text("".join(
                json.dumps({"messages": line(f"{part}{i} {task}")}) + "\n" for i in range(count)))
    monkeypatch.setattr(compare_report, "RESULTS", tmp_path / "results")
    return compare.parse([
        "--out", str(tmp_path / "grid"), "--model", str(tmp_path / "model"), "--data",
        str(tmp_path / "data"), "--seeds", "3", "--search-seeds", "1", "--lrs",
        "0.002,0.001,0.004", "--name", "tiny",
        "--strategies", "lora,uniform,votes"])


def fake(calls: list[Cell], answers: bool = True):
    """A run_cell that trains nothing: votes are a little better, and 0.002 is the best rate."""
    def run_cell(args, cell: Cell) -> None:
        calls.append(cell)
        folder = args.out / cell.name
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps({"seconds": 10.0}))
        if cell.phase == "probe":
            (folder / "sensitivity.json").write_text(json.dumps({"tasks": {
                t: {"scores": s} for t, s in scores(cell.seed).items()}}))
            return
        if cell.lr == 0.004 and cell.strategy == "lora":
            (folder / "diverged.json").write_text('"error: the loss is nan"')
            return
        allocation = compare_cells.allocation_of(args, cell)
        rng = random.Random(cell.name)
        share = 0.6 + 0.2 * (cell.strategy == "votes") - 200 * abs(cell.lr - 0.002)
        right = {t: [int(rng.random() < share) for _ in range(100)] for t in ("a", "b")}
        if answers:
            (folder / "after.json").write_text(json.dumps(
                {task: {"right": marks} for task, marks in right.items()}))
        tasks = {t: {"before": 0.1, "after": sum(r) / 100, "examples": 100}
                 for t, r in right.items()}
        (folder / "allocation.json").write_text(json.dumps(allocation.to_json()))
        (folder / "results.json").write_text(json.dumps({
            "trainable_parameters": allocation.trainable_parameters,
            "experts": sum(allocation.experts.values()), "tasks": tasks,
            "mean": {"after": sum(t["after"] for t in tasks.values()) / 2}}))
    return run_cell


def test_the_search_validates_on_cases_that_nothing_else_holds() -> None:
    lines = [line(q) for i in range(50) for q in (f'How many letters are in "w{i}"?',
                                                  f'Count the letters of "w{i}".')]
    taken = {compare_cells.case(line(f'How many letters are in "w{i}"?')) for i in range(20)}
    task = compare_cells.split(Task("count", lines, [line("never read")]), taken)
    assert len(task.test) == 20 and len(task.train) == 80
    train, test = ({compare_cells.case(m) for m in part} for part in (task.train, task.test))
    assert not test & train and not test & taken and taken <= train
    with pytest.raises(ValueError, match="too few training lines"):
        compare_cells.split(Task("count", lines[:2], []), taken)


def test_the_defaults_validation_lines_are_in_no_final_test(tmp_path) -> None:
    args = compare.parse(["--out", str(tmp_path), "--first-seed", "25"])
    folder = compare_cells.data_folder(args, SEARCH)
    tests = {m[0]["content"] for s in range(25, 25 + compare_cells.TEST_SEEDS)
             for t in toy.tasks(s) for m in t.test}
    for task in toy.TASKS:
        held = [json.loads(row)["messages"] for row in
                (folder / task / "test.jsonl").read_text().splitlines()]
        assert len(held) > 40 and not tests & {m[0]["content"] for m in held}, task
    assert args.flags == ["--dtype", "float32"]        # of the default, also when it is a folder


@pytest.mark.parametrize("experts", [2, 4])
@pytest.mark.parametrize("strategy", compare_cells.STRATEGIES)
def test_budgets_are_equal_within_one_percent(strategy, experts) -> None:
    target = compare_cells.budget_parameters(SHAPES, experts, 8)
    for seed in range(5):
        found = compare_cells.fit(scores(seed), target, {
            **compare_cells.STRATEGIES[strategy], "rank": 8, "shapes": SHAPES})
        assert abs(found.trainable_parameters / target - 1) <= 0.01
        assert found.trainable_parameters == found.trainable(SHAPES)
        if strategy == "votes":                        # the paper's choice, but for its last step
            rule = allocate(scores(seed), budget_params=target, shapes=SHAPES).experts
            moved = sum(abs(found.experts.get(m, 0) - rule.get(m, 0)) for m in SHAPES)
            assert moved <= 11


def test_the_budget_of_the_paper_is_what_votes_spend(args) -> None:
    fake([])(args, Cell("probe", 0))
    paper = {s: compare_cells.allocation_of(args, Cell("final", 0, s, "paper", 1e-3)).experts
             for s in ("votes", "uniform")}
    assert set(paper["uniform"].values()) == {5} and paper["votes"] == allocate(
        scores(), keep=0.6, shapes=SHAPES).experts
    lora = compare_cells.allocation_of(args, Cell("final", 0, "lora", "paper", 1e-3))
    everywhere = compare_cells.budget_parameters(SHAPES, 5, args.rank)
    assert set(lora.experts.values()) == {1}
    assert lora.trainable_parameters == pytest.approx(everywhere, rel=0.02)


def test_grid_searches_then_compares_and_never_repeats(args, monkeypatch, capsys) -> None:
    calls: list[Cell] = []
    monkeypatch.setattr(compare, "run_cell", fake(calls))
    compare.plan(args)
    assert "40 of 40 cells to run" in (planned := capsys.readouterr().out) and "lr?" in planned
    compare.run_grid(args)
    assert len(calls) == len(set(calls)) == 40          # 1 + 6 * 3 of the search, 3 * (1 + 6)
    phases = [cell.phase == "final" for cell in calls]
    assert all(cell.seed == SEARCH for cell in calls[:phases.index(True) - 1])
    assert {cell.lr for cell in calls if cell.phase == "final"} == {0.002}
    args.seeds = 4
    compare.run_grid(args)
    added = calls[40:]
    assert {cell.seed for cell in added} == {3} and len(added) == 7
    compare.plan(args)
    assert "0 of 47 cells to run" in capsys.readouterr().out


def test_final_seeds_may_begin_where_no_choice_was_made_by_them(args, capsys) -> None:
    args.first_seed = 25
    assert {c.seed for c in compare_cells.final_cells(args)} == {25, 26, 27}
    assert {c.seed for c in compare_cells.search_cells(args)} == {SEARCH}
    with pytest.raises(SystemExit):
        compare.parse(["--first-seed", "996", "--seeds", "5"])
    assert "from 0 to 999" in capsys.readouterr().err


def test_the_rate_is_the_best_over_all_seeds_of_the_search(args) -> None:
    args.search_seeds = 2
    for lr, marks in {0.001: (0.9, 0.1), 0.002: (0.5, 0.6), 0.004: (0.6, 0.4)}.items():
        for i, mark in enumerate(marks):
            assert compare_cells.chosen_rate(args, "2", "lora") is None
            folder = args.out / Cell("search", SEARCH + i, "lora", "2", lr).name
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"mean": {"after": mark}}))
    assert compare_cells.chosen_rate(args, "2", "lora") == 0.002


@pytest.mark.parametrize("answers", [True, False])
def test_record_and_tables(args, monkeypatch, capsys, answers) -> None:
    monkeypatch.setattr(compare, "run_cell", fake([], answers))
    compare.run_grid(args)
    compare_report.write(args)
    text = capsys.readouterr().out
    file = compare_report.RESULTS / "tiny.json"
    record = json.loads(file.read_text())
    assert compare_report.markdown(record) in text     # from the JSON alone
    votes = next(r for r in record["rows"] if (r["strategy"], r["budget"]) == ("votes", "2"))
    assert set(votes["against"]) == {"lora", "uniform"} and votes["off"] <= 0.01
    for control in votes["against"].values():
        mean, low, high = control["intervals"]["mean"]
        assert 0 < low < mean < high < 0.4
        assert control["by_line"] == answers
    assert votes["accuracy"]["seeds"] == 3 and votes["before"] == pytest.approx(
        {"a": 0.1, "b": 0.1})
    assert "| none | 0 |" in text and "The paper's claim" in text and "minus uniform" in text
    assert ("over seeds only" in text) == (not answers) and "off!" not in text
    assert record["settings"]["epochs"] == 3 and record["machine"]["cores"]


def test_intervals_hold_what_they_promise() -> None:
    """Half-widths near 1.96 standard errors, of lines that seeds share and of lines of their own.
    """
    generator = torch.Generator().manual_seed(1)
    lines = torch.randn(1, 400, generator=generator, dtype=torch.float64)
    for new_lines, slack, value in (
            (False, 0.12, lines.expand(8, -1)),        # the same everywhere: 400 independent values
            (True, 0.35, torch.randn(8, 400, generator=generator, dtype=torch.float64))):  # 3200
        mean, low, high = compare_report.intervals({"t": value}, new_lines)["mean"]
        expected = 1.96 / math.sqrt(3200 if new_lines else 400) * math.sqrt(8 / 7)
        assert low < mean < high and (high - low) / 2 == pytest.approx(expected, rel=slack)
    zero = compare_report.intervals({"t": torch.zeros(3, 5)}, False)
    assert zero == {"t": [0, 0, 0], "mean": [0, 0, 0]}
    spread = torch.tensor([[0.1], [0.2], [0.3]]).double()      # accuracies only: three seeds
    mean, low, high = compare_report.intervals({"t": spread}, True)["t"]
    assert mean == pytest.approx(0.2) and low < 0.1 and high > 0.3


def test_a_cell_goes_on_diverges_or_fails(args, monkeypatch, tmp_path) -> None:
    cell = Cell("final", 0, "votes", "2", 1e-3)
    folder = args.out / cell.name

    def script(text: str) -> None:
        monkeypatch.setattr(compare, "command", lambda *_: [sys.executable, "-c", text])

    script("import sys; sys.exit('error: no space left')")
    with pytest.raises(RuntimeError, match="no space left"):
        compare.run_cell(args, cell)
    assert not folder.exists()                         # the next try finds it free
    script("import sys; print('in a buffer'); sys.exit('error: the loss is nan at step 3')")
    compare.run_cell(args, cell)
    assert compare.finished(folder) and (folder / "diverged.json").exists()
    monkeypatch.undo()
    (folder / "config.json").write_text("{}")
    assert compare.command(args, cell, folder)[2:] == ["--resume", "--out", str(folder)]


def test_other_settings_need_another_folder(args, monkeypatch, capsys) -> None:
    flags = ["--out", str(args.out), "--model", args.model, "--data", args.data, "--plan"]
    args.out.mkdir()
    (args.out / "compare.json").write_text(json.dumps({n: getattr(args, n) for n in compare.FIXED}))
    compare.main([*flags, "--seeds", "7"])             # a larger grid is no other setting
    with pytest.raises(ValueError, match="choose another --out"):
        compare.main([*flags, "--", "--batch-size", "8"])
    with pytest.raises(SystemExit):
        compare.parse(["--strategies", "vote"])
    assert "strategies are lora" in capsys.readouterr().err
