"""The command line of export.py: its flags, and which of them contradict each other."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.settings import ExportConfig
from ..export.weights import PRECISIONS
from ..io.flags import from_flags, new_parser, option, text
from .script import command

NO_RUN = "runs holds no run yet (python train.py makes one)"
TARGETS = {name: how.targets for name, how in PRECISIONS.items()} | {
    "web": ("ort",), "genai": ("ort", "portable")}       # layouts that not all targets have
USUAL = {name: getattr(ExportConfig, name) for name in (     # to give the default is never wrong
    "layout", "precision", "routing", "target")}


def parse(argv: Sequence[str], description: str) -> ExportConfig:
    """The settings that a command line asks for. Exits with 2 if flags contradict each other.

    Without RUN and --model, the newest run in `runs`; ValueError if flags need one, and none is.
    """
    parser = new_parser(description, {"export": ExportConfig})
    parser.add_argument("run", nargs="?", metavar="RUN", type=text,
                        help="folder of train.py (default: newest in runs)")
    # None is "not given": a flag without effect is refused even if it repeats the default.
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None and value != USUAL.get(name)}
    config = from_flags(ExportConfig, given)
    if wrong := contradiction(config, given):
        parser.error(wrong)
    if config.run or config.model:
        return config
    made = sorted(Path("runs").glob("*/adapter/adapter.json"), key=lambda p: p.stat().st_mtime)
    if made:
        return replace(config, run=str(made[-1].parents[1]))
    if begun := sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime):
        raise FileNotFoundError("no run in runs has finished; go on with the newest: "
                                f"{command('train')} --resume --out "
                                f"{shlex.quote(str(begun[-1].parent))}")
    if wrong := contradiction(replace(config, model="the base"), given):
        raise ValueError(f"{NO_RUN}; {wrong}")
    return config


def contradiction(config: ExportConfig, given: Mapping[str, Any]) -> str:
    """Which flags contradict each other, and how to mend it; "" if none do."""
    reasons = {name: next((why for applies, why in rules if applies), "")
               for name, rules in without_effect(config).items() if name in given}
    if why := next(filter(None, reasons.values()), ""):
        flags = [shown(name, given) for name, same in reasons.items() if same == why]
        return f"{why}: leave out {' and '.join(flags)}"
    needs = {f"--precision {config.precision}": TARGETS.get(config.precision),
             f"--layout {config.layout}": TARGETS.get(config.layout),
             "--static": config.static and ("portable", "npu"),
             "--provider qnn": any(name.startswith("qnn") for name in config.provider or ()) and (
                 "npu",)}
    return next((f"{flag} needs --target {' or '.join(targets)}" for flag, targets in needs.items()
                 if targets and config.target not in targets), "")


def without_effect(config: ExportConfig) -> dict[str, list[tuple[Any, str]]]:
    """By flag: whether it has no effect, and why not."""
    layout, precision, npu = config.layout, config.precision, config.target == "npu"
    base, files, dynamic = config.model, not config.graph, config.routing == "dynamic"
    rounded = config.graph and not precision.startswith("fp")
    in_blocks = rounded and (not npu or precision == "w4a16") and precision != "q8"
    no_graph = f"--layout {layout} holds no graph"
    no_adapters = "a base has no adapters (--prompts FILE calibrates 4 bits and NPUs)"
    merged = "--target npu holds one merged model"
    routed = "--routing dynamic freezes nothing"
    each = "--adapters freezes for each task, beside a base of layout onnx or genai"
    no_texts = "texts show which tokens are needed: give --prompts FILE"
    static = "--static fixes all sizes of layout onnx"
    stored = f"--precision {precision} of --target {config.target}"
    return {
        "run": [(base, no_adapters)], "limit_test": [(base, no_adapters)],
        "target": [(files, no_graph)], "provider": [(files, no_graph)],
        "precision": [(files, no_graph)], "static": [(files, no_graph)],
        "context": [(files, no_graph), (config.static and npu, static)],
        "layout": [(base and layout == "peft", no_adapters), (
            config.adapters and layout == "web", each), (config.static, static)],
        "routing": [(files and (layout == "hf" or dynamic), no_graph), (base, no_adapters),
                    (npu, merged), (config.adapters, each)],
        "adapters": [(files, no_graph), (base, no_adapters), (npu, merged), (dynamic, routed)],
        "task": [(base, no_adapters), (dynamic, routed), (config.adapters, each),
                 (config.prompts, "--prompts has no tasks")],
        "port": [(files, no_graph), (npu or config.static or layout == "web" or config.adapters,
                                     "answer.c takes no fixed sizes, web folders and adapters")],
        "prompts": [(base and not config.vocab and (not rounded or precision in ("int8", "q8")),
                     no_adapters), (dynamic, routed), (config.adapters, each)],
        "vocab": [(layout == "peft", "an adapter belongs to the base with all tokens"),
                  (base and not config.prompts, no_texts)],
        "block": [(files, no_graph), (not in_blocks, f"{stored} has no blocks")]}


def shown(name: str, given: Mapping[str, Any]) -> str:
    """A flag as it was given, with its value if that is a word."""
    if name == "run":
        return "RUN"
    return f"{option(name)} {given[name]}" if name in USUAL else option(name)
