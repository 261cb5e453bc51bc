"""Whether healing overfits: how far our folders are from the base on tasks that were not trained.

For the routed mixture and each folder of ours: KL(base || model) and KL(mixture || model) in nats a
token on prompts of tasks outside of training, and accuracy on some of them. All are computed in
PyTorch, in the dtype that is faster here: a folder's weights are read back from its graph.

Letters: T tokens, V vocabulary, N outputs, K inputs, G blocks in a row.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from compare_report import table
from onnx import TensorProto
from onnx.numpy_helper import to_array
from torch import Tensor, nn
from tqdm import tqdm

from minismoe.cli.runs import read_run
from minismoe.data.tasks import Example, Task, collate, load_tasks
from minismoe.export.settings import Source
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM
from minismoe.model.quantize import unpack
from minismoe.training.evaluate import answer_prompts, evaluate, references

PROMPTS = 16                                 # of each task, for the divergence
BATCH = 16                                   # prompts read at once
ANSWERS = 60                               # test lines of each task that is answered
KINDS = ("base", "mixture", "exact", "likeliest")
ANSWERED = ("boolq", "arc_easy")
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def read_back(folder: Path, model: CausalLM) -> CausalLM:
    """Give a model, in place, the matrices of its exported folder (target ort, merged).

    Raises ValueError if the graph lacks a matrix of the model.
    """
    graph = onnx.load(str(folder / "model.onnx")).graph
    stored, dtype = tensors(graph), model.model.norm.weight.dtype
    left = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "MatMul", "Gemm"):
            continue
        weight = dense(node, stored).to(dtype)
        if "embed_tokens" in node.input[1]:              # a tied head
            model.model.embed_tokens.weight = nn.Parameter(weight, False)
            model.lm_head.weight = model.model.embed_tokens.weight
            left.discard("lm_head")
            continue
        parent, _, last = node.input[1].removesuffix(".weight").rpartition(".")
        names = [f"{parent}.{part}" for part in PARTS.get(last, (last,))]
        layers: list[Any] = [model.get_submodule(name) for name in names]
        for layer, part in zip(layers, weight.split([len(m.weight) for m in layers]), strict=True):
            layer.weight = nn.Parameter(part, False)
        left -= {*names}
    if left:
        raise ValueError(f"{folder}: no weights of {', '.join(sorted(left)[:5])} are in its graph")
    return model


def tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The stored tensors of a graph that torch has a type for, by name."""
    return {t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer
            if t.data_type not in (TensorProto.INT4, TensorProto.UINT4)}


def dense(node: onnx.NodeProto, stored: Mapping[str, Tensor]) -> Tensor:
    """The weight (N, K) that a node multiplies by."""
    weight = stored[node.input[1]]
    if node.op_type != "MatMulNBits":
        return weight.T.contiguous() if node.op_type == "MatMul" else weight
    size = {a.name: a.i for a in node.attribute}
    q = unpack(weight, size["bits"]).flatten(1).unflatten(1, (-1, size["block_size"])).float()
    scales = stored[node.input[2]].view(len(q), -1, 1)                               # (N, G, 1)
    zeros = torch.tensor(2.0 ** (size["bits"] - 1))                  # of a symmetric grid
    if len(node.input) > 3:
        zeros = stored[node.input[3]].view(len(q), -1)
        if zeros.dtype == torch.uint8:                   # HQQ's are floats
            zeros = unpack(zeros, size["bits"])[:, :q.shape[1]].float()
        zeros = zeros[..., None]
    return ((q - zeros) * scales).flatten(1)[:, :size["K"]].contiguous()


@torch.no_grad()
def predicted(model: CausalLM, texts: Sequence[list[int]], start: int) -> Tensor:
    """Log-probabilities (N, V) of what follows each token of the texts, from token `start` on."""
    ids, mask, _ = collate([Example("", text, text) for text in texts], 0)
    needed = mask.bool() & (torch.arange(ids.shape[1]) >= start)
    return model.lm_head(model.model(ids, mask, needed=needed)[needed]).float().log_softmax(-1)


