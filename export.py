#!/usr/bin/env python3
"""Export a run to what onnxruntime, onnxruntime-genai, transformers.js, peft or transformers open.

    python export.py                                  the newest run in runs, in 4 bits
    python export.py RUN --out FOLDER --precision fp32
    python export.py RUN --layout web                 a page that runs the model in a browser
    python export.py --model FOLDER --out FOLDER      a base without adapters

Places the experts, rounds, writes the folder, keeps it if it computes what PyTorch does, and says
what the export lost of the trained model.
"""

import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import onnxruntime

from minismoe.cli import inputs as cli
from minismoe.cli import results, runs, script, trimming
from minismoe.cli.export_flags import NO_RUN, parse
from minismoe.cli.flags import InputConfig
from minismoe.data.tasks import collate
from minismoe.data.tokenizer import load_tokenizer
from minismoe.export.answers import rights_in_torch
from minismoe.export.calibration import unlabelled
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.ship import widened
from minismoe.export.write import export_model
from minismoe.io.files import must_be_new, must_be_writable, naming
from minismoe.io.text import clean
from minismoe.method.experts import routed
from minismoe.method.freeze import freeze
from minismoe.model.checkpoint import load_adapter
from minismoe.model.decoder import CausalLM
from minismoe.runtime.providers import find_device
from minismoe.training.plan import can_match, lines_to_fit

CHECKED, ANSWERED = 8, 300       # test lines of a task: of free text, and of others at most
STORED = "weights as stored"


def main(argv: Sequence[str]) -> None:
    # Configure and load
    config = parse(argv, __doc__ or "")
    if config.out:
        must_be_new(Path(config.out))        # raises before the work if it cannot be made
    if config.run:
        print(f"exports {clean(config.run)}")
    if config.graph:
        for name in config.provider or ["cpu"]:
            find_device(name)                # raises before the work if it is not here
    with scratch_folder(config) as scratch:
        source = load_run(config, scratch) if config.run else load_base(config, scratch)

        # Place the experts, round, write, check, and measure what was lost
        out, info = export_model(config, source)

    # Say how to open it
    print(clean(f"{out}: {info['bytes'] / 1e6:.1f} MB\n"
                f"{next_commands(config, source, out)}", "\n"))
    if config.run and not config.vocab:
        print(trimming.hint(source, info), end="")


@contextmanager
def scratch_folder(config: ExportConfig) -> Iterator[Path]:
    """A folder for a base with fewer tokens, beside what is written; it is removed at the end."""
    if not config.vocab:
        yield Path()
        return
    beside = Path(config.out).absolute().parent if config.out else Path(config.run or "runs")
    must_be_writable(beside)
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".vocab-", suffix=".tmp", dir=beside) as folder:
        yield Path(folder)


def load_run(config: ExportConfig, scratch: Path = Path()) -> Source:
    """The model of a run with its experts, and the data that it was trained on. scratch: a folder
    for a copy of the base with fewer tokens."""
    run = Path(config.run or "")
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} is no run of train.py: it holds no config.json")
    saved = runs.read_run(run)
    runs.finished(run)
    resume = f"{script.command('train')} --resume --out {shlex.quote(str(run))}"
    # A base that was trained in a few bits is exported from its own weights: base_bits stays None.
    limit = config.limit_test or (CHECKED if saved.limit_test == 0 else saved.limit_test)
    dtype = saved.dtype if config.dtype == "auto" else config.dtype
    settings = stored_on_cpus(cli.resolve_auto(replace(
        saved, device=config.device, dtype=dtype, limit_test=limit)), config)
    with naming(f"{run / 'config.json'} ({resume} --model FOLDER --data FOLDER says where they are "
                "now)", FileNotFoundError):
        inputs = cli.load_inputs(settings)
    if limit == saved.limit_test and (other := runs.other_tasks(run, inputs)):
        print(f"not what the run was trained on: {other}", file=sys.stderr)
    load_adapter(inputs.model, run / "adapter")
    freezes = must_freeze(run, inputs.model, config.routing)
    judged = results.read_after(run, inputs) if dtype == saved.dtype else {}
    whole = inputs
    if config.vocab:
        inputs = trimming.trimmed(whole, settings, config.vocab, scratch / "base")
        load_adapter(inputs.model, run / "adapter")
        trimming.print_logprobs(whole, inputs)
    if settings.dtype == STORED:
        widened(inputs.model)
    for task in inputs.tasks:
        most = ANSWERED if can_match(task.new_words) else CHECKED
        lines = cli.drawn([*range(len(task.test))], config.limit_test or most, saved.seed)
        task.test = [task.test[i] for i in lines]
        if right := judged.get(task.name):
            judged[task.name] = [right[i] for i in lines]
    source = Source(
        run, inputs.folder, whole.model.name, inputs.model, inputs.tokenizer, inputs.tasks,
        inputs.encoded, saved.system, judged, freezes)
    if config.vocab or freezes:
        of_whole = replace(source, trained=whole.model, tokenizer=whole.tokenizer)
        judged |= {task.name: rights_in_torch(whole.model, of_whole, task)
                   for task in inputs.tasks if task.name not in judged}
    if freezes:
        freeze_mixtures(inputs)
    return source


