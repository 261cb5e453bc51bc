"""Adapters in an ONNX graph: experts of a layer, or a LoRA that is an input of the graph.

Together, those of the matrices that read the same x compute:

    x -> MatMul router -> top k -> Softmax -> MatMul (gate of each rank) -+
    x -> MatMul [A_q A_k A_v] -------------------------------------------Mul -> h

Beside a base in blocks, A is in 8-bit blocks too (not in q4f16), and B is part of the base's own
product, y = [B W] [h x]: decoding pays for nodes more than for bytes. Where the base has 4 bits, B
is the sum of two rounded matrices, the second of what the first misses: y = [B_1 B_2 W] [h h x].
Beside other bases B is float32, and B h is added to W x.

Letters: T new tokens, G matrices that read the same x, E experts of a matrix, r rank,
R all ranks of a matrix or a group.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx.helper import make_tensor, make_tensor_value_info
from torch import Tensor, nn

from ..method.experts import ExpertLinear, expert_layers
from ..model.decoder import CausalLM
from ..model.quantize import TINY, Blocks, dequantize, quantize
from .leaves import AdapterLinear, BlockExperts, flat, matrix
from .nodes import Graph
from .weights import HALF, GraphFormat, WeightStore, concatenated

A_BITS = 8                      # of lora_A beside a base in blocks


@torch.no_grad()
def round_experts(tree: CausalLM, form: GraphFormat) -> None:
    """Store the experts of the tree, in place, as a graph of that form does."""
    for name, layer in expert_layers(tree).items():
        bits, block = storage(layer)
        if not bits:
            continue
        new = BlockExperts(layer, layer.experts, layer.rank, layer.scaling * layer.rank,
                           layer.top_k)
        A, B, _ = flat(layer)
        R = len(A)
        new.stored_B = [] if form.rows else in_8_bits(B, bits, block)
        if new.stored_B:
            A = F.pad(A, (0, 0, 0, -R % block))
            B = torch.stack([*map(dequantize, new.stored_B)]).sum(0)
        new.stored_A = A
        if form.precision not in HALF:
            new.stored_A = quantize(A, A_BITS, block)
            A = dequantize(new.stored_A)
        new.lora_A.copy_(A[:R].view_as(layer.lora_A))
        new.lora_B.copy_((B / layer.scaling).T.reshape(layer.lora_B.shape))
        new.router = layer.router
        tree.set_submodule(name, new)


class LinearLayers:
    """The linear layers of a graph, with their adapters, by module name."""

    def __init__(self, graph: Graph, weights: WeightStore):
        self.graph, self.weights = graph, weights
        self.node, self.tensor, self.cast = graph.node, graph.tensor, graph.cast
        self.no_choices: dict[tuple[int, int], str] = {}

    def linear(self, names: Sequence[str], x: str, label: str = "") -> str:
        """x (1, T, in) -> (1, T, sum of out), by the modules `names`. label: the name of the nodes,
        by default that of the first module. Neighbours of the same bits are one product."""
        leaves = {name: self.weights.leaf(name) for name in names}
        products = [[*part] for _, part in groupby(names, lambda n: storage(leaves[n]))]
        label = label or names[0]
        if len(products) > 1:
            parts = [self.linear(part, x) for part in products]
            return self.node("Concat", label, *parts, axis=-1)
        matrices, delta = [matrix(leaf) for leaf in leaves.values()], ""
        experts = [leaf for leaf in leaves.values() if isinstance(leaf, ExpertLinear)]
        given = any(isinstance(leaf, AdapterLinear) for leaf in leaves.values())
        wide = self.cast(f"{label}.wide", x, TensorProto.FLOAT) if experts or given else x
        if given:
            parts = [self.adapter_input(name, wide, leaf) for name, leaf in leaves.items()]
            delta = self.node("Concat", f"{label}.lora_B", *parts, axis=-1)
        elif experts:
            h = self.experts([*leaves.values()], label, wide)
            if any(isinstance(leaf, BlockExperts) and leaf.stored_B for leaf in experts):
                Bs = joined_B([*leaves.values()])
                matrices = [concatenated([*Bs, concatenated(matrices, 0)], 1)]
                h = self.cast(f"{label}.narrow", h, self.graph.real)
                x = self.node("Concat", label, *[h] * len(Bs), x, axis=-1)
            else:
                B = torch.block_diag(*(flat(leaf)[1] for leaf in leaves.values()))
                delta = self.node("MatMul", f"{label}.lora_B", h,
                                  self.tensor(f"{label}.lora_B", B.T))
        y = self.weights.product(names, label, x, matrices)
        biases = [leaf.bias for leaf in leaves.values() if leaf.bias is not None]
        if biases:
            y = self.node("Add", f"{label}.bias", y, self.tensor(
                f"{label}.bias", torch.cat(biases).detach().to(self.graph.dtype)))
        return y if not delta else self.node(
            "Add", f"{label}.side", y, self.cast(f"{label}.narrow", delta, self.graph.real))

    def adapter_input(self, name: str, x: str, leaf: nn.Linear) -> str:
        """The LoRA that comes as an input; by default zeros of rank 1: WebGPU crashes at rank 0."""
        A = self.tensor(f"{name}.lora_A", torch.zeros(leaf.in_features, 1))
        B = self.tensor(f"{name}.lora_B", torch.zeros(1, leaf.out_features))
        if isinstance(leaf, AdapterLinear):
            rank = f"{name}.rank"
            self.graph.inputs += [
                make_tensor_value_info(A, TensorProto.FLOAT, [leaf.in_features, rank]),
                make_tensor_value_info(B, TensorProto.FLOAT, [rank, leaf.out_features])]
        h = self.node("MatMul", f"{name}.lora_A", x, A)
        return self.node("MatMul", f"{name}.lora_B", h, B)

    def experts(self, leaves: Sequence[Any], label: str, x: str) -> str:
        """h (1, T, R), gated, of the experts of layers that read the same x."""
        stored: list[Any] = [leaf.stored_A if isinstance(leaf, BlockExperts) else flat(leaf)[0]
                             for leaf in leaves]
        name, blocks = f"{label}.lora_A", [A for A in stored if isinstance(A, Blocks)]
        h = self.weights.product([], name, x, [concatenated(blocks, 0)]) if blocks else self.node(
            "MatMul", name, x, self.tensor(name, torch.cat(stored).T))
        of_leaves = [flat(leaf)[2] for leaf in leaves]
        routers = [router for router in of_leaves if len(router)]
        if routers:
            E, first, gate_of_rank = max(map(len, routers)), 0, []      # each (G * E, R)
            for leaf, A, router in zip(leaves, stored, of_leaves):
                gate = torch.zeros(len(routers) * E, A.shape[0])
                if n := len(router):
                    ranks = torch.eye(n).repeat_interleave(leaf.rank, 1)
                    gate[first:first + n, :ranks.shape[1]] = ranks
                    first += E
                else:
                    gate[:E] = 1                 # always 1: the gates of any matrix sum to 1
                gate_of_rank.append(gate)
            top_k = [leaf.top_k for leaf in leaves
                     if isinstance(leaf, ExpertLinear) and leaf.router is not None]
            gates = self.node(
                "MatMul", f"{label}.gates", self.gates(f"{label}.router", x, routers, top_k),
                self.tensor(f"{label}.gates", torch.cat(gate_of_rank, 1)))
            h = self.node("Mul", f"{label}.gates", h, gates)
        return h

    def gates(self, name: str, x: str, routers: Sequence[Tensor], top_k: Sequence[int]) -> str:
        """Top-k gates of G matrices, zero for experts not chosen, (1, T, G * E)."""
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
        """-inf (1, T, G, E), or (1, T, E) for one matrix: the chosen logits overwrite it."""
        name, sizes = f"router.none.{G}x{E}", [G, E] if G > 1 else [E]
        if (G, E) not in self.no_choices and (static := self.weights.form.static):
            self.no_choices[G, E] = self.tensor(name, torch.full((*static[:2], *sizes), -math.inf))
        elif (G, E) not in self.no_choices:
            shape = self.node("Concat", name, self.node("Shape", name, "input_ids"), sizes, axis=0)
            self.no_choices[G, E] = self.node("ConstantOfShape", name, shape, value=make_tensor(
                "value", TensorProto.FLOAT, [1], [-math.inf]))
        return self.no_choices[G, E]


def storage(leaf: nn.Linear) -> tuple[int, int]:
    """Bits and block of what a layer stores; 0 for floats."""
    w = matrix(leaf)
    return (0, 0) if isinstance(w, Tensor) else (w.bits, w.size)


def joined_B(layers: Sequence[nn.Linear]) -> list[Blocks]:
    """The B's of layers that read the same x as block-diagonal matrices (sum of out, R)."""
    by_layer = [layer.stored_B if isinstance(layer, BlockExperts) else [] for layer in layers]
    first = next(Bs[0] for Bs in by_layer if Bs)
    zero, width = 0x88 if first.bits == 4 else 0x80, first.data.shape[2]     # bytes of a block
    joined = []
    for number in range(max(map(len, by_layer))):
        parts = [Bs[number] if Bs else replace(
            first, data=first.data.new_zeros(layer.out_features, 0, width),
            scales=first.scales.new_zeros(layer.out_features, 0))
            for layer, Bs in zip(layers, by_layer)]
        data = torch.block_diag(*(B.data.flatten(1) ^ zero for B in parts)) ^ zero
        scales = torch.block_diag(*(B.scales for B in parts))
        joined.append(Blocks(
            first.bits, first.size, torch.Size((len(data), scales.shape[1] * first.size)),
            data.unflatten(1, (-1, width)), scales.where(scales != 0, TINY)))
    return joined


def in_8_bits(B: Tensor, bits: int, block: int) -> list[Blocks]:
    """lora_B (out, R) as one matrix in 8 bits, or as two in 4 bits whose sum it is."""
    parts = [quantize(B, bits, block)]
    return parts if bits == 8 else [*parts, quantize(B - dequantize(parts[0]), bits, block)]
