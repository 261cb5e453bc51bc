"""A run's folder: config.json, which holds the flags that --resume goes on with, and results."""

import argparse
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..io import files
from ..io.drawing import loss_svg
from ..io.flags import as_flags, from_flags, new_parser, option
from ..io.text import clean, table
from ..method.allocate import Allocation
from ..model.checkpoint import versions
from ..training import distributed
from ..training.distributed import print0
from ..training.evaluate import Accuracy
from ..training.judge import Judgement
from ..training.loop import TrainConfig
from ..training.verdict import read_metrics
from .flags import AllocationConfig, InputConfig, RunConfig
from .inputs import Inputs
from .script import command, working_in

# Flags that a resumed run may change; of UPDATED, its config.json then holds the new values.
ROUNDING = ("device", "micro_batch_size")    # these change the order of sums
UPDATED = ("model", "data", "checkpoint_every", "patience", "recompute", *ROUNDING)
RESUMABLE = ("out", "resume", "debug", "show", *UPDATED)
# Flags that export.py takes over from a run.
EXPORTED = ("model", "data", "columns", "only_tasks", "system", "limit_train", "limit_valid",
            "limit_test", "max_length", "seed")


def check_free(run: Path, resume: bool) -> None:
    """Raise FileExistsError if a new run would lie in a folder that holds anything, and
    PermissionError if no file can be made in it."""
    if run.exists() and not run.is_dir():
        raise FileExistsError(f"{run} is a file: choose another --out")
    files.must_be_writable(run)
    if resume:
        return
    if (run / "config.json").exists():
        raise FileExistsError(f"{run} holds a run already: go on with --resume, or choose "
                              "another --out")
    if (run / "sensitivity.json").exists():
        raise FileExistsError(f"{run} is what probe.py measured: choose another --out, with "
                              f"--allocation {run}/allocation.json to train on it")
    if run.exists() and (found := [path.name for path in run.iterdir() if path.name[0] != "."]):
        raise FileExistsError(f"{run} is not empty (it holds {clean(found[0])}): choose another "
                              "--out")


def folder_of(config: RunConfig) -> Path:
    """--out, or the next free name in runs."""
    name, n = Path(config.inputs.model or "default").resolve().name, 1
    while (free := Path("runs") / f"{name}-{n}").exists():
        n += 1
    return Path(distributed.gather(config.out or str(free))[0])


@contextmanager
def run_folder(config: RunConfig) -> Iterator[Path]:
    """The folder of a run, held for it: --out, or the next free name in runs.

    Raises FileExistsError as `check_free` does, and BlockingIOError if another process holds it.
    """
    run = folder_of(config)              # again: another run may have taken the name meanwhile
    with working_in(run, f"{command('train')} --resume --out {shlex.quote(str(run))}"):
        # Again: another process may have filled it meanwhile.
        check_free(run, config.resume)
        distributed.gather(None)             # no process writes before all have looked
        yield run


def resumed(parser: argparse.ArgumentParser, argv: Sequence[str], run: Path) -> argparse.Namespace:
    """The flags of a run, changed by those of argv. ValueError lists those that may not change."""
    kept = vars(as_typed(parser, run, saved_config(run)["arguments"] | {"out": str(run)}))
    args = parser.parse_args(argv, argparse.Namespace(**kept))
    if args.dtype == "auto":                 # the run began with what auto was then
        args.dtype = kept["dtype"]
    if changed := [f"{option(name)} {now} (was {kept[name]})" for name, now in vars(args).items()
                   if name not in RESUMABLE and kept[name] != now]:
        raise ValueError(f"a resumed run keeps its flags: {', '.join(changed)}. It may change "
                         f"{', '.join(map(option, UPDATED))}; another run with other flags may "
                         f"begin with its experts: --init {shlex.quote(str(run))}")
    return args


def with_inputs_of(parser: argparse.ArgumentParser, argv: Sequence[str], run: Path,
                   ) -> argparse.Namespace:
    """The flags of argv and, where it names none, the model, its bits, the system prompt and,
    unless it names other data, the data of `run` and the flags that choose lines. FileNotFoundError
    if the run has no adapter."""
    kept = vars(as_typed(parser, run, saved_config(run)["arguments"]))
    if not (run / "adapter" / "adapter.json").exists():
        raise FileNotFoundError(f"{run} has not finished; go on with: {command('train')} --resume "
                                f"--out {shlex.quote(str(run))}")
    same = parser.parse_args(argv).data in (None, kept["data"])
    names = ("base_bits", *(EXPORTED if same else ("model", "system")))
    return parser.parse_args(argv, argparse.Namespace(**{name: kept[name] for name in names}))


