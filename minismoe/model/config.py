"""The decoder's configuration, read from a checkpoint's config.json. The unknown is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "granitemoehybrid",
               "gemma3", "gemma3_text", "lfm2")
# What a config.json of text and images says of both, beside its text_config.
OUTER = ("eos_token_id", "tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
# What config.json of a family may leave out, where Llama's defaults are others.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "smollm3": {"rope_theta": 2e6, "tie_word_embeddings": True},
    "granitemoehybrid": {"num_local_experts": 8, "layer_types": ["mamba"]},
    "gemma3_text": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "max_position_embeddings": 1 << 17, "rope_theta": 1e6,
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "lfm2": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 128_000,
             "tie_word_embeddings": True}}
# What a family calls a setting -> Llama's name of it.
SETTINGS = {"granitemoehybrid": {"shared_intermediate_size": "intermediate_size"},
            "gemma3_text": {"hidden_activation": "hidden_act"},
            "lfm2": {"norm_eps": "rms_norm_eps", "block_ff_dim": "intermediate_size",
                     "tie_embedding": "tie_word_embeddings"}}
# Llama's name of a module -> that in the checkpoints of a family.
MODULES = {"granitemoehybrid": {"mlp": "shared_mlp", "down_proj": "output_linear"},
           "lfm2": {"input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm",
                    "norm": "embedding_norm", "o_proj": "out_proj", "q_norm": "q_layernorm",
                    "k_norm": "k_layernorm", "mlp": "feed_forward", "gate_proj": "w1",
                    "up_proj": "w3", "down_proj": "w2"}}
OLDER = 17                    # fields that the text of every Config holds


@dataclass(frozen=True, repr=False)
class Config:
    """The fields of config.json that the decoder needs, mostly under the same names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, float] | None = None  # None, linear's factor, llama3's four numbers
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()             # of each layer: tokens it sees, None = all
    # What other families have; Llama has these defaults.
    activation: str = "silu"                         # or gelu_pytorch_tanh
    local_rope_theta: float | None = None            # of layers with a window; None: as the others
    no_rope_layers: tuple[int, ...] = ()             # layers that do not rotate queries and keys
    norm_offset: float = 0.0                         # added to the stored weights of norms
    post_norms: bool = False                         # norms after attention and MLP, too
    fused_mlp: bool = False                          # gate and up are one matrix
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None        # of the scores; None: 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0                 # of what attention and MLP add
    output_multiplier: float = 1.0                   # of the logits
    conv_layers: tuple[int, ...] = ()                # with a short convolution, not attention
    conv_size: int = 0                               # tokens that it sees
    names: Mapping[str, str] | None = None           # one of MODULES

    def __repr__(self) -> str:
        """The text that fingerprints hash. Families that came later leave that of others alone."""
        shown = [f.name for n, f in enumerate(fields(self))
                 if n < OLDER or getattr(self, f.name) != f.default]
        return f"Config({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have keys and values."""
        return [i for i in range(self.num_hidden_layers) if i not in self.conv_layers]

    @property
    def attention_scale(self) -> float:
        """What attention multiplies the products of queries and keys with."""
        return self.attention_multiplier or self.head_dim ** -0.5

    @property
    def ropes(self) -> tuple[str, ...]:
        """Rotary frequencies of each layer: "global", "local", or "" without rotation."""
        return tuple("" if i in self.no_rope_layers else
                     "local" if window and self.local_rope_theta else "global"
                     for i, window in enumerate(self.windows))

    def name(self, module: str) -> str:
        """The checkpoint's name of a module, given Llama's name of it."""
        return ".".join((self.names or {}).get(part, part) for part in module.split("."))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Read a config.json; ValueError names everything in it that is not implemented."""
        wrong: list[str] = []
        kind, config = _as_llama(text_part(config), wrong)
        sizes = {name: _size(config, name, None, wrong) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
        heads = sizes["num_attention_heads"]
        sizes |= {
            "num_hidden_layers": _size(config, "num_hidden_layers", None, wrong, most=1 << 8),
            "num_key_value_heads": _size(config, "num_key_value_heads", heads, wrong),
            "head_dim": _size(config, "head_dim", sizes["hidden_size"] // heads or 1, wrong),
            "max_position_embeddings": _size(config, "max_position_embeddings", 2048, wrong,
                                             most=1 << 31)}
        if heads % sizes["num_key_value_heads"]:
            wrong.append("num_attention_heads is no multiple of num_key_value_heads")
        if sizes["head_dim"] % 2 and sizes["head_dim"] > 1:      # refused sizes are returned as 1
            wrong.append(f"head_dim = {sizes['head_dim']} is odd")
        act = config.get("hidden_act", "silu")
        if act not in ("silu", "swish", "gelu_pytorch_tanh"):
            wrong.append(f"hidden_act {act!r}: only silu and gelu_pytorch_tanh")
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            wrong.append(f"quantization_config ({method}): only bf16, fp16 and fp32 weights")
        theta, scaling = _rope(config, wrong)
        bias = bool(config.get("attention_bias", False))
        still = _no_rope(config, kind, sizes["num_hidden_layers"], wrong)
        types = _layer_types(config, kind, sizes["num_hidden_layers"], still, wrong)
        window = _size(config, "sliding_window", 4096, wrong, most=1 << 31) if (
            "sliding_attention" in types) else None
        eps = _number(config, "rms_norm_eps", 1e-6, wrong)
        own = _own(config, kind, sizes, wrong)
        if wrong:
            raise ValueError("this model is not implemented: " + "; ".join(wrong))
        return cls(**{**sizes, **own}, rms_norm_eps=eps, rope_theta=theta, rope_scaling=scaling,
                   tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                   qkv_bias=bias or kind == "qwen2", o_bias=bias and kind != "qwen2",
                   mlp_bias=bool(config.get("mlp_bias", False)),
                   qk_norm=kind in ("qwen3", "lfm2", "gemma3_text"), names=MODULES.get(kind),
                   activation="silu" if act == "swish" else act, no_rope_layers=still,
                   windows=tuple(window if t == "sliding_attention" else None for t in types),
                   conv_layers=tuple(i for i, t in enumerate(types) if t == "conv"))


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in one of text and images; any other as it is."""
    if config.get("model_type") != "gemma3":
        return dict(config)
    if not isinstance(inner := config.get("text_config"), Mapping):
        raise ValueError(f"text_config of model_type 'gemma3' is {inner!r}, not an object")
    outer = {name: config[name] for name in OUTER if config.get(name) is not None}
    return {**inner, "tie_word_embeddings": True, **outer,
            "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def _as_llama(config: Mapping[str, Any], wrong: list[str]) -> tuple[str, Mapping[str, Any]]:
    """model_type, and the settings under Llama's names, with the family's defaults."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        wrong.append(f"model_type {kind!r}: only {', '.join(MODEL_TYPES)}")
        return "llama", config
    config = {**config, **{
        name: config[own] for own, name in SETTINGS.get(kind, {}).items() if own in config}}
    config |= {n: v for n, v in DEFAULTS.get(kind, {}).items() if config.get(n) is None}
    ropes = config.get("rope_parameters")
    if kind == "gemma3_text" and isinstance(ropes, Mapping) and "sliding_attention" in ropes:
        config["rope_local_base_freq"], scaled = _rope(
            {"rope_parameters": ropes["sliding_attention"]}, wrong)
        wrong += [f"sliding_attention with rope scaling {scaled}"] if scaled else []
        config["rope_parameters"] = ropes.get("full_attention")
    return kind, config


def _own(config: Mapping[str, Any], kind: str, sizes: Mapping[str, int], wrong: list[str],
         ) -> dict[str, Any]:
    """The fields of Config that one family has."""
    number = partial(_number, config, wrong=wrong)
    refused = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "conv_bias": False,
               "use_bidirectional_attention": False, "num_local_experts": 0}
    wrong += [f"{name} = {config[name]!r}: only {value}" for name, value in refused.items()
              if (config.get(name) or value) != value]
    if kind == "gemma3_text":
        return {"norm_offset": 1.0, "post_norms": True,
                "embedding_multiplier": sizes["hidden_size"] ** 0.5,
                "local_rope_theta": number("rope_local_base_freq", 1e4),
                "attention_multiplier": number("query_pre_attn_scalar", 256) ** -0.5}
    if kind.startswith("granite"):
        return {"fused_mlp": kind == "granitemoehybrid",
                "output_multiplier": 1 / number("logits_scaling", 1.0), **{
                    f"{name}_multiplier": number(f"{name}_multiplier", 1.0)
                    for name in ("embedding", "attention", "residual")}}
    if kind == "lfm2":
        inner, step = sizes["intermediate_size"], _size(config, "block_multiple_of", 256, wrong)
        if config.get("block_auto_adjust_ff_dim", True):
            inner = int(number("block_ffn_dim_multiplier", 1.0) * (2 * inner // 3))
            inner = -(-inner // step) * step
        return {"intermediate_size": inner,
                "conv_size": _size(config, "conv_L_cache", 3, wrong, least=2, most=64)}
    return {}


def _size(config: Mapping[str, Any], name: str, default: int | None, wrong: list[str],
          most: int = 1 << 20, least: int = 1) -> int:
    """config[name] if it is a size, else 1. `most` keeps a product of three sizes below 2^63."""
    size = default if config.get(name) is None else config[name]
    if isinstance(size, int) and not isinstance(size, bool) and least <= size <= most:
        return size
    wrong.append(f"{name} = {size!r} is not an integer from {least} to {most}")
    return 1


def _number(config: Mapping[str, Any], name: str, default: float | None, wrong: list[str]) -> float:
    number = default if config.get(name) is None else config[name]
    if isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf:
        return float(number)
    wrong.append(f"{name} = {number!r} is not a positive number")
    return 1.0


def _rope(config: Mapping[str, Any], wrong: list[str]) -> tuple[float, dict[str, float] | None]:
    """theta and scaling, from the older `rope_scaling` or the newer `rope_parameters`."""
    older = config.get("rope_scaling") or {}             # theta stands beside it
    rope = config.get("rope_parameters") or older
    if isinstance(rope, Mapping) and isinstance(older, Mapping) and any(
            rope.get(key, value) != value for key, value in older.items()):
        wrong.append("rope_parameters and rope_scaling contradict each other")
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        wrong.append(f"rope {rope!r}: only one rope for all layers")
        rope = {}
    theta = _number({"rope_theta": config.get("rope_theta"), **rope}, "rope_theta", 1e4, wrong)
    for part in (config.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if part not in (None, 1):
            wrong.append(f"partial_rotary_factor {part}: only 1.0")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        scaling = {name: _number(rope, name, None, wrong) for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            wrong.append("rope type llama3: low_freq_factor is not below high_freq_factor")
    elif kind == "linear":
        scaling = {"factor": _number(rope, "factor", None, wrong)}
    elif kind != "default":
        wrong.append(f"rope type {kind!r}: only default, linear and llama3")
    return theta, scaling


def _no_rope(config: Mapping[str, Any], kind: str, layers: int, wrong: list[str],
             ) -> tuple[int, ...]:
    """The layers that do not rotate queries and keys."""
    rotates: Any = [1] * layers
    if kind == "granitemoehybrid" and config.get("position_embedding_type") != "rope":
        rotates = [0] * layers
    elif kind == "smollm3":
        every = _size(config, "no_rope_layer_interval", 4, wrong)
        rotates = config.get("no_rope_layers") or [(i + 1) % every for i in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers:
        wrong.append(f"no_rope_layers {rotates!r}: expected 1 for each layer that rotates, or 0")
        return ()
    return tuple(i for i in range(layers) if not rotates[i])


def _layer_types(config: Mapping[str, Any], kind: str, layers: int, still: Collection[int],
                 wrong: list[str]) -> list[str]:
    """full_attention, sliding_attention or conv, of each layer; `still` do not rotate."""
    plain, other, full = ["full_attention"] * layers, "sliding_attention", config.get(
        "full_attn_idxs") or [*range(layers)]
    if kind in ("lfm2", "granitemoehybrid"):
        other = "conv" if kind == "lfm2" else "attention"
    elif kind == "gemma3_text":
        every = _size(config, "sliding_window_pattern", 6, wrong)
        full = [*range(every - 1, layers, every)]
    elif config.get("sliding_window", 4096) is None or kind != "mistral" and not (
            kind in ("qwen2", "qwen3", "smollm3") and config.get("use_sliding_window")):
        return plain
    elif kind == "smollm3":
        full = [i for i in range(layers) if i not in still]
    else:
        first = 0 if kind == "mistral" else config.get("max_window_layers", 28)
        full = [*range(first)] if isinstance(first, int) else f"max_window_layers = {first!r}"
    if not isinstance(full, list):
        wrong.append(f"{full} does not tell the layers of full attention")
        return plain
    types = config.get("layer_types") or [plain[0] if i in full else other for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not {*map(str, types)} <= {
            plain[0], other}:
        wrong.append(f"layer_types {types!r}: only {plain[0]} and {other}, one for each layer")
        return plain
    return types
