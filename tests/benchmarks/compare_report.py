"""The results of compare.py: its record, paired intervals, and Markdown tables.

The record holds what the tables and the README's picture show. Single runs stay in --out.

Letters: S seeds, N test lines of a task, R resamples.
"""

import argparse
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compare_cells
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minismoe.io.files import read_json, write_json
from minismoe.io.text import clean
from minismoe.model.checkpoint import versions

RESULTS = Path(__file__).resolve().parent / "results"
CONTROLS = ("lora", "uniform", "random")
RESAMPLES, TOLERANCE = 2000, compare_cells.TOLERANCE
Interval = list[float]                       # mean, and the ends of 95 %


def intervals(values: Mapping[str, Tensor], new_lines: bool) -> dict[str, Interval]:
    """Mean of each task's (S, N) and of all tasks as "mean", with 95 % bootstrap intervals.

    A resample draws seeds, and lines of each task. With `new_lines` every seed has its own lines,
    so lines are drawn for each seed apart; a seed with fewer lines is filled up with nan. A
    bootstrap of few seeds is too narrow by sqrt(1 - 1/S) (Hesterberg 2015, arXiv 1411.5279), so its
    ends are moved out by that factor.
    """
    generator = torch.Generator().manual_seed(0)
    count = len(next(iter(values.values())))
    seeds = torch.randint(count, (RESAMPLES, count), generator=generator)            # (R, S)
    wide = math.sqrt(count / (count - 1)) if count > 1 else 1.0
    means, draws = {}, {}
    for task, value in values.items():
        have = (~value.isnan()).sum(1)[seeds, None]                                  # (R, S, 1)
        lines = torch.rand(RESAMPLES, count if new_lines else 1, value.shape[1],
                           generator=generator) * have
        drawn = value[seeds[:, :, None], lines.long()]                               # (R, S, N)
        drawn = drawn * (torch.arange(value.shape[1]) < have)
        draws[task] = (drawn.sum(2) / have[..., 0]).mean(1)                          # (R,)
        means[task] = value.nanmean(1).mean()
    means["mean"], draws["mean"] = (torch.stack(list(d.values())).mean(0) for d in (means, draws))
    ends = {task: torch.quantile(d, torch.tensor([0.025, 0.975], dtype=d.dtype))
            for task, d in draws.items()}
    return {task: [round(x.item(), 5) for x in (mean, *(mean + wide * (ends[task] - mean)))]
            for task, mean in means.items()}


def outcomes(runs: Sequence[dict], task: str, seeds: Sequence[int], by_line: bool) -> Tensor:
    """Share of right answers on a task, averaged over draws: (S, N), or (S, 1) from accuracies.

    The row of a seed with fewer lines than others is filled up with nan.
    """
    return pad_sequence([torch.tensor([
        [float(c) for c in run["answers"][task]] if by_line else [run["tasks"][task]["after"]]
        for run in runs if run["seed"] == seed], dtype=torch.float64).mean(0) for seed in seeds],
        batch_first=True, padding_value=math.nan)


def against(row: dict, control: dict | None, new_lines: bool) -> dict[str, Any] | None:
    """Paired difference to a control over common seeds; the accuracy itself if control is None.

    Also its standard deviation over seeds.
    """
    sides = [row] if control is None else [row, control]
    seeds = sorted(set.intersection(*({r["seed"] for r in side["runs"]} for side in sides)))
    if not seeds:
        return None
    by_line = all(run["answers"] for side in sides for run in side["runs"])
    values = {}
    for task in sides[0]["runs"][0]["tasks"]:
        first, *second = (outcomes(side["runs"], task, seeds, by_line) for side in sides)
        values[task] = first - second[0] if second else first
    by_seed = torch.stack([v.nanmean(1) for v in values.values()]).mean(0)              # (S,)
    found: dict[str, Any] = {"seeds": len(seeds), "by_line": by_line,
                             "intervals": intervals(values, new_lines)}
    if len(seeds) > 1:
        found["sd"] = round(by_seed.std().item(), 5)
    return found


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """The record of all finished final cells, with the outcomes of every run."""
    cells = list(compare_cells.all_cells(args))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        folder = args.out / cell.name
        if cell.phase != "final" or not compare_cells.finished(folder):
            continue
        row = found.setdefault((cell.budget, cell.strategy), {
            "budget": cell.budget, "strategy": cell.strategy, "lr": cell.lr,
            "edge": cell.lr in (args.lrs[0], args.lrs[-1]), "diverged": 0, "runs": []})
        if not (folder / "results.json").exists():
            row["diverged"] += 1
            continue
        results, answers = read_json(folder / "results.json"), folder / "after.json"
        row["runs"].append({
            "seed": cell.seed, "tasks": results["tasks"],
            "trainable_parameters": results["trainable_parameters"],
            "answers": {task: found["right"] for task, found in read_json(answers).items()}
            if answers.exists() else None})
    spent = [compare_cells.seconds_of(args.out / cell.name) or 0.0 for cell in cells]
    return {"format": "minismoe.compare/1", "name": args.name, "machine": machine(),
            "versions": versions(), "hours": round(sum(spent) / 3600, 2),
            "settings": {name: getattr(args, name) for name in compare_cells.FIXED} | {
                name: Path(value).name for name in ("model", "data")
                if (value := getattr(args, name))},
            "seeds": args.seeds, "lrs": args.lrs, "new_lines": not args.model,
            "targets": targets(args, found),
            "rows": [row for row in found.values() if row["runs"]]}


