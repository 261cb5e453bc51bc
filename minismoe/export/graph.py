"""The decoder of model.py as an ONNX graph, node by node; its weights stream to a file beside it.

Two targets. `ort` takes onnxruntime's own operators, which attend, normalise and multiply 4-bit
blocks in one node each; its batches are padded on the right. `portable` takes what opset 21 defines
and nothing else; its batches are padded on the left. A node is named after its module,
`/model/layers.0/mlp/Mul`, and a weight as in the checkpoint.

float16 graphs compute in float16 but for norms, routers and adapters. A CPU has few kernels for it:
onnxruntime inserts casts where there is none, so that the graph runs there as well as on a GPU.

Letters: B batch, T new tokens, P past tokens, S = P + T, D hidden, H query heads, K key/value
heads, C head size, V vocabulary; of adapters: G matrices that read the same x, E experts of a
matrix, r rank, R all ranks of a matrix or a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from ..model.config import Config
from ..model.decoder import rope_frequencies
from ..model.quantize import BLOCK, Blocks, columns, quantize
from .nodes import TYPES, Graph, Size

CHUNK = 1 << 22                 # elements that are converted at a time
END = 1 << 62                   # the end of any axis
# Bits of the blocks of linear layers, and of embedding and head, which suffer most from few.
PRECISIONS = {"fp32": (0, 0), "fp16": (0, 0), "int8": (8, 8), "int4-8": (4, 8), "int4": (4, 4)}


@dataclass(frozen=True)
class Mixture:
    """Experts routed token by token: lora_A (E, r, in), lora_B (E, r, out), router (E, in)."""

    lora_A: Tensor
    lora_B: Tensor
    router: Tensor | None
    top_k: int
    scaling: float


@dataclass(frozen=True)
class Lora:
    """A frozen LoRA: lora_A (R, in), lora_B (out, R), scaling folded in."""

    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True)
class AdapterInput:
    """A LoRA that comes at run time: inputs `<module>.lora_A` (in, R) and `.lora_B` (R, out)."""


Side = Mixture | Lora | AdapterInput


class Decoder(Graph):
    """The graph of one model. Methods are the modules of model.py, and end where a tensor does."""

    def __init__(self, data: BinaryIO, location: str, config: Config,
                 weight: Callable[[str], Tensor], beside: Mapping[str, Side], target: str,
                 precision: str, static: tuple[int, int, int] | None):
        super().__init__(data, location)
        self.config, self.weight, self.beside = config, weight, beside
        self.ort, self.static = target == "ort", static
        self.bits, self.table_bits = PRECISIONS[precision]
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.real = TYPES[self.dtype]
        self.shared: dict[str, Any] = {}         # what every layer reads: made once

    # Norm
    #   ort       x, added -> SkipSimplifiedLayerNormalization -> y, x + added
    #   portable  x -> Pow 2 -> ReduceMean -> Add eps -> Sqrt -> x / . -> Mul weight -> y

    def norm(self, name: str, x: str, added: str | None) -> tuple[str, str]:
        """x + added, normalised, and as it is."""
        weight = self.tensor(f"{name}.weight", self.weight(f"{name}.weight").to(self.dtype))
        if self.ort and added is not None:
            y, _, _, x = self.node(
                "SkipSimplifiedLayerNormalization", name, x, added, weight, domain="com.microsoft",
                epsilon=self.config.rms_norm_eps, named=[f"{name}.y", "", "", f"{name}.x"])
            return y, x
        if added is not None:
            x = self.node("Add", name, x, added)
        return self.rms(name, x, weight), x

    def rms(self, name: str, x: str, weight: str) -> str:
        eps = self.config.rms_norm_eps
        if self.ort:
            return self.node("SimplifiedLayerNormalization", name, x, weight, axis=-1, epsilon=eps,
                             stash_type=1)
        wide = self.cast(f"{name}.wide", x, TensorProto.FLOAT)
        mean = self.node("ReduceMean", name, self.node(
            "Pow", name, wide, self.constant(2.0, torch.float32)), self.constant([-1]))
        root = self.node("Sqrt", name, self.node(
            "Add", f"{name}.eps", mean, self.constant(eps, torch.float32)))
        y = self.cast(f"{name}.narrow", self.node("Div", name, wide, root), self.real)
        return self.node("Mul", name, y, weight)

    def cast(self, name: str, x: str, to: int) -> str:
        """x, cast where the graph is not of float32 throughout."""
        return x if self.dtype == torch.float32 else self.node("Cast", name, x, to=to)

    # Linear: the weights W (out, in) of modules that read the same x are stored side by side
    #   x -> MatMul [W_q^T W_k^T W_v^T] -> Add bias -> Add side -> y
    #   int8, int4: MatMulNBits (ort), or DequantizeLinear -> MatMul (portable)

    def linear(self, names: Sequence[str], label: str, x: str, bias: bool) -> str:
        """x (B, T, in) -> (B, T, sum of out), by the modules `names`."""
        weights = [self.weight(f"{n}.weight") for n in names]
        sizes, inputs = [len(w) for w in weights], weights[0].shape[1]
        if self.bits:
            y = self.multiply(label, x, self.blocks(label, weights, self.bits), inputs, sum(sizes),
                              self.bits)
        else:
            def rows() -> Iterator[Tensor]:
                step = max(1, CHUNK // sum(sizes))
                for i in range(0, inputs, step):
                    yield torch.cat([w[:, i:i + step].to(self.dtype) for w in weights]).T

            y = self.node("MatMul", label, x, self.stream(
                f"{label}.weight", self.real, (inputs, sum(sizes)), rows()))
        if bias:
            value = torch.cat([self.weight(f"{n}.bias").to(self.dtype) for n in names])
            y = self.node("Add", f"{label}.bias", y, self.tensor(f"{label}.bias", value))
        sides = [self.beside.get(n) for n in names]
        if not any(sides):
            return y
        wide = self.cast(f"{label}.wide", x, TensorProto.FLOAT)
        if any(isinstance(s, AdapterInput) for s in sides):
            delta = self.adapters(names, label, wide, inputs, sizes)
        else:
            delta = self.experts(sides, label, wide, inputs, sizes)
        return self.node("Add", f"{label}.side", y,
                         self.cast(f"{label}.narrow", delta, self.real))

    def blocks(self, label: str, weights: Sequence[Tensor], bits: int) -> list[str]:
        """Stored data, scales and zeros of quantised weights."""
        parts = [quantize(w, bits) for w in weights]
        names = [f"{label}.{field}" for field in ("weight", "scales", "zeros")]
        if self.ort:
            for name, values in zip(names, zip(*((p.data, p.scales, p.zeros) for p in parts))):
                self.stream(name, TYPES[values[0].dtype],
                            (sum(map(len, values)), *values[0].shape[1:]), values)
            return names
        b = Blocks(bits, *(torch.cat([getattr(p, field) for p in parts])
                           for field in ("data", "scales", "zeros")))
        inputs, (outputs, groups) = weights[0].shape[1], b.scales.shape
        kind = TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
        for name, value, rows, data_type in zip(names, columns(b, inputs), (inputs, groups, groups),
                                                (kind, TensorProto.FLOAT, kind)):
            self.tensor(name, value, data_type, (rows, outputs))
        return names

    def multiply(self, label: str, x: str, blocks: Sequence[str], inputs: int, outputs: int,
                 bits: int) -> str:
        if self.ort:
            # accuracy_level 4: x is rounded to int8, a block at a time
            return self.node("MatMulNBits", label, x, *blocks, domain="com.microsoft", K=inputs,
                             N=outputs, bits=bits, block_size=BLOCK, accuracy_level=4)
        return self.node("MatMul", label, x, self.node(
            "DequantizeLinear", label, *blocks, axis=0, block_size=BLOCK))

    # Side: what stands beside the modules of a group
    #   x -> MatMul router -> top k -> Softmax -> MatMul (gate of each rank) -+
    #   x -> MatMul [A_q A_k A_v] -------------------------------------------Mul -> Split
    #     -> MatMul B_q, MatMul B_k, MatMul B_v -> Concat -> delta
    # The floats read for a token are what it costs: hence no block-diagonal B, though fewer nodes.

    def experts(self, sides: Sequence[Side | None], label: str, x: str, inputs: int,
                sizes: Sequence[int]) -> str:
        """What the sides add, side by side, (B, T, sum of sizes)."""
        parts = [flat(side, inputs, size) for side, size in zip(sides, sizes)]
        routers = [router for _, _, router in parts if len(router)]
        h = self.node("MatMul", f"{label}.lora_A", x, self.tensor(
            f"{label}.lora_A", torch.cat([A for A, _, _ in parts]).T))
        if routers:
            E, first, gate = max(map(len, routers)), 0, []
            for A, _, router in parts:           # which router output scales which rank
                gate.append(torch.zeros(len(routers) * E, len(A)))
                if len(router):
                    gate[-1][first:first + len(router)] = torch.eye(
                        len(router)).repeat_interleave(len(A) // len(router), 1)
                    first += E
                else:
                    gate[-1][:E] = 1             # the gates of any one matrix sum to 1
            gates = self.node("MatMul", f"{label}.gates", self.gates(
                f"{label}.router", x, routers, sides), self.tensor(
                f"{label}.gates", torch.cat(gate, 1)))
            h = self.node("Mul", f"{label}.gates", h, gates)
        hs = [h] if len(sides) == 1 else self.node(
            "Split", f"{label}.lora_A", h, self.constant([len(A) for A, _, _ in parts]),
            outputs=len(sides), axis=-1)
        return self.join(f"{label}.lora_B", [
            self.node("MatMul", f"{label}.lora_B.{i}", h, self.tensor(f"{label}.lora_B.{i}", B.T))
            for i, (h, (_, B, _)) in enumerate(zip(hs, parts))])

    def join(self, name: str, parts: Sequence[str]) -> str:
        return parts[0] if len(parts) == 1 else self.node("Concat", name, *parts, axis=-1)

    def gates(self, name: str, x: str, routers: Sequence[Tensor], sides: Sequence[Side | None],
              ) -> str:
        """Top-k gates of G matrices, zero where not chosen, (B, T, G * E)."""
        G, counts = len(routers), [len(router) for router in routers]
        E, active = max(counts), [s.top_k for s in sides
                                  if isinstance(s, Mixture) and s.router is not None]
        k = max(active)
        if active != [min(k, n) for n in counts]:
            raise ValueError(f"{name}: matrices that read the same input need the same top_k")
        rows = [F.pad(router, (0, 0, 0, E - len(router))) for router in routers]
        y = self.node("MatMul", name, x, self.tensor(name, torch.cat(rows).T))
        if G > 1:
            y = self.node("Reshape", f"{name}.split", y, self.constant([0, 0, G, E]))
        if min(counts) < E:                      # never choose what is not there
            fewer = torch.tensor([[0.0 if e < n else -math.inf for e in range(E)] for n in counts])
            y = self.node("Add", name, y, self.tensor(f"{name}.counts", fewer))
        if k < E:
            values, chosen = self.node("TopK", name, y, self.constant([k]), outputs=2, axis=-1,
                                       sorted=0)
            y = self.node("ScatterElements", name, self.none(G, E), chosen, values, axis=-1)
        y = self.node("Softmax", name, y, axis=-1)
        if G > 1:
            y = self.node("Reshape", f"{name}.join", y, self.constant([0, 0, G * E]))
        return y

    def none(self, G: int, E: int) -> str:
        """-inf (B, T, G, E), on which the logits of the chosen are put; (B, T, E) for one."""
        name, sizes = f"router.none.{G}x{E}", [G, E] if G > 1 else [E]
        if name not in self.shared and self.static:
            self.shared[name] = self.tensor(name, torch.full((*self.static[:2], *sizes), -math.inf))
        elif name not in self.shared:
            shape = self.node("Concat", name, self.node("Shape", name, "input_ids"),
                              self.constant(sizes), axis=0)
            self.shared[name] = self.node(
                "ConstantOfShape", name, shape,
                value=helper.make_tensor("value", TensorProto.FLOAT, [1], [-math.inf]))
        return self.shared[name]

    def adapters(self, names: Sequence[str], label: str, x: str, inputs: int,
                 sizes: Sequence[int]) -> str:
        """The same for LoRAs that come as inputs, of rank 0 where none comes."""
        deltas = []
        for name, size in zip(names, sizes):
            A = self.tensor(f"{name}.lora_A", torch.empty(inputs, 0))
            B = self.tensor(f"{name}.lora_B", torch.empty(0, size))
            side = self.beside.get(name)
            if isinstance(side, AdapterInput):
                rank = f"{name}.rank"
                self.inputs += [self.value(A, TensorProto.FLOAT, [inputs, rank]),
                                self.value(B, TensorProto.FLOAT, [rank, size])]
            elif side is not None:
                raise ValueError(f"{name}: an adapter that is an input beside one that is not")
            h = self.node("MatMul", f"{name}.lora_A", x, A)
            deltas.append(self.node("MatMul", f"{name}.lora_B", h, B))
        return self.join(f"{label}.lora_B", deltas)

    # Attention
    #   x -> qkv_proj -> GroupQueryAttention (past, present) -> o_proj -> y             ort

    def attention(self, i: int, x: str) -> str:
        c, name = self.config, f"model.layers.{i}.self_attn"
        qkv = self.linear([f"{name}.{p}_proj" for p in "qkv"], f"{name}.qkv_proj", x, c.qkv_bias)
        y = (self.attend_ort if self.ort else self.attend)(i, name, qkv)
        return self.linear([f"{name}.o_proj"], f"{name}.o_proj", y, c.o_bias)

    def attend_ort(self, i: int, name: str, qkv: str) -> str:
        """(B, T, (H + 2K) * C) -> (B, T, H * C) by one operator, which rotates and caches too."""
        c = self.config
        H, K, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q, k, v = qkv, "", ""
        if c.qk_norm:
            q, k, v = self.node("Split", f"{name}.qkv_proj", qkv,
                                self.constant([H * C, K * C, K * C]), outputs=3, axis=-1)
            q, k = self.head_norm(f"{name}.q_norm", q, H), self.head_norm(f"{name}.k_norm", k, K)
        s = self.shared
        return self.node(
            "GroupQueryAttention", name, q, k, v, *cached("past_key_values", i), s["seqlens"],
            s["total"], s["cos"], s["sin"], named=[f"{name}.y", *cached("present", i)],
            domain="com.microsoft", num_heads=H, kv_num_heads=K, do_rotary=1,
            local_window_size=c.windows[i] or -1)[0]

    def head_norm(self, name: str, x: str, heads: int) -> str:
        C = self.config.head_dim
        y = self.node("Reshape", f"{name}.split", x, self.constant([0, 0, heads, C]))
        y, _ = self.norm(name, y, None)
        return self.node("Reshape", f"{name}.join", y, self.constant([0, 0, heads * C]))

    #   qkv (B, H + 2K, T, C) -> q, k: norm, rotate;  keys, values = past and new  (B, K, S, C)
    #   q (B, K, H/K * T, C) -> MatMul keys^T -> Add mask -> Softmax -> MatMul values      portable
    #   The queries that share a key/value head are rows of one product: the cache is not repeated.

    def attend(self, i: int, name: str, qkv: str) -> str:
        """The same of standard operators."""
        c, s = self.config, self.shared
        H, K, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        x = self.node("Reshape", f"{name}.heads", qkv, self.constant([0, 0, H + 2 * K, C]))
        x = self.node("Transpose", f"{name}.heads", x, perm=[0, 2, 1, 3])
        qk, v = self.node("Split", f"{name}.heads", x, self.constant([H + K, K]), outputs=2, axis=1)
        if c.qk_norm:
            weight = torch.cat([self.weight(f"{name}.{n}_norm.weight").expand(heads, 1, C)
                                for n, heads in (("q", H), ("k", K))]).to(self.dtype)
            qk = self.rms(f"{name}.qk_norm", qk, self.tensor(f"{name}.qk_norm.weight", weight))
        turned = self.node("Concat", f"{name}.rotate", *reversed(self.node(
            "Split", f"{name}.rotate", qk, outputs=2, axis=-1, num_outputs=2)), axis=-1)
        qk = self.node("Add", f"{name}.rotate",
                       self.node("Mul", f"{name}.rotate.cos", qk, s["cos"]),
                       self.node("Mul", f"{name}.rotate.sin", turned, s["sin"]))
        q, k = self.node("Split", f"{name}.qk", qk, self.constant([H, K]), outputs=2, axis=1)
        keys, values = (self.cache(i, part, new) for part, new in (("key", k), ("value", v)))
        q = self.node("Reshape", f"{name}.q", q, self.constant([0, K, -1, C]))
        q = self.node("Mul", f"{name}.q", q, self.constant(C ** -0.5, self.dtype))
        scores = self.node("MatMul", f"{name}.scores", q, self.node(
            "Transpose", f"{name}.keys", keys, perm=[0, 1, 3, 2]))
        weights = self.node("Softmax", name, self.node(
            "Add", f"{name}.scores", scores, self.mask(c.windows[i])), axis=-1)
        y = self.node("MatMul", f"{name}.values", weights, values)
        y = self.node("Reshape", f"{name}.y", y, self.constant([0, H, -1, C]))
        y = self.node("Transpose", f"{name}.y", y, perm=[0, 2, 1, 3])
        return self.node("Reshape", f"{name}.y.join", y, self.constant([0, 0, H * C]))

    def cache(self, i: int, part: str, new: str) -> str:
        """Past and new (B, K, S, C). What is kept of it: all, or the last P where P is fixed."""
        name, past, present = (f"model.layers.{i}.self_attn.{part}",
                               f"past_key_values.{i}.{part}", f"present.{i}.{part}")
        if not self.static:
            return self.node("Concat", name, past, new, axis=2, named=[present])
        whole = self.node("Concat", name, past, new, axis=2)
        self.node("Slice", name, whole, self.constant([self.static[1]]), self.constant([END]),
                  self.constant([2]), named=[present])
        return whole

    def mask(self, window: int | None) -> str:
        """What to add to scores: 0 where a query sees a key, else a large negative number.

        (B, 1, H/K * T, S). Key j is seen from query t, the (P + t)-th, where j <= P + t, within the
        window, and where attention_mask is 1. Pads see nothing, hence no -inf: their rows would be
        NaN, and so would the products of others with them.
        """
        name, c = f"mask.{window or 'full'}", self.config
        if name in self.shared:
            return self.shared[name]
        if self.static:
            _, T, P = self.static
            key, query = torch.arange(P + T), torch.arange(P, P + T)[:, None]
            seen = self.tensor(f"{name}.past", key <= query)                     # (T, S)
            if window:
                seen = self.node("And", f"{name}.near", seen, self.recent(name, P, window))
        else:
            S, T = (self.node("Squeeze", f"{name}.{n}", self.node(
                "Shape", f"{name}.{n}", n, start=1, end=2))
                for n in ("attention_mask", "input_ids"))
            zero, one = self.constant(0), self.constant(1)
            key = self.node("Range", f"{name}.key", zero, S, one)
            query = self.node("Range", f"{name}.query", self.node("Sub", name, S, T), S, one)
            query = self.node("Unsqueeze", f"{name}.query", query, self.constant([1]))
            seen = self.node("LessOrEqual", name, key, query)                    # (T, S)
            if window:
                first = self.node("Sub", f"{name}.query", query, self.constant(window))
                seen = self.node("And", f"{name}.near", seen, self.node(
                    "Greater", name, key, first))
        real = self.node("Unsqueeze", name, self.node(
            "Cast", name, "attention_mask", to=TensorProto.BOOL), self.constant([1, 2]))
        none = -1e4 if self.dtype == torch.float16 else -1e9
        y = self.node("Where", name, self.node("And", name, seen, real),
                      self.constant(0.0, self.dtype), self.constant(none, self.dtype))
        self.shared[name] = self.node("Tile", name, y, self.constant(
            [1, 1, c.num_attention_heads // c.num_key_value_heads, 1]))
        return self.shared[name]

    def recent(self, name: str, P: int, window: int) -> str:
        """(B, 1, T, S): whether key j is within the window of query t of a static graph. Chunks
        may have been padded, so the real tokens between the two are counted, not the places."""
        count = self.node("CumSum", name, "attention_mask", self.constant(1))            # (B, S)
        first = self.node("Sub", f"{name}.first", self.node(
            "Slice", f"{name}.first", count, self.constant([P]), self.constant([END]),
            self.constant([1])), self.constant(window))                                  # (B, T)
        return self.node("Greater", f"{name}.recent",
                         self.node("Unsqueeze", f"{name}.keys", count, self.constant([1, 2])),
                         self.node("Unsqueeze", f"{name}.first", first,
                                   self.constant([1, 3])))

    def positions(self, context: int) -> None:
        """cos and sin of the rotary angles, and where each row of a batch is."""
        angles = torch.arange(context).float()[:, None] * rope_frequencies(self.config)
        s = self.shared
        s["cos"], s["sin"] = (self.tensor(f"rotary.{n}", t.to(self.dtype)) for n, t in (
            ("cos", angles.cos()), ("sin", angles.sin())))              # (context, C / 2)
        if self.ort:
            count = self.node("ReduceSum", "lengths", "attention_mask", self.constant([1]),
                              keepdims=0)
            s["seqlens"] = self.node("Cast", "lengths", self.node(
                "Sub", "lengths", count, self.constant(1)), to=TensorProto.INT32)
            s["total"] = self.node("Cast", "total", self.node("Squeeze", "total", self.node(
                "Shape", "total", "attention_mask", start=1, end=2)), to=TensorProto.INT32)
            return
        for part in ("cos", "sin"):
            half = self.node("Gather", f"rotary.{part}", s[part], "position_ids")
            first = half if part == "cos" else self.node("Neg", f"rotary.{part}", half)
            whole = self.node("Concat", f"rotary.{part}", first, half, axis=-1)
            s[part] = self.node("Unsqueeze", f"rotary.{part}", whole, self.constant([1]))

    # MLP
    #   x -> gate_up_proj -> Split -> silu(gate) * up -> down_proj -> y

    def mlp(self, i: int, x: str) -> str:
        name, bias = f"model.layers.{i}.mlp", self.config.mlp_bias
        both = self.linear([f"{name}.gate_proj", f"{name}.up_proj"], f"{name}.gate_up_proj", x,
                           bias)
        gate, up = self.node("Split", name, both, outputs=2, axis=-1, num_outputs=2)
        if self.ort:
            act = self.node("QuickGelu", name, gate, domain="com.microsoft", alpha=1.0)
        else:
            act = self.node("Mul", f"{name}.act", gate, self.node("Sigmoid", name, gate))
        return self.linear([f"{name}.down_proj"], f"{name}.down_proj",
                           self.node("Mul", name, act, up), bias)

    # Embedding and head: a tied table (V, D) is stored once, and read by both

    def table(self, name: str) -> list[str]:
        """The stored tensors of an embedding or head."""
        if name in self.shared:
            return self.shared[name]
        value = self.weight(f"{name}.weight")
        if self.table_bits:
            self.shared[name] = self.blocks(name, [value], self.table_bits)
        else:
            step = max(1, CHUNK // value.shape[1])
            self.shared[name] = [self.stream(f"{name}.weight", self.real, value.shape, (
                value[i:i + step].to(self.dtype) for i in range(0, len(value), step)))]
        return self.shared[name]

    def embed(self) -> str:
        """input_ids (B, T) -> (B, T, D)."""
        c, name = self.config, "model.embed_tokens"
        table, D = self.table(name), c.hidden_size
        if not self.table_bits:
            return self.node("Gather", name, *table, "input_ids")
        if not self.ort:
            return self.embed_blocks(name, *table)
        row = -(-D // BLOCK) * BLOCK
        data = self.alias(table[0], [c.vocab_size, row * self.table_bits // 8])
        x = self.node("GatherBlockQuantized", name, data, "input_ids", *table[1:],
                      domain="com.microsoft", bits=self.table_bits, block_size=BLOCK, gather_axis=0,
                      quantize_axis=1)
        return x if row == D else self.node("Slice", name, x, self.constant([0]),
                                            self.constant([D]), self.constant([-1]))

    def embed_blocks(self, name: str, data: str, scales: str, zeros: str) -> str:
        """Rows of a table that is stored as the head's product wants it: element (d, v) of (D, V).

        No standard operator gathers 4-bit values, so the bytes that hold them are gathered.
        """
        D, V = self.config.hidden_size, self.config.vocab_size
        token = self.node("Unsqueeze", name, "input_ids", self.constant([2]))    # (B, T, 1)
        rows, blocks = torch.arange(D) * V, torch.arange(D) // BLOCK * V
        q = self.gather(f"{name}.weight", data, token, rows)
        zero = self.gather(f"{name}.zeros", zeros, token, blocks)
        scale = self.node("Gather", f"{name}.scales", self.alias(scales, [-(-D // BLOCK) * V]),
                          self.node("Add", f"{name}.scales", token, self.tensor(
                              f"{name}.scales.at", blocks)))
        return self.node("Mul", name, self.node("Sub", name, q, zero), scale)    # (B, T, D)

    def gather(self, name: str, packed: str, token: str, at: Tensor) -> str:
        """Elements token + at of a packed table, as floats.

        OpenVINO divides integers as floats, inexact from 2^24 on, and rounds what is shifted or
        divided as uint8: so only what is small is divided, in int64.
        """
        size, bits = math.prod(self.tensors[packed].dims), self.table_bits
        data = self.alias(packed, [size * bits // 8 + size * bits % 8 // 4], TensorProto.UINT8)
        if bits == 8:
            q = self.node("Gather", name, data, self.node(
                "Add", name, token, self.tensor(f"{name}.at", at)))
            return self.node("Cast", name, q, to=TensorProto.FLOAT)
        two = self.constant(2)
        token = self.node("Add", name, token, self.tensor(f"{name}.odd", at % 2))
        place = self.node("Add", f"{name}.byte", self.node("Div", name, token, two),
                          self.tensor(f"{name}.at", at // 2))
        byte = self.node("Cast", f"{name}.byte", self.node("Gather", name, data, place),
                         to=TensorProto.INT64)
        divisor = self.node("Gather", f"{name}.nibble", self.constant([1, 16]),
                            self.node("Mod", name, token, two))
        q = self.node("Mod", f"{name}.nibble", self.node("Div", f"{name}.nibble", byte, divisor),
                      self.constant(16))
        return self.node("Cast", name, q, to=TensorProto.FLOAT)

    def head(self, x: str, all_logits: bool) -> None:
        """Hidden states (B, T, D) -> logits (B, 1, V) of the last token of each row, or of all."""
        c, name = self.config, "lm_head"
        D, V = c.hidden_size, c.vocab_size
        table = self.table("model.embed_tokens" if c.tie_word_embeddings else name)
        x = self.node("Reshape", f"{name}.rows", x, self.constant([-1, D])) if all_logits else (
            self.last(x))
        # Gemm reads (V, D) as it is: a Transpose would be folded into a second table.
        y = self.multiply(name, x, table, D, V, self.table_bits) if self.table_bits else self.node(
            "Gemm", name, x, *table, transB=1)
        y = self.cast(f"{name}.wide", y, TensorProto.FLOAT)
        if all_logits:
            shape = self.node("Concat", name, self.node("Shape", name, "input_ids"),
                              self.constant([V]), axis=0)
            self.node("Reshape", name, y, shape, named=["logits"])
        else:
            self.node("Unsqueeze", name, y, self.constant([1]), named=["logits"])

    def last(self, x: str) -> str:
        """(B, T, D) -> (B, D): the last token, or the last before the pads on the right."""
        name = "lm_head.last"
        if not self.ort:
            return self.node("Gather", name, x, self.constant(-1), axis=1)
        size = self.node("Neg", name, self.node("Shape", name, "input_ids", start=1, end=2))
        new = self.node("Slice", name, "attention_mask", size, self.constant([END]),
                        self.constant([1]))                              # (B, T)
        count = self.node("ReduceSum", name, new, self.constant([1]))
        at = self.node("Max", name, self.node("Sub", name, count, self.constant(1)),
                       self.constant(0))                                 # (B, 1)
        return self.node("GatherND", name, x, at, batch_dims=1)

    # The whole

    def decoder(self, context: int, all_logits: bool) -> None:
        """Inputs, outputs, and every node between them."""
        c = self.config
        B, T, P = self.static or ("batch_size", "sequence_length", "past_sequence_length")
        S: Size = P + T if self.static else "total_sequence_length"         # type: ignore[operator]
        for name, length in (("input_ids", T), ("attention_mask", S), ("position_ids", T)):
            if name != "position_ids" or not self.ort:
                self.inputs.append(self.value(name, TensorProto.INT64, [B, length]))
        self.outputs.append(self.value("logits", TensorProto.FLOAT,
                                       [B, T if all_logits else 1, c.vocab_size]))
        for i in range(c.num_hidden_layers):
            for past, present in zip(cached("past_key_values", i), cached("present", i)):
                shape = [B, c.num_key_value_heads, P, c.head_dim]
                self.inputs.append(self.value(past, self.real, shape))
                shape[2] = P if self.static else S
                self.outputs.append(self.value(present, self.real, shape))
        self.positions(context)
        x, added = self.embed(), None
        for i in range(c.num_hidden_layers):
            y, x = self.norm(f"model.layers.{i}.input_layernorm", x, added)
            added = self.attention(i, y)
            y, x = self.norm(f"model.layers.{i}.post_attention_layernorm", x, added)
            added = self.mlp(i, y)
        y, _ = self.norm("model.norm", x, added)
        self.head(y, all_logits)


def flat(side: Side | None, inputs: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A (R, in), lora_B (out, R) with the scaling, router (E, in) or (0, in), in float32."""
    router = torch.zeros(0, inputs)
    if isinstance(side, Lora):
        return side.lora_A.float(), side.lora_B.float(), router
    if isinstance(side, Mixture):
        router = router if side.router is None else side.router.float()
        return (side.lora_A.flatten(0, 1).float(),
                (side.lora_B.flatten(0, 1).float() * side.scaling).T, router)
    return torch.zeros(1, inputs), torch.zeros(size, 1), router


