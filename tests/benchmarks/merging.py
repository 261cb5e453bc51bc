"""What merging costs: exact match of a run's mixture, and of the run merged for all tasks together
and for each task by itself.

    python tests/benchmarks/merging.py RUN

"missed" is the median share of the mixture's output energy that the fits lack on held-out samples.
rounding.py says what rounding costs.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from mixture import merge

import export
from minismoe.export.calibration import calibration_batches, shuffled_samples
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.ship import Part, fits_to_make, freeze_and_round, sharing_copy
from minismoe.io.text import clean, table
from minismoe.method.freeze import Fit
from minismoe.training.evaluate import evaluate, questions


def row(name: str, source: Source, fits: Mapping[str, Mapping[str, Fit]]) -> list[str]:
    """Exact match by task, merged by the fits of the task, and what these miss; the mixture itself
    if there are no fits."""
    scores, missed = [], []
    for task in source.tasks:
        model = sharing_copy(source.trained)
        if fits:
            merge(model, fits[task.name])
            missed += [f.residual for f in fits[task.name].values() if f.kind != "exact"]
        asked = questions(source.tokenizer, task, model.config.max_position_embeddings)
        scores.append(evaluate(model, source.tokenizer, asked).share)
    return [name, *(f"{x:.3f}" for x in (*scores, mean(scores))),
            f"{100 * median(missed):.2f} %" if missed else ""]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of train.py")
    config = ExportConfig(run=parser.parse_args(argv).run)
    source = export.load_run(config)
    batches = calibration_batches(shuffled_samples(config, source), source)
    names = [task.name for task in source.tasks]
    fits = fits_to_make(config, source, batches) | fits_to_make(
        replace(config, adapters=True), source, batches)
    freeze_and_round(Part(replace(config, routing="dynamic", precision="fp32"),
                          sharing_copy(source.trained), {}), source.trained, batches, fits)
    rows = [row("mixture", source, {}),
            row("merged", source, dict.fromkeys(names, fits[None])),
            row("merged for each task", source, fits)]
    print(table(["exact match", *map(clean, names), "mean", "missed"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