def targets(args: argparse.Namespace, found: Mapping[tuple[str, str], dict]) -> dict[str, int]:
    """The parameters of each budget: those of the uniform mixture that gives it its name."""
    wanted = {budget for budget, _ in found if budget != "paper"}
    if not wanted:
        return {}
    modules = compare_cells.probed(args, compare_cells.SEARCH)
    shapes = compare_cells.shapes_of(args, list(next(iter(modules.values()))))
    return {b: compare_cells.budget_parameters(shapes, int(b), args.rank) for b in sorted(wanted)}


def machine() -> dict[str, Any]:
    """The machine of these measurements."""
    cpus = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in (
        cpus.read_text().splitlines() if cpus.exists() else ()) if line.startswith("model name")]
    return {"platform": platform.platform(), "python": platform.python_version(),
            "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name()
            if torch.cuda.is_available() else None}


def judge(record: dict[str, Any]) -> None:
    """Put in place of each row's runs their accuracy, and the differences to the controls of the
    same budget."""
    by_name = {(row["budget"], row["strategy"]): row for row in record["rows"]}
    for row in record["rows"]:
        row["accuracy"] = against(row, None, record["new_lines"])
        row["against"] = {}
        for name in CONTROLS:
            control = by_name.get((row["budget"], name))
            if control and control is not row:
                row["against"][name] = against(row, control, record["new_lines"])
        target = record["targets"].get(row["budget"])
        spent = [run["trainable_parameters"] for run in row["runs"]]
        row["parameters"] = round(sum(spent) / len(spent))
        row["off"] = max((abs(s / target - 1) for s in spent), default=0.0) if target else None
        row["before"] = {t: sum(run["tasks"][t]["before"] for run in row["runs"]) / len(row["runs"])
                         for t in row["runs"][0]["tasks"]}
    for row in record["rows"]:
        del row["runs"]


def write(args: argparse.Namespace) -> None:
    """Write the record of the finished cells, and print its tables."""
    record = collect(args)
    if not record["rows"]:
        print("no final cell is finished yet: there is nothing to report")
        return
    judge(record)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{args.name}.json", record)
    print(markdown(record))
    print(f"wrote {RESULTS / args.name}.json")


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a record: the paper's comparison first, then each equal budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in record["rows"]))
    seeds = max(row["accuracy"]["seeds"] for row in record["rows"])
    on = record["machine"]
    parts = [f"Seeds: {seeds}; {record['hours']:.2g} hours on {on['gpu'] or on['cpu']}, "
             f"{on['cores']} cores, torch {record['versions']['torch']}. Exact match in %; "
             "differences in points, with paired 95 % intervals over seeds and test lines."]
    for budget in sorted(budgets, key=lambda b: (b != "paper", b)):
        rows = sorted((row for row in record["rows"] if row["budget"] == budget),
                      key=lambda row: -row["accuracy"]["intervals"]["mean"][0])
        target = record["targets"].get(budget)
        parts.append(f"**Equal parameters**: {target:,}, those of {budget} experts everywhere"
                     if target else "**The paper's claim**: votes at keep 0.6 against as many "
                     "experts everywhere as there are tasks")
        parts += [*reached(rows), *differences(rows)]
    return "\n\n".join(parts)


def reached(rows: Sequence[dict]) -> list[str]:
    """The table of a budget's accuracies, and a note on its marks."""
    before = rows[0]["before"]
    tasks = list(before)
    body = [["none", "0", "", *map(percent, before.values()),
             percent(sum(before.values()) / len(tasks)), ""]]
    for row in rows:
        found = row["accuracy"]["intervals"]
        off = f" ({100 * row['off']:.1f} % off!)" if row["off"] and row["off"] > TOLERANCE else ""
        lost = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        body.append([row["strategy"] + lost, f"{row['parameters']:,}{off}",
                     f"{row['lr']:g}" + "*" * row["edge"],
                     *(percent(found[t][0]) for t in (*tasks, "mean")),
                     percent(row["accuracy"].get("sd"))])
    notes = [note for used, note in (
        (rows[0]["off"] is not None, "Parameters are equal within 1 %" + (
            ", except where marked." if any("off!" in line[1] for line in body) else ".")),
        (any(row["edge"] for row in rows), "\\* the best rate is at an end of those tried."),
        (not all(row["accuracy"]["by_line"] for row in rows), "Intervals are over seeds only."),
    ) if used]
    return [table(["strategy", "parameters", "rate", *tasks, "mean", "sd over seeds"], body),
            *([" ".join(notes)] if notes else [])]


def differences(rows: Sequence[dict]) -> list[str]:
    """The table of differences to the controls, of the means over tasks."""
    controls = [c for c in CONTROLS if any(row["against"].get(c) for row in rows)]
    if not controls:
        return []
    return [table(["mean of", *(f"minus {c}" for c in controls)], [
        [row["strategy"], *(points(row["against"][c]["intervals"]["mean"])
                            if row["against"].get(c) else "" for c in controls)]
        for row in rows])]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def points(interval: Sequence[float]) -> str:
    """A difference and its interval, in bold if the interval leaves out zero.

    The accuracies of a single seed do not vary, so they have no interval.
    """
    mean, low, high = (100 * x + 0.0 for x in interval)
    if low == high:
        return f"{mean:+.1f}"
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table. Cells are cleaned, since task names come from files of others."""
    lines = [[clean(c).replace("|", "\\|") for c in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
