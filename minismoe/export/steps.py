"""Graphs that choose tokens: a sampler, and a decoder that writes several in one run.

A browser copies all keys and values to JavaScript and back around each run. In a Loop they stay.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from onnx import TensorProto, ValueInfoProto
from onnx.helper import make_graph
from onnx.helper import make_tensor_value_info as value

from .nodes import Graph


def put_in_steps(graph: Graph, stops: Sequence[int]) -> None:
    """Put a decoder of `write_decoder` into a Loop that chooses tokens greedily.

    The largest number N of attention_mask says how many tokens a run writes; a mask of 0 and 1 asks
    for one, so that the graph can be used as before: the decoder reads the mask's length alone. The
    loop ends earlier once it writes one of the token ids `stops`. logits and the cache are those of
    the last step. The new output `tokens` (n, 1, 1), n <= N, holds what was chosen.
    """
    constant, step, outer = {"", *graph.tensors}, Graph(), Graph()
    for node in graph.nodes:
        if constant.issuperset(node.input):      # made of weights alone: once a session
            outer.nodes.append(node)
            constant.update(node.output)
        else:
            step.nodes.append(node)
    ids, mask, *past = (v.name for v in graph.inputs)
    logits, *present = (v.name for v in graph.outputs)
    for node in step.nodes:
        for names in (node.input, node.output):
            names[:] = [n if n in constant else f"step.{n}" for n in names]

    token = step.node("ArgMax", "step.token", f"step.{logits}", axis=-1, keepdims=0)       # (1, 1)
    ends = step.node("Equal", "step.ends", token, step.constant([*stops]))
    ends = step.node("ReduceSum", "step.ends", step.node(
        "Cast", "step.ends", ends, to=TensorProto.INT64), keepdims=0)
    more = step.node("Equal", "step.more", ends, 0)
    longer = step.node("Concat", "step.mask", f"step.{mask}", step.constant([[1]]), axis=1)
    chosen = step.node("Identity", "step.chosen", token)
    body = make_graph(step.nodes, "step", [
        value("step.number", TensorProto.INT64, []), value("step.running", TensorProto.BOOL, []),
        *_inner(*graph.inputs), value("step.before", TensorProto.FLOAT, None)], [
        value(more, TensorProto.BOOL, []), value(token, TensorProto.INT64, None),
        value(longer, TensorProto.INT64, None), *_inner(*graph.outputs[1:], graph.outputs[0]),
        value(chosen, TensorProto.INT64, None)])
    outer.node("Loop", "steps", outer.node("ReduceMax", "steps", mask, keepdims=0), "",
               ids, mask, *past, outer.constant([[[0.0]]], torch.float32), body=body,
               named=["steps.ids", "steps.mask", *present, logits, "tokens"])
    graph.nodes = outer.nodes
    graph.tensors |= step.tensors | outer.tensors
    graph.outputs.append(value("tokens", TensorProto.INT64, ["steps", 1, 1]))


def _inner(*values: ValueInfoProto) -> list[ValueInfoProto]:
    """The same inside the Loop, with their shapes: an older onnxruntime needs them for Gemma."""
    return [ValueInfoProto(name=f"step.{v.name}", type=v.type) for v in values]


def write_sampler(file: Path, vocab: int) -> None:
    """Write a graph from logits (1, 1, V) to the 64 largest, sorted.

    Its outputs are `values` (1, 64), float32, `indices` (1, 64), int64, and `logprobs` (1, 64), the
    log-probabilities of these tokens among all, float32; V where V < 64.
    """
    g, k = Graph(), min(64, vocab)
    values, indices = g.node("TopK", "top", "logits", [k], outputs=2)
    logprobs = g.node("GatherElements", "logprobs", g.node(
        "LogSoftmax", "logprobs", "logits", axis=-1), indices, axis=-1)
    for name, top in ("values", values), ("indices", indices), ("logprobs", logprobs):
        g.node("Squeeze", name, top, [1], named=[name])
    g.inputs = [value("logits", TensorProto.FLOAT, [1, 1, vocab])]
    g.outputs = [value(name, kind, [1, k]) for name, kind in (
        ("values", TensorProto.FLOAT), ("indices", TensorProto.INT64),
        ("logprobs", TensorProto.FLOAT))]
    g.save(file)
