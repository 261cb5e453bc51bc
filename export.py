#!/usr/bin/env python3
"""Export a run to what onnxruntime, onnxruntime-genai, transformers.js, peft or transformers open.

    python export.py                                  the newest run in runs
    python export.py RUN --out FOLDER --routing merge --precision int4-8
    python export.py RUN --table                      what each way to freeze the routing costs
    python export.py --model FOLDER --out FOLDER      a base without adapters

Freezes the routing, writes the folder, runs it beside PyTorch, and keeps it if both say the same.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minismoe.cli import inputs as cli
from minismoe.cli import runs, script
from minismoe.cli.export_flags import DEFAULTS, of_adapters, parse
from minismoe.cli.flags import InputConfig
from minismoe.cli.probing import PROBE_BATCH
from minismoe.data import toy
from minismoe.data.tasks import Example, Task, probe_batches
from minismoe.data.tokenizer import Tokenizer, load_tokenizer
from minismoe.export import layouts, verify
from minismoe.export.graph import AdapterInput, Lora, Mixture, Side, write_decoder, write_sampler
from minismoe.export.heal import agreement, auto, compare, comparison, heal, save_frozen, twin
from minismoe.io.drawing import allocation_svg, terminal_heatmap
from minismoe.io.files import must_be_new, new_folder, read_json, replacing, write_json
from minismoe.io.hub import resolve
from minismoe.io.text import clean
from minismoe.method.experts import ExpertLinear, expert_layers, linear_layers
from minismoe.method.freeze import Fit, fit, freeze, merge, merged
from minismoe.method.loss import IGNORE
from minismoe.model.checkpoint import MERGED, load_adapter, load_model, versions, weights
from minismoe.model.decoder import CausalLM
from minismoe.runtime import FORMAT, Generator, enough_onnxruntime, sha256
from minismoe.training.evaluate import answer_prompts, evaluate, references

HELLO = ("Hello!", "What is the capital of France?", "Count from one to five.")   # without data
NO_RUN = "runs holds no run yet (python train.py makes one)"
Fits = Mapping[str, Fit]                     # module -> its fit


@dataclass
class Source:
    """What is exported: a model with the experts of a run, or a base alone."""

    run: Path                    # the run's folder, or where that of a base would be
    base: Path                   # folder of the base checkpoint
    name: str                    # of the base, as it was given
    inputs: cli.Inputs
    trained: Mapping[str, float]             # task -> exact match that training measured


def main(argv: Sequence[str]) -> None:
    args = parse(argv, __doc__)
    if args.layout not in ("hf", "peft"):
        enough_onnxruntime()
    source = load(args)
    kind = args.task or ("adapters" if args.adapters else args.routing)
    parts = [kind, args.layout] + [args.precision] * (args.layout not in ("hf", "peft"))
    out = Path(args.out or source.run / "export" / "-".join(parts))
    if not args.table:
        must_be_new(out)

    # Freeze the routing: one fit for all tasks together ("") and one for each.
    fits: Mapping[str, Fits] = {"": {}}
    keep = list(expert_layers(source.inputs.model))             # where it stays, token by token
    if keep and args.routing != "dynamic":
        fits, keep = frozen(args, source)
    if args.table:
        return

    # Write the folder under another name; it gets its own once it was seen to work.
    with new_folder(out) as folder:
        tokenizer = layouts.copy_base_files(source.base, folder, args.layout != "onnx")
        info: dict[str, Any] = {
            "format": FORMAT, "model": source.name, "layout": args.layout, "routing": kind,
            "routed": keep, "arguments": vars(args), "versions": versions(), "files": {}}
        if args.layout in ("hf", "peft"):
            write_weights(args, source, folder, fits[args.task or ""])
        else:
            info |= write_graph(args, source, folder, fits, keep)
            info["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": ""}
                             for f in folder.iterdir()}
            write_json(folder / "export.json", info)
        info["checked"] = check(args, source, folder, fits, keep)
        if args.layout in ("genai", "web"):
            (folder / "sampler.onnx").unlink()                  # these choose tokens themselves
        if args.layout == "genai":
            layouts.write_genai(folder, tokenizer, args.context, args.target == "ort")
        if args.layout == "web":
            layouts.write_web(folder, args.precision, info["cache_type"])
        (folder / "export.json").unlink(missing_ok=True)
        info["files"] = {f.relative_to(folder).as_posix(): {
            "bytes": f.stat().st_size, "sha256": sha256(f)}
            for f in sorted(folder.rglob("*")) if f.is_file()}
        write_json(folder / "export.json", info)
    size = sum(entry["bytes"] for entry in info["files"].values())
    first = next((task for task in fits if args.adapters and task), None)
    print(clean(f"{out}: {size / 1e6:.1f} MB\n{next_command(args.layout, out, first)}", "\n"))


def load(args: argparse.Namespace) -> Source:
    """The model with its adapters, its tokenizer and its data; without a run, the base alone."""
    made = sorted(Path("runs").glob("*/adapter/adapter.json"), key=lambda p: p.stat().st_mtime)
    if args.run or (made and not args.model):
        run = Path(args.run or made[-1].parents[1])
        if not (run / "config.json").is_file():
            raise FileNotFoundError(f"{run} is no run of train.py: it holds no config.json")
        settings = runs.read_run(run)
        name = settings.model
        if settings.data and not Path(settings.data).exists():
            raise FileNotFoundError(f"{run / 'config.json'} names the data folder {settings.data}, "
                                    "which is not here: export where train.py ran")
        # A base that was trained in a few bits is exported from its own weights, unrounded.
        inputs = cli.load_inputs(cli.settled(replace(
            settings, device=args.device, dtype=args.dtype,
            limit_test=args.limit_test or settings.limit_test)))
        load_adapter(inputs.model, run / "adapter")
        if args.task not in (None, *inputs.encoded):
            raise ValueError(f"{run} has no task {args.task!r}; it has {', '.join(inputs.encoded)}")
        base, trained = resolve(name) if name else toy.checkpoint_folder(), measured(run, inputs)
    else:
        name, run = args.model, Path("runs") / (Path(args.model).name if args.model else "base")
        if not name:
            if needs := of_adapters(args):
                raise ValueError(f"{NO_RUN}, which {needs} is for")
            print(f"{NO_RUN}: the embedded base alone")
        base, trained = resolve(name) if name else toy.checkpoint_folder(), {}
        settings = cli.settled(InputConfig(model=name, device=args.device, dtype=args.dtype))
        inputs = cli.Inputs(cli.load_base(settings, base), load_tokenizer(base), [], {})
    for flag, value in DEFAULTS.items():
        setattr(args, flag, value if getattr(args, flag) is None else getattr(args, flag))
    longest, tokenizer = inputs.model.config.max_position_embeddings, inputs.tokenizer
    tests = {task.name: answer_prompts(tokenizer, task, longest) for task in inputs.tasks}
    prompts = some_prompts(inputs, args.check) + [p for texts in tests.values() for p in texts]
    needed = min(longest, max([max(map(len, prompts)) + verify.TOKENS, *(
        max(map(len, tests[t.name])) + references(tokenizer, t)[1] for t in inputs.tasks)]))
    args.context = args.context or min(longest, max(2048, needed))
    if args.context > longest:
        raise ValueError(f"--context {args.context}: the model was made for {longest} positions")
    if args.context < needed:
        raise ValueError(f"--context {args.context}: the texts that the export is checked with "
                         f"need {needed}")
    if args.static and args.static[2] < (least := max(map(len, prompts)) + args.static[1]):
        raise ValueError(f"--static with {args.static[2]} past positions: the texts that the "
                         f"export is checked with need {least}")
    return Source(run, base, name or "the embedded default", inputs, trained)


def measured(run: Path, inputs: cli.Inputs) -> dict[str, float]:
    """Exact match by task from a run's results, where its test lines are those of `inputs`."""
    file = run / "results.json"
    rows = read_json(file) if file.is_file() else {"tasks": {}}
    try:
        found = {t.name: rows["tasks"].get(t.name, {}) for t in inputs.tasks}
        return {t.name: float(found[t.name]["after"]) for t in inputs.tasks
                if found[t.name].get("examples") == len(t.test)}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{file} is not understood: {type(e).__name__} {e}") from None


