#!/usr/bin/env python3
"""Measure how sensitive each weight matrix is to each task, and allocate experts.

    python probe.py --out RUN                                  the built-in toy
    python probe.py --model FOLDER --data FOLDER --out RUN

Writes RUN/sensitivity.json, RUN/allocation.json and RUN/allocation.svg; train.py takes the second
with --allocation.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from minismoe.cli import flags, probing, script
from minismoe.cli.inputs import load_inputs, print_examples, resolve_auto
from minismoe.io.drawing import allocation_svg, terminal_heatmap
from minismoe.io.files import must_be_writable, replacing, write_json
from minismoe.io.flags import from_flags, new_parser, text
from minismoe.io.text import clean


def main(argv: Sequence[str]) -> None:
    # Configure.
    parser = new_parser(__doc__, {"model and data": flags.InputConfig,
                                  "probe and allocation": flags.AllocationConfig})
    parser.add_argument("--out", type=text, metavar="RUN", default="runs/probe",
                        help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    run, allocating = Path(args.out), from_flags(flags.AllocationConfig, vars(args))
    allocation, settings = probing.read_allocation(allocating)
    if allocation:
        parser.error(f"{args.allocation} is an allocation already: nothing is left to probe")
    config = resolve_auto(from_flags(flags.InputConfig, vars(args)))
    if config.show:
        print_examples(config, config.show)
        return
    if (run / "config.json").exists():
        raise FileExistsError(f"{run} is a run of train.py: its allocation would be lost. Choose "
                              "another --out")
    must_be_writable(run)

    # Load, probe and allocate.
    settings = probing.without_small(settings, inputs := load_inputs(config))
    probing.known_allocation(settings, inputs)           # finds flags that are wrong
    with script.working_in(run, f"{script.command('probe')} {shlex.join(argv)}"):
        scores = probing.run_probe(allocating, settings, inputs)
        for name in ("allocation.json", "allocation.svg"):
            (run / name).unlink(missing_ok=True)         # of an earlier probe, with other scores
        write_json(run / "sensitivity.json", scores.to_json(inputs.model.name))
        allocation = probing.choose(settings, scores)  # the scores may not fit a budget

        # Save.
        write_json(run / "allocation.json", allocation.to_json())
        with replacing(run / "allocation.svg") as tmp:
            tmp.write_text(allocation_svg(scores, allocation.experts), encoding="utf-8")

    for task, values in scores.items():
        print(terminal_heatmap(f"sensitivity of {clean(task)}", values, scale="log"))
    print(probing.allocation_heatmap(inputs.model, allocation))
    print(f"{allocation} of {len(scores.shapes)}, "
          f"{allocation.trainable_parameters:,} trainable parameters")
    print(f"wrote sensitivity.json, allocation.json and allocation.svg to {run}")


if __name__ == "__main__":
    script.run_script(main)
