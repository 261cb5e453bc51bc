"""Gated delta nets (Yang et al. 2024, arXiv 2412.06464), the token mixers of Qwen3.5.

Each head has a memory S (K, V), which maps keys to values. For each token it fades by e^g, and
what it answers to key k moves towards value v, by the rate b:

    S <- e^g S;   S <- S + k (b (v - S^T k))^T;   y = S^T q

Token by token, a device would wait. A chunk of tokens is a few matrix products (section 3.3 of the
paper): with c the sum of g so far, D_ij = e^(c_i - c_j) for j <= i, else 0, and rows for tokens,

    M = (I + tril(b k k^T * D, -1))^-1                 what earlier tokens of the chunk changed
    new = M (b v) - M (b e^c k) S                      what each token adds to S, at its own key
    y = e^c q S + (q k^T * D) new;   S <- e^c_end S + (e^(c_end - c) k)^T new

A chunk of one token is the recurrence itself. Linear layers run a shared prefix once; the delta
rule runs each sequence whole.

Letters: B batch, T time, N packed tokens, n chunks of L tokens, H value heads, K key size, V value
size.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import RMSNorm, Rope, after_past, rms_norm
from .config import Config
from .tokens import Tokens

CHUNK = 64             # tokens
EPS = 1e-6             # of the norms of queries and keys


def memories(keys: Tensor, reads: Tensor, values: Tensor, fade: Tensor, start: Tensor) -> Tensor:
    """S before each chunk and after the last, (n + 1, B, H, K, V), of S <- fade S + keys^T new with
    new = values - reads S.

    keys and reads (n, B, H, L, K), values (n, B, H, L, V), fade (n, B, H, 1, 1), start
    (B, H, K, V).
    """
    states = [start]
    for i in range(len(keys)):
        S = states[-1]
        states.append(fade[i] * S + keys[i].mT @ (values[i] - reads[i] @ S))
    return torch.stack(states)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, start: Tensor,
               ) -> tuple[Tensor, Tensor]:
    """y (n, B, H, L, V) and the memory after it, (B, H, K, V), of q and k (n, B, H, L, K), v
    (n, B, H, L, V), g and b (n, B, H, L, 1), and the memory before it."""
    c = g.cumsum(-2)
    later = torch.ones(c.shape[-2], c.shape[-2], dtype=torch.bool, device=c.device).triu(1)
    D = (c - c.mT).masked_fill(later, -torch.inf).exp()                        # (n, B, H, L, L)
    one = torch.eye(c.shape[-2], dtype=c.dtype, device=c.device)
    M = torch.linalg.solve_triangular(b * (k @ k.mT) * D, one, upper=False, unitriangular=True)
    M = M * b.mT
    values, reads, end = M @ v, (M * c.exp().mT) @ k, c[..., -1:, :]
    S = memories((end - c).exp() * k, reads, values, end.exp(), start)
    new = values - reads @ S[:-1]
    return c.exp() * (q @ S[:-1]) + ((q @ k.mT) * D) @ new, S[-1]


class DeltaNet(nn.Module):
    """q, k, v = silu(conv(in_proj_qkv x)), in_proj_b and in_proj_a give the rate and the fading of
    each head, and y = out_proj(norm(delta rule) * silu(in_proj_z x))."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.layer, self.past, self.parts = layer, cfg.conv_size - 1, cfg.delta_parts
        self.heads, self.keys = cfg.linear_num_value_heads, cfg.linear_num_key_heads
        D, channels, inner = cfg.hidden_size, sum(cfg.delta_parts), cfg.delta_parts[2]
        self.in_proj_qkv = nn.Linear(D, channels, bias=False)
        self.in_proj_z = nn.Linear(D, inner, bias=False)
        self.in_proj_b = nn.Linear(D, self.heads, bias=False)
        self.in_proj_a = nn.Linear(D, self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, cfg.conv_size, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.norm = RMSNorm(cfg.linear_value_head_dim, replace(cfg, norm_offset=0.0))
        self.out_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor, tokens: Tokens, rope: Rope) -> Tensor:
        """(N, D) -> (N, D); the memory, and the last inputs of the convolution, are kept in the
        cache."""
        qkv, z = self.in_proj_qkv(x), self.in_proj_z(x)
        b, a = self.in_proj_b(x), self.in_proj_a(x)
        qkv = after_past(qkv, tokens, self.layer, self.past)             # (B, past + T, channels)
        qkv = F.silu(self.conv1d(qkv.mT)).mT
        dtype = torch.promote_types(x.dtype, torch.float32)
        g = -self.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + self.dt_bias)
        gates = tokens.sequences(torch.stack((g, b.sigmoid().to(dtype)), 1)).transpose(1, 2)
        y = tokens.flat(self.rule(qkv, gates, tokens).to(x.dtype))
        y = self.norm(y.unflatten(1, (self.heads, -1))).flatten(1)
        return self.out_proj(y * F.silu(z))

    def rule(self, qkv: Tensor, gates: Tensor, tokens: Tokens) -> Tensor:
        """qkv (B, T, channels), gates (B, T, 2, H): g, and b -> (B, H, T, V), in float32."""
        B, T, _ = qkv.shape
        if tokens.cache is not None:         # pads leave the memory as it is
            new = torch.arange(T, device=qkv.device) < tokens.new[:, None]
            gates = gates * new[:, :, None, None]
        L = CHUNK if T > 1 else 1
        n = (T + L - 1) // L

        def chunks(x: Tensor, heads: int) -> Tensor:
            x = F.pad(x, (0, 0, 0, n * L - T)).to(gates.dtype).unflatten(2, (heads, -1))
            return x.unflatten(1, (n, L)).permute(1, 0, 3, 2, 4).contiguous()

        q, k, v = (chunks(x, heads) for x, heads in zip(
            qkv.split(self.parts, 2), (self.keys, self.keys, self.heads)))
        K, V = q.shape[-1], v.shape[-1]
        one = q.new_ones(K)
        q = rms_norm(q, one / K, EPS / K)                                # of length 1 / sqrt(K)
        k = rms_norm(k, one * K ** -0.5, EPS / K)
        if (shared := self.heads // self.keys) > 1:
            q, k = q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)
        g, b = (chunks(x, self.heads) for x in gates.unbind(2))
        cache = tokens.cache
        start = q.new_zeros(B, self.heads, K, V) if cache is None else cache.memories[self.layer]
        y, S = delta_rule(q, k, v, g, b, start)
        if cache is not None:
            cache.memories[self.layer] = S.clone()       # not a view of all chunks
        return y.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :T]
