"""The decoder, with the module names of Llama's checkpoints, whatever the family.

One class serves Llama 1/2/3, SmolLM2/3, TinyLlama, Mistral, Qwen2/2.5/3, Granite, Gemma 3 and LFM2;
`Config` says how they differ. Tokens are packed to rows (N, D), without padding, except in
attention and convolutions; see tokens.py. Backwards that are written by hand are compared with
autograd by test_hand_written_backwards in tests/model/test_decoder.py.

Letters: B batch, T time, N packed tokens, D hidden, H query heads, K key/value heads, C head size,
S cached positions, L taps of a convolution, V vocabulary.
"""

import math
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..method.experts import expert_layers, linear_outputs
from .config import Config
from .tokens import Cache, Tokens

SHORT = 256            # keys; up to so many, a CPU trains bfloat16 faster with `attend_short`
Rope = tuple[Tensor, Tensor] | None      # cos and sin (N, 1, C), the first half of sin negated
ACTIVATIONS: dict[str, tuple[Any, Any]] = {      # f(z), and dy f'(z) of (dy, z)
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (partial(F.gelu, approximate="tanh"),
                          partial(torch.ops.aten.gelu_backward, approximate="tanh"))}


class _RMSNorm(torch.autograd.Function):
    """RMS normalisation with a fused backward: five passes over x, a third of autograd's time.

    y = x / rms * weight,   rms = sqrt(mean(x^2) + eps)
    dx = g / rms - x <g, x> / (n rms^3),   g = dy * weight
    d_weight = sum over rows of dy * x / rms
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x, weight), n = ctx.saved_tensors, dy.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        x32, g = x.to(wide), (dy * weight).to(wide)
        mean_square = torch.linalg.vecdot(x32, x32)[..., None].div_(n)
        inverse = mean_square.add_(ctx.eps).rsqrt_()                     # (..., 1): 1 / rms
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (dy * (x32 * inverse)).flatten(0, -2).sum(0).to(weight.dtype)
        along = torch.linalg.vecdot(g, x32)[..., None] * inverse ** 3 / n
        return (g * inverse).addcmul_(x32, along, value=-1).to(x.dtype), d_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32; Gemma stores the weight less 1."""

    def __init__(self, size: int, cfg: Config):
        super().__init__()
        self.offset, self.eps = cfg.norm_offset, cfg.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.to(wide) + self.offset if self.offset else self.weight
        if x.device.type == "cpu":
            return _RMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    same_input = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.layer, self.window, self.size = layer, cfg.windows[layer], cfg.head_dim
        self.scale = cfg.attention_scale
        q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
        self.q_proj = nn.Linear(cfg.hidden_size, q, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.hidden_size, kv, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.hidden_size, kv, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(q, cfg.hidden_size, bias=cfg.o_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg) if cfg.qk_norm else nn.Identity()

    def forward(self, x: Tensor, tokens: Tokens, rope: Rope) -> Tensor:
        """(N, D) -> (N, D); keys and values are added to the cache, if there is one."""
        q, k, v = (y.unflatten(1, (-1, self.size))                       # (N, H or K, C)
                   for y in linear_outputs(x, self.q_proj, self.k_proj, self.v_proj))
        heads = q.shape[1], k.shape[1]
        qk = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        if rope is not None:
            qk = rotate(qk, rope)
        if tokens.cache is None:
            q, keys = tokens.sequences(qk).split(heads, 1)
            values = tokens.sequences(v)
        else:
            q, k = qk.split(heads, 1)
            q, keys, values = tokens.sequences(q), *self.remember(k, v, tokens, tokens.cache)
        y = attend(q, keys, values, tokens.masks[self.window], self.scale)
        return self.o_proj(tokens.flat(y))

    def remember(self, k: Tensor, v: Tensor, tokens: Tokens, cache: Cache) -> list[Tensor]:
        """Add keys and values (N, K, C) to the cache; all of it so far, (B, K, S, C) each."""
        held = cache.keys[self.layer], cache.values[self.layer]
        for cached, new in zip(held, (k, v)):
            if tokens.shared:                        # the cache was empty: all rows start at 0
                cached[:, :, :tokens.shape[1]] = tokens.sequences(new)
            else:
                cached[tokens.rows, :, tokens.positions] = new
        return [cached[:, :, :max(tokens.ends)] for cached in held]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + C/2) of (N, heads, C) by their position's angles (RoPE, Su 2021)."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v of q (B, H, T, C) and k, v (B, K, S, C); causal without a mask."""
    narrow, cpu = q.dtype.itemsize < 4, q.device.type == "cpu"
    if q.requires_grad and narrow and cpu and k.shape[2] <= SHORT:
        return attend_short(q, k, v, mask, scale)
    if (shared := q.shape[1] // k.shape[1]) > 1 and not cpu and (mask is not None or not narrow):
        # CUDA's fused kernels share key/value heads only without a mask and in half precision.
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          scale=scale, enable_gqa=shared > 1)


def attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`attend` step by step: a CPU's fused kernel takes six times as long to train in bfloat16."""
    heads, length = (k.shape[1], q.shape[1] // k.shape[1]), q.shape[2]
    grouped = (q * scale).unflatten(1, heads).flatten(2, 3)                      # (B, K, G*T, C)
    scores = (grouped @ k.mT).unflatten(2, (heads[1], length))                   # (B, K, G, T, S)
    seen = (torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if mask is None
            else mask[:, :, None])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights.flatten(2, 3) @ v).unflatten(2, (heads[1], length)).flatten(1, 2)


class ShortConv(nn.Module):
    """LFM2's token mixer: gated by b and c, each channel is a weighted sum over L tokens.

    b, c, u = in_proj(x);   y = out_proj(c * conv(b * u)).
    """

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.layer, self.past, D = layer, cfg.conv_size - 1, cfg.hidden_size
        self.in_proj = nn.Linear(D, 3 * D, bias=False)
        self.conv = nn.Conv1d(D, D, cfg.conv_size, groups=D, bias=False)
        self.out_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, tokens: Tokens, rope: Rope) -> Tensor:
        """(N, D) -> (N, D); the last L - 1 inputs of the convolution are kept in the cache."""
        b, c, u = self.in_proj(x).chunk(3, -1)
        u = tokens.sequences((b * u)[:, None]).squeeze(1)                # (B, T, D)
        if tokens.cache is None:
            u = F.pad(u, (0, 0, self.past, 0))
        else:
            u = torch.cat((tokens.cache.states[self.layer], u), 1)
            last = tokens.new[:, None] + torch.arange(self.past, device=u.device)    # (B, L - 1)
            tokens.cache.states[self.layer] = u.take_along_dim(last[..., None], 1)
        return self.out_proj(c * tokens.flat(self.conv(u.mT).mT[:, None]))


