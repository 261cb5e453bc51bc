#!/usr/bin/env python3
"""Measure how sensitive each weight matrix is to each task, and allocate experts.

    python probe.py --out RUN                                  the tiny embedded model
    python probe.py --model FOLDER --data FOLDER --out RUN

Writes RUN/sensitivity.json, RUN/allocation.json and RUN/allocation.svg; train.py takes the second
with --allocation. The same command again goes on where an interrupted one was.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from minismoe.cli import flags, probing
from minismoe.cli import inputs as cli
from minismoe.io import flags as kinds
from minismoe.io.drawing import allocation_svg, terminal_heatmap
from minismoe.io.files import replacing, write_json
from minismoe.io.text import clean
from minismoe.training import distributed
from minismoe.training.resume import discard


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=kinds.text, metavar="RUN", default="runs/probe",
                        help="folder to write to (default: %(default)s)")
    flags.add_input_flags(parser)
    flags.add_allocation_flags(parser)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    run = Path(args.out)
    if (run / "config.json").exists():
        raise FileExistsError(f"{run} is a run of train.py, whose allocation it is to keep: choose "
                              "another --out")
    inputs = cli.load_inputs(args)
    probing.rehearse(args, inputs)
    with cli.working_in(run, f"python probe.py {shlex.join(argv)}"):
        scores = probing.measure(args, inputs, run)
        allocation = probing.choose(args, scores)
        if distributed.rank():
            return
        write_json(run / "sensitivity.json", scores.to_json(inputs.model.name))
        write_json(run / "allocation.json", allocation.to_json())
        what, counts = (("ranks", allocation.ranks) if allocation.ranks else
                        ("experts", allocation.experts))
        with replacing(run / "allocation.svg") as tmp:
            tmp.write_text(allocation_svg(scores, counts, what=what), encoding="utf-8")
        discard(run, "probe")

    for task, values in scores.items():
        print(terminal_heatmap(f"sensitivity of {clean(task)}", values, scale="log"))
    print(probing.allocation_heatmap(inputs.model, allocation))
    print(f"{allocation} of {len(scores.shapes)}, "
          f"{allocation.trainable_parameters:,} trainable parameters")
    print(f"wrote sensitivity.json, allocation.json and allocation.svg to {run}")


if __name__ == "__main__":
    cli.run(main)
