"""The decoder of model/decoder.py as an ONNX graph, module by module.

Two targets. `ort` uses onnxruntime's own operators, which attend, normalise and multiply 4-bit
blocks in one node each. `portable` uses the operators of opset 21 only. A graph reads one prompt. A
node is named after its module, `/model/layers.0/mlp/Mul`, and a weight as in the checkpoint.

float16 graphs compute norms, routers and adapters in float32. CPUs have few float16 kernels:
onnxruntime inserts casts for the others, so that such a graph runs on a CPU and on a GPU.

Letters: T new tokens, P past tokens, S = P + T, D hidden, H query heads, K key/value
heads, C head size, L taps of a convolution, I its channels, V vocabulary, N tokens with logits.
"""

from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from onnx.helper import make_tensor_value_info as value
from torch import Tensor

from ..model.decoder import CausalLM
from ..model.delta import EPS as DELTA_EPS
from ..runtime.drafts import SHORT
from .layers import matrix
from .mixture import LinearLayers
from .nodes import Graph
from .positions import END, Positions
from .weights import GraphFormat, WeightStore


class DecoderBuilder:
    """Writes the decoder of a model, by methods that are the modules of model/decoder.py."""

    def __init__(self, graph: Graph, weights: WeightStore):
        self.graph, self.config, self.weights, form = graph, weights.config, weights, weights.form
        self.ort, self.static, self.dtype = form.ort, form.static, graph.dtype
        self.node, self.tensor, self.constant = graph.node, graph.tensor, graph.constant
        self.parameter, self.linear = weights.parameter, LinearLayers(graph, weights).linear
        self.positions, c = Positions(graph, self.config, form), self.config
        self.heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.rows = 1 if c.convolutions else form.last       # those cannot take back a draft
        # The scale of the residual stream. Gemma 3's reaches 100,000, more than float16 holds; what
        # it adds up comes from norms, and what reads it are norms.
        self.stream = 2.0 ** -6 if c.post_norms and form.dtype == torch.float16 else 1.0

    def norm(self, name: str, x: str, added: str | None) -> tuple[str, str]:
        """Two outputs: the residual stream x + added normalised, and x + added."""
        weight = self.tensor(f"{name}.weight", self.norm_weight(name))
        eps = self.config.rms_norm_eps * self.stream ** 2
        if self.ort and added is not None:
            y, _, _, x = self.node(
                "SkipSimplifiedLayerNormalization", name, x, added, weight, domain="com.microsoft",
                epsilon=eps, named=[f"{name}.y", "", "", f"{name}.x"])
            return y, x
        if added is not None:
            x = self.node("Add", name, x, added)
        return self.rms(name, x, weight, eps), x

    def norm_weight(self, name: str) -> Tensor:
        """What a norm multiplies by, in the graph's dtype."""
        return (self.parameter(f"{name}.weight").float() + self.config.norm_offset).to(self.dtype)

    def times(self, name: str, x: str, factor: float) -> str:
        return x if factor == 1 else self.node(
            "Mul", f"{name}.times", x, self.constant(factor, self.dtype))

    def rms(self, name: str, x: str, weight: str, eps: float | None = None) -> str:
        """x, normalised by its root mean square over the last axis, times weight."""
        eps = eps or self.config.rms_norm_eps
        if self.ort:
            return self.node("SimplifiedLayerNormalization", name, x, weight, axis=-1, epsilon=eps,
                             stash_type=1)
        wide = self.graph.cast(f"{name}.wide", x, TensorProto.FLOAT)
        square = self.node("Pow", name, wide, self.constant(2.0, torch.float32))
        mean = self.node("Add", f"{name}.eps", self.node("ReduceMean", name, square, [-1]),
                         self.constant(eps, torch.float32))
        y = self.node("Div", name, wide, self.node("Sqrt", name, mean))
        return self.node("Mul", name, self.graph.cast(f"{name}.narrow", y, self.graph.real), weight)

    def attention(self, i: int, x: str) -> str:
        """x (1, T, D) -> (1, T, D)."""
        name = f"model.layers.{i}.self_attn"
        qkv = self.linear([f"{name}.{p}_proj" for p in "qkv"], x, f"{name}.qkv_proj")
        attend = self.attend_ort if self.ort else self.attend
        return self.linear([f"{name}.o_proj"], attend(i, name, qkv))

    def attend_ort(self, i: int, name: str, qkv: str) -> str:
        """(1, T, (H + 2K) * C) -> (1, T, H * C) by one operator, which also rotates and caches."""
        c, (H, K, C) = self.config, self.heads
        q, k, v, gate = qkv, "", "", ""
        if c.qk_norm:
            q, k, v = self.node("Split", f"{name}.qkv_proj", qkv, [
                (1 + c.output_gate) * H * C, K * C, K * C], outputs=3, axis=-1)
            if c.output_gate:                # each head has its query and its gate side by side
                both = self.node("Reshape", f"{name}.gates", q, [0, 0, H, 2 * C])
                parts = self.node("Split", f"{name}.gates", both, outputs=2, axis=-1, num_outputs=2)
                q, gate = (self.node("Reshape", f"{name}.{part}", x, [0, 0, H * C])
                           for part, x in zip(("q", "gate"), parts))
            q, k = (self.head_norm(f"{name}.{part}_norm", x, heads, self.norm_weight(
                f"{name}.{part}_norm"), c.rms_norm_eps) for part, x, heads in (
                    ("q", q, H), ("k", k, K)))
        y = self.node(
            "GroupQueryAttention", name, q, k, v, f"past_key_values.{i}.key",
            f"past_key_values.{i}.value", *self.positions.lengths,
            *self.positions.rotary[c.ropes[i]], domain="com.microsoft", num_heads=H,
            named=[f"{name}.y", f"present.{i}.key", f"present.{i}.value"], kv_num_heads=K,
            do_rotary=int(c.ropes[i] != ""), scale=c.attention_scale,
            local_window_size=c.windows[i] or -1)[0]
        return y if not gate else self.node("Mul", f"{name}.gate", y, self.node(
            "Sigmoid", f"{name}.gate", gate))

    def head_norm(self, name: str, x: str, heads: int, weight: Tensor, eps: float) -> str:
        """(1, T, heads * C) or (1, T, heads, C) -> (1, T, heads * C), normalised head by head."""
        x = self.node("Reshape", f"{name}.split", x, [0, 0, heads, len(weight)])
        y = self.rms(name, x, self.tensor(f"{name}.weight", weight), eps)
        return self.node("Reshape", f"{name}.join", y, [0, 0, heads * len(weight)])

    def attend(self, i: int, name: str, qkv: str) -> str:
        """The same by standard operators. The queries that share a key/value head are rows of one
        product, q (1, K, H/K * T, C), so that the cache is not repeated."""
        c, (H, K, C) = self.config, self.heads
        x = self.node("Reshape", f"{name}.heads", qkv, [0, 0, H + 2 * K, C])
        x = self.node("Transpose", f"{name}.heads", x, perm=[0, 2, 1, 3])
        qk, v = self.node("Split", f"{name}.heads", x, [H + K, K], outputs=2, axis=1)
        if c.qk_norm:
            weight = torch.cat([self.norm_weight(f"{name}.{n}_norm").expand(heads, 1, C)
                                for n, heads in (("q", H), ("k", K))])
            qk = self.rms(f"{name}.qk_norm", qk, self.tensor(f"{name}.qk_norm.weight", weight))
        if c.ropes[i]:
            cos, sin = self.positions.rotary[c.ropes[i]]
            turned = self.node("Concat", f"{name}.rotate", *reversed(self.node(
                "Split", f"{name}.rotate", qk, outputs=2, axis=-1, num_outputs=2)), axis=-1)
            qk = self.node("Add", f"{name}.rotate",
                           self.node("Mul", f"{name}.rotate.cos", qk, cos),
                           self.node("Mul", f"{name}.rotate.sin", turned, sin))
        q, k = self.node("Split", f"{name}.qk", qk, [H, K], outputs=2, axis=1)
        keys = self.cache(f"{name}.key", f"past_key_values.{i}.key", k, f"present.{i}.key")
        values = self.cache(f"{name}.value", f"past_key_values.{i}.value", v, f"present.{i}.value")
        q = self.node("Reshape", f"{name}.q", q, [0, K, -1, C])
        q = self.node("Mul", f"{name}.q", q, self.constant(c.attention_scale, self.dtype))
        scores = self.node("MatMul", f"{name}.scores", q, self.node(
            "Transpose", f"{name}.keys", keys, perm=[0, 1, 3, 2]))
        scores = self.node("Add", f"{name}.scores", scores, self.positions.mask(c.windows[i]))
        weights = self.node("Softmax", name, scores, axis=-1)
        y = self.node("MatMul", f"{name}.values", weights, values)
        y = self.node("Reshape", f"{name}.y", y, [0, H, -1, C])
        y = self.node("Transpose", f"{name}.y", y, perm=[0, 2, 1, 3])
        return self.node("Reshape", f"{name}.y.join", y, [0, 0, H * C])

    def cache(self, name: str, past: str, new: str, present: str) -> str:
        """Past and new (1, K, S, C). The present is all of it, or the last P in a static graph."""
        whole = self.node("Concat", name, past, new, axis=2, named=() if self.static else [present])
        if self.static:
            self.node("Slice", name, whole, [self.static[1]], [END], [2], named=[present])
        return whole

    def short_conv(self, i: int, x: str) -> str:
        """x (1, T, D) -> (1, T, D) by LFM2's short convolution."""
        name = f"model.layers.{i}.conv"
        x = self.linear([f"{name}.in_proj"], x)
        b, gate, u = self.node("Split", name, x, outputs=3, axis=-1, num_outputs=3)
        y = self.conv(i, f"{name}.conv", self.node("Mul", name, b, u))
        return self.linear([f"{name}.out_proj"], self.node("Mul", f"{name}.gate", gate, y))

    def conv(self, i: int, name: str, x: str) -> str:
        """x (1, T, I), each channel a weighted sum over L tokens; the last L - 1 are its cache. A
        CPU takes half the time of CausalConvWithState."""
        L, past = self.config.conv_size, self.node(
            "Transpose", f"{name}.past", f"past_conv.{i}", perm=[0, 2, 1])
        x = self.node("Concat", name, past, x, axis=1)
        if self.static:
            x = self.node("GatherND", name, x, self.positions.conv_inputs, batch_dims=1)
        last = self.node("Slice", name, x, [1 - L], [END], [1])
        self.node("Transpose", f"{name}.present", last, perm=[0, 2, 1], named=[f"present_conv.{i}"])
        taps = self.parameter(f"{name}.weight")[:, 0].T.to(self.dtype)                  # (L, I)
        parts = [self.node("Mul", f"{name}.{j}", self.tensor(f"{name}.{j}", tap), self.node(
            "Slice", f"{name}.{j}", x, [j], [j - L + 1 or END], [1])) for j, tap in enumerate(taps)]
        return self.node("Sum", name, *parts)

    def delta_net(self, i: int, x: str) -> str:
        """x (1, T, D) -> (1, T, D) by a gated delta net, whose memory is float32."""
        c, name, wide = self.config, f"model.layers.{i}.linear_attn", TensorProto.FLOAT
        H, K = c.linear_num_value_heads, c.linear_key_head_dim
        x = self.linear([f"{name}.in_proj_{p}" for p in ("qkv", "z", "b", "a")], x,
                        f"{name}.in_proj")
        qkv, z, *gates = self.node("Split", name, x, [sum(c.delta_parts), c.delta_parts[2], H, H],
                                   outputs=4, axis=-1)
        qkv = self.silu(f"{name}.conv1d", self.conv(i, f"{name}.conv1d", qkv))
        *qk, v = self.node("Split", f"{name}.qkv", self.graph.cast(f"{name}.wide", qkv, wide),
                           [*c.delta_parts], outputs=3, axis=-1)
        q, k = (self.head_norm(f"{name}.{part}", y, c.linear_num_key_heads,
                               torch.full((K,), length / K ** 0.5), DELTA_EPS / K)
                for part, y, length in zip("qk", qk, (K ** -0.5, 1.0)))
        b, a = (self.graph.cast(f"{name}.{part}.wide", y, wide) for part, y in zip("ba", gates))
        dt = self.tensor(f"{name}.dt_bias", self.parameter(f"{name}.dt_bias").float())
        A = self.tensor(f"{name}.A", -self.parameter(f"{name}.A_log").float().exp())
        g, b = self.node("LinearAttentionGate", name, a, dt, A, b, outputs=2,
                         domain="com.microsoft")
        y, _ = self.node(
            "LinearAttention", name, q, k, v, f"past_recurrent.{i}", g, b, domain="com.microsoft",
            named=[f"{name}.y", f"present_recurrent.{i}"], q_num_heads=c.linear_num_key_heads,
            kv_num_heads=H, update_rule="gated_delta", scale=1.0)
        y = self.head_norm(f"{name}.norm", y, H, self.parameter(f"{name}.norm.weight").float(),
                           c.rms_norm_eps)
        y = self.graph.cast(f"{name}.narrow", y, self.graph.real)
        return self.linear([f"{name}.out_proj"], self.node(
            "Mul", f"{name}.gate", y, self.silu(f"{name}.gate", z)))

    def silu(self, name: str, x: str) -> str:
        return self.node("QuickGelu", name, x, domain="com.microsoft", alpha=1.0) if self.ort else (
            self.node("Mul", f"{name}.act", x, self.node("Sigmoid", name, x)))

    def mlp(self, i: int, x: str) -> str:
        """x (1, T, D) -> (1, T, D)."""
        c, name = self.config, f"model.layers.{i}.mlp"
        both = self.linear([f"{name}.gate_proj", f"{name}.up_proj"], x, f"{name}.gate_up_proj")
        gate, up = self.node("Split", name, both, outputs=2, axis=-1, num_outputs=2)
        act = self.silu(name, gate) if c.activation == "silu" else self.node(
            "Gelu", name, gate, approximate="tanh")
        return self.linear([f"{name}.down_proj"], self.node("Mul", name, act, up))

    def embed(self) -> str:
        """input_ids (1, T) -> (1, T, D)."""
        return self.weights.embed("model.embed_tokens")

    def head(self, x: str) -> None:
        """Hidden states (1, T, D) -> logits (1, N, V) of the last tokens."""
        name, last = "lm_head", self.last(x)                                     # (N, D)
        named = ["logits"] if self.dtype == torch.float32 else []    # a cast would copy them
        table = "model.embed_tokens" if self.config.tie_word_embeddings else name
        stored, w = self.weights.vocabulary(table), matrix(self.weights.leaf(table))
        if not self.weights.is_float(w):
            last = self.node("Unsqueeze", f"{name}.last", last, [0])
            y = self.weights.multiply(name, last, stored, w, named)
        else:
            # Gemm reads (V, D) directly: onnxruntime would fold a Transpose into a second matrix.
            y = self.node("Gemm", name, last, *stored, transB=1)
            y = self.node("Unsqueeze", name, y, [0], named=named)
        if not named:
            self.node("Cast", f"{name}.wide", y, to=TensorProto.FLOAT, named=["logits"])

    def last(self, x: str) -> str:
        """(1, T, D) -> (N, D): the last token or, for drafts, the last tokens of a short step. A
        longer one reads a prompt, of which the last token counts, and the head may be large."""
        name = "lm_head.last"
        if self.rows == 1:
            return self.node("Gather", name, x, -1, axis=1)
        length = self.node("Shape", name, "input_ids", start=1)
        short = self.node("LessOrEqual", name, length, [SHORT])
        first = self.node("Where", name, short, [-self.rows], [-1])
        few = self.node("Slice", name, x, first, [END], [1])
        return self.node("Squeeze", name, few, [0])

    def build(self) -> None:
        """Write every node between the inputs and the outputs."""
        c, added = self.config, None
        x = self.times("model.embed_tokens", self.embed(), c.embedding_multiplier * self.stream)
        for i in range(c.num_hidden_layers):
            name, mixer = f"model.layers.{i}", (
                self.short_conv if i in c.conv_layers else
                self.delta_net if i in c.delta_layers else self.attention)
            second = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
            for before, part, after in (("input_layernorm", mixer, "post_attention_layernorm"),
                                        (second, self.mlp, "post_feedforward_layernorm")):
                y, x = self.norm(f"{name}.{before}", x, added)
                added = part(i, y)
                if c.post_norms:
                    weight = self.norm_weight(f"{name}.{after}") * self.stream
                    added = self.rms(f"{name}.{after}", added, self.tensor(
                        f"{name}.{after}.weight", weight))
        y, _ = self.norm("model.norm", x, added)
        self.head(y)

    def declare(self) -> None:
        """Name the inputs and outputs of the graph, with their types and shapes."""
        c, graph, static = self.config, self.graph, self.static
        sizes: Any = static or (1, "sequence_length", "past_sequence_length")
        _, T, P = sizes
        S = P + T if static else "total_sequence_length"
        lengths = {"input_ids": T, "attention_mask": S} | ({} if self.ort else {"position_ids": T})
        graph.inputs = [value(name, TensorProto.INT64, [1, n]) for name, n in lengths.items()]
        rows = 1 if self.rows == 1 else "last_tokens"
        graph.outputs = [value("logits", TensorProto.FLOAT, [1, rows, c.vocab_size])]
        self.declare_cache(P, P if static else S, graph.real)

    def declare_cache(self, past: Any, present: Any, kind: int) -> None:
        """Name the cache's inputs and outputs; past, present: tokens of keys and values."""
        c, (_, K, C) = self.config, self.heads
        for values, when, keys, n in (
                (self.graph.inputs, "past", "past_key_values", past),
                (self.graph.outputs, "present", "present", present)):
            values += [value(f"{keys}.{i}.{part}", kind, [1, K, n, C])
                       for i in c.attention_layers for part in ("key", "value")]
            values += [value(f"{when}_conv.{i}", kind, [1, channels, c.conv_size - 1])
                       for i, channels in c.convolutions.items()]
            values += [value(f"{when}_recurrent.{i}", TensorProto.FLOAT, [
                1, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim])
                for i in c.delta_layers]


def write_decoder(file: Path, model: CausalLM, form: GraphFormat, data: str = ".data") -> None:
    """Write the graph of a model to `file`, and its tensors to a file beside it, whose name has
    `data` behind.

    The modules decide what each matrix is: see ship.py. A static form (1, T, P) fixes every size:
    the cache holds the last P positions, and a prompt is read in chunks of T, the first of which is
    padded on the left. plan.py's `refuse` says what cannot be written.
    """
    with open(f"{file}{data}", "wb") as tensors:
        graph = Graph(tensors, form.dtype)
        decoder = DecoderBuilder(graph, WeightStore(graph, model, form))
        decoder.declare()
        decoder.build()
    graph.save(file)
