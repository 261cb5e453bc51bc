"""The flags of export.py, and which of them mean nothing together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..export.weights import PRECISIONS
from ..io import flags as kinds
from ..method.freeze import KINDS

LAYOUTS = ("onnx", "genai", "web", "peft", "hf")
# What flags say where they are not given. Those of DEFAULTS are None at first, so that one which
# would be ignored is refused even where it says the default.
USUAL = {"layout": "onnx", "precision": "fp32", "routing": "merge", "target": "ort"}
DEFAULTS = {"calibration": 64, "check": 8, "fit": "linear", "tolerance": 0.01}


def parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    """The flags; what they ask for together is checked before anything is loaded."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="folder of train.py (default: newest in runs)")
    add("--model", type=kinds.text,
        help="instead of RUN: a checkpoint folder or hub name, without adapters")
    add("--out", type=kinds.text, metavar="DIR", help="folder to make (default: one in RUN/export)")
    group = parser.add_argument_group("routing")
    add = group.add_argument
    add("--routing", choices=("merge", "freeze", "dynamic", "auto"),
        help="merge (default): into the weights; freeze: a LoRA beside them; dynamic: token by "
        "token, as trained; auto: dynamic in the fewest matrices that --tolerance needs")
    add("--fit", choices=KINDS, help="how a mixture becomes one linear map: "
        "linear (default) in its input, constant gates, or their mean")
    add("--heal", type=kinds.positive, metavar="STEPS", help="train the frozen maps on")
    add("--tolerance", type=kinds.number, metavar="X", help="of auto: exact match, or agreement "
        f"without labels, that may be lost, as a share (default: {DEFAULTS['tolerance']})")
    add("--task", help="freeze for the samples of this task alone")
    add("--adapters", action="store_true", help="the base with one .onnx_adapter for each task, "
        "switched at run time; layouts onnx and genai")
    add("--table", action="store_true", help="print exact match and residual of each way to "
        "freeze (with --routing auto: of that at three tolerances too), write them to "
        "RUN/routing.json, and export nothing")
    add("--calibration", type=kinds.positive, metavar="N",
        help=f"training examples a task to freeze with (default: {DEFAULTS['calibration']})")
    add("--prompts", metavar="FILE", help="calibrate and heal on these prompts, one a line, "
        "towards what the mixture says, and not on the run's data")
    group = parser.add_argument_group("folder")
    add = group.add_argument
    add("--layout", choices=LAYOUTS, help="for onnxruntime (default), onnxruntime-"
        "genai, transformers.js, peft, or transformers")
    add("--precision", choices=tuple(PRECISIONS),
        help="of the base weights, int4-8 with embedding and head in 8 bits; adapters and routers "
        "stay in float32 (default: fp32)")
    add("--target", choices=("ort", "portable"), help="onnxruntime's fused "
        "operators (default), or standard ONNX ones alone")
    add("--static", type=static, metavar="BxTxP", help="fixed sizes for accelerators: prompts, "
        "tokens a step, past positions; needs --target portable")
    add("--context", type=kinds.positive, metavar="TOKENS", help="positions of the graph (default: "
        "what the model was made for, at most 2048, or what the test lines need)")
    add("--check", type=kinds.positive, metavar="N",
        help="prompts on which the export must say what PyTorch does (default: "
        f"{DEFAULTS['check']})")
    group = parser.add_argument_group("where it runs")
    add = group.add_argument
    add("--limit-test", type=kinds.positive, metavar="N", help="test lines a task (default: RUN's)")
    add("--device", default="auto", help="of freezing: cpu, cuda, mps, or auto (default)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of freezing, healing and the table; default: what the device is fast at")
    add("--debug", action="store_true", help="show a traceback on failure")
    parser.set_defaults(**USUAL)
    args = parser.parse_args(argv)
    if wrong := contradiction(args):
        parser.error(wrong)
    return args


def contradiction(args: argparse.Namespace) -> str:
    """What flags mean nothing together, or "" where all do."""
    layout, needs = args.layout, of_adapters(args) if args.model else ""
    graph, portable = layout not in ("peft", "hf"), args.target == "portable"
    idle = given(args, "fit", "calibration", "heal", "prompts", "task")
    unwritten = given(args, "out", "layout", "precision", "target", "static", "context", "check",
                      "adapters", *["routing"] * (args.routing != "auto"))
    rules = [
        (args.run and args.model, "RUN names its base itself: give RUN or --model"),
        (not graph and (args.static or portable or args.precision != "fp32" or args.context),
         f"--layout {layout} holds no graph: --target, --static, --context and --precision mean "
         "nothing"),
        (args.calibration == 1, "--calibration: a fit needs two samples a task, one held out"),
        (layout == "hf" and args.routing == "freeze",
         "--layout hf holds merged weights: --routing merge, or --layout peft"),
        (args.table and args.task, "--table compares all tasks: leave out --task"),
        (args.table and unwritten, f"--table compares and exports nothing: leave out {unwritten}"),
        (args.tolerance is not None and (args.table or args.routing != "auto"),
         "--tolerance is of --routing auto, without --table, which shows three"),
        (args.static and not portable, "--static needs --target portable"),
        (args.static and layout != "onnx" or portable and layout == "web",
         "--layout genai and web take graphs of varying sizes, web those of target ort"),
        (args.routing == "dynamic" and idle,
         f"--routing dynamic freezes nothing: leave out {idle}"),
        (args.adapters and args.routing != "merge",
         "--adapters freezes every matrix: leave out --routing"),
        (args.adapters and (layout not in ("onnx", "genai") or args.task or args.model),
         "--adapters holds every task of a run, in layout onnx or genai"),
        (not graph and args.routing in ("dynamic", "auto"),
         f"--layout {layout} knows no routing: --routing merge"),
        (args.prompts and (args.task or args.adapters),
         "--prompts has no tasks: leave out --task and --adapters"),
        (needs, f"--model has no adapters, which {needs} is for")]
    return next((said for wrong, said in rules if wrong), "")


def of_adapters(args: argparse.Namespace) -> str:
    """The first of the flags given that mean nothing to a base alone."""
    return given(args, *["layout"] * (args.layout == "peft"), "routing", "adapters", "heal",
                 "prompts", "table", "task", "fit", "calibration", "tolerance", "limit_test")


def given(args: argparse.Namespace, *names: str) -> str:
    """The first of these flags that asks for something else than usual."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False and value != USUAL.get(name):
            return f"--{name.replace('_', '-')}" + f" {value}" * (name in USUAL)
    return ""


def static(text: str) -> tuple[int, int, int]:
    """An argparse type: BxTxP."""
    B, T, P = (kinds.positive(part) for part in text.lower().split("x"))
    return B, T, P
