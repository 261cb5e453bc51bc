"""The command line of export.py: its flags, and which of them contradict each other."""

import shlex
from collections.abc import Callable, Mapping, Sequence
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
WORDS = ("layout", "precision", "routing", "target")     # flags that a message shows with the value
NO_GRAPH = "--layout {layout} holds no graph"
NO_ADAPTERS = "a base has no adapters (--prompts FILE calibrates 4 bits and NPUs)"
STATIC = "--static fixes all sizes of layout onnx"
# When flags have no effect, which ones, and why not.
Row = tuple[Callable[[ExportConfig], Any], str, str]
NO_EFFECT: tuple[Row, ...] = (
    (lambda c: not c.graph, "target provider precision static context port block", NO_GRAPH),
    (lambda c: c.layout == "hf" or c.layout == "peft" and c.routing == "dynamic", "routing",
     NO_GRAPH),
    (lambda c: c.model and c.layout == "peft", "run limit_test routing layout", NO_ADAPTERS),
    (lambda c: c.model, "run limit_test routing", NO_ADAPTERS),
    (lambda c: c.model and not c.vocab and (
        not c.graph or c.precision in ("fp32", "fp16", "int8", "q8")), "prompts", NO_ADAPTERS),
    (lambda c: c.target == "npu", "routing", "--target npu holds one merged model"),
    (lambda c: c.static, "layout", STATIC),
    (lambda c: c.static and c.target == "npu", "context", STATIC),
    (lambda c: c.target == "npu" or c.static or c.layout == "web", "port",
     "answer.c takes no fixed sizes and no web folders"),
    (lambda c: c.layout == "peft", "vocab", "an adapter belongs to the base with all tokens"),
    (lambda c: c.model and not c.prompts, "vocab",
     "texts show which tokens are needed: give --prompts FILE"),
    (lambda c: c.precision in ("fp32", "fp16", "q8") or c.target == "npu" and (
        c.precision != "w4a16"), "block", "--precision {precision} of --target {target} has no "
     "blocks"))


def parse(argv: Sequence[str], description: str) -> ExportConfig:
    """The settings that a command line asks for. Exits with 2 if flags contradict each other.

    Without RUN and --model, the newest run in `runs`; ValueError if flags need one, and none is.
    """
    parser = new_parser(description, {"export": ExportConfig})
    parser.add_argument("run", nargs="?", metavar="RUN", type=text,
                        help="folder of train.py (default: newest in runs)")
    args = vars(parser.parse_args(argv))
    config, given = from_flags(ExportConfig, args), {     # to give the default is never wrong
        name: value for name, value in args.items() if value != parser.get_default(name)}
    if wrong := without_effect(config, given):
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
    if wrong := without_effect(replace(config, model="the base"), given):
        raise ValueError(f"{NO_RUN}; {wrong}")
    return config


def without_effect(config: ExportConfig, given: Mapping[str, Any]) -> str:
    """Which flags contradict each other, and how to mend it; "" if none do."""
    for applies, names, why in NO_EFFECT:
        if wrong := [name for name in names.split() if name in given and applies(config)]:
            flags = ["RUN" if name == "run" else f"{option(name)} {given[name]}" if (
                name in WORDS) else option(name) for name in wrong]
            return f"{why.format(**vars(config))}: leave out {' and '.join(flags)}"
    needs = {f"--precision {config.precision}": TARGETS.get(config.precision),
             f"--layout {config.layout}": TARGETS.get(config.layout),
             "--static": config.static and ("portable", "npu"),
             "--provider qnn": any(name.startswith("qnn") for name in config.provider or ()) and (
                 "npu",)}
    return next((f"{flag} needs --target {' or '.join(targets)}" for flag, targets in needs.items()
                 if targets and config.target not in targets), "")
