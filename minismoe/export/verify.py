"""Check an exported folder: compare it with PyTorch, and measure exact match.

Letters: n tokens compared, V vocabulary.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..data.tasks import Task
from ..io.files import read_json
from ..io.progress import progress_bar
from ..io.text import clean, table
from ..method.experts import expert_layers
from ..method.freeze import Fit, freeze, merge
from ..model.checkpoint import load_model, text_name, weights
from ..model.decoder import CausalLM
from ..runtime import Generator
from ..training.evaluate import evaluate, exact_match, generate, questions
from .compare import (
    FEW,
    TOKENS,
    compare_graph,
    compare_logits,
    compare_rounded,
    stop_rounding,
    with_long,
)
from .leaves import AdapterLinear
from .plan import check_prompts
from .settings import ExportConfig, Source
from .tree import Fits, Part, sharing_copy
from .weights import HALF

# How far logits may be from PyTorch's on the same weights, as a share of the largest: what rounding
# activations explains. Of float16 graphs weights are rounded as well, and a router may choose
# another expert where two are almost equal.
FLOAT32, FLOAT16, ROUTED_FLOAT16, BITS16, BFLOAT16 = 1e-4, 3e-2, 6e-2, 2e-2, 5e-2
BITS8 = 0.1              # of activations that one provider rounds to 8 bits, and another does not


def check(config: ExportConfig, source: Source, reference: CausalLM, shipped: Part,
          folder: Path) -> dict[str, Any]:
    """Compare the folder with PyTorch; returns figures, of a graph by adapter.

    A graph in few bits has to compute what the tree does that it was written from. How far it is
    from the run in float32 is reported, and has no bound.

    reference: the trained model with its experts, in float32. Raises ValueError if they disagree.
    """
    if not config.graph:
        return check_weights(config, source, reference, shipped, folder)
    rounds = config.form.rounds
    tolerance, prompts = activations_explain(config), check_prompts(source)
    rounded = check_rounded(config, shipped, folder, prompts, tolerance) if rounds else {}
    generator, by_adapter = Generator(folder), {}
    for adapter in (None, *generator.tasks):
        task, adapted = adapter or config.task, bool(adapter) or not config.adapters
        model = without_routing(config, reference, shipped.fits[task] if adapted else None)
        generator.use(adapter)
        figures = compare_graph(model, generator, prompts, math.inf if rounds else tolerance,
                                config.precision == "fp32")
        figures |= rounded.get(adapter, {})
        show_logits(task or source.name, figures)
        for name in config.provider or ():
            figures.setdefault("providers", {})[name] = compare_provider(
                generator, Generator(folder, name, task=adapter), name, model, prompts,
                BITS8 if rounds and config.target != "npu" else tolerance)
            show_logits(name, figures["providers"][name], "the CPU")
        if adapted:
            floats = without_routing(config, source.model, shipped.fits[task])
            figures["exact_match"] = accuracies(config, source, generator, floats, [
                t for t in source.tasks if task in (None, t.name)])
        by_adapter[task or ""] = figures
    show_accuracy([figures.get("exact_match", {}) for figures in by_adapter.values()])
    return by_adapter


def check_rounded(config: ExportConfig, shipped: Part, folder: Path,
                  prompts: Sequence[Sequence[int]], tolerance: float,
                  ) -> dict[str | None, dict[str, float]]:
    """Compare a graph in few bits, whose activations are not rounded, with the tree that it was
    written from; returns figures by adapter. Its session is closed before another one opens."""
    generator, figures = Generator(folder), {}
    if config.target != "npu":
        stop_rounding(generator)
    for adapter in (None, *generator.tasks):
        generator.use(adapter)
        for layer in shipped.tree.modules():
            if isinstance(layer, AdapterLinear):
                layer.task = adapter
        figures[adapter] = compare_rounded(shipped.tree, generator, prompts, tolerance)
    return figures


def compare_provider(generator: Generator, other: Generator, name: str, model: CausalLM,
                     prompts: Sequence[Sequence[int]], tolerance: float) -> dict[str, float]:
    """Compare a folder on another provider with the CPU, along the CPU's greedy texts.

    Raises ValueError as `compare_logits` does: what a provider takes, it may compute wrongly.
    """
    npu = other.info["target"] == "npu"      # an emulated one is slow
    prompts, count = (prompts[:1], FEW - 1) if npu else (prompts, TOKENS)
    texts = [[*generator.generate(prompt, count)] for prompt in prompts]
    read = (prompts, texts) if npu else with_long(generator, model, prompts, texts)
    wrong = f"{name} does not compute what the CPU does"
    figures = compare_logits(generator, other, *read, tolerance, f"{wrong} (try another T in "
                             "--static 1xTxP)" if npu else wrong)
    same = sum([*other.generate(p, count)] == text for p, text in zip(prompts, texts))
    return figures | {"texts": len(prompts), "texts_equal": same}


def activations_explain(config: ExportConfig) -> float:
    """How far a graph's logits may be from those of its weights in PyTorch, by its activations."""
    if config.precision in HALF:
        return ROUTED_FLOAT16 if config.routing == "dynamic" else FLOAT16
    return BITS16 if config.target == "npu" else FLOAT32