def as_typed(parser: argparse.ArgumentParser, run: Path, saved: Mapping[str, Any],
             ) -> argparse.Namespace:
    """Flags of a run's config.json, read as if typed. ValueError names a wrong one."""
    parser.exit_on_error = False
    with files.naming(run / "config.json", argparse.ArgumentError):
        args = parser.parse_args([
            option(name) if value is True else f"{option(name)}={value}"
            for name, value in saved.items() if value is not None and value is not False])
    parser.exit_on_error = True
    return args


def saved_config(run: Path) -> dict[str, Any]:
    """The config.json of a run. Raises FileNotFoundError if there is none, and ValueError if it is
    not that of a run, or if another version of minismoe made it."""
    file = run / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} holds no run: config.json is missing. Name the folder of a "
                                "run, or begin one without --resume")
    config = files.read_json(file)
    form = {"arguments": dict, "identity": dict, "versions": dict, "threads": int, "processes": int}
    if lacks := [name for name, kind in form.items() if not isinstance(config.get(name), kind)]:
        raise ValueError(f"{file} is not of a run: it lacks {', '.join(lacks)}")
    saved = config["arguments"]
    flags = [f for kind in (InputConfig, AllocationConfig, TrainConfig, RunConfig)
             for f in fields(kind) if f.metadata]
    # A setting that is missing is None, which may be its default.
    lacks = [f"lacks {f.name}" for f in flags if f.default is not None and f.name not in saved]
    lacks += [f"has {name}, which is no flag" for name in saved.keys() - {f.name for f in flags}
              if saved[name] is not None]
    if lacks:
        raise ValueError(f"{file} {', '.join(lacks)}: another version of minismoe made this run, "
                         "so train again with this one")
    return config


def read_run(run: Path) -> InputConfig:
    """The model, its dtype and the data of a run's config.json; the device is the default. Raises
    ValueError as `saved_config` does, and for a value that no flag can have."""
    for name in ("config.json", "adapter", "export"):
        files.inside(run, name)
    saved = saved_config(run)["arguments"]
    return from_flags(InputConfig, vars(as_typed(
        new_parser(None, {"": InputConfig}), run,
        {name: saved.get(name) for name in (*EXPORTED, "dtype")})))


def finished(config: RunConfig) -> bool:
    """Whether a resumed run holds its results already, and its model and data are where it says."""
    run, inputs = Path(config.out or ""), config.inputs
    complete = all((run / name).exists() for name in ("results.json", "adapter/adapter.json"))
    if not (config.resume and complete):
        return False
    saved = saved_config(run)["arguments"]
    return (inputs.model, inputs.data) == (saved.get("model"), saved.get("data"))


def write_config(run: Path, config: RunConfig, inputs: Inputs, allocation: Allocation) -> None:
    """Write config.json, which makes a folder a run; of a resumed run, with its new flags.

    What may change the last bits of a resumed run is told on stderr. Raises ValueError that lists
    what differs of the model, the tasks and the allocation.
    """
    now: dict[str, Any] = {
        "format": "minismoe.run/1",
        "arguments": as_flags(config, config.inputs, config.allocating, config.training),
        "identity": inputs.identity | {
            "the allocation": files.sha256_of_json(allocation.to_json())[:16]},
        "versions": versions(), "machine": platform.platform(), "threads": torch.get_num_threads(),
        "processes": distributed.world()}
    if config.init:
        file = Path(config.init) / "adapter" / "adapter.safetensors"
        now["identity"]["the adapter of --init"] = files.sha256(file)[:16]
    if config.resume:
        saved = saved_config(run)
        if changes := differences(now["identity"], saved["identity"]):
            raise ValueError(f"{run} began with other inputs: {changes}; if they are the same, "
                             "another version of minismoe began it: train again without --resume")
        here, there = ({**c["versions"], **{name: c["arguments"].get(name) for name in ROUNDING},
                        "processes": c["processes"]} for c in (now, saved))
        if (changes := differences(here, there)) and not distributed.rank():
            print(f"the last bits may differ: {changes}", file=sys.stderr)
        if saved["processes"] == distributed.world():
            same_threads(saved["threads"])
        saved["arguments"] |= {name: now["arguments"][name] for name in UPDATED}
        now = saved
    distributed.rank0_only(files.write_json, run / "config.json", now)