def must_freeze(run: Path, model: CausalLM, routing: str) -> bool:
    """Whether a run was trained with routers to the end, and they do not ship. ValueError if they
    are to ship, and training has frozen them."""
    if routing == "dynamic" and not routed(model):
        raise ValueError(f"{run} has no routers, as its routing was frozen while it was trained: "
                         "leave out --routing dynamic, or train with --routing dynamic")
    return routing != "dynamic" and routed(model)


def freeze_mixtures(inputs: cli.Inputs) -> None:
    """Make plain LoRAs of the mixtures of a model, and print what this loses."""
    lines = [*chain(*inputs.encoded.values())]
    lines = lines_to_fit(random.Random(0).sample(lines, len(lines)))
    missed = freeze(inputs.model, collate(lines, inputs.tokenizer.pad_id))
    print(f"froze {len(missed)} mixtures, which were trained with their routers: the median "
          f"LoRA misses {median(missed.values()):.1%} of what its mixture added to lines held "
          "out. Training with frozen routing loses less")


def stored_on_cpus(settings: InputConfig, config: ExportConfig) -> InputConfig:
    """The same, with weights as they are stored if a CPU computes in float32: `widened` converts
    them where they are needed, so that they take no memory. For --vocab, which reads the head's
    weight itself, they stay in float32."""
    wide = (settings.device, settings.dtype) == ("cpu", "float32") and not config.vocab
    return replace(settings, dtype=STORED) if wide else settings


def load_base(config: ExportConfig, scratch: Path = Path()) -> Source:
    """A base without adapters: that of --model, or the built-in toy. scratch: as for `load_run`."""
    if not config.model:
        print(f"{NO_RUN}: the built-in toy, untrained")
    settings = stored_on_cpus(cli.resolve_auto(InputConfig(
        model=config.model, device=config.device,
        dtype="float32" if config.dtype == "auto" else config.dtype)), config)
    base = cli.model_folder(settings)
    model, tokenizer = cli.load_base(settings, base), load_tokenizer(base)
    if settings.dtype == STORED:
        widened(model)
    run = Path("runs") / (Path(config.model).resolve().name if config.model else "base")
    source = Source(run, base, model.name, model, tokenizer)
    if not (config.vocab and config.prompts):
        return source
    trimmed = scratch / "base"
    trimming.trim(source.base, model, tokenizer, {"": unlabelled(config.prompts, source)}, (),
                  config.vocab, trimmed)
    return replace(source, base=trimmed, trained=cli.load_base(settings, trimmed),
                   tokenizer=load_tokenizer(trimmed))


def next_commands(config: ExportConfig, source: Source, out: Path) -> str:
    """How the folder is opened, and asked what its first task asks."""
    folder, asked = shlex.quote(str(out)), [task for task in source.tasks if task.instruction]
    task = asked[0].name if asked and len(source.tasks) > 1 else ""
    named = f" --task {shlex.quote(task)}" if task else ""
    ask = f"{named} --lines < questions.txt" if asked else f"{named} --chat"
    if config.provider:
        ask = f" --provider {config.provider[0]}{ask}"
    port = f"{port_commands(folder)}{named} < questions.txt" if config.port else ""
    return {"onnx": f"python -m minismoe.runtime {folder}{ask}{port}",
            "genai": f"model = onnxruntime_genai.Model({str(out)!r}){port}",
            # transformers.js looks a relative path up among its own models, then on the hub
            "web": f"python -m minismoe.runtime {folder} --serve\n"
                   f"await pipeline('text-generation', {str(out.absolute())!r})"
                   "          // transformers.js",
            "peft": f"PeftModel.from_pretrained(model, {str(out)!r})",
            "hf": f"AutoModelForCausalLM.from_pretrained({str(out)!r})"}[config.layout]


def port_commands(folder: str) -> str:
    """How answer.c is compiled, with a release's header (Debian's libonnxruntime-dev) and the
    library that is here, and how it is asked. The program looks beside itself for a library of the
    name libonnxruntime.so.1, which that of the wheel calls itself."""
    here = Path(onnxruntime.__file__).with_name("capi")
    library = shlex.quote(str(next(here.glob("libonnxruntime.so.*"), here / "libonnxruntime.so")))
    return (f"\nln -sf {library} libonnxruntime.so.1"
            f"\ncc -O2 {folder}/answer.c libonnxruntime.so.1 -lm -Wl,-rpath,'$ORIGIN' -o answer"
            f"\n./answer {folder}")


if __name__ == "__main__":
    script.run_script(main)