def frozen(args: argparse.Namespace, source: Source) -> tuple[dict[str, Fits], list[str]]:
    """Fits by task ("": all), kept beside the adapter, and the matrices that keep routing."""
    inputs, model = source.inputs, source.inputs.model
    pad_id, device = inputs.tokenizer.pad_id, model.lm_head.weight.device
    pools = {name: random.Random(0).sample(e.examples, len(e.examples))
             for name, e in inputs.encoded.items()}
    if args.prompts:
        pools = {"prompts": unlabelled(args.prompts, inputs.tokenizer)}
    batches = {name: list(probe_batches(pool, args.calibration, PROBE_BATCH, pad_id, device))
               for name, pool in pools.items()}
    with tqdm(desc="freeze", unit="sample") as bar:
        every = fit(model, batches, progress=bar.update)
    fits: dict[str, Fits] = dict(every[args.fit])
    chosen = fits[args.task or ""]
    show_residuals(source, chosen)

    def score(candidate: Any, task: str) -> float:
        """Exact match on a task's test split, or without labels agreement with the mixture."""
        if args.prompts:
            return agreement(candidate, model, batches[task])
        tests = {t.name: t for t in inputs.tasks}[task]
        with tqdm(total=len(tests.test), desc=f"evaluate {clean(task)}", leave=False) as bar:
            return evaluate(candidate, inputs.tokenizer, tests, progress=bar.update).share

    examples = pools[args.task] if args.task else [e for pool in pools.values() for e in pool]
    tasks = [args.task] if args.task else list(pools)
    keep: list[str] = []
    if args.table:
        healed = heal(model, chosen, examples, args.heal or 40, pad_id)
        tolerances = (0.0, 0.01, 0.02) if args.routing == "auto" else ()
        rows = compare(model, every, list(pools), score, healed, tolerances)
        write_json(source.run / "routing.json", {"format": "minismoe.routing/1", "rows": rows})
        print(comparison(rows))
        return fits, keep
    if args.routing == "auto":
        (keep,) = auto(model, chosen, lambda m: statistics.mean(score(m, t) for t in tasks),
                       [args.tolerance])
        print(f"auto: routing stays in {len(keep)} of {len(chosen)} matrices")
    if args.heal:
        for name in pools if args.adapters else [args.task or ""]:
            fits[name] = heal(model, fits[name], pools.get(name, examples), args.heal, pad_id,
                              keep=keep)
    save_frozen(source.run / "adapter", fits)
    return fits, keep


