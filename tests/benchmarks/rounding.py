"""What rounding costs an export: ways to round, paired, line by line, over several runs.

    python tests/benchmarks/rounding.py RUN RUN RUN --lines 200
    python tests/benchmarks/rounding.py --table

Each run is rounded in each of the ways below, and each graph reads test lines with their right
answers in onnxruntime. The record is tests/benchmarks/results/rounding.jsonl, a line a run and way,
with means over lines, and the difference from the first way with its 95 % interval:

    exact       lines of whose answer each token is the likeliest, %: greedy decoding writes it
    NLL         negative log-likelihood of the right answer, nats a line
    KL          from the trained model, in float32, to the graph, over the answer, nats a line

A run that has its lines in the record is left out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import export
from minismoe.cli import script
from minismoe.cli.export_flags import parse
from minismoe.cli.flags import positive
from minismoe.export import calibration, layouts
from minismoe.export.calibration import shuffled_samples
from minismoe.export.check import logits
from minismoe.export.plan import resolved
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.ship import Part, in_float32, ship
from minismoe.io.files import write_json
from minismoe.io.text import table
from minismoe.model.checkpoint import load_adapter, load_model
from minismoe.runtime import Generator
from minismoe.runtime.folder import FORMAT
from minismoe.training.evaluate import questions

RECORD = Path(__file__).parent / "results" / "rounding.jsonl"
USUAL, SMALL = "--precision int4-8 --block 32", "--precision int4 --block 128"
# Flags of export.py; lines of each task to calibrate on; the share of a token's count that is not
# by its weight.
WAYS = {"alike, 64 lines: 4 bits of 32, head 8": (USUAL, 64, 1.0),
        "alike: 4 bits of 32, head 8": (USUAL, 10 ** 6, 1.0),
        "weighted: 4 bits of 32, head 8": (USUAL, 10 ** 6, calibration.EVEN),
        "weighted: all 4 bits of 32": ("--precision int4", 10 ** 6, calibration.EVEN),
        "weighted: all 4 bits of 64": ("--precision int4 --block 64", 10 ** 6, calibration.EVEN),
        "weighted: all 4 bits of 128": (SMALL, 10 ** 6, calibration.EVEN)}
COLUMNS = ("exact", "NLL", "KL")
Line = tuple[float, float, float]


def as_trained(source: Source) -> Any:
    """A run as it was trained, in float32, with its routers if it has some."""
    model = load_model(source.base)
    load_adapter(model, source.run / "adapter")
    return model


def predictions(model: Any, source: Source, lines: int) -> list[tuple[Tensor, list[int]]]:
    """Log-probabilities (n, V) after the prompt and each token of the right answer, and the tokens
    that follow, for the first test lines of each task."""
    found = []
    for task in source.tasks:
        _, prompts, rights = (part[:lines] for part in questions(source.tokenizer, task, 10 ** 6))
        ends = [[*right, source.tokenizer.end_id] for right in rights]
        for i in range(0, len(prompts), 20):
            part = slice(i, i + 20)
            found += [(given.log_softmax(-1).half(), end) for given, end in zip(
                logits(model, prompts[part], rights[part]), ends[part])]
    return found


def line_of(trained: Tensor, given: Tensor, right: Sequence[int]) -> Line:
    """exact (0 or 100), NLL and KL of one line."""
    p, q, at = trained.float(), given.float(), range(len(right))
    return (100.0 * all(q.argmax(-1) == torch.tensor(right)), -q[at, right].sum().item(),
            (p.exp() * (p - q)).sum().item())


def graph_of(source: Source, part: Part, folder: Path) -> tuple[Generator, float]:
    """The session of a part that is written into a folder, and its MB."""
    layouts.copy_base_files(source.base, folder)
    info = {"format": FORMAT, **layouts.write_graph(part, folder)}
    size = sum(f.stat().st_size for f in folder.glob("model.onnx*")) / 1e6
    write_json(folder / "export.json", info | {"files": {
        f.name: {"bytes": f.stat().st_size, "sha256": ""} for f in folder.iterdir()}})
    return Generator(folder, threads=torch.get_num_threads()), size


def parts_of(run: Path, source: Source, ways: Sequence[str]) -> list[Part]:
    """What ships of a run in some ways that differ in their flags alone."""
    configs = [resolved(parse([str(run), *WAYS[way][0].split()], ""), source) for way in ways]
    _, lines, even = WAYS[ways[0]]
    samples = shuffled_samples(configs[0], source)
    usual, calibration.EVEN = calibration.EVEN, even
    try:
        few = {task: examples[:lines] for task, examples in samples.items()}
        return [ship(config, source, in_float32(source), few) for config in configs]
    finally:
        calibration.EVEN = usual


def record_run(run: Path, lines: int) -> None:
    """Measure a run in all ways."""
    source = export.load_run(ExportConfig(run=str(run), limit_test=lines))
    with torch.no_grad():
        trained = predictions(as_trained(source), source, lines)
    of_ways = dict[str, tuple[list[Line], float]]()
    for _, group in groupby(WAYS, lambda way: WAYS[way][1:]):
        for way, part in zip(ways := [*group], parts_of(run, source, ways)):
            with tempfile.TemporaryDirectory() as folder:
                generator, size = graph_of(source, part, Path(folder))
                of_ways[way] = [line_of(p, q, right) for (p, right), (q, _) in zip(
                    trained, predictions(generator, source, lines))], size
    found = {"trained": ([line_of(p, p, right) for p, right in trained], 0.0)} | {
        way: of_ways[way] for way in WAYS}
    with RECORD.open("a") as file:
        for way, (rows, size) in found.items():
            file.write(json.dumps({"run": name_of(run), "way": way, "MB": round(size, 1), **{
                column: {"mean": round(fmean(values), 4), "difference": difference(values, usual)}
                for column, values, usual in zip(COLUMNS, zip(*rows), zip(*of_ways[[*WAYS][0]][0]))
                }, "lines": len(rows)}) + "\n")


def difference(values: Sequence[float], usual: Sequence[float]) -> list[float]:
    """The mean of paired differences, and half of its 95 % interval."""
    pairs = [a - b for a, b in zip(values, usual)]
    return [round(x, 4) for x in (fmean(pairs), 1.96 * stdev(pairs) / len(pairs) ** 0.5)]


def name_of(run: Path) -> str:
    """The folder that few.py keeps a run in, or that of another run."""
    return run.parent.name if run.name == "run" else run.name


def report(records: Sequence[dict[str, Any]]) -> str:
    """A table of each run, and one of the means over runs and the interval of their differences."""
    def row(name: str, of: dict[str, Any]) -> list[str]:
        cells = [f"{of[c]['mean']:.{d}f} ({of[c]['difference'][0]:+.{d}f} ± "
                 f"{of[c]['difference'][1]:.{d}f})" for c, d in zip(COLUMNS, (1, 3, 4))]
        return [name, f"{of['MB']:.1f}", *cells]

    runs = [*dict.fromkeys(r["run"] for r in records)]
    parts = [table([run, "MB", *COLUMNS], [row(r["way"], r) for r in records if r["run"] == run])
             for run in runs]
    means = []
    for way in dict.fromkeys(r["way"] for r in records):
        own = [r for r in records if r["way"] == way]
        # The runs are independent: the variance of their mean is the mean variance over their count
        means.append(row(way, {"MB": fmean(r["MB"] for r in own)} | {c: {
            "mean": fmean(r[c]["mean"] for r in own), "difference": [
                fmean(r[c]["difference"][0] for r in own),
                sum(r[c]["difference"][1] ** 2 for r in own) ** 0.5 / len(own)]}
            for c in COLUMNS}))
    return "\n\n".join([*parts, table([f"means of {len(runs)} runs", "MB", *COLUMNS], means)])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of train.py")
    parser.add_argument("--lines", type=positive, default=200, help="test lines a task")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    args = parser.parse_args(argv)
    for run in () if args.table else map(Path, args.runs):
        done = RECORD.read_text().splitlines() if RECORD.exists() else []
        if name_of(run) not in {json.loads(line)["run"] for line in done}:
            record_run(run, args.lines)
    print(report([json.loads(line) for line in RECORD.read_text().splitlines()]))


if __name__ == "__main__":
    script.run_script(main)
