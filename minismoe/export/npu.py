"""The decoder for NPUs: static shapes, activations in 16 bits, and no operator that needs a CPU.

    embed.onnx    input_ids (1, T) -> hidden (1, T, D): the embedding is looked up on the CPU
    prompt.onnx   T tokens a step, whose keys and values the runtime appends to a cache of P slots
    model.onnx    the same graph for one token a step
    model.onnx.data                  the weights of all three

Qualcomm's HTP computes floats in float16, whose largest number is 65504. So the norms, which square
numbers of 25,000 (SmolLM2's first token), are one operator each, which HTP sums in float32, and the
mask is -1e4. Linear layers multiply integers: weights in 8 bits a row, or in 4 bits a block;
activations in 16 bits, with one range a tensor. A layer whose activations no such range holds stays
in float16, as do norms, rotary angles, softmax and the residual stream.

Letters: T new tokens, P slots of the cache, D hidden, K key/value heads, C head size, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx.helper import make_tensor_value_info as value
from torch import Tensor

from ..model.decoder import CausalLM
from ..model.quantize import BLOCK, Blocks, columns
from ..runtime.providers import find_device, open_session
from .graph import DecoderBuilder
from .layers import matrix
from .nodes import Graph
from .positions import causal
from .ranges import Range, Ranges
from .weights import GraphFormat, WeightStore, concatenated


class NpuWeights(WeightStore):
    """Weights in integers that HTP multiplies, beside activations rounded to `ranges`."""

    def __init__(self, graph: Graph, model: CausalLM, form: GraphFormat, ranges: Ranges):
        super().__init__(graph, model, form)
        self.ranges = ranges

    def product(self, names: Sequence[str], label: str, x: str, weights: Sequence[Any]) -> str:
        """x (1, T, in) -> (1, T, sum of out), in integers if all outputs have ranges."""
        w = concatenated(weights)
        if isinstance(w, Tensor):
            return super().product(names, label, x, [w])
        if not self.ranges.keys() >= set(names):
            return self.float_product(label, x, w)
        ins, outs = zip(*(self.ranges[name] for name in names))
        y = self.node("MatMul", label, self.narrow(f"{label}.x", x, ins), self.stored(label, w))
        return self.narrow(f"{label}.y", y, outs)

    def narrow(self, name: str, x: str, ranges: Sequence[Range]) -> str:
        """x, rounded to 16 bits in a range that holds all of these."""
        scale, zero = Range(min(r.low for r in ranges), max(r.high for r in ranges)).step()
        step = [self.graph.constant(scale, torch.float32),
                self.tensor(f"{name}.zero", torch.tensor(zero).to(torch.int16), TensorProto.UINT16)]
        return self.node("DequantizeLinear", name, self.node("QuantizeLinear", name, x, *step),
                         *step)

    def stored(self, label: str, w: Blocks) -> str:
        """A weight (out, in) in few bits, for MatMul (in, out): 8 bits a row, or 4 bits a block.

        QNN wants zero points of 0, so the highest bit of each integer is flipped.
        """
        (data, scales), rows = columns(w), w.bits == 8
        kind, highest = (TensorProto.INT8, 0x80) if rows else (TensorProto.INT4, 0x88)
        names = [self.tensor(f"{label}.weight", data ^ highest, kind, w.shape[::-1]),
                 self.tensor(f"{label}.scales", scales[0] if rows else scales)]
        axes: dict[str, Any] = {"axis": 1} if rows else {"axis": 0, "block_size": w.size}
        return self.node("DequantizeLinear", label, *names, **axes)

    def float_product(self, label: str, x: str, w: Blocks) -> str:
        """x times a weight in few bits, without rounding x; a row of 8 bits is cut into blocks."""
        (N, K), data, scales = w.shape, w.data, w.scales
        if w.bits == 8:
            data = F.pad(data.flatten(1), (0, -K % BLOCK), value=0x80).unflatten(1, (-1, BLOCK))
            scales = scales.expand(-1, data.shape[1])
        return self.node("MatMulNBits", label, x, self.tensor(f"{label}.weight", data),
                         self.tensor(f"{label}.scales", scales.contiguous()), K=K, N=N,
                         bits=w.bits, block_size=BLOCK if w.bits == 8 else w.size,
                         domain="com.microsoft")

    def blocks(self, label: str, w: Blocks) -> list[str]:
        """The data and scales of an embedding or head (V, D), in 8 bits with a scale a row."""
        return [self.tensor(f"{label}.weight", w.data.flatten(1) ^ 0x80, TensorProto.INT8),
                self.tensor(f"{label}.scales", w.scales.flatten())]


class NpuBuilder(DecoderBuilder):
    """One step of T tokens after the P slots of a cache; returns the keys and values of the T."""

    weights: NpuWeights

    def rms(self, name: str, x: str, weight: str, eps: float | None = None) -> str:
        """As in the base class, in one operator: HTP sums the squares in float32."""
        ones, shape = weight, self.graph.tensors[weight].dims
        if len(shape) > 1:                             # one weight a head
            ones = self.tensor(f"{name}.ones", torch.ones(shape[-1], dtype=self.dtype))
        y = self.node("RMSNormalization", name, x, ones, axis=-1, stash_type=1,
                      epsilon=eps or self.config.rms_norm_eps)
        return y if ones == weight else self.node("Mul", name, y, weight)

    def embed(self) -> str:
        """The hidden states that embed.onnx looked up."""
        return "hidden"

    def cache(self, name: str, past: str, new: str, present: str) -> str:
        """Past and new (1, K, P + T, C); the present is the new alone."""
        if self.dtype == torch.float16:
            self.node("Identity", name, new, named=[present])
        else:
            past = self.node("Cast", f"{name}.past", past, to=self.graph.real)
            self.node("Cast", name, new, to=TensorProto.FLOAT16, named=[present])
        return self.node("Concat", name, past, new, axis=2)

    def head(self, x: str) -> None:
        """Hidden states (1, T, D) -> logits (1, 1, V) of the last position."""
        tied, name, w = self.config.tie_word_embeddings, "lm_head", self.weights
        table = "model.embed_tokens" if tied else name
        if isinstance(matrix(w.leaf(table)), Tensor):
            super().head(x)
            return
        dense = self.node("DequantizeLinear", name, *w.vocabulary(table), axis=0)
        ins, outs = w.ranges[name]
        y = self.node("Gemm", name, w.narrow(f"{name}.x", self.last(x), [ins]), dense, transB=1)
        y = w.narrow(f"{name}.y", y, [outs])
        self.node("Unsqueeze", name, y, [1], named=["logits"])

    def resize(self, T: int, P: int) -> None:
        """Declare inputs and outputs of T tokens, and fit the mask: nothing else depends on T."""
        c, graph = self.config, self.graph
        graph.inputs = [value("hidden", graph.real, [1, T, c.hidden_size]),
                        value("attention_mask", TensorProto.INT64, [1, P + T]),
                        value("position_ids", TensorProto.INT64, [1, T])]
        graph.outputs = [value("logits", TensorProto.FLOAT, [1, 1, c.vocab_size])]
        self.declare_cache(P, T, TensorProto.FLOAT16)
        self.tensor("mask.full.past", causal(T, P))


def write_npu(folder: Path, model: CausalLM, form: GraphFormat, ranges: Ranges) -> None:
    """Write embed.onnx, prompt.onnx and model.onnx of a model over one file of weights."""
    _, T, P = form.static or (1, 1, 1)
    with open(folder / "model.onnx.data", "wb") as data:
        graph = Graph(data, form.dtype, opset=23)      # RMSNormalization is new in 23
        weights = NpuWeights(graph, model, form, ranges)
        embedding = weights.vocabulary("model.embed_tokens")
        decoder = NpuBuilder(graph, weights)
        decoder.build()
        for file, tokens in ("prompt.onnx", T), ("model.onnx", 1):
            decoder.resize(tokens, P)
            graph.save(folder / file)
    lookup = Graph()
    lookup.tensors = {name: graph.tensors[name] for name in embedding}
    lookup.inputs = [value("input_ids", TensorProto.INT64, [1, "T"])]
    lookup.outputs = [value("hidden", graph.real, [1, "T", model.config.hidden_size])]
    row, *scale = (lookup.node("Gather", name, name, "input_ids") for name in embedding)
    if scale:
        row = lookup.node("Mul", "scale", lookup.node("Cast", "row", row, to=TensorProto.FLOAT),
                          lookup.node("Unsqueeze", "scale", *scale, [2]))
    lookup.node("Identity", "hidden", row, named=["hidden"])
    lookup.save(folder / "embed.onnx")


def compile_npu(folder: Path, soc: int) -> None:
    """Compile both graphs for a chip: prompt.qnn.onnx, model.qnn.onnx, and a binary of each."""
    for name in ("prompt", "model"):
        open_session(folder / f"{name}.onnx", find_device(f"qnn:{soc}"), None, (
            ("ep.context_enable", "1"), ("ep.context_embed_mode", "0"),
            ("ep.context_file_path", str(folder / f"{name}.qnn.onnx"))))
