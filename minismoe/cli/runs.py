"""A run's folder, and config.json in it, which holds the flags that --resume goes on with."""

import platform
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..io import files
from ..io.flags import as_flags, from_flags, new_parser, option, wrong_value
from ..io.text import clean
from ..method.allocate import Allocation
from ..model.checkpoint import versions
from ..training.plan import TaskPlan, TrainConfig
from .flags import AllocationConfig, InputConfig, RunConfig, clashing_flags
from .inputs import Inputs
from .script import command, working_in

# Flags that a resumed run may change; of UPDATED, its config.json then holds the new values.
UPDATED = ("model", "data", "recompute", "device")
RESUMABLE = ("out", "resume", "debug", "show", *UPDATED)
# Flags that export.py takes over from a run.
EXPORTED = ("model", "data", "columns", "only_tasks", "system", "limit_train", "limit_test",
            "max_length", "seed")


def configure(argv: Sequence[str], description: str | None) -> RunConfig:
    """What the flags of train.py ask for: a new run, one that goes on, or one from the experts of
    another. Exits with 2 if flags contradict each other; ValueError lists flags that a resumed run
    may not change; FileNotFoundError if the run of --init has no adapter."""
    parser = new_parser(description, {
        "run": RunConfig, "model and data": InputConfig, "probe and allocation": AllocationConfig,
        "training": TrainConfig})
    args = parser.parse_args(argv)
    typed = from_flags(RunConfig, vars(args))
    if wrong := clashing_flags(typed):
        parser.error(wrong)
    if typed.resume:
        args = resumed(parser, argv, Path(args.out))
    elif typed.init:
        args = continued(parser, argv, Path(typed.init), typed.data)
    return from_flags(RunConfig, vars(args))


def continued(parser: ArgumentParser, argv: Sequence[str], run: Path, data: str | None,
              ) -> Namespace:
    """The flags of a new run that begins with the experts of `run`: its model and, unless `data`
    names others, its lines."""
    kept = saved_config(finished(run))["arguments"]
    names = EXPORTED if data in (None, kept["data"]) else ("model", "system")
    taken = {name: kept[name] for name in (*names, "base_bits")}
    return parser.parse_args(argv, Namespace(**taken))


def resumed(parser: ArgumentParser, argv: Sequence[str], run: Path) -> Namespace:
    """The flags of a run that goes on, with those changed that argv names. ValueError lists flags
    that may not change."""
    kept = saved_config(run)["arguments"] | {"out": str(run)}
    args = parser.parse_args(argv, Namespace(**kept))
    if args.dtype == "auto":                 # the run began with what auto was then
        args.dtype = kept["dtype"]
    if changed := [f"{option(name)} {now} (was {kept[name]})" for name, now in vars(args).items()
                   if name not in RESUMABLE and kept[name] != now]:
        raise ValueError(f"a resumed run keeps its flags: {', '.join(changed)}. It may change "
                         f"{', '.join(map(option, UPDATED))}; another run with other flags may "
                         f"begin with its experts: --init {shlex.quote(str(run))}")
    if (allocation := run / "allocation.json").exists():       # the probe does not run again
        args.allocation = str(allocation)
    return args


def finished(run: Path) -> Path:
    """A run that has an adapter; FileNotFoundError says how one without goes on."""
    if not (run / "adapter" / "adapter.json").exists():
        raise FileNotFoundError(f"{run} has not finished; go on with: {command('train')} --resume "
                                f"--out {shlex.quote(str(run))}")
    return run


def is_complete(config: RunConfig) -> bool:
    """Whether a resumed run holds its results already, and its model and data are where it says."""
    run = Path(config.out or "")
    if not config.resume or not all(
            (run / name).exists() for name in ("results.json", "adapter/adapter.json")):
        return False
    saved = saved_config(run)["arguments"]
    return (config.model, config.data) == (saved["model"], saved["data"])