def cached(kind: str, layer: int) -> tuple[str, str]:
    return f"{kind}.{layer}.key", f"{kind}.{layer}.value"


def write_decoder(file: Path, config: Config, weight: Callable[[str], Tensor],
                  beside: Mapping[str, Side], *, target: str, precision: str, context: int,
                  static: tuple[int, int, int] | None = None, all_logits: bool = False) -> None:
    """Write the graph to `file`, and its tensors to `file`.data.

    weight(name) gives one tensor by its Hugging Face name, and is asked once for each. `beside`
    holds what stands beside the matrices, by module name. `context` is the number of positions.
    static (B, T, P) fixes every size: the cache holds the last P positions, and a prompt goes
    through in chunks of T, of which the first is padded on the left. Raises ValueError for what a
    target cannot do, and for names in `beside` that the model does not have.
    """
    if target not in ("ort", "portable") or precision not in PRECISIONS:
        raise ValueError(f"target {target!r}, precision {precision!r}: expected ort or portable, "
                         f"and one of {', '.join(PRECISIONS)}")
    if target == "ort" and config.head_dim % 16:
        raise ValueError(f"head size {config.head_dim}: onnxruntime's attention takes multiples of "
                         "16 alone; the portable target takes any")
    if target == "ort" and static:
        raise ValueError("static shapes need the portable target: onnxruntime's attention has "
                         "a cache that grows")
    known = {f"model.layers.{i}.{part}_proj" for i in range(config.num_hidden_layers) for part in (
        *(f"self_attn.{n}" for n in "qkvo"), *(f"mlp.{n}" for n in ("gate", "up", "down")))}
    if wrong := sorted(set(beside) - known):
        raise ValueError(f"adapters beside no matrix of this model: {', '.join(wrong[:5])}")
    file = Path(file)
    with open(f"{file}.data", "wb") as data:
        graph = Decoder(data, f"{file.name}.data", config, weight, beside, target, precision,
                        static)
        graph.decoder(context, all_logits)
    graph.save(file)


def write_sampler(file: Path, vocab: int) -> None:
    """A graph from logits (B, T, V) to the 64 largest, or all, of the last position, sorted.

    Its outputs are `values` (B, 64), float32, and `indices` (B, 64), int64.
    """
    g = Graph()
    k = min(64, vocab)
    last = g.node("Gather", "last", "logits", g.constant(-1), axis=1)
    g.node("TopK", "top", last, g.constant([k]), axis=-1, named=["values", "indices"])
    g.inputs = [g.value("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", vocab])]
    g.outputs = [g.value("values", TensorProto.FLOAT, ["batch_size", k]),
                 g.value("indices", TensorProto.INT64, ["batch_size", k])]
    g.save(Path(file))