def divergence(base: CausalLM, model: CausalLM, prompts: Sequence[list[int]], start: int) -> float:
    """Mean KL(base || model) in nats over the tokens of the prompts, from token `start` on."""
    found, order = [], sorted(prompts)       # neighbours that begin alike are cheap
    for i in range(0, len(order), BATCH):
        wanted, given = (predicted(m, order[i:i + BATCH], start) for m in (base, model))
        found.append((wanted.exp() * (wanted - given)).sum(-1))
    return torch.cat(found).mean().item()


def likeliest(model: CausalLM, prompts: Sequence[list[int]], right: Sequence[list[int]],
              answers: Sequence[list[int]]) -> float:
    """Share of prompts after which the right one of the answers is the likeliest, 0 to 1."""
    hits = []
    for prompt, wanted in zip(prompts, right, strict=True):
        found = predicted(model, [prompt + answer for answer in answers], len(prompt) - 1)
        scores = [after[:-1].gather(1, torch.tensor(answer)[:, None]).sum().item() for after, answer
                  in zip(found.split([len(answer) + 1 for answer in answers]), answers)]
        hits.append(answers[scores.index(max(scores))] == wanted)
    return statistics.mean(hits)


def measure(source: Source, models: Mapping[str, Callable[[], CausalLM]], found: dict[str, Any],
            save: Callable[[], None]) -> None:
    """Add to `found`, by name: {"base", "mixture": {task: KL(it || model) in nats a token},
    "exact", "likeliest": {task: 0 to 1}}.

    Measured are the base, the mixture and `models`, but for those in `found`. The tasks are those
    beside the trained ones.
    """
    tokenizer = source.tokenizer
    base = load_model(source.base, source.model.lm_head.weight.dtype)
    context = base.config.max_position_embeddings
    others = outside(source)
    prompts = {task.name: answer_prompts(tokenizer, task, context) for task in others}
    start = len(os.path.commonprefix([p for several in prompts.values() for p in several]))
    every = {"base": lambda: base, "mixture": lambda: source.model, **models}
    for name, make in tqdm(every.items(), "drift", unit="model"):
        if name in found:
            continue
        model = make()
        row: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
        for task in tqdm(others, name, leave=False, unit="task"):
            some = prompts[task.name][:PROMPTS]
            for kind, other in (("base", base), ("mixture", source.model)):
                row[kind][task.name] = divergence(other, model, some, start)
            if task.name in ANSWERED:
                row["exact"][task.name] = evaluate(model, tokenizer, task).share
                right = references(tokenizer, task)[0]
                row["likeliest"][task.name] = likeliest(
                    model, prompts[task.name], right, [*map(list, {*map(tuple, right)})])
        found[name] = row
        save()


def outside(source: Source) -> list[Task]:
    """The tasks of the run's data folder that were not trained, with ANSWERS test lines each."""
    trained = {task.name for task in source.tasks}
    others = [t for t in load_tasks(read_run(source.run)[0].data or "") if t.name not in trained]
    for task in others:
        task.test = task.test[:ANSWERS]
    return others


def report(drift: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of a record, in Markdown: means over the runs."""
    runs, lines = list(drift.values()), []
    for name in dict.fromkeys(name for found in runs for name in found):
        rows = [found[name] for found in runs if name in found]
        mean = {kind: {task: statistics.mean(row[kind][task] for row in rows)
                       for task in rows[0][kind]} for kind in KINDS}
        lines.append([name] + [f"{statistics.mean(mean[kind].values()):.3f}" for kind in KINDS[:2]]
                     + [f"{100 * x:.1f}" for kind in KINDS[2:] for x in mean[kind].values()])
    columns = [f"{task}, {how}" for how in ("exact match", "likeliest answer")
               for task in rows[0]["exact"]]
    return table(["", "KL from the base, nats a token", "from the mixture", *columns], lines)
