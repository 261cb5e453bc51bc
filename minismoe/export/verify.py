"""Run what was exported beside PyTorch, and say what came of it: logits, greedy texts, exact match.

Letters: n tokens compared, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.tasks import Task
from ..io.text import clean, table
from ..model.decoder import CausalLM
from ..model.quantize import dequantize, quantize
from ..runtime import Generator
from ..training.evaluate import Accuracy, answer_prompts, exact_match, generate, references
from .weights import PRECISIONS

# How far logits may be from PyTorch's in float32, as a share of the largest: what rounding of
# weights and activations explains. In few bits that would hide much of a wrong graph, so such a
# graph must also be what PyTorch makes of the rounded weights.
TOLERANCES = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 5e-2, "int8": 0.15, "int4-8": 0.6, "int4": 0.6}
TOKENS = 24                              # of each greedy text
FEW = 4                                  # the same where no activation is rounded, which is slow
Prompts = Sequence[Sequence[int]]
Read = Callable[[Sequence[int], Sequence[int]], Tensor]


@torch.no_grad()
def logits(model: CausalLM, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Logits (n, V) after the prompt and after each token of the text."""
    return model(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1:]


def graph_logits(generator: Generator, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """The same of a graph, which reads the prompt at once and the text token by token."""
    return torch.stack([torch.from_dlpack(given)[0].clone().flatten()
                        for given in generator.forced(prompt, text)])


def compare(model: CausalLM, read: Read, prompts: Prompts, stop_ids: Sequence[int],
            precision: str, tokens: int = TOKENS, weights: str = "") -> dict[str, Any]:
    """Logits of read(prompt, text) beside those of `model`, along the greedy texts of `model`.

    Raises ValueError where they differ by more than the precision explains.
    """
    errors, agreed, count = [], 0, 0
    for prompt, text in zip(prompts, generate(model, prompts, tokens, stop_ids)):
        wanted, found = logits(model, prompt, text), read(prompt, text)
        errors.append((found - wanted).abs().max() / wanted.abs().max())
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        count += len(wanted)
    error = torch.stack(errors).max().item()             # of which Python's max would drop a nan
    if not error <= TOLERANCES[precision]:
        raise ValueError(f"the export is not what PyTorch computes{weights}: its logits are off by "
                         f"{error:.2g} of the largest, and {precision} explains "
                         f"{TOLERANCES[precision]:g}")
    return {"logits_error": float(f"{error:.3g}"), "tolerance": TOLERANCES[precision],
            "tokens_agreed": round(agreed / count, 4)}


def compare_graph(model: CausalLM, generator: Generator, prompts: Prompts, precision: str,
                  ) -> dict[str, Any]:
    """A graph beside `model`: its logits; its texts, one by one and in a batch.

    Raises ValueError as `compare` does, and where a float32 text differs.
    """
    stop_ids, count = generator.tokenizer.stop_ids, tokens_of(generator, prompts, TOKENS)
    found = compare(model, partial(graph_logits, generator), prompts, stop_ids, precision, count)
    texts = [generate(model, prompts, count, stop_ids), generator.batch(prompts, count),
             [list(generator.generate(prompt, count)) for prompt in prompts]]
    same = [sum(a == b for a, b in zip(texts[0], other)) for other in texts[1:]]
    if precision == "fp32" and same != [len(prompts)] * 2:
        raise ValueError(f"the export says other texts than PyTorch: {same[1]} of {len(prompts)} "
                         f"are equal, and {same[0]} in a batch")
    return found | {"texts": len(prompts), "texts_equal": same[1], "batched_equal": same[0]}


def compare_rounded(model: CausalLM, generator: Generator, prompts: Prompts, precision: str,
                    ) -> dict[str, Any]:
    """An `unrounded` graph beside `model`, whose weights are rounded in place as the graph's are.

    Raises ValueError where they differ by more than float32 explains.
    """
    found = compare(round_weights(model, precision), partial(graph_logits, generator), prompts,
                    generator.tokenizer.stop_ids, "fp32", tokens_of(generator, prompts, FEW),
                    " with the same rounded weights")
    return {"rounded_error": found["logits_error"]}


def tokens_of(generator: Generator, prompts: Prompts, most: int) -> int:
    """How many tokens of each text are compared: a static graph may have room for few."""
    return min(most, generator.room(max(map(len, prompts))))


def unrounded(generator: Generator) -> Generator:
    """Another of the same graph, that rounds no activation: what its blocks stand for, exactly."""
    graph = onnx.load(str(generator.folder / "model.onnx"), load_external_data=False)
    for attribute in (a for node in graph.graph.node for a in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 0
    options = generator._session.get_session_options()
    options.add_session_config_entry(                    # of what it makes of target portable
        "session.qdq_matmulnbits_accuracy_level", "0")
    options.add_session_config_entry(                    # where bytes find their external data
        "session.model_external_initializers_file_folder_path", str(generator.folder))
    other = copy(generator)
    other._session = ort.InferenceSession(graph.SerializeToString(), options,
                                          providers=["CPUExecutionProvider"])
    other.use(None)
    return other


@torch.no_grad()
def round_weights(model: CausalLM, precision: str) -> CausalLM:
    """The model with the weights that a graph's blocks stand for, in place."""
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
    """Whether the context, or a static graph's past, holds a task's answers; if not, it is said."""
    prompts = answer_prompts(generator.tokenizer, task, generator.context)
    wanted = references(generator.tokenizer, task)[1]
    room = generator.room(max(map(len, prompts)))
    if room < wanted:
        print(f"{clean(task.name)}: no exact match, as an answer may have {wanted} tokens, and "
              f"there is room for {room}")
    return room >= wanted


def say(name: str, seen: dict[str, Any]) -> dict[str, Any]:
    """Print how far an export was from PyTorch."""
    same = f"{seen['texts_equal']} of {seen['texts']} texts the same, " if "texts" in seen else ""
    rounded = (f" ({seen['rounded_error']:.1e} with rounded weights)"
               if "rounded_error" in seen else "")
    print(f"{clean(name)}: logits within {seen['logits_error']:.1e} of PyTorch's largest{rounded}, "
          f"{same}{100 * seen['tokens_agreed']:.1f} % of tokens")
    return seen


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
