"""How an ONNX graph stores, multiplies and looks up the weights of a model, in any precision.

Weights stream to the data file tensor by tensor. `ort` graphs multiply quantised blocks by
MatMulNBits, and look rows up by GatherBlockQuantized; `portable` graphs use DequantizeLinear and
MatMul, and look bytes up. Rows of 8 bits, for browsers, become floats when a session loads.

Letters: B batch, T new tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from ..model.config import Config
from ..model.quantize import BLOCK, ROW, Blocks, columns, quantize
from .nodes import Graph

# Bits of linear layers, and of embedding and head, which lose most in few bits.
# q8 and q4f16 are transformers.js's names: rows of 8 bits for WASM, and int4 in float16 for WebGPU.
# w8a16 and w4a16, for NPUs, have activations in 16 bits.
PRECISIONS = {"fp32": (0, 0), "fp16": (0, 0), "int8": (8, 8), "int4-8": (4, 8), "int4": (4, 4),
              "q8": (8, 8), "q4f16": (4, 4), "w8a16": (8, 8), "w4a16": (4, 8)}
NPU_PRECISIONS = ("fp16", "w8a16", "w4a16")
HALF = ("fp16", "q4f16")        # activations are float16
ReadWeight = Callable[[str], Any]            # Hugging Face name -> a Tensor, or its Blocks


@dataclass(frozen=True)
class GraphFormat:
    """Which operators, precision and sizes a graph has."""

    target: str                              # ort, portable or npu
    precision: str                           # one of PRECISIONS
    context: int                             # positions
    block: int = BLOCK                       # weights that share a scale, in few bits
    static: tuple[int, int, int] | None = None           # prompts, tokens a step, past positions

    @property
    def ort(self) -> bool:
        """Whether onnxruntime's own operators may be used."""
        return self.target == "ort"

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations."""
        return torch.float16 if self.precision in HALF else torch.float32


def few_bits(weight: Any, precision: str, bits: int, block: int) -> Blocks:
    """A weight as a graph of that precision stores it; ready-made `Blocks` stay as they are."""
    if isinstance(weight, Blocks):
        return weight
    if bits == 8 and precision in NPU_PRECISIONS:
        return quantize(weight, bits, ROW, positive=True)
    return quantize(weight, bits, block)


def concatenated(parts: Sequence[Blocks], dim: int) -> Blocks:
    """Blocks of matrices below each other (dim 0) or side by side (1), as those of one matrix."""
    shape = [*parts[0].shape]
    shape[dim] = sum(p.shape[dim] for p in parts)
    return replace(parts[0], shape=torch.Size(shape), data=torch.cat([p.data for p in parts], dim),
                   scales=torch.cat([p.scales for p in parts], dim))


class WeightStore:
    """Stores the weights of a model in a graph, and multiplies by them."""

    def __init__(self, graph: Graph, config: Config, read: ReadWeight, form: GraphFormat):
        self.graph, self.config, self.read, self.form = graph, config, read, form
        self.node, self.tensor = graph.node, graph.tensor
        self.rows = form.precision == "q8"       # 8 bits in the file, floats in a session
        self.block = ROW if self.rows else form.block
        self.bits, self.vocabulary_bits = (0, 0) if self.rows else PRECISIONS[form.precision]
        self.vocabularies: dict[str, list[str]] = {}     # stored embedding and head, by module

    def joined(self, weights: Sequence[Any], bits: int) -> Blocks:
        """Weights (out, in) below each other, as the graph stores them."""
        return concatenated([few_bits(w, self.form.precision, bits, self.block) for w in weights],
                            0)

    def product(self, names: Sequence[str], label: str, x: str, weights: Sequence[Any],
                bits: int = 0) -> str:
        """x (B, T, in) -> (B, T, sum of out), by weights (out, in) of the modules `names`, side by
        side, in the graph's number of bits or in `bits`."""
        outputs, inputs = sum(w.shape[0] for w in weights), weights[0].shape[1]
        if self.rows:
            return self.node("MatMul", label, x, self.floats(label, weights, transposed=True))
        if bits := bits or self.bits:
            blocks = self.blocks(label, weights, bits)
            return self.multiply(label, x, blocks, inputs, outputs, bits)
        return self.node("MatMul", label, x, self.tensor(
            f"{label}.weight", torch.cat([*weights]).to(self.graph.dtype).T))

    def blocks(self, label: str, weights: Sequence[Any], bits: int) -> list[str]:
        """Store the data and scales of quantised weights, for `portable` also their zeros, which
        `ort` operators know; returns their names."""
        w = self.joined(weights, bits)
        if self.form.ort:
            return [self.tensor(f"{label}.weight", w.data),
                    self.tensor(f"{label}.scales", w.scales.to(self.graph.dtype))]
        kind, zero = (TensorProto.UINT4, 0x88) if bits == 4 else (TensorProto.UINT8, 0x80)
        data, scales = columns(w)
        zeros = torch.full((-(-scales.numel() * bits // 8),), zero, dtype=torch.uint8)
        return [self.tensor(f"{label}.weight", data, kind, w.shape[::-1]),
                self.tensor(f"{label}.scales", scales),
                self.tensor(f"{label}.zeros", zeros, kind, scales.shape)]

    def multiply(self, label: str, x: str, blocks: Sequence[str], inputs: int, outputs: int,
                 bits: int) -> str:
        """x (.., in) times stored blocks. accuracy_level 4 rounds x to int8, a block at a time."""
        if self.form.ort:
            return self.node("MatMulNBits", label, x, *blocks, domain="com.microsoft", K=inputs,
                             N=outputs, bits=bits, block_size=self.block, accuracy_level=4)
        return self.node("MatMul", label, x, self.node(
            "DequantizeLinear", label, *blocks, axis=0, block_size=self.block))

    def floats(self, label: str, weights: Sequence[Any], transposed: bool = False) -> str:
        """Weights (N, K) below each other, in rows of 8 bits: float32 (N, K) or (K, N).

        No operator here depends on an input, so a session computes the floats once, as it loads.
        onnxruntime's WASM build multiplies these faster than it multiplies 8 bits.
        """
        w = self.joined(weights, 8)
        data, scales = w.data.squeeze(1).bitwise_xor(128).view(torch.int8), w.scales      # (N, 1)
        data, scales = (data.T, scales.T) if transposed else (data, scales)
        wide = self.node("Cast", label, self.tensor(f"{label}.weight", data), to=TensorProto.FLOAT)
        return self.node("Mul", f"{label}.floats", wide, self.tensor(f"{label}.scales", scales))

    def vocabulary(self, name: str) -> list[str]:
        """The stored tensors of an embedding or a head (V, D); one for both is stored once."""
        if name not in self.vocabularies:
            value = self.read(f"{name}.weight")
            self.vocabularies[name] = (
                [self.floats(name, [value])] if self.rows else
                self.blocks(name, [value], self.vocabulary_bits) if self.vocabulary_bits else
                [self.tensor(f"{name}.weight", value.to(self.graph.dtype))])
        return self.vocabularies[name]

    def embed(self, name: str) -> str:
        """input_ids (B, T) -> (B, T, D)."""
        stored, D, bits = self.vocabulary(name), self.config.hidden_size, self.vocabulary_bits
        if not bits:
            return self.node("Gather", name, *stored, "input_ids")
        if not self.form.ort:
            return self.embed_columns(name, *stored[:2])
        row = -(-D // self.block) * self.block
        data = self.graph.alias(stored[0], [self.config.vocab_size, row * bits // 8])
        x = self.node("GatherBlockQuantized", name, data, "input_ids", stored[1],
                      domain="com.microsoft", bits=bits, block_size=self.block, gather_axis=0,
                      quantize_axis=1)
        return x if row == D else self.node("Slice", name, x, [0], [D], [-1])

    def embed_columns(self, name: str, data: str, scales: str) -> str:
        """Rows (B, T, D) of a matrix stored as (D, V), as the head's product needs it.

        No standard operator gathers 4-bit values, so the bytes that hold them are gathered.
        """
        D, V = self.config.hidden_size, self.config.vocab_size
        token = self.node("Unsqueeze", name, "input_ids", [2])    # (B, T, 1)
        rows, blocks = torch.arange(D) * V, torch.arange(D) // self.block * V
        q = self.gather(f"{name}.weight", data, token, rows)
        zero = self.graph.constant(float(1 << (self.vocabulary_bits - 1)), torch.float32)
        flat = self.graph.alias(scales, [-(-D // self.block) * V])
        scale = self.node("Gather", f"{name}.scales", flat, self.node(
            "Add", f"{name}.scales", token, self.tensor(f"{name}.scales.at", blocks)))
        return self.node("Mul", name, self.node("Sub", name, q, zero), scale)    # (B, T, D)

    def gather(self, name: str, packed: str, token: str, at: Tensor) -> str:
        """Elements token + at of a packed matrix, as floats.

        OpenVINO divides integers as floats, which is inexact from 2^24 on, and rounds shifts and
        divisions of uint8. So only small numbers are divided, in int64.
        """
        size, bits = math.prod(self.graph.tensors[packed].dims), self.vocabulary_bits
        data = self.graph.alias(packed, [size * bits // 8 + size * bits % 8 // 4],
                                TensorProto.UINT8)
        if bits == 8:
            q = self.node("Gather", name, data, self.node(
                "Add", name, token, self.tensor(f"{name}.at", at)))
            return self.node("Cast", name, q, to=TensorProto.FLOAT)
        two = self.graph.constant(2)
        token = self.node("Add", name, token, self.tensor(f"{name}.odd", at % 2))
        place = self.node("Add", f"{name}.byte", self.node("Div", name, token, two),
                          self.tensor(f"{name}.at", at // 2))
        byte = self.node("Cast", f"{name}.byte", self.node("Gather", name, data, place),
                         to=TensorProto.INT64)
        divisor = self.node("Gather", f"{name}.nibble", [1, 16], self.node("Mod", name, token, two))
        q = self.node("Div", f"{name}.nibble", byte, divisor)
        q = self.node("Mod", f"{name}.nibble", q, 16)
        return self.node("Cast", name, q, to=TensorProto.FLOAT)
