"""The experts of linear layers in an ONNX graph.

Together, those of the matrices that read the same x compute:

    x -> MatMul router -> top k -> Softmax -> MatMul (gate of each rank) -+
    x -> MatMul [A_q A_k A_v] -------------------------------------------Mul -> h -> MatMul B -> Add

Beside a base in blocks, A is in 8-bit blocks too (not in q4f16). B and routers are float32. On
SmolLM2, B in blocks of the base's product decodes 1.06 times as fast, and takes 15 MB of 136 less.

Letters: T new tokens, G matrices that read the same x, E experts of a matrix, r rank, R all ranks
of a matrix or a group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx.helper import make_tensor
from torch import Tensor, nn

from ..method.experts import ExpertLinear, expert_layers
from ..model.decoder import CausalLM
from ..model.quantize import dequantize, quantize
from .layers import flat, matrix
from .nodes import Graph
from .weights import GraphFormat, WeightStore

A_BITS = 8                      # of lora_A beside a base in blocks


@torch.no_grad()
def round_experts(shipped: CausalLM, form: GraphFormat) -> None:
    """Round lora_A of the experts of a model that ships, in place, as a graph of that form stores
    it: each parameter holds what the blocks, `stored_A`, stand for."""
    layers: Any = expert_layers(shipped)
    for layer in layers.values():
        w = matrix(layer)
        if not isinstance(w, Tensor) and form.dtype != torch.float16:
            layer.stored_A = quantize(layer.lora_A.flatten(0, 1), A_BITS, w.size)
            layer.lora_A = nn.Parameter(dequantize(layer.stored_A).view_as(layer.lora_A))


class LinearLayers:
    """The linear layers of a graph, with their experts, by module name."""

    def __init__(self, graph: Graph, weights: WeightStore):
        self.graph, self.weights = graph, weights
        self.node, self.tensor, self.cast = graph.node, graph.tensor, graph.cast
        self.no_choices: dict[tuple[int, int], str] = {}

    def linear(self, names: Sequence[str], x: str, label: str = "") -> str:
        """x (1, T, in) -> (1, T, sum of out), by the modules `names`. label: the name of the nodes,
        by default that of the first module."""
        label, leaves = label or names[0], {name: self.weights.leaf(name) for name in names}
        y = self.weights.product(names, label, x, [matrix(leaf) for leaf in leaves.values()])
        biases = [leaf.bias for leaf in leaves.values() if leaf.bias is not None]
        if biases:
            y = self.node("Add", f"{label}.bias", y, self.tensor(
                f"{label}.bias", torch.cat(biases).detach().to(self.graph.dtype)))
        delta = self.added(leaves, label, x)
        return y if not delta else self.node(
            "Add", f"{label}.side", y, self.cast(f"{label}.narrow", delta, self.graph.real))

    def added(self, leaves: Mapping[str, nn.Linear], label: str, x: str) -> str:
        """What the experts of layers add, (1, T, sum of out), float32; "" without any."""
        if not any(isinstance(leaf, ExpertLinear) for leaf in leaves.values()):
            return ""
        x = self.cast(f"{label}.wide", x, TensorProto.FLOAT)
        B = torch.block_diag(*(flat(leaf)[1] for leaf in leaves.values()))
        return self.node("MatMul", f"{label}.lora_B", self.experts([*leaves.values()], label, x),
                         self.tensor(f"{label}.lora_B", B.T))

    def experts(self, leaves: Sequence[Any], label: str, x: str) -> str:
        """h (1, T, R), gated, of the experts of layers that read the same x."""
        name, blocks = f"{label}.lora_A", [m.stored_A for m in leaves if hasattr(m, "stored_A")]
        As, _, routers = zip(*map(flat, leaves))
        h = self.weights.product([], name, x, blocks) if blocks else self.node(
            "MatMul", name, x, self.tensor(name, torch.cat(As).T))
        if not (E := max(map(len, routers))):
            return h
        of_ranks = torch.block_diag(*(                                           # (G * E, R)
            F.pad(torch.eye(len(router)).repeat_interleave(leaf.rank, 1),
                  (0, 0, 0, E - len(router))) if len(router) else torch.zeros(0, len(A))
            for leaf, A, router in zip(leaves, As, routers)))
        # Ranks of matrices without a router have the gate 1: the sum of the first matrix's gates.
        of_ranks[:E, of_ranks.sum(0) == 0] = 1
        gates = self.gates(f"{label}.router", x, [router for router in routers if len(router)],
                           max(leaf.top_k for leaf, router in zip(leaves, routers) if len(router)))
        return self.node("Mul", f"{label}.gates", h, self.node(
            "MatMul", f"{label}.gates", gates, self.tensor(f"{label}.gates", of_ranks)))

    def gates(self, name: str, x: str, routers: Sequence[Tensor], k: int) -> str:
        """Top-k gates of G matrices, zero for experts not chosen, (1, T, G * E). An allocation has
        one k, of which a matrix of fewer experts takes all."""
        G, counts = len(routers), [len(router) for router in routers]
        E = max(counts)
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
        """-inf (1, T, G, E), or (1, T, E) for one matrix: the chosen logits overwrite it."""
        if (G, E) not in self.no_choices:
            name, sizes = f"router.none.{G}x{E}", [G, E] if G > 1 else [E]
            if static := self.weights.form.static:
                y = self.tensor(name, torch.full((*static[:2], *sizes), -math.inf))
            else:
                shape = self.node("Concat", name, self.node("Shape", name, "input_ids"), sizes,
                                  axis=0)
                y = self.node("ConstantOfShape", name, shape, value=make_tensor(
                    "value", TensorProto.FLOAT, [1], [-math.inf]))
            self.no_choices[G, E] = y
        return self.no_choices[G, E]
