"""Adapters in an ONNX graph: experts of a layer, or a LoRA that is an input of the graph.

Together, those of the matrices that read the same x compute:

    x -> MatMul router -> top k -> Softmax -> MatMul (gate of each rank) -+
    x -> MatMul [A_q A_k A_v] -------------------------------------------Mul -> Split
      -> MatMul B_q, MatMul B_k, MatMul B_v -> Concat -> delta

Decoding is bound by memory, so B stays one MatMul a matrix: a block-diagonal B would read zeros.
Beside a base in blocks, A is in 8-bit blocks too, except in q4f16. B stays float32: its rows of r
weights are too short for blocks, which make prompts 8 % slower and decoding no faster.

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
from ..model.quantize import dequantize, quantize
from .weights import WeightGraph

A_BITS = 8                      # of lora_A beside a base in blocks


class AdapterInput:
    """A LoRA given at run time: inputs `<module>.lora_A` (in, R) and `<module>.lora_B` (R, out)."""


Adapter = ExpertLinear | AdapterInput


class MixtureGraph(WeightGraph):
    """A graph with `adapters`, by module name."""

    def __init__(self, adapters: Mapping[str, Adapter], *model: Any):
        super().__init__(*model)
        self.adapters = adapters

    def linear(self, names: Sequence[str], x: str, bias: bool = False, label: str = "") -> str:
        """x (B, T, in) -> (B, T, sum of out), by the modules `names`. label: the name of the nodes,
        by default that of the first module."""
        label, weights = label or names[0], [self.weight(f"{n}.weight") for n in names]
        y = self.product(names, label, x, weights)
        if bias:
            values = torch.cat([self.weight(f"{n}.bias").to(self.dtype) for n in names])
            y = self.node("Add", f"{label}.bias", y, self.tensor(f"{label}.bias", values))
        if not self.adapters.keys() & set(names):
            return y
        x, shapes = self.cast(f"{label}.wide", x, TensorProto.FLOAT), [w.shape for w in weights]
        adapters: list[Any] = [self.adapters.get(name) for name in names]
        if any(isinstance(a, AdapterInput) for a in adapters):
            parts = [self.adapter_input(n, x, *shape) for n, shape in zip(names, shapes)]
        else:
            parts = self.experts(adapters, label, x, shapes)
        delta = parts[0] if len(parts) == 1 else self.node(
            "Concat", f"{label}.lora_B", *parts, axis=-1)
        return self.node("Add", f"{label}.side", y, self.cast(f"{label}.narrow", delta, self.real))

    def adapter_input(self, name: str, x: str, outputs: int, inputs: int) -> str:
        """The LoRA that comes as an input of the graph; its default has rank 0 and adds nothing."""
        A = self.tensor(f"{name}.lora_A", torch.empty(inputs, 0))
        B = self.tensor(f"{name}.lora_B", torch.empty(0, outputs))
        if name in self.adapters:
            rank = f"{name}.rank"
            self.inputs += [make_tensor_value_info(A, TensorProto.FLOAT, [inputs, rank]),
                            make_tensor_value_info(B, TensorProto.FLOAT, [rank, outputs])]
        h = self.node("MatMul", f"{name}.lora_A", x, A)
        return self.node("MatMul", f"{name}.lora_B", h, B)

    def experts(self, layers: Sequence[ExpertLinear | None], label: str, x: str,
                shapes: Sequence[tuple[int, int]]) -> list[str]:
        """What the experts of each layer add to a matrix (out, in), (B, T, out); None: zeros."""
        parts = [flat(layer) if layer else (torch.zeros(1, inputs), torch.zeros(out, 1),
                                            torch.zeros(0, inputs))
                 for layer, (out, inputs) in zip(layers, shapes)]
        routers = [router for _, _, router in parts if len(router)]
        name, A = f"{label}.lora_A", torch.cat([A for A, _, _ in parts])
        few = self.rows or self.bits and self.dtype == torch.float32
        h = self.product([], name, x, [A], A_BITS) if few else self.node(
            "MatMul", name, x, self.tensor(name, A.T))
        if routers:
            E, first, gate_of_rank = max(map(len, routers)), 0, []      # each (G * E, R)
            for A, _, router in parts:
                gate = torch.zeros(len(routers) * E, len(A))
                if n := len(router):
                    gate[first:first + n] = torch.eye(n).repeat_interleave(len(A) // n, 1)
                    first += E
                else:
                    gate[:E] = 1                 # always 1: the gates of any matrix sum to 1
                gate_of_rank.append(gate)
            top_k = [layer.top_k for layer in layers if layer and layer.router is not None]
            gates = self.node(
                "MatMul", f"{label}.gates", self.gates(f"{label}.router", x, routers, top_k),
                self.tensor(f"{label}.gates", torch.cat(gate_of_rank, 1)))
            h = self.node("Mul", f"{label}.gates", h, gates)
        hs = [h] if len(parts) == 1 else self.node(
            "Split", name, h, [len(A) for A, _, _ in parts], outputs=len(parts), axis=-1)
        return [self.node("MatMul", f"{label}.lora_B.{i}", h,
                          self.tensor(f"{label}.lora_B.{i}", B.T))
                for i, (h, (_, B, _)) in enumerate(zip(hs, parts))]

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
        if name not in self.shared and self.static:
            self.shared[name] = self.tensor(name, torch.full((*self.static[:2], *sizes), -math.inf))
        elif name not in self.shared:
            shape = self.node("Concat", name, self.node("Shape", name, "input_ids"), sizes, axis=0)
            self.shared[name] = self.node("ConstantOfShape", name, shape, value=make_tensor(
                "value", TensorProto.FLOAT, [1], [-math.inf]))
        return self.shared[name]


def flat(layer: ExpertLinear) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A (R, in), lora_B (out, R) with the scaling, router (E, in), or (0, in) without one."""
    A, B = (p.detach().float().cpu().flatten(0, 1) for p in (layer.lora_A, layer.lora_B))
    router = A[:0] if layer.router is None else layer.router.detach().float().cpu()
    return A, (B * layer.scaling).T, router


@torch.no_grad()
def round_adapters(model: nn.Module, block: int) -> None:
    """Round the experts of the model in place, as a graph beside a base in blocks does."""
    for layer in expert_layers(model).values():
        A = dequantize(quantize(layer.lora_A.flatten(0, 1), A_BITS, block))
        layer.lora_A = nn.Parameter(A.view_as(layer.lora_A), requires_grad=False)
