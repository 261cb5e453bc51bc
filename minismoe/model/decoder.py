"""The decoder, with the module names of Hugging Face checkpoints.

One class serves Llama 1/2/3, SmolLM2/3, TinyLlama, Mistral, Qwen2/2.5/3, Granite, Gemma 3 and LFM2;
`Config` says how they differ, and layers.py holds the parts. Tokens are packed to rows (N, D),
without padding, except in attention; see tokens.py.

Letters: B batch, T time, N packed tokens, D hidden, C head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..method.experts import expert_layers
from .config import Config
from .layers import DecoderLayer, Part, RMSNorm, Rope, SandwichLayer
from .tokens import Cache, Tokens, shared_prefixes


def _checkpointed(layer: nn.Module, *inputs: Any) -> Tensor:
    """layer(*inputs); its activations are not kept, but computed again in the backward pass."""
    @contextmanager
    def recomputing() -> Iterator[None]:
        try:
            yield
        finally:         # detach the routers' logits: their graph would keep all activations
            for experts in expert_layers(layer).values():
                if experts.router_logits is not None:
                    experts.router_logits = experts.router_logits.detach()
    return checkpoint(layer, *inputs, use_reentrant=False,
                      context_fn=lambda: (nullcontext(), recomputing()))


class Decoder(Part):
    """Embedding, layers and the last norm."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.config = cfg
        # nn.Embedding would call normal_, which on the meta device imports torch's compiler: 1.2 s
        # and 75 MB. This uniform distribution has the same variance, 1.
        table = torch.empty(cfg.vocab_size, cfg.hidden_size).uniform_(-3 ** 0.5, 3 ** 0.5)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        layer = SandwichLayer if cfg.post_norms else DecoderLayer
        self.layers = nn.ModuleList(layer(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg)
        self.recompute = False       # activation checkpointing: slower, far less memory
        self.copies: Tensor | None = None    # `Tokens.copies` of the last forward
        for part in [part for part in self.modules() if isinstance(part, Part)]:
            part.rename(cfg.names or {})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                cache: Cache | None = None, needed: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of input_ids (B, T); zeros where attention_mask (B, T) is 0.

        needed (B, T) marks the positions that the caller reads; others may return zeros. The last
        MLP runs on needed positions only. A prefix that neighbouring rows share before their first
        needed position (a system prompt) runs once. With a filled cache, needed is ignored.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if needed is None or (cache is not None and cache.used):
            tokens, top = Tokens(mask, self.config, cache), None
        else:
            alike = shared_prefixes(input_ids, mask.bool() & ~needed)
            tokens = Tokens(mask, self.config, cache, alike)
            top = tokens.pack(needed.reshape(-1)).nonzero().squeeze(1)
        self.copies = tokens.copies
        x = self.embed_tokens(tokens.pack(input_ids.reshape(-1)))        # (N, D)
        if self.config.embedding_multiplier != 1:
            x = x * x.new_tensor(self.config.embedding_multiplier)       # rounded to x's dtype
        ropes: dict[str, Rope] = {"": None}
        for kind in {*self.config.ropes} - {""}:
            angles = tokens.positions[:, None] * rope_frequencies(self.config, kind).to(x.device)
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)    # (N, C / 2)
            ropes[kind] = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
        rows = len(x)
        for layer, kind in zip(self.layers, self.config.ropes):
            inputs = (x, tokens, ropes[kind], top if layer is self.layers[-1] else None)
            recompute = self.recompute and torch.is_grad_enabled()
            x = _checkpointed(layer, *inputs) if recompute else layer(*inputs)
        x = self.norm(x)
        if self.config.output_multiplier != 1:       # of the logits; the head is linear
            x = x * self.config.output_multiplier
        if top is not None:
            x = x.new_zeros(rows, x.shape[1]).index_copy(0, top, x)
        return tokens.unpack(x)


def rope_frequencies(cfg: Config, kind: str = "global") -> Tensor:
    """Radians a token turns each rotary pair, (C / 2,), in layers of a kind of `Config.ropes`.

    Linear scaling lowers all of them, llama3 scaling low ones.
    """
    theta, s = cfg.rope_theta, cfg.rope_scaling
    if kind == "local":
        theta, s = cfg.local_rope_theta or theta, None
    frequencies = theta ** (-torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
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
