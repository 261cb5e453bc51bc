"""The command line of export.py: its flags, and which of them contradict each other."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..export.settings import ExportConfig
from ..export.weights import PRECISIONS
from ..io.flags import from_flags, new_parser, option, text
from .script import command

NO_RUN = "runs holds no run yet (python train.py makes one)"
TARGETS = {name: how.targets for name, how in PRECISIONS.items()} | {
    "web": ("ort",), "genai": ("ort", "portable")}       # layouts that not all targets have


def parse(argv: Sequence[str], description: str) -> ExportConfig:
    """The settings that a command line asks for. Exits with 2 if flags contradict each other.

    Without RUN and --model, the newest run in `runs`; ValueError if flags need one, and none is.
    """
    parser = new_parser(description, {"export": ExportConfig})
    parser.add_argument("run", nargs="?", metavar="RUN", type=text,
                        help="folder of train.py (default: newest in runs)")
    config = from_flags(ExportConfig, vars(parser.parse_args(argv)))
    if wrong := clashing_export_flags(config):
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
    if wrong := clashing_export_flags(replace(config, model="the base")):
        raise ValueError(f"{NO_RUN}; {wrong}")
    return config


def clashing_export_flags(c: ExportConfig) -> str:
    """The sentence that says which flags do not go together, and how to mend it; "" if all do."""
    no_graph = f"--layout {c.layout} holds no graph"
    of_base = "a base has no adapters (--prompts FILE calibrates 4 bits and NPUs)"
    fixed = "--static fixes all sizes of layout onnx"
    exact = not c.graph or c.precision in ("fp32", "fp16", "int8", "q8")
    no_blocks = c.precision in ("fp32", "fp16", "q8") or (
        c.target == "npu" and c.precision != "w4a16")
    no_effect = [                        # where something is so: flags that do nothing, and why
        (not c.graph, "target provider precision static context port block", no_graph),
        (c.layout == "hf", "routing", no_graph),
        (c.layout == "peft" and c.routing == "dynamic", "routing", no_graph),
        (c.model and c.layout == "peft", "run limit_test routing layout", of_base),
        (c.model, "run limit_test routing", of_base),
        (c.model and exact and not c.vocab, "prompts", of_base),
        (c.target == "npu", "routing", "--target npu holds one merged model"),
        (c.static, "layout", fixed),
        (c.static and c.target == "npu", "context", fixed),
        (c.target == "npu" or c.static or c.layout == "web", "port",
         "answer.c takes no fixed sizes and no web folders"),
        (c.layout == "peft", "vocab", "an adapter belongs to the base with all tokens"),
        (c.model and not c.prompts, "vocab",
         "texts show which tokens are needed: give --prompts FILE"),
        (no_blocks, "block", f"--precision {c.precision} of --target {c.target} has no blocks")]
    for is_so, names, why in no_effect:
        given = [name for name in names.split() if getattr(c, name) != getattr(ExportConfig, name)]
        if is_so and given:
            return f"{why}: leave out {' and '.join(as_typed(c, name) for name in given)}"
    qnn = any(name.startswith("qnn") for name in c.provider or ())
    for flag, targets in ((f"--precision {c.precision}", TARGETS.get(c.precision)),
                          (f"--layout {c.layout}", TARGETS.get(c.layout)),
                          ("--static", ("portable", "npu") if c.static else None),
                          ("--provider qnn", ("npu",) if qnn else None)):
        if targets and c.target not in targets:
            return f"{flag} needs --target {' or '.join(targets)}"
    return ""


def as_typed(config: ExportConfig, name: str) -> str:
    """A flag as a message names it: with its value, if that is one of few."""
    if name == "run":
        return "RUN"
    few = name in ("layout", "precision", "routing", "target")
    return f"{option(name)} {getattr(config, name)}" if few else option(name)
