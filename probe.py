#!/usr/bin/env python3
"""Measure how sensitive each weight matrix is to each task, and allocate experts.

    python probe.py --out RUN                                  the built-in toy
    python probe.py --model FOLDER --data FOLDER --out RUN

Writes RUN/sensitivity.json and RUN/allocation.json, which train.py takes with --allocation.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minismoe.cli import probing, script
from minismoe.cli.flags import TOGETHER, AllocationConfig, InputConfig
from minismoe.cli.inputs import load_inputs, print_examples, resolve_auto
from minismoe.io.drawing import terminal_heatmap
from minismoe.io.files import must_be_writable, write_json
from minismoe.io.flags import flag, from_flags, new_parser, positive, text


@dataclass(frozen=True)
class ProbeConfig(InputConfig, AllocationConfig):
    """The flags of this script."""

    samples: int = flag(32, "training examples a task to probe (default: %(default)s)", positive,
                        metavar="N")
    out: str = flag("runs/probe", "folder to write to (default: %(default)s)", text, metavar="RUN")


def main(argv: Sequence[str]) -> None:
    # Configure.
    parser = new_parser(__doc__, {"output": ProbeConfig, "model and data": InputConfig,
                                  "probe and allocation": AllocationConfig})
    config = from_flags(ProbeConfig, vars(parser.parse_args(argv)))
    if (config.model is None) != (config.data is None):
        parser.error(TOGETHER)
    config, run = resolve_auto(config), Path(config.out)
    if config.show:
        print_examples(config, config.show)
        return
    if (run / "config.json").exists():
        raise FileExistsError(f"{run} is a run of train.py: its allocation would be lost. Choose "
                              "another --out")
    must_be_writable(run)

    # Load, probe, allocate and save.
    inputs = load_inputs(config)
    shapes = probing.large_matrices(inputs, config.rank)
    with script.working_in(run, f"{script.command('probe')} {shlex.join(argv)}"):
        scores = probing.run_probe(config, inputs, shapes)
        (run / "allocation.json").unlink(missing_ok=True)    # of an earlier probe's scores
        write_json(run / "sensitivity.json", scores.to_json(inputs.model.name))
        allocation = probing.choose(config, scores, shapes)    # the scores may not fit a budget
        write_json(run / "allocation.json", allocation.to_json())

    for task, values in scores.items():
        print(terminal_heatmap(f"sensitivity of {task}", values))
    probing.print_experts(inputs.model, allocation)
    print(f"{allocation} of {len(scores.shapes)}, "
          f"{allocation.trainable_parameters:,} trainable parameters")
    print(f"wrote sensitivity.json and allocation.json to {run}")


if __name__ == "__main__":
    script.run_script(main)
