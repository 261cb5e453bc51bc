"""What an export loses of its run: exact match, log-probability, calibration, divergence.

    python tests/benchmarks/export_loss.py RUN RUN RUN --out FOLDER

Each run is frozen once, merged, and stored in each of the ways below. Every folder answers the test
lines in onnxruntime. A task needs a closed set of answers. Prints, for each run and way:

    exact       share of greedy answers that are exactly right, %
    log p       mean log-probability of the right answer among all answers of the task
    calibration expected error of the likeliest answer's probability, in ten bins, %
    KL          divergence of the next token from the mixture's, mean over the right answers' tokens

FOLDER keeps one .json for each run and way: the same command goes on where it was.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import export
from minismoe.cli import script
from minismoe.cli.export_flags import parse
from minismoe.cli.flags import positive
from minismoe.data.tasks import Task
from minismoe.export import layouts
from minismoe.export.calibration import shuffled_samples
from minismoe.export.compare import logits
from minismoe.export.part import Part
from minismoe.export.plan import resolved
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.ship import ship
from minismoe.io.files import read_json, write_json
from minismoe.io.progress import progress_bar
from minismoe.io.text import table
from minismoe.model.checkpoint import load_adapter, load_model
from minismoe.model.decoder import CausalLM
from minismoe.runtime import FORMAT, Generator
from minismoe.training.evaluate import questions

FLOAT = "merged, float32"
WAYS = {                                     # flags of export.py
    FLOAT: "--precision fp32",
    "int4, blocks of 128": "--precision int4 --block 128",
    "int4, blocks of 32": "--precision int4 --block 32",
    "int4-8, blocks of 32": "--precision int4-8 --block 32"}
DIVERGE = 60                                 # lines of each task on which KL is measured
BINS = 10
COLUMNS = {"exact": (100, 1), "log p": (1, 3), "calibration": (100, 1), "KL": (1, 4), "MB": (1, 0)}


def shipped_ways(run: Path, ways: Sequence[str], limit: int | None,
                 ) -> tuple[Source, list[Part]]:
    """A run with its test lines, and what each way stores of it."""
    source = export.load_run(ExportConfig(run=str(run), limit_test=limit or 10 ** 6))
    configs = [resolved(parse([str(run), *WAYS[way].split()], ""), source)[-1] for way in ways]
    return source, ship(configs, source, mixture_of(source), shuffled_samples(configs[0], source))


def mixture_of(source: Source) -> CausalLM:
    """The routed mixture of a run, in float32."""
    model = load_model(source.base)
    load_adapter(model, source.run / "adapter")
    return model


def answers(generator: Generator, task: Task) -> dict[str, float]:
    """What a folder says of the test lines of a task."""
    found: list[tuple[float, float, float, float]] = []
    asked = questions(generator.tokenizer, task, generator.context)
    bar = progress_bar(zip(*asked, asked.limits), task.name, len(asked.lines), unit="answer")
    for messages, prompt, right, limit in bar:
        every = generator.choose(prompt, task.choices, len(task.choices))
        by_text = {answer.text: answer.logprob for answer in every}
        wanted = messages[-1]["content"].strip()
        found.append(([*generator.generate(prompt, limit)] == right, by_text[wanted],
                      math.exp(every[0].logprob), every[0].text == wanted))
    exact, log_p, stated, hit = zip(*found)
    return {"exact": mean(exact), "log p": mean(log_p), "calibration": calibration(stated, hit)}


def calibration(stated: Sequence[float], hit: Sequence[float]) -> float:
    """Expected calibration error in ten bins of equal width (Naeini et al. 2015), 0 to 1."""
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for p, right in zip(stated, hit):
        bins[min(BINS - 1, int(p * BINS))].append(p - right)
    return sum(abs(sum(part)) for part in bins) / len(stated)


def predictions(model: CausalLM | Generator, source: Source, task: Task) -> Tensor:
    """Log-probabilities (n, V) of the tokens of the right answers, for the first DIVERGE lines."""
    _, prompts, rights = questions(source.tokenizer, task, 10 ** 6)
    return torch.cat(logits(model, prompts[:DIVERGE], rights[:DIVERGE])).log_softmax(-1)


def measure(source: Source, part: Part, folder: Path, mixture: dict[str, Tensor],
            ) -> dict[str, Any]:
    """Write a graph, and score what it answers. mixture: its `predictions` by task."""
    shutil.rmtree(folder, ignore_errors=True)
    layouts.copy_base_files(source.base, folder)
    info = {"format": FORMAT, **layouts.write_graph(part, folder)}
    write_json(folder / "export.json", info | {"files": {
        f.name: {"bytes": f.stat().st_size, "sha256": ""} for f in folder.iterdir()}})
    generator, by_task = Generator(folder, threads=torch.get_num_threads()), {}
    for task in source.tasks:
        p, q = mixture[task.name], predictions(generator, source, task)
        by_task[task.name] = answers(generator, task) | {
            "KL": (p.exp() * (p - q)).sum(-1).mean().item()}
    size = sum(f.stat().st_size for f in folder.glob("model.onnx*")) / 1e6
    shutil.rmtree(folder)
    return {"run": source.run.name, "tasks": by_task, "MB": size}


def record_run(run: Path, ways: Sequence[str], limit: int | None, out: Path) -> None:
    """Measure a run in the ways that have no record yet."""
    source, parts = shipped_ways(run, ways, limit)
    model = mixture_of(source)
    with torch.no_grad():
        mixture = {t.name: predictions(model, source, t) for t in source.tasks}
    for way, part in zip(ways, parts):
        write_json(out / f"{run.name}, {way}.json", measure(
            source, part, out / "folder", mixture) | {"way": way})


def report(records: Iterable[dict[str, Any]]) -> str:
    """A table of each run, and one of means over runs and of the worst loss against float32."""
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        tasks = [*record["tasks"].values()]
        runs.setdefault(record["run"], {})[record["way"]] = {
            name: mean(task[name] for task in tasks) for name in tasks[0]} | {"MB": record["MB"]}
    parts, lost = [], dict[str, list[list[float]]]()
    for run, ways in runs.items():
        parts.append(table([run, *COLUMNS], [[way, *shown(row)] for way, row in ways.items()]))
        for way, row in ways.items():
            lost.setdefault(way, []).append(
                [100 * (row["exact"] - ways[FLOAT]["exact"]), row["log p"] - ways[FLOAT]["log p"]])
    rows: list[list[object]] = []
    for way, pairs in lost.items():
        exact, log_p = zip(*pairs)
        means = {name: mean(ways[way][name] for ways in runs.values() if way in ways)
                 for name in COLUMNS}
        rows.append([way, len(pairs), *shown(means), f"{mean(exact):+.2f}", f"{min(exact):+.2f}",
                     f"{mean(log_p):+.4f}", f"{min(log_p):+.4f}"])
    parts.append(table(["means", "runs", *COLUMNS, "exact - float32", "worst", "log p - float32",
                        "worst"], rows))
    return "\n\n".join(parts)


def shown(row: dict[str, float]) -> list[str]:
    """The figures of a way, as the tables print them."""
    return [f"{factor * row[name]:.{digits}f}" for name, (factor, digits) in COLUMNS.items()]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of train.py")
    parser.add_argument("--out", required=True, help="folder of the records")
    parser.add_argument("--limit-test", type=positive, help="test lines a task (default: all)")
    parser.add_argument("--ways", default="", metavar="WORDS;WORDS",
                        help="only float32 and ways whose names begin so")
    args = parser.parse_args(argv)
    out, runs = Path(args.out), [*map(Path, args.runs)]
    out.mkdir(parents=True, exist_ok=True)
    chosen = [way for way in WAYS if way == FLOAT or any(
        way.startswith(words) for words in args.ways.split(";"))]
    for run in runs:
        if lacking := [w for w in chosen if not (out / f"{run.name}, {w}.json").exists()]:
            record_run(run, lacking, args.limit_test, out)
    print(report(read_json(out / f"{run.name}, {way}.json") for run in runs for way in chosen))


if __name__ == "__main__":
    script.run_script(main)
