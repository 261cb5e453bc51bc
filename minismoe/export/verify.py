"""Check an exported folder: compare it with PyTorch, and measure what it lost.

Two models stand beside a folder. `part.tree` holds the weights that the folder holds, and the
folder has to compute what the tree does. The trained model is the run's, with its experts, or the
base: how far the folder is from it is reported, and has no bound.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..data.tasks import Task
from ..data.tokenizer import Tokenizer
from ..io.files import read_json
from ..io.progress import progress_bar
from ..io.text import clean, table
from ..method.experts import expert_layers
from ..method.freeze import Fit, merge
from ..model.checkpoint import load_model, stored_tensors, text_name
from ..model.decoder import CausalLM
from ..runtime import Generator
from ..training.evaluate import Accuracy, evaluate, exact_match, questions
from . import compare
from .compare import FEW, TOKENS, Prompts
from .leaves import AdapterLinear
from .plan import check_prompts
from .settings import ExportConfig, Source
from .tree import Part, sharing_copy
from .weights import HALF

Scores = dict[str, tuple[Accuracy, Accuracy]]    # by task: of the trained model, of an export
# How far logits may be from PyTorch's on the same weights, as a share of the largest: what rounding
# activations explains. Of float16 graphs weights are rounded as well, and a router may choose
# another expert where two are almost equal.
FLOAT32, FLOAT16, ROUTED_FLOAT16, BITS16, BFLOAT16 = 1e-4, 3e-2, 6e-2, 2e-2, 5e-2
BITS8 = 0.1              # of activations that one provider rounds to 8 bits, and another does not
CHANCE = 0.05            # a loss is told if chance explains it less often than this


def check(part: Part, source: Source, folder: Path) -> dict[str, Any]:
    """Compare the folder with its tree and with the trained model; returns figures, of a graph by
    adapter. Raises ValueError if it does not compute what the tree does."""
    config, prompts = part.config, check_prompts(source)
    if not config.graph:
        return check_weights(part, source, folder, prompts)
    tolerance, rounds = activations_explain(config), config.form.rounds
    exact = check_rounded(part, folder, prompts, tolerance) if rounds else {}
    generator, by_adapter, scores = Generator(folder), {}, Scores()
    for adapter in (None, *generator.tasks):
        task, alone = adapter or config.task, config.adapters and not adapter
        trained = without_experts(source.model) if alone else source.model
        generator.use(adapter)
        most = min(TOKENS, generator.room(max(map(len, prompts))))
        texts = generator.batch(prompts, most)
        figures: dict[str, Any] = exact[adapter] if rounds else compare.compare_floats(
            with_adapter(part.tree, adapter), generator, prompts, texts, tolerance)
        figures |= compare.compare_texts(trained, generator, prompts, texts, most)
        show_logits(task or source.name, figures)
        for name in config.provider or ():
            figures.setdefault("providers", {})[name] = compare_provider(
                generator, Generator(folder, name, task=adapter), name, part.tree, prompts,
                BITS8 if rounds and config.target != "npu" else tolerance)
            show_logits(name, figures["providers"][name], "the CPU")
        if not alone:
            answered = scored(source, task, partial(accuracy, generator))
            figures["exact_match"] = shares(answered, config.precision)
            scores |= answered
        by_adapter[task or ""] = figures
    show_scores(scores, config.precision)
    return by_adapter


def check_rounded(part: Part, folder: Path, prompts: Prompts, tolerance: float,
                  ) -> dict[str | None, dict[str, float]]:
    """Compare a graph in few bits, whose activations are not rounded, with the tree that it was
    written from; returns figures by adapter. Its session is closed before another one opens."""
    generator, figures = Generator(folder), {}
    if part.config.target != "npu":
        compare.stop_rounding(generator)
    for adapter in (None, *generator.tasks):
        generator.use(adapter)
        figures[adapter] = compare.compare_rounded(with_adapter(part.tree, adapter), generator,
                                                   prompts, tolerance)
    return figures


def check_weights(part: Part, source: Source, folder: Path, prompts: Prompts) -> dict[str, Any]:
    """Compare a folder of layout hf or peft with its tree, and with the trained model."""
    fits = part.fits[part.config.task]
    if part.config.layout == "hf":
        exported = load_model(folder)
    else:
        exported = sharing_copy(part.tree)
        tensors = load_file(folder / "adapter_model.safetensors")
        key = "base_model.model.{}.lora_{}.weight".format
        ours = {exported.config.name(name): name for name in fits}
        merge(exported, {ours[text_name(n)]: Fit(tensors[key(n, "A")], tensors[key(n, "B")])
                         for n in read_json(folder / "adapter_config.json")["target_modules"]})
    stored, name = stored_tensors(source.base), source.model.config.name
    exact = part.config.layout == "peft" or all(           # merged weights have the base's dtypes
        stored[name(f"{n}.weight")].content.get_dtype() == "F32" for n in fits)
    read, texts = compare.last_tokens(prompts)
    figures: dict[str, Any] = {"graph_error": compare.compare_logits(
        compare.logits(part.tree, read, texts), given := compare.logits(exported, read, texts),
        FLOAT32 if exact else BFLOAT16)["logits_error"]}
    figures |= compare.compare_logits(compare.logits(source.model, read, texts), given)
    show_logits(source.name, figures)
    scores = scored(source, part.config.task,
                    partial(accuracy_in_torch, exported, source.tokenizer))
    show_scores(scores, part.config.layout)
    return figures | {"exact_match": shares(scores, part.config.layout)}


def compare_provider(generator: Generator, other: Generator, name: str, model: CausalLM,
                     prompts: Prompts, tolerance: float) -> dict[str, float]:
    """Compare a folder on another provider with the CPU, along the CPU's greedy texts.

    Raises ValueError as `compare_logits` does: what a provider takes, it may compute wrongly.
    """
    npu = other.info["target"] == "npu"      # an emulated one is slow
    prompts, count = (prompts[:1], FEW - 1) if npu else (prompts, TOKENS)
    texts = [[*generator.generate(prompt, count)] for prompt in prompts]
    read = (prompts, texts) if npu else compare.with_long(generator, model, prompts, texts)
    wrong = f"{name} does not compute what the CPU does"
    figures = compare.compare_logits(
        compare.logits(generator, *read), compare.logits(other, *read), tolerance,
        f"{wrong} (try another T in --static 1xTxP)" if npu else wrong)
    same = sum([*other.generate(p, count)] == text for p, text in zip(prompts, texts))
    return figures | {"texts": len(prompts), "texts_equal": same}


def activations_explain(config: ExportConfig) -> float:
    """How far a graph's logits may be from those of its weights in PyTorch, by its activations."""
    if config.precision in HALF:
        return ROUTED_FLOAT16 if config.routing == "dynamic" else FLOAT16
    return BITS16 if config.target == "npu" else FLOAT32


