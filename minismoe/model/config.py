"""The decoder's configuration, read from a checkpoint's config.json. The unknown is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        "sliding_window": 4096, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
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
# What a config.json may ask for, and its only value here.
REFUSED = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "conv_bias": False,
           "use_bidirectional_attention": False, "num_local_experts": 0}
FULL, SLIDING = "full_attention", "sliding_attention"        # types of layers
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
        size, number = partial(_size, config, wrong), partial(_number, config, wrong)
        D, H = size("hidden_size"), size("num_attention_heads")
        K, C = size("num_key_value_heads", H), size("head_dim", D // H or 1)
        if H % K:
            wrong.append("num_attention_heads is no multiple of num_key_value_heads")
        if C % 2 and C > 1:                                      # refused sizes are returned as 1
            wrong.append(f"head_dim = {C} is odd")
        act, bias = config.get("hidden_act", "silu"), bool(config.get("attention_bias"))
        if act not in ("silu", "swish", "gelu_pytorch_tanh"):
            wrong.append(f"hidden_act {act!r}: only silu and gelu_pytorch_tanh")
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            wrong.append(f"quantization_config ({method}): only bf16, fp16 and fp32 weights")
        wrong += [f"{name} = {config[name]!r}: only {value}" for name, value in REFUSED.items()
                  if (config.get(name) or value) != value]
        theta, scaling = _rope(config, wrong)
        layers = size("num_hidden_layers", most=1 << 8)
        found: dict[str, Any] = {
            "vocab_size": size("vocab_size"), "hidden_size": D,
            "intermediate_size": size("intermediate_size"),
            "num_hidden_layers": layers, "num_attention_heads": H, "num_key_value_heads": K,
            "head_dim": C, "rope_theta": theta, "rope_scaling": scaling,
            "max_position_embeddings": size("max_position_embeddings", 2048, most=1 << 31),
            "rms_norm_eps": number("rms_norm_eps", 1e-6),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
            "qkv_bias": bias or kind == "qwen2", "o_bias": bias and kind != "qwen2",
            "mlp_bias": bool(config.get("mlp_bias")), "qk_norm": kind == "qwen3",
            "activation": "silu" if act == "swish" else act, "names": MODULES.get(kind)}
        found |= _own(config, kind, D, range(layers), wrong)
        if wrong:
            raise ValueError("this model is not implemented: " + "; ".join(dict.fromkeys(wrong)))
        return cls(**found)


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
    return kind, config | {name: value for name, value in DEFAULTS.get(kind, {}).items()
                           if config.get(name) is None}


def _size(config: Mapping[str, Any], wrong: list[str], name: str, default: int | None = None,
          least: int = 1, most: int = 1 << 20) -> int:
    """config[name] if it is a size, else 1. `most` keeps a product of three sizes below 2^63."""
    size = default if config.get(name) is None else config[name]
    if isinstance(size, int) and not isinstance(size, bool) and least <= size <= most:
        return size
    wrong.append(f"{name} = {size!r} is not an integer from {least} to {most}")
    return 1


def _number(config: Mapping[str, Any], wrong: list[str], name: str, default: float | None = None,
            ) -> float:
    number = default if config.get(name) is None else config[name]
    if isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf:
        return float(number)
    wrong.append(f"{name} = {number!r} is not a positive number")
    return 1.0


def _rope(config: Mapping[str, Any], wrong: list[str]) -> tuple[float, dict[str, float] | None]:
    """theta and scaling, from the older `rope_scaling` or the newer `rope_parameters`."""
    older = config.get("rope_scaling") or {}             # theta stands beside it
    rope = config.get("rope_parameters") or older
    if config.get("model_type") == "gemma3_text" and isinstance(rope, Mapping) and FULL in rope:
        rope = rope[FULL]                                # of global layers; _own reads the other
    if isinstance(rope, Mapping) and isinstance(older, Mapping) and any(
            rope.get(key, value) != value for key, value in older.items()):
        wrong.append("rope_parameters and rope_scaling contradict each other")
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        wrong.append(f"rope {rope!r}: only one rope for all layers")
        rope = {}
    theta = _number({"rope_theta": config.get("rope_theta"), **rope}, wrong, "rope_theta", 1e4)
    for part in (config.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if part not in (None, 1):
            wrong.append(f"partial_rotary_factor {part}: only 1.0")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        scaling = {name: _number(rope, wrong, name) for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            wrong.append("rope type llama3: low_freq_factor is not below high_freq_factor")
    elif kind == "linear":
        scaling = {"factor": _number(rope, wrong, "factor")}
    elif kind != "default":
        wrong.append(f"rope type {kind!r}: only default, linear and llama3")
    return theta, scaling


def _own(config: Mapping[str, Any], kind: str, hidden: int, layers: range, wrong: list[str],
         ) -> dict[str, Any]:
    """The fields of Config that one family has, and those that tell layers apart."""
    size, number = partial(_size, config, wrong), partial(_number, config, wrong)
    slides = bool(config.get("use_sliding_window"))
    own, rotates, other = dict[str, Any](), [True] * len(layers), ""
    full: Any = layers               # with full attention, not `other`, if layer_types is left out
    if kind == "gemma3_text":
        every = size("sliding_window_pattern", 6)
        other, full = SLIDING, layers[every - 1::every]
        ropes, local = config.get("rope_parameters"), number("rope_local_base_freq", 1e4)
        if isinstance(ropes, Mapping) and SLIDING in ropes:
            local, scaled = _rope({"rope_parameters": ropes[SLIDING]}, wrong)
            wrong += [f"{SLIDING} with rope scaling {scaled}"] if scaled else []
        own = {"norm_offset": 1.0, "post_norms": True, "qk_norm": True, "local_rope_theta": local,
               "embedding_multiplier": hidden ** 0.5,
               "attention_multiplier": number("query_pre_attn_scalar", 256) ** -0.5}
    elif kind in ("granite", "granitemoehybrid"):
        own = {f"{name}_multiplier": number(f"{name}_multiplier", 1.0)
               for name in ("embedding", "attention", "residual")}
        own |= {"output_multiplier": 1 / number("logits_scaling", 1.0)}
        if kind == "granitemoehybrid":
            own, other = own | {"fused_mlp": True}, "attention"
            rotates = [config.get("position_embedding_type") == "rope"] * len(layers)
    elif kind == "lfm2":
        other, full = "conv", config.get("full_attn_idxs") or layers
        inner, step = size("intermediate_size"), size("block_multiple_of", 256)
        if config.get("block_auto_adjust_ff_dim", True):
            inner = int(number("block_ffn_dim_multiplier", 1.0) * (2 * inner // 3))
            inner = -(-inner // step) * step
        own = {"intermediate_size": inner, "qk_norm": True,
               "conv_size": size("conv_L_cache", 3, least=2, most=64)}
    elif kind == "smollm3":
        every = size("no_rope_layer_interval", 4)
        rotates = config.get("no_rope_layers") or [(i + 1) % every > 0 for i in layers]
        if not isinstance(rotates, list) or len(rotates) < len(layers):
            wrong.append(f"no_rope_layers {rotates!r}: expected 1 (rotates) or 0 for each layer")
            rotates = [True] * len(layers)
        other, full = SLIDING if slides else "", [i for i in layers if rotates[i]]
    elif kind == "mistral":
        other, full = SLIDING, []
    elif kind in ("qwen2", "qwen3") and slides:
        other, full = SLIDING, layers[:size("max_window_layers", 28, least=0)]
    if other == SLIDING and config.get("sliding_window", 4096) is None:
        other = ""
    types = _layer_types(config, layers, full, other, wrong)
    window = size("sliding_window", 4096, most=1 << 31) if SLIDING in types else None
    return own | {"windows": tuple(window if t == SLIDING else None for t in types),
                  "conv_layers": tuple(i for i, t in enumerate(types) if t == "conv"),
                  "no_rope_layers": tuple(i for i in layers if not rotates[i])}


def _layer_types(config: Mapping[str, Any], layers: range, full: Any, other: str, wrong: list[str],
                 ) -> list[str]:
    """FULL or `other` of each layer; full: those of full attention, if layer_types is left out."""
    plain = [FULL for _ in layers]
    if not isinstance(full, (list, range)):
        wrong.append(f"{full!r} does not tell the layers of full attention")
    elif other:
        types = config.get("layer_types") or [FULL if i in full else other for i in layers]
        if isinstance(types, list) and len(types) == len(layers) and {
                *map(str, types)} <= {FULL, other}:
            return types
        wrong.append(f"layer_types {types!r}: only {FULL} and {other}, one for each layer")
    return plain
