"""Check an exported folder: compare it with PyTorch, session by session, and measure what it lost.

Two models stand beside a folder. `part.shipped` holds the weights that the folder holds: each
session, also the one that ships, has to compute what it does, and files without a graph have to
hold its numbers to the bit. `source.trained` is the run's model, with its experts, or the base: how
far the folder is from it is reported, and has no bound.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..data.tasks import Task
from ..io.files import read_json
from ..io.text import clean
from ..method.experts import expert_layers
from ..model.checkpoint import DTYPES, load_model, stored_tensors, text_name
from ..model.decoder import CausalLM
from ..runtime import Generator
from ..training.evaluate import Accuracy
from . import compare
from . import scores as scoring
from .compare import FEW, TOKENS, Prompts
from .layers import AdapterLinear, flat, matrix
from .part import Part, sharing_copy
from .plan import check_prompts
from .scores import MERGED, ROUNDED, accuracy, accuracy_in_torch, shares
from .settings import ExportConfig, Source
from .ship import widened
from .weights import PRECISIONS

Figures = dict[str | None, dict[str, Any]]       # by adapter; None: without any
Written = tuple[str, Tensor | None, Tensor]      # a name, what is in a file, and what has to be
# How far logits may be from PyTorch's on the same weights, as a share of the largest.
FLOAT32 = 1e-4
FLOAT16 = 3e-2           # weights are rounded to float16 as well
ROUTED_FLOAT16 = 6e-2    # and a router may take another expert where two are almost equal
BITS16 = 2e-2            # activations are rounded to 16 bits, for NPUs
BITS8 = 0.1              # activations are rounded to 8 bits


def check(part: Part, source: Source, folder: Path) -> dict[str, Any]:
    """Compare the folder with the shipped model and with the trained one; returns figures, of a
    graph by adapter. Raises ValueError if it does not compute what the shipped model does."""
    config, prompts = part.config, check_prompts(source)
    if not config.graph:
        return check_weights(part, source, folder, prompts)
    figures: Figures = defaultdict(dict)
    check_exact(part, folder, prompts, figures)
    generator = Generator(folder)
    check_shipped(part, source, generator, prompts, figures)
    for name in config.provider or ():
        check_provider(part, generator, Generator(folder, name), name, prompts, figures)
    check_answers(part, source, generator, figures)
    return {task or config.task or "": seen for task, seen in figures.items()}


def check_exact(part: Part, folder: Path, prompts: Prompts, figures: Figures) -> None:
    """A session that rounds no activations to 8 bits, beside the shipped model: it shows the least
    error in weights and operators. It is closed before another one opens."""
    generator = Generator(folder)
    if part.config.form.rounds_activations and part.config.target != "npu":
        compare.stop_rounding(generator)
    for adapter in (None, *generator.tasks):
        generator.use(adapter)
        figures[adapter] |= compare.compare_exact(
            with_adapter(part.shipped, adapter), generator, prompts,
            tolerance(part.config, exact=True))


def check_shipped(part: Part, source: Source, generator: Generator, prompts: Prompts,
                  figures: Figures) -> None:
    """The session that ships, beside the shipped model, and beside the trained one."""
    config, most = part.config, min(TOKENS, generator.room(max(map(len, prompts))))
    for adapter in (None, *generator.tasks):
        generator.use(adapter)
        texts = generator.batch(prompts, most)
        figures[adapter] |= compare.compare_shipped(
            with_adapter(part.shipped, adapter), generator, prompts, texts,
            tolerance(config), config.form.rounds_activations)
        alone = config.adapters and not adapter
        figures[adapter] |= compare.compare_texts(
            without_experts(source.trained) if alone else source.trained, generator, prompts, texts,
            most)
        show_logits(adapter or config.task or source.name, figures[adapter],
                    "the trimmed model" if config.vocab else "the trained model")


def check_provider(part: Part, generator: Generator, other: Generator, name: str, prompts: Prompts,
                   figures: Figures) -> None:
    """A session on another provider, beside the one that ships, along the greedy texts of that one:
    what a provider takes, it may compute wrongly."""
    npu, wrong = part.config.target == "npu", f"{name} does not compute what the CPU does"
    if npu:                                  # an emulated one is slow
        prompts, wrong = prompts[:1], f"{wrong} (try another T in --static 1xTxP)"
    for adapter in (None, *generator.tasks):
        generator.use(adapter)
        other.use(adapter)
        texts, said = ([[*session.generate(prompt, FEW - 1 if npu else TOKENS)]
                        for prompt in prompts] for session in (generator, other))
        read = (prompts, texts) if npu else compare.with_long(
            generator, part.shipped, prompts, texts)
        found = compare.compare_logits(
            compare.logits(generator, *read), compare.logits(other, *read),
            tolerance(part.config, exact=npu), wrong)
        found |= {"texts": len(texts), "texts_equal": sum(map(list.__eq__, texts, said))}
        figures[adapter].setdefault("providers", {})[name] = found
        show_logits(name, found, "the CPU")


def check_answers(part: Part, source: Source, generator: Generator, figures: Figures) -> None:
    """Exact match of the session that ships, beside the trained model; and, where it has lost more
    than chance explains, of the shipped model before its weights were rounded."""
    config = part.config

    def of_export(task: Task) -> Accuracy:
        generator.use(task.name if config.adapters else None)
        return accuracy(generator, task)

    scores = scoring.scored(source, config, config.precision, of_export)
    merges = any(fit.kind != "exact" for fits in part.fits.values() for fit in fits.values())
    if merges and config.form.rounds and [*scoring.losses(scores)]:
        merged = part.unrounded()
        for task in (task for task in source.tasks if task.name in scores):
            name, of_rounded = scores[task.name].popitem()
            answered = replace(task, test=task.test[:of_rounded.examples])
            model = with_adapter(merged, task.name if config.adapters else None)
            scores[task.name] |= {MERGED: accuracy_in_torch(model, source.tokenizer, answered),
                                  name: of_rounded}
    for adapter, seen in figures.items():
        if adapter or not config.adapters:
            seen["exact_match"] = shares({
                task: row for task, row in scores.items() if adapter in (None, task)})
    scoring.show_scores(scores, ROUNDED if config.form.rounds else MERGED)


def check_weights(part: Part, source: Source, folder: Path, prompts: Prompts) -> dict[str, Any]:
    """Compare each tensor of a folder of layout hf or peft with the shipped model, to the bit, and
    what the folder computes with the trained one."""
    layout, exported = part.config.layout, part.shipped
    if layout == "hf":
        exported = load_model(folder, None)
        tensors = merged_weights(part.shipped, exported, source.base)
    else:
        tensors = adapter_weights(part.shipped, folder)
    if wrong := [name for name, found, wanted in tensors if found is None or not (
            found.dtype == wanted.dtype and torch.equal(found, wanted))]:
        raise ValueError(f"the export is not what PyTorch computes: {len(wrong)} tensors are not "
                         f"the merged ones, to the bit, such as {wrong[0]}")
    exported = widened(exported)
    read, texts = compare.last_tokens(prompts)
    figures: dict[str, Any] = compare.compare_logits(
        compare.logits(source.trained, read, texts), compare.logits(exported, read, texts))
    show_logits(source.name, figures)
    scores = scoring.scored(source, part.config, layout,
                    partial(accuracy_in_torch, exported, source.tokenizer))
    scoring.show_scores(scores, MERGED)
    return figures | {"exact_match": shares(scores)}


def merged_weights(shipped: CausalLM, exported: CausalLM, base: Path) -> Iterator[Written]:
    """The weights of layout hf, as they are stored, and those that ship, in the base's dtypes."""
    stored = stored_tensors(base)
    for name, weight in exported.named_parameters():
        module, _, kind = name.rpartition(".")
        leaf = shipped.get_submodule(module)
        wanted = matrix(leaf) if kind == "weight" else getattr(leaf, kind)
        yield name, weight, wanted.to(DTYPES[stored[shipped.config.name(name)].content.get_dtype()])


