"""What train.py prints of a run, and its results.json."""

import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..io.files import read_json
from ..io.text import clean, table
from ..training.evaluate import Accuracy


def read_before(file: Path, tasks: Iterable[str]) -> dict[str, Accuracy]:
    """The base's accuracy by task. ValueError if before.json does not say it."""
    with suppress(KeyError, TypeError, ValueError):
        content = read_json(file)
        counts = {name: (content[name]["correct"], content[name]["examples"]) for name in tasks}
        if all(type(c) is type(n) is int and 0 <= c <= n > 0 for c, n in counts.values()):
            return {name: Accuracy(*pair) for name, pair in counts.items()}
    raise ValueError(f"{file} is damaged: remove it, and --resume evaluates the base again")


def results_json(before: Mapping[str, Accuracy], after: Mapping[str, Accuracy],
                 trainable: int, experts: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The content of results.json."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, a in after.items():
        tasks[name] = {"before": round(before[name].share, 4), "after": round(a.share, 4),
                       "interval": [round(x, 4) for x in a.interval], "examples": a.examples}
    mean = {when: round(sum(t[when] for t in tasks.values()) / len(tasks), 4)
            for when in ("before", "after")}
    return {"format": "minismoe.results/1", "metric": "exact_match",
            "trainable_parameters": trainable, "experts": experts, "seconds": seconds,
            "tasks": tasks, "mean": mean}


def print_results(results: Mapping[str, Any], after: Mapping[str, Accuracy], verbose: bool) -> None:
    """Print the table of results and, if `verbose`, some wrong answers of each task."""
    rows = [[clean(name), f"{t['before']:.3f}", f"{t['after']:.3f}",
             "{:.3f} to {:.3f}".format(*t["interval"]), t["examples"]]
            for name, t in results["tasks"].items()]
    mean = results["mean"]
    rows.append(["mean", f"{mean['before']:.3f}", f"{mean['after']:.3f}", "", ""])
    print(table(["exact match", "before", "after", "95 % interval", "answers"], rows))
    if verbose:
        for name, accuracy in after.items():
            for prompt, expected, given in accuracy.wrong[:3]:
                print(f"{clean(name)}: {prompt[-200:]!r}\n  expected {expected!r}, got {given!r}")


def next_commands(run: Path, embedded: bool) -> str:
    """Commands to type next."""
    name, size = shlex.quote(str(run)), read_json(run / "results.json")["trainable_parameters"]
    if embedded:
        return (f"Next: freeze, quantise and chat; see the sensitivities; compare at equal size, "
                "with the same other flags; your own data\n"
                f"  python export.py {name}\n"
                "  python probe.py --out runs/probe\n"
                f"  python train.py --strategy uniform --budget-params {size}\n"
                "  python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data FOLDER\n"
                "  python train.py --help")
    return (f"Next: python export.py {name}, or compare with --strategy uniform "
            f"or lora\nat the same size: --budget-params {size}")
