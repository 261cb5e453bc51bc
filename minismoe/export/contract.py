"""What export.json says to a program that runs the graph without our code, as an app in C++ does.

Letters: T new tokens, P tokens read before, S = P + T, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, ValueInfoProto

from ..runtime import Generator
from ..runtime.drafts import DRAFTED, SHORT
from ..runtime.folder import trained_system
from ..runtime.npu import EXACT
from .settings import Source

ONNXRUNTIME = "1.30"                         # the oldest that has all kernels
QUESTION, TOKENS, LOGITS = "What is the capital of France?", 16, 8
BYTES = {"float": 4, "float16": 2}
DIMENSIONS = {
    "sequence_length": "new tokens of this run",
    "last_tokens": f"the last {1 + DRAFTED} of up to {SHORT} new tokens, or all if they are fewer; "
                   "of more, the last",
    "past_sequence_length": "tokens of the past, 0 at first",
    "total_sequence_length": "past and new tokens"}
MASK = "1 for each past and new token, 0 for the padding of a graph of fixed sizes"
POSITIONS = "if it is an input: the number of each new token from 0, padding not counted"
NPU_MASK = ("1 for each slot of the past that is filled and, behind the slots, for each new token; "
            "0 for free slots and padding")
NPU_PAST = ("present.* are keys and values of the new tokens alone: copy those of tokens, not of "
            "padding, to the next free slots of past_key_values.*, which are zeros at first")
PAST = ("present.* and present_* of a run are past_key_values.* and past_* of the next; at first, "
        "keys and values have no tokens, and other states are zeros")


def golden(generator: Generator, tolerance: float) -> dict[str, Any]:
    """A prompt, the tokens that follow it greedily, and the largest logits after the prompt.

    tolerance: how far another device's logits may be from them, as a share of the largest. A prompt
    that a small context cannot hold is cut.
    """
    chat = [*trained_system(generator.folder), {"role": "user", "content": QUESTION}]
    ids = generator.tokenizer.encode_chat(chat, True).ids
    ids = ids[:max(1, generator.room(0) - TOKENS)]
    logits = torch.from_dlpack(next(generator.forced(ids, [])))[0, -1]
    values, largest = logits.topk(LOGITS)
    return {"input_ids": ids, "tokens": [*generator.generate(ids, TOKENS)],
            "logits": {"ids": largest.tolist(), "values": values.tolist(),
                       "tolerance": tolerance}}


def contract(folder: Path, name: str, target: str, stops: Sequence[int]) -> dict[str, Any]:
    """The entry "contract" of export.json on the decoder `name` of the folder, without "golden".

    stops: ids of the tokens that end an answer. For an NPU, it holds the two graphs beside the
    decoder, and what a CPU needs to run them as exactly.
    """
    graph, npu = _graph(folder, name), target == "npu"
    keys = [x for x in graph["inputs"] if x["name"].startswith("past_key_values.")]
    states = [x for x in graph["inputs"] if x["name"].startswith("past_") and x not in keys]
    fixed = isinstance(graph["inputs"][0]["shape"][1], int)
    return {
        "onnxruntime": ONNXRUNTIME, **graph, "dimensions": DIMENSIONS,
        "attention_mask": NPU_MASK if npu else MASK,
        "past": NPU_PAST if npu else PAST, "position_ids": POSITIONS,
        "padding": "left" if fixed else "none",
        "cache": "slots" if npu else "fixed" if fixed else (
            "shared" if target == "ort" else "growing"),
        "cache_bytes_per_token": sum(        # heads, and numbers of a head
            BYTES[x["type"]] * x["shape"][1] * x["shape"][3] for x in keys),
        "state_bytes": sum(BYTES[x["type"]] * prod(x["shape"][1:]) for x in states),
        "stop_ids": [*stops],
        **({"embed_graph": _graph(folder, "embed.onnx"), "cpu_session": dict(EXACT),
            "prompt_graph": _graph(folder, "prompt.onnx")} if npu else {})}


def _graph(folder: Path, name: str) -> dict[str, Any]:
    """The name of a graph, its operators as lines for reduced builds, inputs and outputs."""
    model = onnx.load(str(folder / name), load_external_data=False)
    operators = defaultdict[str, set[str]](set)
    weights = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        operators[node.domain].add(node.op_type)
    return {
        "graph": name, "ir_version": model.ir_version,
        "operators": [f"{opset.domain or 'ai.onnx'};{opset.version};{','.join(sorted(names))}"
                      for opset in model.opset_import if (names := operators[opset.domain])],
        "inputs": [_described(v) for v in model.graph.input if v.name not in weights],
        "outputs": [_described(v) for v in model.graph.output]}


def _described(value: ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    return {"name": value.name, "type": TensorProto.DataType.Name(tensor.elem_type).lower(),
            "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim]}


def prompt(source: Source) -> dict[str, Any]:
    """What the chat template writes before and after a question, and whether it strips the question
    of white space; ValueError if it does not write each question of the source so."""
    system = [{"role": "system", "content": source.system}] * (source.system is not None)
    chats = (chat for task in source.tasks for chat in (*task.train, *task.valid, *task.test))
    texts = (m["content"] for chat in chats for m in chat if m["role"] == "user")
    asked = {text: source.tokenizer.render([*system, {"role": "user", "content": text}], True)
             for text in ("\ue000", "\n a\r\n\n b \u3000", *texts)}
    before, mark, after = asked["\ue000"].partition("\ue000")
    for strip in (False, True):
        if mark and all(prompt == before + (text.strip() if strip else text) + after
                        for text, prompt in asked.items()):
            return {"before": before, "after": after, "strip": strip}
    raise ValueError(f"the chat template of {source.name} changes questions: apps would need Jinja")