def folder_of(config: RunConfig) -> Path:
    """--out, or the next free name in runs. Raises FileExistsError if a new run would lie in a
    folder that holds anything, and PermissionError if no file can be made in it."""
    name, n = Path(config.model or "default").resolve().name, 1
    while (free := Path("runs") / f"{name}-{n}").exists():
        n += 1
    run = Path(config.out or free)
    if run.exists() and not run.is_dir():
        raise FileExistsError(f"{run} is a file: choose another --out")
    files.must_be_writable(run)
    found = [path.name for path in (run.iterdir() if run.exists() else ()) if path.name[0] != "."]
    if found and not config.resume:
        hint = f"is not empty (it holds {clean(found[0])}): choose another --out"
        if "config.json" in found:
            hint = "holds a run already: go on with --resume, or choose another --out"
        elif "sensitivity.json" in found:
            hint = ("is what probe.py measured: choose another --out, with --allocation "
                    f"{run}/allocation.json to train on it")
        raise FileExistsError(f"{run} {hint}")
    return run


@contextmanager
def run_folder(config: RunConfig) -> Iterator[Path]:
    """The folder of a run, held for it. Raises what `folder_of` does, and BlockingIOError if
    another process holds it."""
    run = folder_of(config)              # again: another run may have taken the name meanwhile
    with working_in(run, f"{command('train')} --resume --out {shlex.quote(str(run))}"):
        folder_of(replace(config, out=str(run)))         # another process may have filled it
        yield run


def saved_config(run: Path) -> dict[str, Any]:
    """The config.json of a run. Raises FileNotFoundError if there is none, and ValueError if it is
    not that of a run, if another version of minismoe made it, or for a value that no flag has."""
    file = run / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} holds no run: config.json is missing. Name the folder of a "
                                "run, or begin one without --resume")
    config = files.read_json(file)
    if lacks := [name for name in ("arguments", "identity")
                 if not isinstance(config.get(name), dict)]:
        raise ValueError(f"{file} is not of a run: it lacks {', '.join(lacks)}")
    flags, saved = {f.name: f for f in fields(RunConfig) if f.metadata}, config["arguments"]
    if other := sorted(flags.keys() ^ saved.keys()):
        raise ValueError(f"{file} is of another version of minismoe, with other flags "
                         f"({', '.join(other)}): train again with this one")
    for name, value in saved.items():
        if wrong := wrong_value(flags[name], value):
            raise ValueError(f"{file}: argument {option(name)}: {wrong}")
    return config


def read_run(run: Path) -> InputConfig:
    """The model, its dtype and the data of a run's config.json; the device is the default. Raises
    what `saved_config` raises."""
    for name in ("config.json", "adapter", "export"):
        files.inside(run, name)
    saved = saved_config(run)["arguments"]
    return InputConfig(**{name: saved[name] for name in (*EXPORTED, "dtype")})


def write_config(run: Path, config: RunConfig, inputs: Inputs, allocation: Allocation,
                 plans: Mapping[str, TaskPlan]) -> None:
    """Write config.json, which makes a folder a run; of a resumed run, with its new flags. Raises
    ValueError that names what differs of the model, the tasks and the allocation."""
    identity = inputs.identity | {
        "the allocation": files.sha256_of_json(allocation.to_json())[:16]}
    if config.init:
        file = Path(config.init) / "adapter" / "adapter.safetensors"
        identity["the adapter of --init"] = files.sha256(file)[:16]
    if config.resume:
        content = saved_config(run)
        if other := differing(identity, content["identity"]):
            raise ValueError(f"{run} began with other inputs, which differ in {other}. If they are "
                             "the same, another version of minismoe began it: train again without "
                             "--resume")
        content["arguments"] |= {name: getattr(config, name) for name in UPDATED}
    else:
        content = {"format": "minismoe.run/1", "arguments": as_flags(config),
                   "plan": {task: vars(plan) for task, plan in plans.items()},
                   "identity": identity, "versions": versions(), "machine": platform.platform()}
    files.write_json(run / "config.json", content)


def differing(now: Mapping[str, str], before: Mapping[str, str]) -> str:
    """The names of what differs, in one line; empty if nothing does."""
    return clean(", ".join(name for name in {**before, **now} if now.get(name) != before.get(name)))


def other_tasks(run: Path, inputs: Inputs) -> str:
    """The names of the tasks whose lines are not those that a run was trained on; empty if all
    are."""
    return differing(*(
        {name: value for name, value in identity.items() if name.startswith("task ")}
        for identity in (inputs.identity, saved_config(run)["identity"])))


def next_commands(run: Path, config: RunConfig) -> str:
    """Commands to type next."""
    real = (f"\n  {command('train')} --model HuggingFaceTB/SmolLM2-135M-Instruct --data FOLDER"
            if config.model is None else "")
    return f"Next:\n  {command('export')} {shlex.quote(str(run))}{real}"
