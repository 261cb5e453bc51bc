"""The decoder's configuration, read from a checkpoint's config.json. The unknown is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
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
    rope_scaling: Mapping[str, float] | None = None  # None, or llama3's four numbers
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()             # of each layer: tokens it sees, None = all

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Read a config.json; ValueError names everything in it that is not implemented."""
        wrong: list[str] = []
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            wrong.append(f"model_type {kind!r}: only {', '.join(MODEL_TYPES)}")
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
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            wrong.append(f"hidden_act {config['hidden_act']!r}: only silu")
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            wrong.append(f"quantization_config ({method}): only bf16, fp16 and fp32 weights")
        theta, scaling = _rope(config, wrong)
        bias = bool(config.get("attention_bias", False))
        windows = _windows(config, kind, sizes["num_hidden_layers"], wrong)
        eps = _number(config, "rms_norm_eps", 1e-6, wrong)
        if wrong:
            raise ValueError("this model is not implemented: " + "; ".join(wrong))
        return cls(**sizes, rms_norm_eps=eps, rope_theta=theta, rope_scaling=scaling,
                   tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                   qkv_bias=bias or kind == "qwen2", o_bias=bias and kind != "qwen2",
                   mlp_bias=bool(config.get("mlp_bias", False)), qk_norm=kind == "qwen3",
                   windows=windows)


def _size(config: Mapping[str, Any], name: str, default: int | None, wrong: list[str],
          most: int = 1 << 20) -> int:
    """config[name] if it is a size, else 1. `most` keeps a product of three sizes below 2^63."""
    size = default if config.get(name) is None else config[name]
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= most:
        return size
    wrong.append(f"{name} = {size!r} is not an integer from 1 to {most}")
    return 1


def _number(config: Mapping[str, Any], name: str, default: float | None, wrong: list[str]) -> float:
    number = default if config.get(name) is None else config[name]
    if isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf:
        return float(number)
    wrong.append(f"{name} = {number!r} is not a positive number")
    return 1.0


def _rope(config: Mapping[str, Any], wrong: list[str]) -> tuple[float, dict[str, float] | None]:
    """theta and llama3 scaling, from the older `rope_scaling` or the newer `rope_parameters`."""
    older = config.get("rope_scaling") or {}             # theta stands beside it
    rope = config.get("rope_parameters") or older
    if isinstance(rope, Mapping) and isinstance(older, Mapping) and any(
            rope.get(key, value) != value for key, value in older.items()):
        wrong.append("rope_parameters and rope_scaling contradict each other")
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        wrong.append(f"rope {rope!r}: only one rope for all layers")
        rope = {}
    theta = _number({"rope_theta": config.get("rope_theta"), **rope}, "rope_theta", 1e4, wrong)
    for partial in (config.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if partial not in (None, 1):
            wrong.append(f"partial_rotary_factor {partial}: only 1.0")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        scaling = {name: _number(rope, name, None, wrong) for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            wrong.append("rope type llama3: low_freq_factor is not below high_freq_factor")
    elif kind != "default":
        wrong.append(f"rope type {kind!r}: only default and llama3")
    return theta, scaling


def _windows(config: Mapping[str, Any], kind: Any, layers: int, wrong: list[str],
             ) -> tuple[int | None, ...]:
    """Sliding window of each layer. Without one in the config it is 4096, as in `transformers`."""
    if config.get("sliding_window", 4096) is None or not (
            kind == "mistral" or kind in ("qwen2", "qwen3") and config.get("use_sliding_window")):
        return (None,) * layers
    window = _size(config, "sliding_window", 4096, wrong, most=1 << 31)
    first = 0 if kind == "mistral" else config.get("max_window_layers", 28)
    if not isinstance(first, int):
        wrong.append(f"max_window_layers = {first!r} is not an integer")
        first = 0
    types = config.get("layer_types") or ["full_attention"] * min(first, layers) + [
        "sliding_attention"] * (layers - first)
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or not all(
            isinstance(t, str) and t in known for t in types):
        wrong.append(f"layer_types {types!r}: only {' and '.join(known)}, one for each layer")
        return (None,) * layers
    return tuple(known[t] for t in types)
