"""What a run reached: before.json, after.json, results.json and loss.svg, and their tables."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ..io import files
from ..io.drawing import loss_svg
from ..io.text import clean, clip, table
from ..training.evaluate import Accuracy
from ..training.judge import Judgement
from ..training.verdict import read_metrics
from .inputs import Inputs
from .runs import saved_config

MEASURES = ("loss", "token_accuracy", "samples")         # of each task in before.json


def read_before(file: Path, tasks: Iterable[str]) -> dict[str, Judgement]:
    """How well the base did, by task. ValueError if before.json does not say it."""
    content = files.read_json(file)
    with files.naming(f"{file} is damaged: remove it, and --resume evaluates the base again; it "
                      "lacks", KeyError):
        return {name: content[name] | {measure: content[name][measure] for measure in MEASURES}
                for name in tasks}


def read_after(run: Path, inputs: Inputs) -> dict[str, list[int]]:
    """Whether the trained model answers each test line rightly, by task, as after.json of a run
    says it; of no task if these are not the model and the lines of the run."""
    saved, file = saved_config(run), run / "after.json"
    same = inputs.identity.items() <= saved["identity"].items()
    if saved["arguments"]["base_bits"] or not same or not file.is_file():
        return {}
    return {name: task["right"] for name, task in files.read_json(file).items() if "right" in task}


def results_json(before: Mapping[str, Judgement], after: Mapping[str, Judgement],
                 facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results.json. `facts` are trainable_parameters, experts and seconds."""
    tasks: dict[str, dict[str, Any]] = {name: {} for name in after}
    for name, trained in after.items():
        base, task = before[name], tasks[name]
        if "correct" in base and "correct" in trained:
            old, new = (Accuracy(j["correct"], j["examples"]) for j in (base, trained))
            task |= {"before": round(old.share, 4), "after": round(new.share, 4),
                     "interval": [round(x, 4) for x in new.interval], "examples": new.examples}
        for measure in ("loss", "token_accuracy"):
            task[measure] = {"before": base[measure], "after": trained[measure]}
    compared = [task for task in tasks.values() if "after" in task]
    mean = {when: round(fmean(task[when] for task in compared), 4)
            for when in ("before", "after") if compared}
    return {"format": "minismoe.results/1", "metric": "exact_match", **facts, "tasks": tasks,
            "mean": mean}


def save_results(run: Path, before: Mapping[str, Judgement], after: Mapping[str, Judgement],
                 facts: Mapping[str, Any]) -> None:
    """Write after.json and results.json; print the tables of results, and the sample answers."""
    results, answers = results_json(before, after, facts), dict[str, Any]()
    for name, trained in after.items():
        samples = [{"prompt": old["prompt"], "expected": old["expected"], "before": old["given"],
                    "after": new["given"]}
                   for old, new in zip(before[name]["samples"], trained["samples"])]
        answers[name] = trained | {"samples": samples}
    files.write_json(run / "after.json", answers)
    files.write_json(run / "results.json", results)
    rows = [[name, *(f"{math.exp(min(t['loss'][when], 99)):.2f}" for when in ("before", "after")),
             f"{t['token_accuracy']['before']:.3f}", f"{t['token_accuracy']['after']:.3f}"]
            for name, t in results["tasks"].items() if t["loss"]["after"] is not None]
    if rows:
        print(table(["test lines", "perplexity before", "after", "token accuracy before", "after"],
                    rows))
    rows = [[name, f"{t['before']:.3f}", f"{t['after']:.3f}",
             "{:.3f} to {:.3f}".format(*t["interval"]), t["examples"]]
            for name, t in results["tasks"].items() if "after" in t]
    if mean := results["mean"]:
        rows.append(["mean", f"{mean['before']:.3f}", f"{mean['after']:.3f}", "", ""])
        print(table(["exact match", "before", "after", "95 % interval", "answers"], rows))
    for name, content in answers.items():
        for sample in content["samples"]:
            print(f"{clean(name)}: " + "\n  ".join(
                f"{kind + ':':9} {clip(clean(' '.join(sample[kind].split())), 100)}"
                for kind in sample))
    others = ", and which others are wrong" if mean else ""
    print(f"after.json holds these answers{others}")


def draw_losses(run: Path, kept: int) -> None:
    """Write loss.svg, the picture of metrics.jsonl, with a mark at the step `kept`."""
    losses, valid = read_metrics(run / "metrics.jsonl")
    with files.replacing(run / "loss.svg") as tmp:
        tmp.write_text(loss_svg(dict(enumerate(losses, 1)), valid, kept), encoding="utf-8")
