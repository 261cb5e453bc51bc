"""The decoder of model/decoder.py as an ONNX graph, module by module.

Two targets. `ort` uses onnxruntime's own operators, which attend, normalise and multiply 4-bit
blocks in one node each; its batches are padded on the right. `portable` uses the operators of opset
21 only; its batches are padded on the left. A node is named after its module,
`/model/layers.0/mlp/Mul`, and a weight as in the checkpoint.

float16 graphs compute norms, routers and adapters in float32. CPUs have few float16 kernels:
onnxruntime inserts casts for the others, so the graph runs on a CPU as well as on a GPU.

Letters: B batch, T new tokens, P past tokens, S = P + T, D hidden, H query heads, K key/value
heads, C head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from onnx.helper import make_tensor_value_info as value

from ..model.config import Config
from ..model.decoder import rope_frequencies
from ..model.quantize import BLOCK, ROW
from .mixture import Adapter, MixtureGraph
from .nodes import Graph
from .weights import PRECISIONS

END = 1 << 62                   # the end of any axis


class DecoderGraph(MixtureGraph):
    """The graph of one model. Its methods are the modules of model/decoder.py, leaf to root."""

    def norm(self, name: str, x: str, added: str | None) -> tuple[str, str]:
        """(x + added, normalised; x + added)."""
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
        """x, normalised by its root mean square over the last axis, times weight."""
        eps = self.config.rms_norm_eps
        if self.ort:
            return self.node("SimplifiedLayerNormalization", name, x, weight, axis=-1, epsilon=eps,
                             stash_type=1)
        wide = self.cast(f"{name}.wide", x, TensorProto.FLOAT)
        square = self.node("Pow", name, wide, self.constant(2.0, torch.float32))
        mean = self.node("Add", f"{name}.eps", self.node("ReduceMean", name, square, [-1]),
                         self.constant(eps, torch.float32))
        y = self.node("Div", name, wide, self.node("Sqrt", name, mean))
        return self.node("Mul", name, self.cast(f"{name}.narrow", y, self.real), weight)

    def linear(self, names: Sequence[str], label: str, x: str, bias: bool) -> str:
        """x (B, T, in) -> (B, T, sum of out), by the modules `names`."""
        weights = [self.weight(f"{n}.weight") for n in names]
        y = self.product(label, x, weights)
        if bias:
            values = torch.cat([self.weight(f"{n}.bias").to(self.dtype) for n in names])
            y = self.node("Add", f"{label}.bias", y, self.tensor(f"{label}.bias", values))
        if not self.adapters.keys() & set(names):
            return y
        delta = self.delta(names, label, self.cast(f"{label}.wide", x, TensorProto.FLOAT),
                           weights[0].shape[1], [w.shape[0] for w in weights])
        return self.node("Add", f"{label}.side", y, self.cast(f"{label}.narrow", delta, self.real))

    def attention(self, i: int, x: str) -> str:
        """x (B, T, D) -> (B, T, D)."""
        c, name = self.config, f"model.layers.{i}.self_attn"
        qkv = self.linear([f"{name}.{p}_proj" for p in "qkv"], f"{name}.qkv_proj", x, c.qkv_bias)
        y = (self.attend_ort if self.ort else self.attend)(i, name, qkv)
        return self.linear([f"{name}.o_proj"], f"{name}.o_proj", y, c.o_bias)

    def attend_ort(self, i: int, name: str, qkv: str) -> str:
        """(B, T, (H + 2K) * C) -> (B, T, H * C) by one operator, which also rotates and caches."""
        c, s = self.config, self.shared
        H, K, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q, k, v = qkv, "", ""
        if c.qk_norm:
            q, k, v = self.node("Split", f"{name}.qkv_proj", qkv, [H * C, K * C, K * C], outputs=3,
                                axis=-1)
            q, k = self.head_norm(f"{name}.q_norm", q, H), self.head_norm(f"{name}.k_norm", k, K)
        return self.node(
            "GroupQueryAttention", name, q, k, v, *cached("past_key_values", i), s["seqlens"],
            s["total"], s["cos"], s["sin"], named=[f"{name}.y", *cached("present", i)],
            domain="com.microsoft", num_heads=H, kv_num_heads=K, do_rotary=1,
            local_window_size=c.windows[i] or -1)[0]

    def head_norm(self, name: str, x: str, heads: int) -> str:
        """(B, T, heads * C), normalised head by head."""
        C = self.config.head_dim
        y, _ = self.norm(name, self.node("Reshape", f"{name}.split", x, [0, 0, heads, C]), None)
        return self.node("Reshape", f"{name}.join", y, [0, 0, heads * C])

    def attend(self, i: int, name: str, qkv: str) -> str:
        """The same by standard operators.

        The queries that share a key/value head are rows of one product, q (B, K, H/K * T, C), so
        that the cache is not repeated.
        """
        c, s = self.config, self.shared
        H, K, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        x = self.node("Reshape", f"{name}.heads", qkv, [0, 0, H + 2 * K, C])
        x = self.node("Transpose", f"{name}.heads", x, perm=[0, 2, 1, 3])
        qk, v = self.node("Split", f"{name}.heads", x, [H + K, K], outputs=2, axis=1)
        if c.qk_norm:
            weight = torch.cat([self.weight(f"{name}.{n}_norm.weight").expand(heads, 1, C)
                                for n, heads in (("q", H), ("k", K))]).to(self.dtype)
            qk = self.rms(f"{name}.qk_norm", qk, self.tensor(f"{name}.qk_norm.weight", weight))
        turned = self.node("Concat", f"{name}.rotate", *reversed(self.node(
            "Split", f"{name}.rotate", qk, outputs=2, axis=-1, num_outputs=2)), axis=-1)
        qk = self.node("Add", f"{name}.rotate",
                       self.node("Mul", f"{name}.rotate.cos", qk, s["cos"]),
                       self.node("Mul", f"{name}.rotate.sin", turned, s["sin"]))
        q, k = self.node("Split", f"{name}.qk", qk, [H, K], outputs=2, axis=1)
        keys, values = self.cache(i, "key", k), self.cache(i, "value", v)
        q = self.node("Reshape", f"{name}.q", q, [0, K, -1, C])
        q = self.node("Mul", f"{name}.q", q, self.constant(C ** -0.5, self.dtype))
        keys = self.node("Transpose", f"{name}.keys", keys, perm=[0, 1, 3, 2])
        scores = self.node("MatMul", f"{name}.scores", q, keys)
        scores = self.node("Add", f"{name}.scores", scores, self.mask(c.windows[i]))
        weights = self.node("Softmax", name, scores, axis=-1)
        y = self.node("MatMul", f"{name}.values", weights, values)
        y = self.node("Reshape", f"{name}.y", y, [0, H, -1, C])
        y = self.node("Transpose", f"{name}.y", y, perm=[0, 2, 1, 3])
        return self.node("Reshape", f"{name}.y.join", y, [0, 0, H * C])

    def cache(self, i: int, part: str, new: str) -> str:
        """Past and new (B, K, S, C). The present is all of it, or the last P in a static graph."""
        name, past, present = (f"model.layers.{i}.self_attn.{part}",
                               f"past_key_values.{i}.{part}", f"present.{i}.{part}")
        if not self.static:
            return self.node("Concat", name, past, new, axis=2, named=[present])
        whole = self.node("Concat", name, past, new, axis=2)
        self.node("Slice", name, whole, [self.static[1]], [END], [2], named=[present])
        return whole

    def mask(self, window: int | None) -> str:
        """The mask (B, 1, H/K * T, S) to add to scores: 0, or a large negative number.

        Query t, the (P + t)-th token, sees key j if j <= P + t, j is within the window, and
        attention_mask is 1 at j. A pad sees nothing; -inf would make its row NaN, and then the
        products of other rows with its values.
        """
        name, c = f"mask.{window or 'full'}", self.config
        if name in self.shared:
            return self.shared[name]
        seen = (self.seen_static if self.static else self.seen)(name, window)
        real = self.node("Unsqueeze", name, self.node(
            "Cast", name, "attention_mask", to=TensorProto.BOOL), [1, 2])
        none = -1e4 if self.dtype == torch.float16 else -1e9
        y = self.node("Where", name, self.node("And", name, seen, real),
                      self.constant(0.0, self.dtype), self.constant(none, self.dtype))
        heads = c.num_attention_heads // c.num_key_value_heads
        self.shared[name] = self.node("Tile", name, y, [1, 1, heads, 1])
        return self.shared[name]

    def seen(self, name: str, window: int | None) -> str:
        """(T, S): whether query t sees key j, apart from pads."""
        S, T = (self.node("Squeeze", f"{name}.{n}", self.node("Shape", f"{name}.{n}", n, start=1,
                                                              end=2))
                for n in ("attention_mask", "input_ids"))
        key = self.node("Range", f"{name}.key", 0, S, 1)
        query = self.node("Range", f"{name}.query", self.node("Sub", name, S, T), S, 1)
        query = self.node("Unsqueeze", f"{name}.query", query, [1])
        seen = self.node("LessOrEqual", name, key, query)
        if window is None:
            return seen
        first = self.node("Sub", f"{name}.query", query, window)
        return self.node("And", f"{name}.near", seen, self.node("Greater", name, key, first))

    def seen_static(self, name: str, window: int | None) -> str:
        """The same (T, S) in a static graph; with a window (B, 1, T, S).

        Chunks may be padded, so the distance counts real tokens, not positions of the cache.
        """
        _, T, P = self.static or (0, 0, 0)
        seen = self.tensor(f"{name}.past", torch.arange(P + T) <= torch.arange(P, P + T)[:, None])
        if window is None:
            return seen
        count = self.node("CumSum", name, "attention_mask", 1)                           # (B, S)
        first = self.node("Slice", f"{name}.first", count, [P], [END], [1])              # (B, T)
        first = self.node("Sub", f"{name}.first", first, window)
        near = self.node("Greater", f"{name}.recent",
                         self.node("Unsqueeze", f"{name}.keys", count, [1, 2]),
                         self.node("Unsqueeze", f"{name}.first", first, [1, 3]))
        return self.node("And", f"{name}.near", seen, near)

    def positions(self, context: int) -> None:
        """cos and sin of the rotary angles, and for `ort` the length of each row of a batch."""
        angles = torch.arange(context).float()[:, None] * rope_frequencies(self.config)
        s = self.shared
        s["cos"], s["sin"] = (self.tensor(f"rotary.{n}", t.to(self.dtype)) for n, t in (
            ("cos", angles.cos()), ("sin", angles.sin())))              # (context, C / 2)
        if self.ort:
            count = self.node("ReduceSum", "lengths", "attention_mask", [1], keepdims=0)
            s["seqlens"] = self.node("Cast", "lengths", self.node("Sub", "lengths", count, 1),
                                     to=TensorProto.INT32)
            s["total"] = self.node("Cast", "total", self.node("Squeeze", "total", self.node(
                "Shape", "total", "attention_mask", start=1, end=2)), to=TensorProto.INT32)
            return
        for part in ("cos", "sin"):
            half = self.node("Gather", f"rotary.{part}", s[part], "position_ids")
            first = half if part == "cos" else self.node("Neg", f"rotary.{part}", half)
            whole = self.node("Concat", f"rotary.{part}", first, half, axis=-1)
            s[part] = self.node("Unsqueeze", f"rotary.{part}", whole, [1])

    def mlp(self, i: int, x: str) -> str:
        """x (B, T, D) -> (B, T, D)."""
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

    def embed(self) -> str:
        """input_ids (B, T) -> (B, T, D)."""
        c, name = self.config, "model.embed_tokens"
        table, D = self.table(name), c.hidden_size
        if not self.table_bits:
            return self.node("Gather", name, *table, "input_ids")
        if not self.ort:
            return self.embed_blocks(name, *table[:2])
        if self.block == ROW:
            return self.embed_panels(name, *table)
        row = -(-D // self.block) * self.block
        data = self.alias(table[0], [c.vocab_size, row * self.table_bits // 8])
        x = self.node("GatherBlockQuantized", name, data, "input_ids", table[1],
                      domain="com.microsoft", bits=self.table_bits, block_size=self.block,
                      gather_axis=0, quantize_axis=1)
        return x if row == D else self.node("Slice", name, x, [0], [D], [-1])

    def head(self, x: str, all_logits: bool) -> None:
        """Hidden states (B, T, D) -> logits (B, 1, V) of the last token of each row, or of all."""
        c, name = self.config, "lm_head"
        D, V = c.hidden_size, c.vocab_size
        table = self.table("model.embed_tokens" if c.tie_word_embeddings else name)
        x = self.node("Reshape", f"{name}.rows", x, [-1, D]) if all_logits else self.last(x)
        # Gemm reads (V, D) directly: onnxruntime would fold a Transpose into a second table.
        y = self.multiply(name, x, table, D, V, self.table_bits) if self.table_bits else self.node(
            "Gemm", name, x, *table, transB=1)
        y = self.cast(f"{name}.wide", y, TensorProto.FLOAT)
        if all_logits:
            shape = self.node("Concat", name, self.node("Shape", name, "input_ids"), [V], axis=0)
            self.node("Reshape", name, y, shape, named=["logits"])
        else:
            self.node("Unsqueeze", name, y, [1], named=["logits"])

    def last(self, x: str) -> str:
        """(B, T, D) -> (B, D): the last token, or the last before the pads on the right."""
        name = "lm_head.last"
        if not self.ort:
            return self.node("Gather", name, x, -1, axis=1)
        size = self.node("Neg", name, self.node("Shape", name, "input_ids", start=1, end=2))
        new = self.node("Slice", name, "attention_mask", size, [END], [1])       # (B, T)
        count = self.node("ReduceSum", name, new, [1])                           # (B, 1)
        at = self.node("Max", name, self.node("Sub", name, count, 1), 0)
        return self.node("GatherND", name, x, at, batch_dims=1)

    def decoder(self, context: int, all_logits: bool) -> None:
        """Build the inputs, the outputs, and every node between them."""
        c = self.config
        sizes: Any = self.static or ("batch_size", "sequence_length", "past_sequence_length")
        B, T, P = sizes
        S = P + T if self.static else "total_sequence_length"
        for name, length in (("input_ids", T), ("attention_mask", S), ("position_ids", T)):
            if name != "position_ids" or not self.ort:
                self.inputs.append(value(name, TensorProto.INT64, [B, length]))
        self.outputs.append(value("logits", TensorProto.FLOAT,
                                  [B, T if all_logits else 1, c.vocab_size]))
        for i in range(c.num_hidden_layers):
            for past, present in zip(cached("past_key_values", i), cached("present", i)):
                for values, name, length in ((self.inputs, past, P),
                                             (self.outputs, present, P if self.static else S)):
                    values.append(value(name, self.real,
                                        [B, c.num_key_value_heads, length, c.head_dim]))
        self.positions(context)
        x, added = self.embed(), None
        for i in range(c.num_hidden_layers):
            y, x = self.norm(f"model.layers.{i}.input_layernorm", x, added)
            added = self.attention(i, y)
            y, x = self.norm(f"model.layers.{i}.post_attention_layernorm", x, added)
            added = self.mlp(i, y)
        y, _ = self.norm("model.norm", x, added)
        self.head(y, all_logits)


def cached(kind: str, layer: int) -> tuple[str, str]:
    """Names of a layer's key and value; kind: past_key_values or present."""
    return f"{kind}.{layer}.key", f"{kind}.{layer}.value"