def without_routing(config: ExportConfig, model: CausalLM, fits: Fits | None) -> CausalLM:
    """A copy of a run's model with its mixtures as the export holds them, in floats; without any if
    fits is None."""
    model = sharing_copy(model)
    if fits is None:
        for name, layer in expert_layers(model).items():
            model.set_submodule(name, AdapterLinear(layer, {}))
    elif config.routing != "dynamic":
        freeze(model, fits)
    return model


def check_weights(config: ExportConfig, source: Source, reference: CausalLM, shipped: Part,
                  folder: Path) -> dict[str, Any]:
    """Compare the logits of a folder of layout hf or peft with those of PyTorch."""
    fits = shipped.fits[config.task]
    if config.layout == "hf":
        exported = load_model(folder)
    else:
        exported = sharing_copy(reference)
        tensors = load_file(folder / "adapter_model.safetensors")
        key = "base_model.model.{}.lora_{}.weight".format
        ours = {reference.config.name(name): name for name in fits}
        merge(exported, {ours[text_name(n)]: Fit(tensors[key(n, "A")], tensors[key(n, "B")])
                         for n in read_json(folder / "adapter_config.json")["target_modules"]})
    stored = weights(source.base)                          # merged weights have its dtypes
    exact = config.layout == "peft" or all(
        stored(f"{n}.weight").dtype == torch.float32 for n in fits)
    model, prompts = without_routing(config, reference, fits), check_prompts(source)
    texts = generate(model, prompts, TOKENS, source.tokenizer.stop_ids)
    figures = compare_logits(model, exported, prompts, texts, FLOAT32 if exact else BFLOAT16)
    show_logits(source.name, figures)
    return figures


def accuracies(config: ExportConfig, source: Source, generator: Generator, model: CausalLM,
               tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """Exact match by task: of the export, in training and, if rounded, of `model`, in floats.

    Tasks whose answers the context, or the past of a static graph, cannot hold are left out.
    """
    by_task = {}
    for task in tasks:
        row = {"trained": source.trained[task.name]} if task.name in source.trained else {}
        share = accuracy(generator, task)
        if share is not None:
            if config.precision != "fp32":
                asked = questions(source.tokenizer, task, model.config.max_position_embeddings)
                row[str(model.model.norm.weight.dtype)[6:]] = evaluate(
                    model, source.tokenizer, asked).share
            by_task[task.name] = row | {config.precision: share}
    return by_task


def accuracy(generator: Generator, task: Task, batch_size: int = 16) -> float | None:
    """Exact match of an exported folder on the test split of a task, 0 to 1; None if it has no room
    for the answers."""
    def complete(prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        limit = max(limits, default=0)
        if (room := generator.room(max(map(len, prompts), default=0))) < limit:
            print(f"{clean(task.name)}: no exact match, as an answer may have {limit} tokens, and "
                  f"there is room for {room}")
            return []
        starts = progress_bar(range(0, len(prompts), batch_size), f"evaluate {clean(task.name)}",
                              unit="batch", leave=False)
        return [answer for start in starts
                for answer in generator.batch(prompts[start:start + batch_size], limit)]

    asked = questions(generator.tokenizer, task, generator.context)
    right = exact_match(generator.tokenizer, asked, complete)
    return right.share if right.examples else None


def show_logits(name: str, figures: Mapping[str, Any], beside: str = "PyTorch") -> None:
    """Print how far an export is from PyTorch, or another provider from the CPU."""
    same = ""
    if "texts" in figures:
        same = f"{figures['texts_equal']} of {figures['texts']} texts the same, "
    rounded = (f" ({figures['rounded_error']:.1e} with rounded weights)"
               if "rounded_error" in figures else "")
    print(f"{clean(name)}: logits within {figures['logits_error']:.1e} of {beside}'s largest"
          f"{rounded}, {same}{100 * figures['tokens_agreed']:.1f} % of tokens")


def show_accuracy(checks: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Print exact match by task."""
    by_task = {clean(name): row for part in checks for name, row in part.items()}
    if not by_task:
        return
    columns = list(dict.fromkeys(c for row in by_task.values() for c in row))
    rows = {name: [row.get(c, math.nan) for c in columns] for name, row in by_task.items()}
    means = [statistics.mean(column) for column in zip(*rows.values())]
    print(table(["exact match", *columns], [
        [name, *("-" if math.isnan(x) else f"{x:.3f}" for x in row)]
        for name, row in (*rows.items(), ("mean", means))]))
