"""The command line of export.py: its flags, and which of them contradict each other."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.settings import ExportConfig
from ..io.flags import from_flags, new_parser, option, text
from .script import command

NO_RUN = "runs holds no run yet (python train.py makes one)"
# The targets that take a value of --precision or --layout, if not all do.
TARGETS = {"w8a16": ("npu",), "w4a16": ("npu",), "q8": ("ort",), "q4f16": ("ort",), "web": ("ort",),
           **dict.fromkeys(("fp32", "int8", "int4-8", "int4", "genai"), ("ort", "portable"))}
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
    layout, precision, npu = config.layout, config.precision, config.target == "npu"
    rounded = config.graph and not precision.startswith("fp")
    scaled = rounded and (not npu or precision == "w4a16") and precision != "q8"     # in blocks
    beside = config.routing != "merge" or config.adapters
    alike = f"--precision {precision} of --target {config.target}"
    idle = [                     # kinds of exports, and the flags that have no effect on them
        (not config.graph, f"--layout {layout} holds no graph", "target static provider context "
         "precision block size adapters" + " routing" * (
             layout == "hf" or config.routing == "dynamic")),
        (config.model, "a base has no adapters (--prompts FILE calibrates 4 bits and NPUs)",
         "run routing adapters task limit_test" + " layout" * (layout == "peft")
         + " prompts" * (not config.vocab and (not rounded or precision in ("int8", "q8")))),
        (npu, "--target npu holds one merged model", "routing adapters"),
        (config.routing == "dynamic", "--routing dynamic freezes nothing", "prompts task adapters"),
        (config.adapters, "--adapters freezes for each task, beside a base of layout onnx or genai",
         "routing task prompts" + " layout" * (layout == "web")),
        (config.prompts, "--prompts has no tasks", "task"),
        (layout == "peft", "an adapter belongs to the base with all tokens", "vocab"),
        (config.static, "--static fixes all sizes of layout onnx", "layout" + " context" * npu),
        (layout == "web", "transformers.js takes one kind of blocks", "size"),
        (config.model and not config.prompts,
         "texts show which tokens and bits are needed: give --prompts FILE", "vocab size"),
        (beside, "experts beside the weights take blocks of one size", "size"),
        (config.block, "--block stores all matrices alike", "size"),
        (precision not in ("auto", "int4-8", "w4a16") or config.target == "portable",
         f"{alike} stores all matrices alike", "size"),
        (not scaled, f"{alike} has no blocks", "block")]
    needs = [                    # flags, and the targets that take them
        (f"--precision {precision}", TARGETS.get(precision)),
        (f"--layout {layout}", TARGETS.get(layout)),
        ("--static", config.static and ("portable", "npu")),
        ("--provider qnn", any(n.startswith("qnn") for n in config.provider or ()) and ("npu",))]
    for applies, kind, names in idle:
        if applies and (flags := [shown(name, given) for name in names.split() if name in given]):
            return f"{kind}: leave out {' and '.join(flags)}"
    return next((f"{flag} needs --target {' or '.join(targets)}" for flag, targets in needs
                 if targets and config.target not in targets), "")


def shown(name: str, given: Mapping[str, Any]) -> str:
    """A flag as it was given, with its value if that is a word."""
    if name == "run":
        return "RUN"
    return f"{option(name)} {given[name]}" if name in USUAL else option(name)