def write_decoder(file: Path, config: Config, weight: Callable[[str], Any],
                  adapters: Mapping[str, Adapter], *, target: str, precision: str, context: int,
                  block: int = BLOCK, static: tuple[int, int, int] | None = None,
                  all_logits: bool = False) -> None:
    """Write the graph to `file`, and its tensors to `file`.data.

    weight(name) returns the tensor of a Hugging Face name, or its `Blocks`, and is called once for
    each. `adapters`: of matrices, by module name. `context`: the number of positions. `block`:
    weights that share a scale, in few bits.
    static (B, T, P) fixes every size: the cache holds the last P positions, and a prompt is read in
    chunks of T, the first of which is padded on the left. Raises ValueError for what a target
    cannot do, and for `adapters` of modules that the model does not have.
    """
    if target not in ("ort", "portable") or precision not in PRECISIONS:
        raise ValueError(f"target {target!r}, precision {precision!r}: expected ort or portable, "
                         f"and one of {', '.join(PRECISIONS)}")
    rows = {config.hidden_size, config.intermediate_size,
            config.num_attention_heads * config.head_dim}
    if target == "portable" and block > BLOCK and (odd := sorted(k for k in rows if k % block)):
        raise ValueError(f"--block {block}: rows of {odd[0]} weights are no whole blocks, which "
                         "OpenVINO refuses in the portable target; use a smaller --block")
    if target == "ort" and config.head_dim % 16:
        raise ValueError(f"head size {config.head_dim}: onnxruntime's attention takes multiples of "
                         "16 only; use the portable target")
    if target == "ort" and static:
        raise ValueError("static shapes need the portable target: the cache of onnxruntime's "
                         "attention grows")
    known = {f"model.layers.{i}.{part}_proj" for i in range(config.num_hidden_layers) for part in (
        *(f"self_attn.{n}" for n in "qkvo"), *(f"mlp.{n}" for n in ("gate", "up", "down")))}
    if wrong := sorted(set(adapters) - known):
        raise ValueError(f"adapters for no matrix of this model: {', '.join(wrong[:5])}")
    with open(f"{file}.data", "wb") as data:
        graph = DecoderGraph(adapters, data, f"{file.name}.data", config, weight, target,
                             precision, block, static)
        graph.decoder(context, all_logits)
    graph.save(file)


def write_sampler(file: Path, vocab: int) -> None:
    """Write a graph from logits (B, T, V) to the 64 largest of the last position, sorted.

    Its outputs are `values` (B, 64), float32, and `indices` (B, 64), int64; V where V < 64.
    """
    g, k = Graph(), min(64, vocab)
    last = g.node("Gather", "last", "logits", -1, axis=1)
    g.node("TopK", "top", last, [k], axis=-1, named=["values", "indices"])
    g.inputs = [value("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", vocab])]
    g.outputs = [value("values", TensorProto.FLOAT, ["batch_size", k]),
                 value("indices", TensorProto.INT64, ["batch_size", k])]
    g.save(file)
