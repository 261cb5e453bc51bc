"""Compare an export with PyTorch: logits, greedy texts, exact match.

Letters: n tokens compared, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.tasks import Task
from ..io.text import clean, table
from ..method.experts import expert_layers
from ..method.freeze import Fit, freeze, merge
from ..model.checkpoint import load_adapter, load_model, weights
from ..model.decoder import CausalLM
from ..model.quantize import dequantize, quantize
from ..runtime import Generator
from ..training.evaluate import (
    Accuracy,
    answer_prompts,
    evaluate,
    exact_match,
    generate,
    references,
)
from .heal import twin
from .layouts import read_peft
from .routing import Frozen
from .settings import ExportConfig, Source
from .weights import PRECISIONS

# How far logits may be from those of PyTorch in float32, as a share of the largest: the error that
# rounding weights and activations explains. In few bits a wrong graph could hide behind it, so such
# a graph must also agree with PyTorch on the same rounded weights.
TOLERANCES = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 5e-2, "int8": 0.15, "int4-8": 0.6, "int4": 0.6}
TOKENS = 24                              # of each greedy text
FEW = 4                                  # of each text read without rounding, which is slow
HELLO = ("Hello!", "What is the capital of France?", "Count from one to five.")   # without data
Prompts = Sequence[Sequence[int]]
Read = Callable[[Sequence[int], Sequence[int]], Tensor]


@torch.no_grad()
def logits(model: CausalLM, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Logits (n, V) after the prompt and after each token of the text."""
    return model(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1:]


