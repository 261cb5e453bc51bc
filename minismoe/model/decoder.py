"""The decoder, with the module names of Llama's checkpoints, whatever the family.

One class serves Llama 1/2/3, SmolLM2/3, TinyLlama, Mistral, Qwen2/2.5/3/3.5, Gemma 3 and LFM2;
`Config` says how they differ. Tokens are packed to rows (N, D), without padding, except in
attention, convolutions and delta nets; see tokens.py.

Letters: B batch, T time, N packed tokens, S of them that are read, D hidden, C head size,
V vocabulary.
"""

from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..method.experts import expert_layers
from .attention import Attention, RMSNorm, Rope, ShortConv, rope_frequencies
from .config import Config
from .delta import DeltaNet
from .tokens import Cache, Tokens

ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    """down(f(gate x) * up x), where f is one of ACTIVATIONS, such as silu(z) = z sigmoid(z)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.activation = cfg.activation
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = ACTIVATIONS[self.activation](self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


MIXERS: dict[str, Any] = {"self_attn": Attention, "conv": ShortConv, "linear_attn": DeltaNet}


class DecoderLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.post_norms = cfg.post_norms
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg)
        self.mixer = ("conv" if layer in cfg.conv_layers else
                      "linear_attn" if layer in cfg.delta_layers else "self_attn")
        self.add_module(self.mixer, MIXERS[self.mixer](cfg, layer))
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg)
        self.mlp = MLP(cfg)
        if self.post_norms:              # Gemma normalises what attention and MLP write, too
            self.pre_feedforward_layernorm = RMSNorm(cfg.hidden_size, cfg)
            self.post_feedforward_layernorm = RMSNorm(cfg.hidden_size, cfg)

    def forward(self, x: Tensor, tokens: Tokens, rope: Rope) -> Tensor:
        y = getattr(self, self.mixer)(self.input_layernorm(x), tokens, rope)
        x = x + (self.post_attention_layernorm(y) if self.post_norms else y)
        if self.post_norms:
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x + self.mlp(self.post_attention_layernorm(x))


def _checkpointed(layer: nn.Module, *inputs: Any) -> Tensor:
    """layer(*inputs); its activations are not kept, but computed again in the backward pass."""
    def detach_logits() -> None:         # the graph of the routers' logits keeps all activations
        for experts in expert_layers(layer).values():
            if experts.router_logits is not None:
                experts.router_logits = experts.router_logits.detach()
    recomputing = ExitStack()
    recomputing.callback(detach_logits)
    return checkpoint(layer, *inputs, use_reentrant=False,
                      preserve_rng_state=False, context_fn=lambda: (nullcontext(), recomputing))


class Decoder(nn.Module):
    """Embedding, layers and the last norm. Its layers see rows (N, D) of real tokens alone."""

    packs_tokens = True

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
        x, ropes = self.embed(tokens)
        for layer, kind in zip(self.layers, self.config.ropes, strict=True):
            inputs = x, tokens, ropes[kind]
            x = _checkpointed(layer, *inputs) if recompute else layer(*inputs)
        if tokens.cache is not None:
            tokens.cache.lengths = tokens.ends
        return self.head_input(x, tokens)

    def embed(self, tokens: Tokens) -> tuple[Tensor, dict[str, Rope]]:
        """What the first layer reads, (N, D), and cos and sin by kind of rotary angles."""
        x = self.embed_tokens(tokens.ids)
        if self.config.embedding_multiplier != 1:
            x = x * x.new_full((), self.config.embedding_multiplier)     # rounded to x's dtype
        ropes: dict[str, Rope] = {"": None}
        for kind in {*self.config.ropes} - {""}:
            angles = tokens.positions[:, None] * rope_frequencies(self.config, kind, x.device)
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)    # (N, C / 2)
            ropes[kind] = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
        return x, ropes

    def head_input(self, x: Tensor, tokens: Tokens) -> Tensor:
        """What the head reads, (N, D) or (S, D), of what the last layer wrote."""
        return self.norm(x if tokens.read is None else x.index_select(0, tokens.read))


class CausalLM(nn.Module):
    """The decoder and its head: model(input_ids, attention_mask) -> logits."""

    name = ""              # the path or hub name that it was loaded from
    fingerprint = ""       # a hash that tells this base from others
    stored_dtype = ""      # of its weights in the checkpoint, such as bfloat16
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
