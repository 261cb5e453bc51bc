"""A run's config.json: written by train.py, and held against the flags of a run that goes on."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..io.files import inside, read_json, write_json
from ..method.allocate import Allocation
from ..model.checkpoint import versions
from ..training import distributed
from ..training.resume import differences, digest, same_threads
from .inputs import Inputs

# Flags that a resumed run may change.
SMALLER = ("memory", "micro_batch_size", "recompute")           # where memory was too little
RESUMABLE = ("out", "resume", "debug", "verbose", "device", "shard", "show", "checkpoint_every",
             *SMALLER)


def new_run(out: str | None, name: str) -> Path:
    """The folder of a new run: the one asked for, which must hold none, or the next free name."""
    if out is not None:
        if (Path(out) / "config.json").exists():
            raise FileExistsError(f"{out} holds a run already: go on with --resume, or choose "
                                  "another --out")
        if (Path(out) / "sensitivity.json").exists() and not (Path(out) / "before.json").exists():
            raise FileExistsError(f"{out} is what probe.py measured: choose another --out, with "
                                  f"--allocation {out}/allocation.json to train on it")
        return Path(out)
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def resumed(parser: argparse.ArgumentParser, argv: Sequence[str], run: Path) -> argparse.Namespace:
    """The flags of a run, and those of argv that may change; ValueError lists what may not."""
    saved = saved_config(run)["arguments"]
    # What a run divided among processes left, one alone may go on with, and the other way.
    kept = vars(as_typed(parser, {**saved, "shard": None, "out": str(run)}))
    args = parser.parse_args(argv, argparse.Namespace(**kept))
    for name in ("batch_size", "micro_batch_size", "dtype"):     # auto was settled by the run
        if getattr(args, name) == "auto":
            setattr(args, name, kept[name])
    if args.memory != kept["memory"] and args.micro_batch_size == kept["micro_batch_size"]:
        args.micro_batch_size = "auto"       # what fitted another memory
    changed = [f"--{k.replace('_', '-')} {v} (was {kept[k]})" for k, v in vars(args).items()
               if k not in RESUMABLE and kept[k] != v]
    if changed:
        raise ValueError("a resumed run keeps its flags: " + ", ".join(changed))
    return args


def as_typed(parser: argparse.ArgumentParser, saved: dict[str, Any]) -> argparse.Namespace:
    """The flags of a config.json as if they had been typed; ValueError where one could not be."""
    if unknown := saved.keys() - vars(parser.parse_args([])):
        raise ValueError(f"{saved['out']}/config.json: there is no flag {', '.join(unknown)}")
    parser.exit_on_error = False
    try:
        return parser.parse_args([
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in saved.items() if value is not None and value is not False])
    except argparse.ArgumentError as e:
        raise ValueError(f"{saved['out']}/config.json: {e}") from None
    finally:
        parser.exit_on_error = True


def saved_config(run: Path) -> dict[str, Any]:
    """The config.json of a run. Raises FileNotFoundError or ValueError where there is none."""
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} holds no run to go on with: begin it without --resume")
    config = read_json(run / "config.json")
    form = {"arguments": dict, "identity": dict, "versions": dict, "threads": int}
    if not isinstance(config, dict) or not all(isinstance(config.get(k), t)
                                               for k, t in form.items()):
        raise ValueError(f"{run / 'config.json'} lacks what going on needs: {', '.join(form)}")
    return config


def read_run(run: Path) -> argparse.Namespace:
    """The input flags with which a run was made; ValueError where its config.json is none."""
    for name in ("config.json", "adapter", "export"):
        inside(run, name)
    content = read_json(run / "config.json")
    arguments = content.get("arguments") if isinstance(content, dict) else None
    arguments = arguments if isinstance(arguments, dict) else {}
    numbers = ("limit_train", "limit_test", "max_length", "seed")
    saved = {name: arguments.get(name) for name in ("model", "data", "tasks", *numbers)}
    if wrong := [f"{name} = {value!r}" for name, value in saved.items()
                 if type(value) is not (int if name in numbers else str)
                 and (value is not None or name in ("max_length", "seed"))]:
        raise ValueError(f"{run / 'config.json'} is none of a run: {', '.join(wrong)}")
    return argparse.Namespace(**{**arguments, **saved, "show": None})


def note(run: Path, args: argparse.Namespace, inputs: Inputs, allocation: Allocation | None,
         ) -> None:
    """Write config.json, which makes a folder a run; with --resume see that it is this run's.

    Raises ValueError that lists what is another's: the model, tasks, or the allocation, if known.
    """
    chosen = {"the allocation": digest(allocation.to_json())[:16]} if allocation else {}
    config: dict[str, Any] = {
        "format": "minismoe.run/1", "arguments": vars(args), "identity": inputs.identity | chosen,
        "versions": versions(), "machine": platform.platform(), "threads": torch.get_num_threads(),
        "processes": distributed.world()}
    if args.resume:
        saved = saved_config(run)
        if said := differences(config["identity"], chosen | saved["identity"]):
            raise ValueError(f"{run} is the run of something else: {said}")
        processes = saved.get("processes", config["processes"])
        smaller = {name: config["arguments"][name] for name in SMALLER}
        said = differences(versions() | smaller | {"processes": config["processes"]}, {
            **saved["versions"], **{n: saved["arguments"].get(n) for n in SMALLER},
            "processes": processes})
        if said and not distributed.rank():
            print(f"the last bits may differ: {said}", file=sys.stderr)
        if processes == config["processes"]:
            same_threads(saved["threads"])
        config = saved | {"identity": config["identity"],
                          "arguments": saved["arguments"] | smaller}
    distributed.once(write_json, run / "config.json", config)
