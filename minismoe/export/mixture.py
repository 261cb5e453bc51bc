"""Adapters in an ONNX graph: experts of a layer, or a LoRA that is an input of the graph.

Together, those of the matrices that read the same x compute:

    x -> MatMul router -> top k -> Softmax -> MatMul (gate of each rank) -+
    x -> MatMul [A_q A_k A_v] -------------------------------------------Mul -> h

Beside a base in blocks, A is in 8-bit blocks too (not in q4f16), and B is part of the base's own
product, y = [B W] [h x]: decoding pays for nodes more than for bytes. Where the base has 4 bits, B
is the sum of two rounded matrices, the second of what the first misses: y = [B_1 B_2 W] [h h x].
Beside other bases B is float32, and B h is added to W x.

Letters: B batch, T new tokens, G matrices that read the same x, E experts of a matrix, r rank,
R all ranks of a matrix or a group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx.helper import make_tensor, make_tensor_value_info
from torch import Tensor, nn

from ..method.experts import ExpertLinear, expert_layers
from ..method.freeze import Fit
from ..model.quantize import Blocks, dequantize, quantize
from .nodes import Graph
from .weights import HALF, PRECISIONS, WeightStore, concatenated

A_BITS = 8                      # of lora_A beside a base in blocks


class AdapterInput:
    """A LoRA given at run time: inputs `<module>.lora_A` (in, R) and `<module>.lora_B` (R, out)."""


Adapter = ExpertLinear | Fit | AdapterInput


class LinearLayers:
    """The linear layers of a graph, with their adapters, by module name."""

    def __init__(self, graph: Graph, weights: WeightStore, adapters: Mapping[str, Adapter]):
        self.graph, self.weights, self.adapters = graph, weights, adapters
        self.node, self.tensor, self.cast = graph.node, graph.tensor, graph.cast
        self.no_choices: dict[tuple[int, int], str] = {}

    def linear(self, names: Sequence[str], x: str, bias: bool = False, label: str = "") -> str:
        """x (B, T, in) -> (B, T, sum of out), by the modules `names`. label: the name of the nodes,
        by default that of the first module."""
        label, matrices = label or names[0], [self.weights.read(f"{n}.weight") for n in names]
        adapters, delta = [self.adapters.get(name) for name in names], ""
        wide = self.cast(f"{label}.wide", x, TensorProto.FLOAT) if any(adapters) else x
        if any(isinstance(adapter, AdapterInput) for adapter in adapters):
            parts = [self.adapter_input(n, wide, *w.shape) for n, w in zip(names, matrices)]
            delta = self.node("Concat", f"{label}.lora_B", *parts, axis=-1)
        elif any(adapters):
            h, B = self.experts(adapters, label, wide, [w.shape for w in matrices])
            if bits := self.weights.bits:
                Bs = in_8_bits(B, bits, self.weights.block)
                matrices = [concatenated([*Bs, self.weights.joined(matrices, bits)], 1)]
                h = self.cast(f"{label}.narrow", h, self.graph.real)
                x = self.node("Concat", label, *[h] * len(Bs), x, axis=-1)
            else:
                delta = self.node("MatMul", f"{label}.lora_B", h,
                                  self.tensor(f"{label}.lora_B", B.T))
        y = self.weights.product(names, label, x, matrices)
        if bias:
            values = torch.cat([self.weights.read(f"{n}.bias") for n in names])
            y = self.node("Add", f"{label}.bias", y,
                          self.tensor(f"{label}.bias", values.to(self.graph.dtype)))
        return y if not delta else self.node(
            "Add", f"{label}.side", y, self.cast(f"{label}.narrow", delta, self.graph.real))

    def adapter_input(self, name: str, x: str, outputs: int, inputs: int) -> str:
        """The LoRA that comes as an input; by default zeros of rank 1: WebGPU crashes at rank 0."""
        A = self.tensor(f"{name}.lora_A", torch.zeros(inputs, 1))
        B = self.tensor(f"{name}.lora_B", torch.zeros(1, outputs))
        if name in self.adapters:
            rank = f"{name}.rank"
            self.graph.inputs += [make_tensor_value_info(A, TensorProto.FLOAT, [inputs, rank]),
                                  make_tensor_value_info(B, TensorProto.FLOAT, [rank, outputs])]
        h = self.node("MatMul", f"{name}.lora_A", x, A)
        return self.node("MatMul", f"{name}.lora_B", h, B)

    def experts(self, adapters: Sequence[Any], label: str, x: str,
                shapes: Sequence[tuple[int, int]]) -> tuple[str, Tensor]:
        """h (B, T, R), gated, and lora_B (sum of out, R) of the experts beside matrices (out, in).

        Beside a base in blocks, the ranks of each matrix are padded to whole blocks.
        """
        bits, block = self.weights.bits, self.weights.block
        parts = [flat(adapter) if adapter else (torch.zeros(0, inputs), torch.zeros(out, 0),
                                                torch.zeros(0, inputs))
                 for adapter, (out, inputs) in zip(adapters, shapes)]
        pads = [-len(A) % block if bits else 0 for A, _, _ in parts]
        A = torch.cat([F.pad(A, (0, 0, 0, pad)) for (A, _, _), pad in zip(parts, pads)])
        B = torch.block_diag(*(F.pad(B, (0, pad)) for (_, B, _), pad in zip(parts, pads)))
        name = f"{label}.lora_A"
        few = self.weights.rows or bits and self.graph.dtype == torch.float32
        h = self.weights.product([], name, x, [A], A_BITS) if few else self.node(
            "MatMul", name, x, self.tensor(name, A.T))
        routers = [router for _, _, router in parts if len(router)]
        if routers:
            E, first, gate_of_rank = max(map(len, routers)), 0, []      # each (G * E, R)
            for (A, _, router), pad in zip(parts, pads):
                gate = torch.zeros(len(routers) * E, len(A) + pad)
                if n := len(router):
                    gate[first:first + n, :len(A)] = torch.eye(n).repeat_interleave(len(A) // n, 1)
                    first += E
                else:
                    gate[:E] = 1                 # always 1: the gates of any matrix sum to 1
                gate_of_rank.append(gate)
            top_k = [layer.top_k for layer in adapters
                     if isinstance(layer, ExpertLinear) and layer.router is not None]
            gates = self.node(
                "MatMul", f"{label}.gates", self.gates(f"{label}.router", x, routers, top_k),
                self.tensor(f"{label}.gates", torch.cat(gate_of_rank, 1)))
            h = self.node("Mul", f"{label}.gates", h, gates)
        return h, B

    def gates(self, name: str, x: str, routers: Sequence[Tensor], top_k: Sequence[int]) -> str:
        """Top-k gates of G matrices, zero for experts not chosen, (B, T, G * E)."""
        G, counts = len(routers), [len(router) for router in routers]
        E, k = max(counts), max(top_k)
        if [*top_k] != [min(k, n) for n in counts]:
            raise ValueError(f"{name}: matrices that read the same input need the same top_k")
        rows = [F.pad(router, (0, 0, 0, E - len(router))) for router in routers]
        y = self.node("MatMul", name, x, self.tensor(name, torch.cat(rows).T))
        if G > 1:
            y = self.node("Reshape", f"{name}.split", y, [0, 0, G, E])
        if min(counts) < E:                      # -inf: padding experts are never chosen
            fewer = torch.tensor([[0.0 if e < n else -math.inf for e in range(E)] for n in counts])
            y = self.node("Add", name, y, self.tensor(f"{name}.counts", fewer))
        if k < E:
            values, chosen = self.node("TopK", name, y, [k], outputs=2, axis=-1, sorted=0)
            y = self.node("ScatterElements", name, self.no_choice(G, E), chosen, values, axis=-1)
        y = self.node("Softmax", name, y, axis=-1)
        if G > 1:
            y = self.node("Reshape", f"{name}.join", y, [0, 0, G * E])
        return y

    def no_choice(self, G: int, E: int) -> str:
        """-inf (B, T, G, E), or (B, T, E) for one matrix: the chosen logits overwrite it."""
        name, sizes = f"router.none.{G}x{E}", [G, E] if G > 1 else [E]
        if (G, E) not in self.no_choices and (static := self.weights.form.static):
            self.no_choices[G, E] = self.tensor(name, torch.full((*static[:2], *sizes), -math.inf))
        elif (G, E) not in self.no_choices:
            shape = self.node("Concat", name, self.node("Shape", name, "input_ids"), sizes, axis=0)
            self.no_choices[G, E] = self.node("ConstantOfShape", name, shape, value=make_tensor(
                "value", TensorProto.FLOAT, [1], [-math.inf]))
        return self.no_choices[G, E]


def flat(layer: ExpertLinear | Fit) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A (R, in), lora_B (out, R) with the scaling, router (E, in), or (0, in) without one."""
    if isinstance(layer, Fit):
        A = layer.lora_A.float().cpu()
        return A, layer.lora_B.float().cpu(), A[:0]
    A, B = (p.detach().float().cpu().flatten(0, 1) for p in (layer.lora_A, layer.lora_B))
    router = A[:0] if layer.router is None else layer.router.detach().float().cpu()
    return A, (B * layer.scaling).T, router


def in_8_bits(B: Tensor, bits: int, block: int) -> list[Blocks]:
    """lora_B (out, R) as one matrix in 8 bits, or as two in 4 bits whose sum it is."""
    parts = [quantize(B, bits, block)]
    return parts if bits == 8 else [*parts, quantize(B - dequantize(parts[0]), bits, block)]


@torch.no_grad()
def round_adapters(model: nn.Module, precision: str, block: int) -> None:
    """Round the experts of the model in place, as a graph beside a base in few bits does."""
    bits = 0 if precision == "q8" else PRECISIONS[precision][0]
    for layer in expert_layers(model).values():
        A, B = layer.lora_A.flatten(0, 1), layer.lora_B.flatten(0, 1).T
        if precision not in HALF:
            A = dequantize(quantize(A, A_BITS, block))
        if bits:
            B = torch.stack([*map(dequantize, in_8_bits(B, bits, block))]).sum(0)
        layer.lora_A = nn.Parameter(A.view_as(layer.lora_A), requires_grad=False)
        layer.lora_B = nn.Parameter(B.T.reshape(layer.lora_B.shape), requires_grad=False)