class _GatedUnit(torch.autograd.Function):
    """f(gate) * up, which saves only its inputs for the backward; autograd saves f(gate) too.

    y = f(gate) * up;   d_gate = dy * up * f'(gate),   d_up = dy * f(gate)
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (gate, up), (f, derivative) = ctx.saved_tensors, ACTIVATIONS[ctx.activation]
        return derivative(dy * up, gate), f(gate).mul_(dy), None


class MLP(nn.Module):
    """down(f(gate x) * up x), where f is one of ACTIVATIONS, such as silu(z) = z sigmoid(z)."""

    same_input = (("gate_proj", "up_proj"),)

    def __init__(self, cfg: Config):
        super().__init__()
        self.activation, self.fused = cfg.activation, cfg.fused_mlp
        if self.fused:
            self.input_linear = nn.Linear(cfg.hidden_size, 2 * cfg.intermediate_size, bias=False)
        else:
            self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
            self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.input_linear(x).chunk(2, -1) if self.fused
                    else linear_outputs(x, self.gate_proj, self.up_proj))
        return self.down_proj(_GatedUnit.apply(gate, up, self.activation))


class DecoderLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.residual, self.post_norms = cfg.residual_multiplier, cfg.post_norms
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg)
        self.mixer = "conv" if layer in cfg.conv_layers else "self_attn"
        self.add_module(self.mixer, (ShortConv if self.mixer == "conv" else Attention)(cfg, layer))
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg)
        self.mlp = MLP(cfg)
        if self.post_norms:              # Gemma normalises what attention and MLP write, too
            self.pre_feedforward_layernorm = RMSNorm(cfg.hidden_size, cfg)
            self.post_feedforward_layernorm = RMSNorm(cfg.hidden_size, cfg)

    def forward(self, x: Tensor, tokens: Tokens, rope: Rope) -> Tensor:
        y = getattr(self, self.mixer)(self.input_layernorm(x), tokens, rope)
        x = x.add(self.post_attention_layernorm(y) if self.post_norms else y, alpha=self.residual)
        if self.post_norms:
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=self.residual)


def _checkpointed(layer: nn.Module, *inputs: Any) -> Tensor:
    """layer(*inputs); its activations are not kept, but computed again in the backward pass."""
    def detach_logits() -> None:         # the graph of the routers' logits keeps all activations
        for experts in expert_layers(layer).values():
            if experts.router_logits is not None:
                experts.router_logits = experts.router_logits.detach()
    recomputing = ExitStack()
    recomputing.callback(detach_logits)
    return checkpoint(layer, *inputs, use_reentrant=False,
                      context_fn=lambda: (nullcontext(), recomputing))


class Decoder(nn.Module):
    """Embedding, layers and the last norm. Its layers see rows (N, D) of real tokens alone."""

    packs = True

    def __init__(self, cfg: Config):
        super().__init__()
        self.config = cfg
        # nn.Embedding would call normal_, which on the meta device imports torch's compiler: 1.2 s
        # and 75 MB. This uniform distribution has the same variance, 1.
        table = torch.empty(cfg.vocab_size, cfg.hidden_size).uniform_(-3 ** 0.5, 3 ** 0.5)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                cache: Cache | None = None, needed: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of input_ids (B, T); zeros where attention_mask (B, T) is 0.

        needed (B, T) marks the positions that the caller reads; others are zeros. A prefix that
        neighbouring rows share before their first needed position (a system prompt) runs once.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens = Tokens(input_ids, mask, self.config, self.norm.weight.device, needed, cache)
        return tokens.unpack(self.rows(tokens))

    def rows(self, tokens: Tokens, recompute: bool = False) -> Tensor:
        """Hidden states (N, D) of packed tokens, or (S, D) of those that are read. recompute:
        activation checkpointing, which is slower and takes far less memory."""
        x = self.embed_tokens(tokens.ids)
        if self.config.embedding_multiplier != 1:
            x = x * x.new_tensor(self.config.embedding_multiplier)       # rounded to x's dtype
        ropes: dict[str, Rope] = {"": None}
        for kind in {*self.config.ropes} - {""}:
            angles = tokens.positions[:, None] * rope_frequencies(self.config, kind, x.device)
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)    # (N, C / 2)
            ropes[kind] = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
        for layer, kind in zip(self.layers, self.config.ropes):
            inputs = x, tokens, ropes[kind]
            x = _checkpointed(layer, *inputs) if recompute else layer(*inputs)
        if tokens.cache is not None:
            tokens.cache.lengths = tokens.ends
        x = self.norm(x if tokens.read is None else x.index_select(0, tokens.read))
        # A multiplier of the logits; the head is linear.
        return x if self.config.output_multiplier == 1 else x * self.config.output_multiplier


def rope_frequencies(cfg: Config, kind: str = "global", device: Any = "cpu") -> Tensor:
    """Radians a token turns each rotary pair, (C / 2,); llama3 scaling lowers low frequencies."""
    theta, s = cfg.rope_theta, cfg.rope_scaling
    if kind == "local":
        theta, s = cfg.local_rope_theta, None
    pairs = torch.arange(0, cfg.head_dim, 2, device=device)
    frequencies = theta ** (-pairs.float() / cfg.head_dim)
    if s is None:
        return frequencies
    if "low_freq_factor" not in s:
        return frequencies / s["factor"]
    turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)   # 0 up to low turns, 1 from high
    return frequencies * (smooth + (1 - smooth) / s["factor"])


class CausalLM(nn.Module):
    """The decoder and its head: model(input_ids, attention_mask) -> logits."""

    name = ""              # the path or hub name that it was loaded from
    fingerprint = ""       # a hash that tells this base from others
    merged = ""            # if adapters are merged into it: the name of the base without them
    base_bits: int | None = None       # 8 or 4, if its linear layers are quantised

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T).

        attention_mask (B, T) is 0 at padding, on either side; logits at padding mean nothing. With
        a cache, input_ids follow the tokens in it, and their keys and values are added to it.
        """
        return self.lm_head(self.model(input_ids, attention_mask, cache))


def meta_model(config: Config) -> CausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return CausalLM(config)