def same_threads(count: int) -> None:
    """Compute with as many threads as an earlier process did: the order of sums depends on it."""
    if count != (now := torch.get_num_threads()):
        print0(f"threads: {count} as before, and not {now}: results stay the same to the last bit")
        torch.set_num_threads(count)


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What two mappings disagree in, in one line; empty if they agree."""
    return ", ".join(f"{clean(key)} {now.get(key, 'absent')} (was {before.get(key, 'absent')})"
                     for key in {**before, **now} if now.get(key) != before.get(key))


def other_tasks(run: Path, inputs: Inputs) -> str:
    """How the tasks differ from those that a run was trained on; empty if they do not."""
    return differences(*(
        {name: value for name, value in identity.items() if name.startswith("task ")}
        for identity in (inputs.identity, saved_config(run)["identity"])))


def read_before(file: Path, tasks: Iterable[str]) -> dict[str, Judgement]:
    """How well the base did, by task. ValueError if before.json does not say it."""
    with suppress(AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        content = files.read_json(file)
        before = {name: content[name] for name in tasks}
        results_json(before, before, {})         # raises for what cannot be compared
        for judgement in before.values():        # as these do, for what cannot be printed
            sum(judgement[name] or 0 for name in ("loss", "token_accuracy"))
            "".join(sample[key] for sample in judgement["samples"]
                    for key in ("prompt", "expected", "given"))
        return before
    raise ValueError(f"{file} is damaged: remove it, and --resume evaluates the base again")


def read_after(run: Path, inputs: Inputs) -> dict[str, list[int]]:
    """Whether the trained model answers each test line rightly, by task, as after.json of a run
    says it; of no task if these are not the model and the lines of the run."""
    saved, file = saved_config(run), run / "after.json"
    same = inputs.identity.items() <= saved["identity"].items()
    if saved["arguments"].get("base_bits") or not same or not file.is_file():
        return {}
    return {name: task["right"] for name, task in files.read_json(file).items() if "right" in task}


def results_json(before: Mapping[str, Judgement], after: Mapping[str, Judgement],
                 facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results.json. `facts` are trainable_parameters, experts and seconds."""
    tasks: dict[str, dict[str, Any]] = {name: {} for name in after}
    for name, trained in after.items():
        base, task = before[name], tasks[name]
        if "correct" in base and "correct" in trained:
            old, new = (Accuracy(j["correct"], j["examples"]) for j in (base, trained))
            task |= {"before": round(old.share, 4), "after": round(new.share, 4),
                     "interval": [round(x, 4) for x in new.interval], "examples": new.examples}
        for measure in ("loss", "token_accuracy"):
            task[measure] = {"before": base[measure], "after": trained[measure]}
    compared = [task for task in tasks.values() if "after" in task]
    mean = {when: round(fmean(task[when] for task in compared), 4)
            for when in ("before", "after") if compared}
    return {"format": "minismoe.results/1", "metric": "exact_match", **facts, "tasks": tasks,
            "mean": mean}


def save_results(run: Path, before: Mapping[str, Judgement], after: Mapping[str, Judgement],
                 facts: Mapping[str, Any]) -> None:
    """Write after.json and results.json; print the tables of results, and the sample answers."""
    results, answers = results_json(before, after, facts), dict[str, Any]()
    for name, trained in after.items():
        samples = [{"prompt": old["prompt"], "expected": old["expected"], "before": old["given"],
                    "after": new["given"]}
                   for old, new in zip(before[name]["samples"], trained["samples"])]
        answers[name] = trained | {"samples": samples}
    files.write_json(run / "after.json", answers)
    files.write_json(run / "results.json", results)
    rows = [[name, *(f"{math.exp(min(t['loss'][when], 99)):.2f}" for when in ("before", "after")),
             f"{t['token_accuracy']['before']:.3f}", f"{t['token_accuracy']['after']:.3f}"]
            for name, t in results["tasks"].items() if t["loss"]["after"] is not None]
    if rows:
        print(table(["test lines", "perplexity before", "after", "token accuracy before", "after"],
                    rows))
    rows = [[name, f"{t['before']:.3f}", f"{t['after']:.3f}",
             "{:.3f} to {:.3f}".format(*t["interval"]), t["examples"]]
            for name, t in results["tasks"].items() if "after" in t]
    if mean := results["mean"]:
        rows.append(["mean", f"{mean['before']:.3f}", f"{mean['after']:.3f}", "", ""])
        print(table(["exact match", "before", "after", "95 % interval", "answers"], rows))
    for name, content in answers.items():
        for sample in content["samples"]:
            print(f"{clean(name)}: " + "\n  ".join(
                f"{kind + ':':9} {shortened(sample[kind])}" for kind in sample))
    others = ", and which others are wrong" if mean else ""
    print(f"after.json holds these answers{others}")


def shortened(text: str) -> str:
    """A text in one line of at most 100 characters that is safe to print."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= 100 else line[:99] + "…"


def draw_losses(run: Path, kept: int) -> None:
    """Write loss.svg, the picture of metrics.jsonl, with a mark at the step `kept`."""
    losses, valid = read_metrics(run / "metrics.jsonl")
    with files.replacing(run / "loss.svg") as tmp:
        tmp.write_text(loss_svg(dict(enumerate(losses, 1)), valid, kept), encoding="utf-8")


def next_commands(run: Path, config: RunConfig) -> str:
    """Commands to type next."""
    commands = ["Next:", f"  {command('export')} {shlex.quote(str(run))}"]
    if config.inputs.model is None:
        commands.append(f"  {command('train')} --model HuggingFaceTB/SmolLM2-135M-Instruct --data "
                        "FOLDER")
    return "\n".join(commands)