def unlabelled(file: str, tokenizer: Tokenizer) -> list[Example]:
    """One example a line of text, nothing of it supervised."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is no UTF-8 text: {e}") from None
    prompts = [[{"role": "user", "content": line}] for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    ids = [tokenizer.encode(tokenizer.render(p, add_generation_prompt=True))[0] for p in prompts]
    return [Example("prompts", tokens, [IGNORE] * len(tokens)) for tokens in ids]


def show_residuals(source: Source, fits: Fits) -> None:
    """Print and draw where token-level routing mattered."""
    residuals = {name: f.residual for name, f in fits.items()}
    print(terminal_heatmap("share of the mixture's output that one linear map misses", residuals))
    kinds = [f.kind for f in fits.values()]
    print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median residual on "
          f"held-out samples {100 * statistics.median(residuals.values()):.2f} %")
    counts = {name: len(layer.lora_A) if isinstance(layer, ExpertLinear) else 0
              for name, layer in linear_layers(source.inputs.model).items()}
    svg = allocation_svg({"lost": residuals}, counts, measure="output energy lost by freezing")
    with replacing(source.run / "adapter" / "residual.svg") as tmp:
        tmp.write_text(svg, encoding="utf-8")


def write_weights(args: argparse.Namespace, source: Source, folder: Path, fits: Fits) -> None:
    """The folder of layout hf or peft."""
    if args.layout == "peft":
        for name in ("config.json", "generation_config.json"):      # which a whole model has
            (folder / name).unlink()
        layouts.write_peft(folder, {n: (f.lora_A, f.lora_B) for n, f in fits.items()}, source.name)
        return
    weight = weights(source.base)
    layouts.write_hf(folder, source.base, lambda name: merged(
        weight(name), fits[name.removesuffix(".weight")]), [f"{n}.weight" for n in fits])
    if fits:
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, MERGED: source.name})


def write_graph(args: argparse.Namespace, source: Source, folder: Path,
                fits: Mapping[str, Fits], keep: Sequence[str]) -> dict[str, Any]:
    """model.onnx, sampler.onnx and adapters; gives back what the runtime has to know of them."""
    config, layers = source.inputs.model.config, expert_layers(source.inputs.model)
    inside = {n: f for n, f in fits[args.task or ""].items() if n not in keep}
    beside: dict[str, Side] = {name: mixture(layers[name]) for name in keep}
    if args.adapters:
        inside, beside = {}, dict.fromkeys(inside, AdapterInput())
    elif args.routing == "freeze":
        inside, beside = {}, {n: Lora(f.lora_A.cpu(), f.lora_B.cpu()) for n, f in inside.items()}
    stored = weights(source.base)

    def weight(name: str) -> Tensor:
        f = inside.get(name.removesuffix(".weight"))
        return stored(name) if f is None else merged(stored(name).float(), f)

    write_decoder(folder / "model.onnx", config, weight, beside, target=args.target,
                  precision=args.precision, context=args.context, static=args.static)
    write_sampler(folder / "sampler.onnx", config.vocab_size)
    adapters = {}
    for number, task in enumerate(t for t in fits if args.adapters and t):
        adapters[task] = f"{number}.onnx_adapter"              # a task's name may be no file's
        layouts.write_adapter(folder / adapters[task], {
            n: (f.lora_A, f.lora_B) for n, f in fits[task].items()})
    return {"target": args.target, "precision": args.precision, "context": args.context,
            "static": args.static, "layers": config.num_hidden_layers,
            "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim,
            "vocab_size": config.vocab_size, "adapters": adapters,
            "cache_type": "float16" if args.precision == "fp16" else "float32"}


def mixture(layer: ExpertLinear) -> Mixture:
    """The experts of a layer, as the graph takes them."""
    A, B = (p.detach().float().cpu() for p in (layer.lora_A, layer.lora_B))
    router = None if layer.router is None else layer.router.detach().float().cpu()
    return Mixture(A, B, router, layer.top_k, layer.scaling)


def check(args: argparse.Namespace, source: Source, folder: Path, fits: Mapping[str, Fits],
          keep: Sequence[str]) -> dict[str, Any]:
    """Run the folder beside PyTorch in float32; ValueError where they do not say the same."""
    inputs, base = source.inputs, load_model(source.base)
    prompts, stop_ids = some_prompts(inputs, args.check), inputs.tokenizer.stop_ids

    def reference(task: str | None) -> CausalLM:
        """The model as it was trained, its routing frozen as asked for."""
        model = twin(base)
        if task is not None and expert_layers(inputs.model):
            load_adapter(model, source.run / "adapter")
            beside = args.adapters or args.routing == "freeze"     # then the base alone is rounded
            (freeze if beside else merge)(model, fits[task], keep)
        return model

    if args.layout in ("hf", "peft"):
        if args.layout == "hf":
            read = load_model(folder)
        else:
            load_adapter(read := twin(base), source.run / "adapter")
            merge(read, {n: Fit(*pair) for n, pair in layouts.read_peft(folder).items()})
        stored = weights(source.base)                  # merged weights are rounded to its dtypes
        exact = args.layout == "peft" or all(
            stored(f"{n}.weight").dtype == torch.float32 for n in fits[args.task or ""])
        return verify.say(source.name, verify.compare(
            reference(args.task or ""), partial(verify.logits, read), prompts, stop_ids,
            "fp32" if exact else "bf16"))
    generator, found = Generator(folder), {}
    blocks = verify.unrounded(generator) if args.precision.startswith("int") else None
    for task in (None, *generator.tasks) if args.adapters else (args.task or "",):
        adapter, seen = task if args.adapters else None, {}
        if blocks:
            blocks.use(adapter)
            seen = verify.compare_rounded(reference(task), blocks, prompts, args.precision)
        generator.use(adapter)
        model = reference(task)
        seen |= verify.compare_graph(model, generator, prompts, args.precision)
        verify.say(task or source.name, seen)
        if task is not None:
            seen["exact_match"] = {t.name: exact_match(args, source, generator, model, t)
                                   for t in inputs.tasks if task in ("", t.name)
                                   and verify.answers_fit(generator, t)}
        found[task or ""] = seen
    verify.show_accuracy([seen.get("exact_match", {}) for seen in found.values()])
    return found


def exact_match(args: argparse.Namespace, source: Source, generator: Generator,
                model: CausalLM, task: Task) -> dict[str, float]:
    """Exact match of the export, and beside it that of training and, if rounded, of float32."""
    found = {"trained": source.trained[task.name]} if task.name in source.trained else {}
    if args.precision != "fp32":
        found["float32"] = evaluate(model, source.inputs.tokenizer, task).share
    return found | {args.precision: verify.accuracy(generator, task).share}


def some_prompts(inputs: cli.Inputs, count: int) -> list[list[int]]:
    """Token prompts from the tasks in turn, or a few of our own."""
    chats = [list(m[:-1]) for several in zip(*(t.test for t in inputs.tasks)) for m in several]
    chats = chats or [[{"role": "user", "content": text}] for text in HELLO]
    render, encode = inputs.tokenizer.render, inputs.tokenizer.encode
    return [encode(render(chat, add_generation_prompt=True))[0] for chat in chats[:count]]


def next_command(layout: str, out: Path, task: str | None) -> str:
    """How the folder is opened, with the adapter of `task`, if it holds any."""
    chosen = f" --task {shlex.quote(task)}" if task else ""
    return {"onnx": f"python -m minismoe.runtime {shlex.quote(str(out))}{chosen} --chat",
            "genai": f"onnxruntime_genai.Model({str(out)!r})",
            # transformers.js looks for another path among its own models, and then on the hub
            "web": f"await pipeline('text-generation', {str(out.absolute())!r})"
                   "          // transformers.js",
            "peft": f"PeftModel.from_pretrained(model, {str(out)!r})",
            "hf": f"AutoModelForCausalLM.from_pretrained({str(out)!r})"}[layout]


if __name__ == "__main__":
    script.run_script(main)