def adapter_weights(shipped: CausalLM, folder: Path) -> Iterator[Written]:
    """The LoRAs of layout peft, if PEFT is told to take them, and those that ship, which zeros fill
    up to one rank."""
    settings = read_json(folder / "adapter_config.json")
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {text_name(name): [tensors.get(f"base_model.model.{name}.lora_{kind}.weight")
                               for kind in "AB"] for name in settings["target_modules"]}
    for name, layer in expert_layers(shipped).items():
        name, (A, B, _) = shipped.config.name(name), flat(layer)
        more = settings["r"] - len(A)
        wanted = F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
        yield from zip((f"{name}.lora_A", f"{name}.lora_B"), found.get(name, [None] * 2), wanted)


def tolerance(config: ExportConfig, exact: bool = False) -> float:
    """How far the logits of the session that ships may be from those of its weights in PyTorch; or
    of the `exact` one."""
    if config.form.rounds_activations and not exact:
        return BITS8
    if PRECISIONS[config.precision].half:
        return ROUTED_FLOAT16 if config.routing == "dynamic" else FLOAT16
    return BITS16 if config.target == "npu" else FLOAT32


def without_experts(model: CausalLM) -> CausalLM:
    """A copy of a model without its experts."""
    model = sharing_copy(model)
    for name, layer in expert_layers(model).items():
        model.set_submodule(name, AdapterLinear(layer, {}))
    return model


def with_adapter(shipped: CausalLM, task: str | None) -> CausalLM:
    """A model that ships, from now on with the LoRAs of a task, if it has such, or with none."""
    for layer in shipped.modules():
        if isinstance(layer, AdapterLinear):
            layer.task = task
    return shipped


def show_logits(name: str, figures: Mapping[str, Any], beside: str = "the trained model") -> None:
    """Print how far an export is from the trained model, or another provider from the CPU."""
    graph = (f"computes its weights within {figures['graph_error']:.1e}, and as it ships within "
             f"{figures['shipped_error']:.1e}; " if "graph_error" in figures else "")
    same = (f"{figures['texts_equal']} of {figures['texts']} texts the same, "
            if "texts" in figures else "")
    print(f"{clean(name)}: {graph}logits within {figures['logits_error']:.1e} of {beside}'s "
          f"largest, {same}{100 * figures['tokens_agreed']:.1f} % of tokens")
