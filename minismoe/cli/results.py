"""What a run reached: after.json, results.json and loss.svg, and their table."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ..io import files
from ..io.drawing import loss_svg
from ..io.text import clean, clip, table
from ..training.evaluate import Accuracy, Judgement
from ..training.verdict import read_losses, verdict
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
    """The content of results.json. `facts`: trainable_parameters, experts, seconds, kept."""
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
                 facts: Mapping[str, Any], mark: int | None = None) -> None:
    """Write after.json, results.json and, after a step, loss.svg, where a dashed line stands at
    the step `mark`; print one table of results, what to try next, and the sample answers."""
    losses = read_losses(run / "metrics.jsonl")
    if losses:
        with files.replacing(run / "loss.svg") as tmp:
            tmp.write_text(loss_svg(losses, mark), encoding="utf-8")
    verdicts = {name: verdict(of_task, after[name]["loss"]) for name, of_task in losses.items()}
    results, answers = results_json(before, after, facts), dict[str, Any]()
    for name, trained in after.items():
        samples = [{"prompt": old["prompt"], "expected": old["expected"], "before": old["given"],
                    "after": new["given"]}
                   for old, new in zip(before[name]["samples"], trained["samples"])]
        answers[name] = trained | {"samples": samples}
    files.write_json(run / "after.json", answers)
    files.write_json(run / "results.json", results)
    print(results_table(results, {name: loss for name, (loss, _) in verdicts.items()}))
    for name, (_, hint) in verdicts.items():
        if hint:
            print(f"{clean(name)}: {hint}")
    for name, content in answers.items():
        for sample in content["samples"]:
            print(f"{clean(name)}: " + "\n  ".join(
                f"{kind + ':':9} {clip(clean(' '.join(sample[kind].split())), 100)}"
                for kind in sample))
    others = ", and which others are wrong" if results["mean"] else ""
    print(f"after.json holds these answers{others}")


def results_table(results: Mapping[str, Any], train_loss: Mapping[str, float]) -> str:
    """By task: losses of training lines at the end and of test lines; and, of the same test lines,
    token accuracy, and exact match before and after with its 95 % interval."""
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    rows = [[name, number(train_loss.get(name)), number(t["loss"]["before"]),
             number(t["loss"]["after"]), number(t["token_accuracy"]["after"]),
             number(t.get("before")), number(t.get("after")),
             "{:.3f} to {:.3f}".format(*t["interval"]) if "interval" in t else "",
             t.get("examples", "")] for name, t in results["tasks"].items()]
    if mean := results["mean"]:
        rows.append(["mean", *[""] * 4, number(mean["before"]), number(mean["after"]), "", ""])
    return table(["task", "training loss", "test loss before", "after", "token accuracy",
                  "exact match before", "after", "95 % interval", "answers"], rows)