def without_experts(model: CausalLM) -> CausalLM:
    """A copy of a model without its experts."""
    model = sharing_copy(model)
    for name, layer in expert_layers(model).items():
        model.set_submodule(name, AdapterLinear(layer, {}))
    return model


def with_adapter(tree: CausalLM, task: str | None) -> CausalLM:
    """The tree, from now on with the LoRAs of a task, if it has such, or with none."""
    for layer in tree.modules():
        if isinstance(layer, AdapterLinear):
            layer.task = task
    return tree


def scored(source: Source, only: str | None, measure: Callable[[Task], Accuracy]) -> Scores:
    """Exact match of the trained model and of an export, by task, or of one task. Tasks whose
    answers the export has no room for are left out."""
    found = Scores()
    for task in source.tasks:
        if only in (None, task.name) and (of_export := measure(task)).examples:
            found[task.name] = accuracy_in_torch(source.model, source.tokenizer, task), of_export
    return found


def accuracy_in_torch(model: CausalLM, tokenizer: Tokenizer, task: Task) -> Accuracy:
    """Exact match of a model on the test split of a task."""
    return evaluate(model, tokenizer, questions(
        tokenizer, task, model.config.max_position_embeddings))


def accuracy(generator: Generator, task: Task) -> Accuracy:
    """Exact match of an exported folder on the test split of a task; of no line if it has no room
    for the answers, in the context or in the past of a static graph."""
    def complete(prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        limit = max(limits, default=0)
        if (room := generator.room(max(map(len, prompts), default=0))) < limit:
            print(f"{clean(task.name)}: no exact match, as an answer may have {limit} tokens, and "
                  f"there is room for {room}")
            return []
        return [[*generator.generate(prompt, limit)] for prompt, limit in progress_bar(
            [*zip(prompts, limits)], f"evaluate {clean(task.name)}", unit="line", leave=False)]

    # The same lines as in PyTorch: `sizes_of` sees to it that the context holds all of them.
    asked = questions(generator.tokenizer, task, generator.context)
    return exact_match(generator.tokenizer, asked, complete)


def shares(scores: Scores, export: str) -> dict[str, dict[str, float]]:
    """What export.json says of exact match, by task."""
    return {task: {"trained": before.share, export: after.share}
            for task, (before, after) in scores.items()}


def show_logits(name: str, figures: Mapping[str, Any], beside: str = "the trained model") -> None:
    """Print how far an export is from the trained model, or another provider from the CPU."""
    graph = (f"computes its weights within {figures['graph_error']:.1e}; "
             if "graph_error" in figures else "")
    same = (f"{figures['texts_equal']} of {figures['texts']} texts the same, "
            if "texts" in figures else "")
    print(f"{clean(name)}: {graph}logits within {figures['logits_error']:.1e} of {beside}'s "
          f"largest, {same}{100 * figures['tokens_agreed']:.1f} % of tokens")


def show_scores(scores: Scores, export: str) -> None:
    """Print exact match by task, and where the export has lost more than chance explains."""
    if not scores:
        return
    rows = {clean(task): both for task, both in scores.items()}
    means = [statistics.mean(column) for column in zip(*(
        (before.share, after.share) for before, after in rows.values()))]
    print(table(["exact match", "trained", export], [
        *([name, f"{before.share:.3f}", f"{after.share:.3f}"]
          for name, (before, after) in rows.items()),
        ["mean", *(f"{mean:.3f}" for mean in means)]]))
    pairs = {name: [*zip(before.right, after.right)] for name, (before, after) in rows.items()}
    if len(pairs) > 1:
        pairs["all tasks"] = [pair for of_task in pairs.values() for pair in of_task]
    for name, of_task in pairs.items():
        lost, won = of_task.count((1, 0)), of_task.count((0, 1))
        if chance_of(lost, won) < CHANCE / len(pairs):
            print(f"{name}: of {len(of_task)} test lines, the export answers {lost} wrongly that "
                  f"the trained model answers rightly, and {won} rightly that it answers wrongly. "
                  "This is more than chance explains: export with more bits (--precision int8 or "
                  "fp32), with --routing dynamic, or calibrated on other lines (--prompts FILE)",
                  file=sys.stderr)


def chance_of(lost: int, won: int) -> float:
    """How often chance loses as many or more of the lines that two models answer differently: the
    sign test of paired lines, exact and one-sided."""
    every = lost + won
    return sum(math.comb(every, k) for k in range(lost, every + 1)) / 2 ** every