def graph_logits(generator: Generator, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """The same logits from a graph, which reads the prompt at once and then token by token."""
    return torch.stack([torch.from_dlpack(given)[0].clone().flatten()
                        for given in generator.forced(prompt, text)])


def compare_logits(model: CausalLM, read: Read, prompts: Prompts, stop_ids: Sequence[int],
                   precision: str, tokens: int = TOKENS, rounded: str = "") -> dict[str, Any]:
    """Compare the logits of read(prompt, text) with those of `model`, along its greedy texts.

    Raises ValueError if they differ by more than the precision explains.
    """
    errors, agreed, count = [], 0, 0
    for prompt, text in zip(prompts, generate(model, prompts, tokens, stop_ids)):
        wanted, found = logits(model, prompt, text), read(prompt, text)
        errors.append((found - wanted).abs().max() / wanted.abs().max())
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        count += len(wanted)
    error = torch.stack(errors).max().item()             # nan if any is: Python's max may drop it
    if not error <= TOLERANCES[precision]:
        raise ValueError(f"the export is not what PyTorch computes{rounded}: its logits are off by "
                         f"{error:.2g} of the largest, and {precision} explains "
                         f"{TOLERANCES[precision]:g}")
    return {"logits_error": float(f"{error:.3g}"), "tolerance": TOLERANCES[precision],
            "tokens_agreed": round(agreed / count, 4)}


def compare_graph(model: CausalLM, generator: Generator, prompts: Prompts, precision: str,
                  ) -> dict[str, Any]:
    """Compare a graph with `model`: logits, and texts, one by one and in a batch.

    Raises ValueError as `compare_logits` does, and if a float32 text differs.
    """
    stop_ids, count = generator.tokenizer.stop_ids, tokens_of(generator, prompts, TOKENS)
    found = compare_logits(model, partial(graph_logits, generator), prompts, stop_ids, precision,
                           count)
    texts = [generate(model, prompts, count, stop_ids), generator.batch(prompts, count),
             [list(generator.generate(prompt, count)) for prompt in prompts]]
    same = [sum(a == b for a, b in zip(texts[0], other)) for other in texts[1:]]
    if precision == "fp32" and same != [len(prompts)] * 2:
        raise ValueError(f"the export says other texts than PyTorch: {same[1]} of {len(prompts)} "
                         f"are equal, and {same[0]} in a batch")
    return found | {"texts": len(prompts), "texts_equal": same[1], "batched_equal": same[0]}


def compare_rounded(model: CausalLM, generator: Generator, prompts: Prompts, precision: str,
                    ) -> dict[str, Any]:
    """Compare an `unrounded` graph with `model`, whose weights are rounded in place like its own.

    Raises ValueError if they differ by more than float32 explains.
    """
    found = compare_logits(
        round_weights(model, precision), partial(graph_logits, generator), prompts,
        generator.tokenizer.stop_ids, "fp32", tokens_of(generator, prompts, FEW),
        " with the same rounded weights")
    return {"rounded_error": found["logits_error"]}


def tokens_of(generator: Generator, prompts: Prompts, most: int) -> int:
    """Tokens of each text to compare: a static graph may have room for few."""
    return min(most, generator.room(max(map(len, prompts))))


def unrounded(generator: Generator) -> Generator:
    """A generator of the same graph that rounds no activations, to test only its blocks."""
    graph = onnx.load(str(generator.folder / "model.onnx"), load_external_data=False)
    for attribute in (a for node in graph.graph.node for a in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 0
    options = generator._session.get_session_options()
    options.add_session_config_entry(                    # for the nodes fused in target portable
        "session.qdq_matmulnbits_accuracy_level", "0")
    options.add_session_config_entry(                    # the graph comes as bytes, without a path
        "session.model_external_initializers_file_folder_path", str(generator.folder))
    other = copy(generator)
    other._session = ort.InferenceSession(graph.SerializeToString(), options,
                                          providers=["CPUExecutionProvider"])
    other.use(None)
    return other


@torch.no_grad()
def round_weights(model: CausalLM, precision: str) -> CausalLM:
    """Round the weights of the model in place, as a graph of that precision does."""
    bits, table_bits = PRECISIONS[precision]
    for name, part in model.named_modules():
        if name == "lm_head" and model.config.tie_word_embeddings:
            part.weight = model.model.embed_tokens.weight
        elif isinstance(part, (nn.Linear, nn.Embedding)):
            blocks = quantize(part.weight, bits if name.endswith("_proj") else table_bits)
            part.weight = nn.Parameter(dequantize(blocks)[:, :part.weight.shape[1]], False)
    return model


def accuracy(generator: Generator, task: Task, batch_size: int = 16) -> Accuracy:
    """Exact match of an exported folder on the test split of a task."""
    def complete(prompts: Sequence[list[int]], limit: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        outputs: list[list[int]] = [[] for _ in prompts]
        with tqdm(total=len(prompts), desc=f"evaluate {clean(task.name)}", unit="answer",
                  leave=False) as bar:
            for start in range(0, len(order), batch_size):
                part = order[start:start + batch_size]
                for i, tokens in zip(part, generator.batch([prompts[i] for i in part], limit)):
                    outputs[i] = tokens
                bar.update(len(part))
        return outputs

    return exact_match(generator.tokenizer, task, generator.context, complete)


def answers_fit(generator: Generator, task: Task) -> bool:
    """Whether the context, or the past of a static graph, holds a task's answers; says if not."""
    prompts = answer_prompts(generator.tokenizer, task, generator.context)
    wanted = references(generator.tokenizer, task)[1]
    room = generator.room(max(map(len, prompts)))
    if room < wanted:
        print(f"{clean(task.name)}: no exact match, as an answer may have {wanted} tokens, and "
              f"there is room for {room}")
    return room >= wanted


def show_logits(name: str, seen: Mapping[str, Any]) -> None:
    """Print how far an export is from PyTorch."""
    same = f"{seen['texts_equal']} of {seen['texts']} texts the same, " if "texts" in seen else ""
    rounded = (f" ({seen['rounded_error']:.1e} with rounded weights)"
               if "rounded_error" in seen else "")
    print(f"{clean(name)}: logits within {seen['logits_error']:.1e} of PyTorch's largest{rounded}, "
          f"{same}{100 * seen['tokens_agreed']:.1f} % of tokens")


def show_accuracy(found: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Print exact match by task."""
    by_task = {name: row for part in found for name, row in part.items()}
    if by_task:
        columns = list(dict.fromkeys(c for row in by_task.values() for c in row))
        rows = [[clean(name), *(f"{row[c]:.3f}" if c in row else "-" for c in columns)]
                for name, row in by_task.items()]
        means = [f"{statistics.mean(row[c] for row in by_task.values()):.3f}"
                 if all(c in row for row in by_task.values()) else "-" for c in columns]
        print(table(["exact match", *columns], [*rows, ["mean", *means]]))


def some_prompts(source: Source, count: int) -> list[list[int]]:
    """Token prompts from the test lines of the tasks in turn; without data, a few of our own."""
    chats = [list(m[:-1]) for several in zip(*(t.test for t in source.tasks)) for m in several]
    chats = chats or [[{"role": "user", "content": text}] for text in HELLO]
    render, encode = source.tokenizer.render, source.tokenizer.encode
    return [encode(render(chat, add_generation_prompt=True))[0] for chat in chats[:count]]


def with_context(config: ExportConfig, source: Source) -> ExportConfig:
    """The settings with a context that holds all texts of the check.

    Raises ValueError if the context asked for, the model, or a static past is too short for them.
    """
    longest, tokenizer = source.model.config.max_position_embeddings, source.tokenizer
    tests = [answer_prompts(tokenizer, task, longest) for task in source.tasks]
    prompts = [len(p) for p in some_prompts(source, config.check)]
    answers = [max(map(len, test)) + references(tokenizer, task)[1]
               for task, test in zip(source.tasks, tests)]
    longest_prompt = max([*prompts, *(len(p) for test in tests for p in test)])
    needed = min(longest, max([longest_prompt + TOKENS, *answers]))
    context = config.context or min(longest, max(2048, needed))
    if context > longest:
        raise ValueError(f"--context {context}: the model was made for {longest} positions")
    if context < needed:
        raise ValueError(f"--context {context}: the texts that the export is checked with "
                         f"need {needed}")
    if config.static and config.static[2] < (least := longest_prompt + config.static[1]):
        raise ValueError(f"--static with {config.static[2]} past positions: the texts that the "
                         f"export is checked with need {least}")
    return replace(config, context=context)


def check(config: ExportConfig, source: Source, folder: Path, frozen: Frozen) -> dict[str, Any]:
    """Compare the folder with PyTorch in float32; returns the figures, for a graph by adapter.

    Raises ValueError if they disagree.
    """
    base = load_model(source.base)

    def reference(task: str | None, adapted: bool = True) -> CausalLM:
        """The model as it was trained, with its routing frozen as asked for."""
        model = twin(base)
        if adapted and expert_layers(source.model):
            load_adapter(model, source.run / "adapter")
            beside = config.adapters or config.routing == "freeze"   # not rounded with the base
            (freeze if beside else merge)(model, frozen.of(task), frozen.routed)
        return model

    if not config.graph:
        return check_weights(config, source, folder, frozen, reference(config.task), base)
    generator, found = Generator(folder), {}
    blocks = unrounded(generator) if config.precision.startswith("int") else None
    prompts = some_prompts(source, config.check)
    for adapter in (None, *generator.tasks):
        task, adapted = adapter or config.task, bool(adapter) or not config.adapters
        seen: dict[str, Any] = {}
        if blocks:
            blocks.use(adapter)
            seen = compare_rounded(reference(task, adapted), blocks, prompts, config.precision)
        generator.use(adapter)
        model = reference(task, adapted)
        seen |= compare_graph(model, generator, prompts, config.precision)
        show_logits(task or source.name, seen)
        if adapted:
            seen["exact_match"] = {
                t.name: accuracies(config, source, generator, model, t) for t in source.tasks
                if task in (None, t.name) and answers_fit(generator, t)}
        found[task or ""] = seen
    show_accuracy([seen.get("exact_match", {}) for seen in found.values()])
    return found


def check_weights(config: ExportConfig, source: Source, folder: Path, frozen: Frozen,
                  reference: CausalLM, base: CausalLM) -> dict[str, Any]:
    """Compare the logits of a folder of layout hf or peft with those of `reference`."""
    if config.layout == "hf":
        exported = load_model(folder)
    else:
        load_adapter(exported := twin(base), source.run / "adapter")
        merge(exported, {n: Fit(*pair) for n, pair in read_peft(folder).items()})
    stored = weights(source.base)                          # merged weights have its dtypes
    exact = config.layout == "peft" or all(
        stored(f"{n}.weight").dtype == torch.float32 for n in frozen.of(config.task))
    seen = compare_logits(reference, partial(logits, exported), some_prompts(source, config.check),
                          source.tokenizer.stop_ids, "fp32" if exact else "bf16")
    show_logits(source.name, seen)
    return seen


def accuracies(config: ExportConfig, source: Source, generator: Generator, model: CausalLM,
               task: Task) -> dict[str, float]:
    """Exact match of the export, beside that seen in training and, if rounded, that of float32."""
    found = {"trained": source.trained[task.name]} if task.name in source.trained else {}
    if config.precision != "fp32":
        found["float32"] = evaluate(model, source.tokenizer, task).share
    return found | {config.precision: accuracy(generator, task).share}
