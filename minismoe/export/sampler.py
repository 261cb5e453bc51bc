"""The graph that a host samples from: the largest of the logits, sorted."""

from pathlib import Path

from onnx import TensorProto
from onnx.helper import make_tensor_value_info as value

from .nodes import Graph


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
