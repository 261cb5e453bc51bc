"""The command line of export.py: its flags, and which of them contradict each other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.settings import ExportConfig
from ..export.weights import NPU_PRECISIONS
from ..io.flags import from_flags, new_parser, option, text

NO_RUN = "runs holds no run yet (python train.py makes one)"
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
    if needs := of_adapters(given):
        raise ValueError(f"{NO_RUN}, and {needs} needs one")
    if wrong := contradiction(replace(config, model="the base"), given):
        raise ValueError(f"{NO_RUN}; of the base, {wrong}")
    return config


def contradiction(config: ExportConfig, given: Mapping[str, Any]) -> str:
    """Which flags contradict each other, and how to mend it; "" if none do."""
    layout, needs = config.layout, of_adapters(given) if config.model else ""
    ungraphed = first(given, "target", "static", "compile", "context", "precision", "block")
    idle = first(given, "fit", "heal", "prompts", "task")
    few, npu = not config.precision.startswith("fp"), config.target == "npu"
    rules = [
        (config.run and config.model, "RUN names its base itself: give RUN or --model"),
        (not config.graph and ungraphed,
         f"--layout {layout} holds no graph: leave out {ungraphed}"),
        (layout == "hf" and config.routing == "freeze",
         "--layout hf holds merged weights: --routing merge, or --layout peft"),
        (config.block and (not few or config.precision in ("q8", "w8a16")),
         f"--precision {config.precision} has no blocks: leave out --block"),
        (npu and config.precision != "w4a16" and (config.block or config.heal and config.model),
         "--target npu has blocks, and heals a base, in w4a16 only: leave out --block and --heal"),
        (config.model and config.heal and not config.prompts,
         "--model has no data to heal on: give --prompts FILE"),
        (config.model and config.prompts and (
            not few or not config.graph or config.precision in ("int8", "q8") and not config.heal),
         f"--layout {layout} with --precision {config.precision} keeps a base as it is: leave out "
         "--prompts" + ", or give --heal" * (few and config.graph)),
        (npu and (layout != "onnx" or config.adapters or config.routing != "merge"),
         "--target npu holds one merged model: leave out --layout, --adapters and --routing"),
        (npu != (config.precision in NPU_PRECISIONS) and config.precision not in ("auto", "fp16"),
         "--target npu takes --precision " + ", ".join(NPU_PRECISIONS) + "; the last two need it"),
        (npu and config.static and config.static[0] > 1,
         "--target npu reads one prompt at a time: --static 1xTxP"),
        (npu and config.static and config.context,
         "--static says how many positions there are: leave out --context"),
        (config.compile and not npu, "--compile needs --target npu"),
        (config.static and config.target == "ort", "--static needs --target portable or npu"),
        (config.static and layout != "onnx", "--static needs --layout onnx"),
        (layout == "web" and config.target != "ort", "--layout web needs --target ort"),
        (config.precision.startswith("q") and config.target != "ort",
         f"--precision {config.precision} needs --target ort"),
        (config.routing == "dynamic" and idle,
         f"--routing dynamic freezes nothing: leave out {idle}"),
        (config.adapters and config.routing != "merge",
         "--adapters freezes every matrix: leave out --routing"),
        (config.adapters and (layout not in ("onnx", "genai") or config.task or config.model),
         "--adapters needs a run, all of its tasks, and --layout onnx or genai"),
        (not config.graph and config.routing == "dynamic",
         f"--layout {layout} cannot route: leave out --routing"),
        (config.prompts and (config.task or config.adapters),
         "--prompts has no tasks: leave out --task and --adapters"),
        (needs, f"--model has no adapters: leave out {needs}")]
    return next((said for wrong, said in rules if wrong), "")


def of_adapters(given: Mapping[str, Any]) -> str:
    """The first flag given that has no effect on a base without adapters."""
    return first(given, *["layout"] * (given.get("layout") == "peft"), "routing", "adapters",
                 *["heal"] * ("prompts" not in given), "task", "fit", "limit_test")


def first(given: Mapping[str, Any], *names: str) -> str:
    """The first of these flags that was given."""
    return next((option(name) + f" {given[name]}" * (name in USUAL)
                 for name in names if name in given), "")
