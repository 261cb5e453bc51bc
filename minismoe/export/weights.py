"""How an ONNX graph stores, multiplies and looks up the weights of a model, in any precision.

Weights stream to the data file tensor by tensor. `ort` graphs multiply quantised blocks by
MatMulNBits, and look rows up by GatherBlockQuantized; `portable` graphs use DequantizeLinear and
MatMul, and look bytes up. Rows of 8 bits, for browsers, become floats when a session loads.

Letters: T new tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from onnx import TensorProto
from torch import Tensor

from ..model.decoder import CausalLM
from ..model.quantize import BLOCK, ROW, Blocks, columns
from .layers import matrix
from .nodes import Graph


class Precision(NamedTuple):
    """How a graph stores weights: their bits, or 0 for floats; and what takes such a graph."""

    layers: int = 0                          # bits of linear layers
    vocabulary: int = 0                      # bits of embedding and head, which lose most in few
    half: bool = False                       # whether activations are float16
    targets: tuple[str, ...] = ("ort", "portable")


# q8 and q4f16 are transformers.js's names: rows of 8 bits for WASM, and int4 in float16 for WebGPU.
# w8a16 and w4a16 have activations in 16 bits.
PRECISIONS = {
    "fp32": Precision(), "fp16": Precision(half=True, targets=("ort", "portable", "npu")),
    "int8": Precision(8, 8), "int4-8": Precision(4, 8), "int4": Precision(4, 4),
    "q8": Precision(8, 8, targets=("ort",)), "q4f16": Precision(4, 4, True, ("ort",)),
    "w8a16": Precision(8, 8, targets=("npu",)), "w4a16": Precision(4, 8, targets=("npu",))}


class Storage(NamedTuple):
    """How a weight matrix is stored in few bits."""

    bits: int                                # 8 or 4
    block: int                               # weights that share a scale; ROW: those of a row


@dataclass(frozen=True)
class GraphFormat:
    """Which operators, precision and sizes a graph has."""

    target: str                              # ort, portable or npu
    precision: str                           # one of PRECISIONS
    context: int                             # positions
    block: int = BLOCK                       # weights that share a scale, in few bits
    static: tuple[int, int, int] | None = None           # 1, tokens a step, past positions
    last: int = 1                            # last tokens of a step that have logits, at most

    @property
    def ort(self) -> bool:
        """Whether onnxruntime's own operators may be used."""
        return self.target == "ort"

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations."""
        return torch.float16 if PRECISIONS[self.precision].half else torch.float32

    @property
    def rows(self) -> bool:
        """Whether weights are rows of 8 bits in the file, and floats in a session."""
        return self.precision == "q8"

    @property
    def rounds(self) -> bool:
        """Whether any weight is stored in few bits."""
        return PRECISIONS[self.precision].layers > 0

    @property
    def rounds_activations(self) -> bool:
        """Whether a session rounds activations: to 8 bits, as accuracy_level 4 says, or for an NPU
        to 16."""
        return self.rounds and not self.rows

    def way_of(self, name: str) -> Storage | None:
        """How the matrix of a module is stored in few bits; None if it stays in floats."""
        precision = PRECISIONS[self.precision]
        bits = precision.layers if ".layers." in name else precision.vocabulary
        whole_rows = self.rows or bits == 8 and self.target == "npu"
        return Storage(bits, ROW if whole_rows else self.block) if bits else None


def concatenated(parts: Sequence[Any]) -> Any:
    """The rows of weights as one weight: Tensors, or Blocks of the same bits and size."""
    if isinstance(parts[0], Tensor):
        return torch.cat([*parts])
    data, scales = torch.cat([p.data for p in parts]), torch.cat([p.scales for p in parts])
    return replace(parts[0], shape=torch.Size((len(data), parts[0].shape[1])), data=data,
                   scales=scales)


class WeightStore:
    """Stores the weights of a model in a graph, and multiplies by them."""

    def __init__(self, graph: Graph, model: CausalLM, form: GraphFormat):
        self.graph, self.model, self.form = graph, model, form
        self.config, self.node, self.tensor = model.config, graph.node, graph.tensor
        self.vocabularies: dict[str, list[str]] = {}     # stored embedding and head, by module

    def leaf(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def parameter(self, name: str) -> Tensor:
        """The floats of a norm, a bias or a convolution."""
        return self.model.get_parameter(name).detach()

    def product(self, names: Sequence[str], label: str, x: str, weights: Sequence[Any]) -> str:
        """x (1, T, in) -> (1, T, sum of out), by weights (out, in) of the modules `names`, all of
        them floats, or blocks of the same bits and size."""
        w = concatenated(weights)
        if self.is_float(w):
            return self.node("MatMul", label, x, self.floats(label, w, transposed=True))
        return self.multiply(label, x, self.blocks(label, w), w)

    def is_float(self, w: Any) -> bool:
        """Whether a session multiplies by a weight as floats, however the file stores it."""
        return isinstance(w, Tensor) or self.form.rows

    def blocks(self, label: str, w: Blocks) -> list[str]:
        """Store the data and scales of a quantised weight, for `portable` also its zeros, which
        `ort` operators know; returns their names."""
        if self.form.ort:
            return [self.tensor(f"{label}.weight", w.data),
                    self.tensor(f"{label}.scales", w.scales.to(self.graph.dtype))]
        kind, zero = (TensorProto.UINT4, 0x88) if w.bits == 4 else (TensorProto.UINT8, 0x80)
        data, scales = columns(w)
        zeros = torch.full((-(-scales.numel() * w.bits // 8),), zero, dtype=torch.uint8)
        return [self.tensor(f"{label}.weight", data, kind, w.shape[::-1]),
                self.tensor(f"{label}.scales", scales),
                self.tensor(f"{label}.zeros", zeros, kind, scales.shape)]

    def multiply(self, label: str, x: str, stored: Sequence[str], w: Blocks,
                 named: Sequence[str] = ()) -> str:
        """x (.., in) times stored blocks. accuracy_level 4 rounds x to int8, a block at a time."""
        if self.form.ort:
            return self.node("MatMulNBits", label, x, *stored, domain="com.microsoft",
                             K=w.shape[1], N=w.shape[0], bits=w.bits, block_size=w.size,
                             accuracy_level=4, named=named)
        return self.node("MatMul", label, x, self.node(
            "DequantizeLinear", label, *stored, axis=0, block_size=w.size), named=named)

    def floats(self, label: str, w: Tensor | Blocks, transposed: bool = False) -> str:
        """The floats (N, K) or (K, N) of a weight (N, K), for which `is_float` holds.

        For rows of 8 bits, no operator here depends on an input, so a session computes the floats
        once, as it loads: onnxruntime's WASM build multiplies these faster than 8 bits.
        """
        if isinstance(w, Tensor):
            dense = w.to(self.graph.dtype)
            return self.tensor(f"{label}.weight", dense.T if transposed else dense)
        data, scales = w.data.squeeze(1).bitwise_xor(128).view(torch.int8), w.scales      # (N, 1)
        data, scales = (data.T, scales.T) if transposed else (data, scales)
        wide = self.node("Cast", label, self.tensor(f"{label}.weight", data), to=TensorProto.FLOAT)
        return self.node("Mul", f"{label}.floats", wide, self.tensor(f"{label}.scales", scales))

    def vocabulary(self, name: str) -> list[str]:
        """The stored tensors of an embedding or a head (V, D); one for both is stored once."""
        if name not in self.vocabularies:
            w = matrix(self.leaf(name))
            self.vocabularies[name] = (
                [self.floats(name, w)] if self.is_float(w) else self.blocks(name, w))
        return self.vocabularies[name]

    def embed(self, name: str) -> str:
        """input_ids (1, T) -> (1, T, D)."""
        stored, D, w = self.vocabulary(name), self.config.hidden_size, matrix(self.leaf(name))
        if self.is_float(w):
            return self.node("Gather", name, *stored, "input_ids")
        if not self.form.ort:
            return self.embed_columns(name, stored[0], stored[1], w)
        row = -(-D // w.size) * w.size
        data = self.graph.alias(stored[0], [self.config.vocab_size, row * w.bits // 8])
        x = self.node("GatherBlockQuantized", name, data, "input_ids", stored[1],
                      domain="com.microsoft", bits=w.bits, block_size=w.size)
        return x if row == D else self.node("Slice", name, x, [0], [D], [-1])

    def embed_columns(self, name: str, data: str, scales: str, w: Blocks) -> str:
        """Rows (1, T, D) of a matrix that is stored as (D, V), as the head's product needs it: the
        D numbers of a token lie V apart."""
        D, V = self.config.hidden_size, self.config.vocab_size
        token = self.node("Unsqueeze", name, "input_ids", [2])    # (1, T, 1)
        q = self.integers(f"{name}.weight", data, token, torch.arange(D) * V, w.bits)
        zero = self.graph.constant(float(1 << (w.bits - 1)), torch.float32)
        scale = self.at(f"{name}.scales", self.graph.alias(scales, [-(-D // w.size) * V]), token,
                        torch.arange(D) // w.size * V)
        return self.node("Mul", name, self.node("Sub", name, q, zero), scale)    # (1, T, D)

    def at(self, name: str, flat: str, token: str, first: Tensor) -> str:
        """Elements token + first of a flat tensor."""
        return self.node("Gather", name, flat, self.node(
            "Add", name, token, self.tensor(f"{name}.at", first)))

    def integers(self, name: str, packed: str, token: str, first: Tensor, bits: int) -> str:
        """Integers token + first of a packed matrix, as floats.

        No standard operator gathers 4-bit values, so the bytes that hold two each are gathered.
        OpenVINO divides integers as floats, which is inexact from 2^24 on, and rounds shifts and
        divisions of uint8. So only small numbers are divided, in int64.
        """
        size = math.prod(self.graph.tensors[packed].dims)
        data = self.graph.alias(packed, [-(-size * bits // 8)], TensorProto.UINT8)
        if bits == 8:
            return self.node("Cast", name, self.at(name, data, token, first), to=TensorProto.FLOAT)
        token = self.node("Add", name, token, self.tensor(f"{name}.odd", first % 2))
        byte = self.at(f"{name}.byte", data, self.node("Div", name, token, 2), first // 2)
        byte = self.node("Cast", f"{name}.byte", byte, to=TensorProto.INT64)
        divisor = self.node("Gather", f"{name}.nibble", [1, 16], self.node("Mod", name, token, 2))
        nibble = self.node("Div", f"{name}.nibble", byte, divisor)
        return self.node("Cast", name, self.node("Mod", f"{name}.nibble", nibble, 16),
                         to=TensorProto.FLOAT)
