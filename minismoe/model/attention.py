"""What mixes tokens: attention with rotary positions, and LFM2's short convolutions; and RMSNorm.

Letters: B batch, T time, N packed tokens, D hidden, H query heads, K key/value heads, C head size,
R of it that rotates, S cached positions, L taps of a convolution, I its channels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .tokens import Cache, Tokens

Rope = tuple[Tensor, Tensor] | None      # cos and sin (N, 1, R), the first half of sin negated


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32; Gemma stores the weight less 1."""

    def __init__(self, size: int, cfg: Config):
        super().__init__()
        self.offset, self.eps = cfg.norm_offset, cfg.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return rms_norm(x, self.weight.to(dtype) + self.offset if self.offset else self.weight,
                        self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions.

    With an output gate (Qwen3.5), q_proj writes a gate beside the query of each head:
    y = o_proj(sigmoid(gate) * attention).
    """

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.layer, self.window, self.size = layer, cfg.windows[layer], cfg.head_dim
        self.scale, self.gated = cfg.attention_scale, cfg.output_gate
        q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
        self.q_proj = nn.Linear(cfg.hidden_size, q * (1 + self.gated), bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.hidden_size, kv, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.hidden_size, kv, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(q, cfg.hidden_size, bias=cfg.o_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg) if cfg.qk_norm else nn.Identity()

    def forward(self, x: Tensor, tokens: Tokens, rope: Rope) -> Tensor:
        """(N, D) -> (N, D); keys and values are added to the cache, if there is one."""
        q, k, v = (y.unflatten(1, (-1, self.size))                       # (N, H or K, C)
                   for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        if self.gated:
            q, gate = q[:, ::2], q[:, 1::2]
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
        y = tokens.flat(y)
        return self.o_proj(y * gate.flatten(1).sigmoid() if self.gated else y)

    def remember(self, k: Tensor, v: Tensor, tokens: Tokens, cache: Cache) -> list[Tensor]:
        """Add keys and values (N, K, C) to the cache; all of it so far, (B, K, S, C) each."""
        held = cache.keys[self.layer], cache.values[self.layer]
        for cached, new in zip(held, (k, v)):
            if tokens.shared:                        # the cache was empty: all rows start at 0
                cached[:, :, :tokens.shape[1]] = tokens.sequences(new)
            else:
                cached[tokens.batch_rows, :, tokens.positions] = new
        return [cached[:, :, :max(tokens.ends)] for cached in held]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + R/2) of (N, heads, C) by their position's angles (RoPE, Su 2021);
    entries from R on stay."""
    (cos, sin), R = rope, rope[0].shape[-1]
    turning = x[..., :R]
    y = torch.addcmul(turning * cos, turning.roll(R // 2, -1), sin)
    return y if x.shape[-1] == R else torch.cat((y, x[..., R:]), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v of q (B, H, T, C) and k, v (B, K, S, C); causal without a mask."""
    half, cpu = q.dtype.itemsize < 4, q.device.type == "cpu"
    if half and cpu:     # a CPU's kernel for half precision takes up to three times as long
        return attend(q.float(), k.float(), v.float(), mask, scale).to(q.dtype)
    if (sharing := q.shape[1] // k.shape[1]) > 1 and not cpu and (mask is not None or not half):
        # CUDA's fused kernels share key/value heads only without a mask and in half precision.
        k, v, sharing = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          scale=scale, enable_gqa=sharing > 1)


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
        u = after_past(b * u, tokens, self.layer, self.past)             # (B, L - 1 + T, D)
        return self.out_proj(c * tokens.flat(self.conv(u.mT).mT[:, None]))


def after_past(x: Tensor, tokens: Tokens, layer: int, past: int) -> Tensor:
    """What a convolution reads, (N, I) -> (B, past + T, I): sequences after their last `past`
    inputs, which are zeros, or those in the cache, which keeps the new ones."""
    x = tokens.sequences(x[:, None]).squeeze(1)
    if tokens.cache is None:
        return F.pad(x, (0, 0, past, 0))
    x = torch.cat((tokens.cache.inputs[layer], x), 1)
    last = tokens.new[:, None] + torch.arange(past, device=x.device)                 # (B, past)
    tokens.cache.inputs[layer] = x.take_along_dim(last[..., None], 1)
    return x


def rope_frequencies(cfg: Config, kind: str = "global", device: Any = "cpu") -> Tensor:
    """Radians a token turns each rotary pair, (R / 2,); llama3 scaling lowers low frequencies."""
    theta, s, R = cfg.rope_theta, cfg.rope_scaling, cfg.rotary_size or cfg.head_dim
    if kind == "local":
        theta, s = cfg.local_rope_theta, None
    pairs = torch.arange(0, R, 2, device=device)
    frequencies = theta ** (-pairs.float() / R)
    if s is None:
        return frequencies
    if "low_freq_factor" not in s:
        return frequencies / s["factor"]
    turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)   # 0 up to low turns, 1 from high
    return frequencies * (smooth + (1 - smooth) / s["factor"])
