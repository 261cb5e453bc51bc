"""How many lines an export answers by itself, and how many of these wrongly, over random splits.

    python tests/benchmarks/sure.py EXPORTED --run RUN --lines 300 --out FILE

EXPORTED is a folder of export.py RUN. Of each task, `lines` training lines that the run did not use
and the test lines are answered once. Then 200 times a random half chooses the threshold of
--max-error, and the other half says how many lines are above it, and how many of these are wrong.
Adds a line for each task, way of answering and share of errors to FILE.
"""

import argparse
import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from minismoe.cli import runs
from minismoe.cli.inputs import read_tasks
from minismoe.export.surety import Answers, answers
from minismoe.io.text import table
from minismoe.method.sure import least_logprob
from minismoe.runtime import Generator

ERRORS, SPLITS = (0.01, 0.02, 0.05), 200


def tried(lines: Answers, max_error: float) -> dict[str, float]:
    """Means over splits: the share of lines that is sure, that of these which is wrong, and how
    often a half has a threshold, whose errors among sure lines of both halves are few enough."""
    rng, covered, wrong, found, held = random.Random(0), list[float](), list[float](), 0, 0
    for _ in range(SPLITS):
        mixed = rng.sample(lines, len(lines))
        half = len(mixed) // 2
        least = least_logprob(mixed[:half], max_error)
        sure = [right for logprob, right in mixed[half:] if least is not None and logprob >= least]
        every = [right for logprob, right in mixed if least is not None and logprob >= least]
        covered.append(len(sure) / (len(mixed) - half))
        found += least is not None
        held += every.count(False) <= max_error * len(every)
        if sure:
            wrong.append(sure.count(False) / len(sure))
    return {"sure": statistics.mean(covered), "wrong": statistics.mean(wrong or [0]),
            "found": found / SPLITS, "held": held / SPLITS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="EXPORTED")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=300, help="unseen training lines a task")
    parser.add_argument("--out", type=Path, required=True, help="the record")
    args = parser.parse_args()
    saved, generator, rows = runs.read_run(args.run), Generator(args.folder), []
    whole = {t.name: t for t in read_tasks(replace(saved, limit_train=sys.maxsize))}
    for task in read_tasks(saved):
        task.valid += whole[task.name].train[len(task.train):len(task.train) + args.lines]
        seen = answers(generator, task, "valid")
        for way, more in answers(generator, task, "test").items():
            lines = seen[way] + more
            right = statistics.mean(right for _, right in lines)
            for max_error in ERRORS:
                row = {"run": args.run.name, "task": task.name, "way": way, "lines": len(lines),
                       "right": right, "max_error": max_error, **tried(lines, max_error)}
                rows.append(row)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(table([*rows[0]], [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()]
                             for row in rows]))


if __name__ == "__main__":
    main()
