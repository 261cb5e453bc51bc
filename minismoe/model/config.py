"""The decoder's configuration, read from a checkpoint's config.json. The unknown is refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3", "gemma3_text",
               "lfm2", "qwen3_5", "qwen3_5_text")
# Models of text and images -> what transformers calls their text alone.
IMAGED = {"gemma3": "Gemma3ForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM"}
# Settings of theirs that stand outside of text_config.
OUTER = ("eos_token_id", "tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
# A family's defaults for what its config.json leaves out, where Llama has others.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "smollm3": {"rope_theta": 2e6, "tie_word_embeddings": True},
    "gemma3_text": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "max_position_embeddings": 1 << 17, "rope_theta": 1e6,
        "sliding_window": 4096, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "lfm2": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 128_000,
             "tie_word_embeddings": True},
    "qwen3_5_text": {
        "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 256, "max_position_embeddings": 1 << 15, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}}
# What a family calls a setting -> Llama's name of it.
SETTINGS = {"gemma3_text": {"hidden_activation": "hidden_act"},
            "lfm2": {"norm_eps": "rms_norm_eps", "block_ff_dim": "intermediate_size",
                     "tie_embedding": "tie_word_embeddings"}}
# Llama's name of a module -> that in the checkpoints of a family.
MODULES = {"lfm2": {"input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm",
                    "norm": "embedding_norm", "o_proj": "out_proj", "q_norm": "q_layernorm",
                    "k_norm": "k_layernorm", "mlp": "feed_forward", "gate_proj": "w1",
                    "up_proj": "w3", "down_proj": "w2"}}
# Settings that are refused unless they have this value.
REFUSED = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "conv_bias": False,
           "use_bidirectional_attention": False, "num_local_experts": 0, "num_experts": 0}
# Types of rope, and the numbers that each scales with.
ROPES = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
FULL, SLIDING = "full_attention", "sliding_attention"        # types of layers
CONV, DELTA = "conv", "linear_attention"


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
    rope_scaling: Mapping[str, float] | None = None  # None, linear's factor, llama3's four numbers
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()             # of each layer: tokens seen; None or (): all
    # What other families have; Llama has these defaults.
    activation: str = "silu"                         # or gelu_pytorch_tanh
    local_rope_theta: float = 0.0                    # of layers with a window; 0: as the others
    no_rope_layers: tuple[int, ...] = ()             # layers that do not rotate queries and keys
    norm_offset: float = 0.0                         # added to the stored weights of norms
    post_norms: bool = False                         # norms after attention and MLP, too
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None        # of the scores; None: 1 / sqrt(head_dim)
    conv_layers: tuple[int, ...] = ()                # with a short convolution, not attention
    conv_size: int = 0                               # tokens that it sees
    delta_layers: tuple[int, ...] = ()               # with a gated delta net, not attention
    linear_num_key_heads: int = 0                    # of delta nets
    linear_num_value_heads: int = 0                  # a multiple of it
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    rotary_size: int = 0                             # of a head, the part that turns; 0: all of it
    output_gate: bool = False                        # attention's output is gated
    names: Mapping[str, str] | None = None           # one of MODULES

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", self.windows or (None,) * self.num_hidden_layers)

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have keys and values."""
        return [i for i in range(self.num_hidden_layers) if i not in self.convolutions]

    @property
    def convolutions(self) -> dict[int, int]:
        """The layers with a short convolution, alone or in a delta net, and its channels."""
        return dict.fromkeys(self.conv_layers, self.hidden_size) | dict.fromkeys(
            self.delta_layers, sum(self.delta_parts))

    @property
    def delta_parts(self) -> tuple[int, int, int]:
        """Queries, keys and values that a delta net writes: the numbers of all heads."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return keys, keys, self.linear_num_value_heads * self.linear_value_head_dim

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
        """The checkpoint's name of a module or tensor, given Llama's name of it."""
        return renamed(module, self.names)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a config.json; ValueError names everything in it that is not implemented."""
        c = _as_llama(text_part(config))
        D, H = c.size("hidden_size"), c.size("num_attention_heads")
        K, C = c.size("num_key_value_heads", H), c.size("head_dim", D // H or 1)
        if H % K:
            c.wrong.append("num_attention_heads is no multiple of num_key_value_heads")
        if C % 2 and C > 1:                                      # refused sizes are returned as 1
            c.wrong.append(f"head_dim = {C} is odd")
        if (act := c.get("hidden_act", "silu")) not in ("silu", "swish", "gelu_pytorch_tanh"):
            c.wrong.append(f"hidden_act {act!r}: only silu and gelu_pytorch_tanh")
        if quantised := c.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            c.wrong.append(f"quantization_config ({method}): only bf16, fp16 and fp32 weights")
        c.wrong += [f"{name} = {c[name]!r}: only {value}" for name, value in REFUSED.items()
                    if (c.get(name) or value) != value]
        kind, bias = c["model_type"], bool(c.get("attention_bias"))
        theta, scaling = c.rope()
        layers = c.size("num_hidden_layers", most=1 << 8)
        fields: dict[str, Any] = dict(
            vocab_size=c.size("vocab_size"), hidden_size=D, num_hidden_layers=layers,
            intermediate_size=c.size("intermediate_size"), num_attention_heads=H,
            num_key_value_heads=K, head_dim=C, rope_theta=theta, rope_scaling=scaling,
            max_position_embeddings=c.size("max_position_embeddings", 2048, most=1 << 31),
            rms_norm_eps=c.number("rms_norm_eps", 1e-6), mlp_bias=bool(c.get("mlp_bias")),
            tie_word_embeddings=bool(c.get("tie_word_embeddings")),
            qkv_bias=bias or kind == "qwen2", o_bias=bias and kind != "qwen2",
            activation="silu" if act == "swish" else act, names=MODULES.get(kind))
        types = _types(c, range(layers), own := _own(c, range(layers)))
        window = c.size("sliding_window", 4096, most=1 << 31) if SLIDING in types else None
        fields |= {**own, "windows": tuple(window if t == SLIDING else None for t in types),
                   "conv_layers": tuple(i for i, t in enumerate(types) if t == CONV),
                   "delta_layers": tuple(i for i, t in enumerate(types) if t == DELTA)}
        if c.wrong:
            raise ValueError("this model is not implemented: " + "; ".join(dict.fromkeys(c.wrong)))
        return cls(**fields)


def renamed(module: str, names: Mapping[str, str] | None) -> str:
    """A dotted name whose parts are renamed as one of MODULES says."""
    return ".".join((names or {}).get(part, part) for part in module.split("."))


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in one of text and images; any other as it is."""
    if not isinstance(kind := config.get("model_type"), str) or kind not in IMAGED:
        return dict(config)
    if not isinstance(inner := config.get("text_config"), Mapping):
        raise ValueError(f"text_config of model_type {kind!r} is {inner!r}, not an object")
    outer = {name: config[name] for name in OUTER if config.get(name) is not None}
    return {**inner, "tie_word_embeddings": kind == "gemma3", **outer,
            "model_type": f"{kind}_text", "architectures": [IMAGED[kind]]}


class _Settings(dict[str, Any]):
    """The content of a config.json; `wrong` collects what in it is not implemented."""

    def __init__(self, config: Mapping[str, Any], wrong: list[str]):
        super().__init__(config)
        self.wrong = wrong

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = 1 << 20,
             ) -> int:
        """Integer `name` in least..most, else 1 and a note in `wrong`; (2^20)^3 is below 2^63."""
        size = default if self.get(name) is None else self[name]
        if type(size) is int and least <= size <= most:
            return size
        self.wrong.append(f"{name} = {size!r} is not an integer from {least} to {most}")
        return 1

    def number(self, name: str, default: float | None = None) -> float:
        number: Any = default if self.get(name) is None else self[name]
        if type(number) in (int, float) and 0 < number < math.inf:
            return float(number)
        self.wrong.append(f"{name} = {number!r} is not a positive number")
        return 1.0

    def rope(self) -> tuple[float, dict[str, float] | None]:
        """theta and scaling, from the older `rope_scaling` or the newer `rope_parameters`."""
        older = self.get("rope_scaling") or {}               # theta stands beside it
        rope = self.get("rope_parameters") or older
        if self.get("model_type") == "gemma3_text" and isinstance(rope, Mapping):
            rope = rope.get(FULL, rope)                      # `_own` reads that of windows
        if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
            self.wrong.append(f"rope {rope!r}: only one rope for all layers")
            rope = {}
        elif isinstance(older, Mapping) and any(rope.get(k, v) != v for k, v in older.items()):
            self.wrong.append("rope_parameters and rope_scaling contradict each other")
        turning = rope.get("partial_rotary_factor", self.get("partial_rotary_factor"))
        if self.get("model_type") == "qwen3_5_text":
            self["partial_rotary_factor"] = 0.25 if turning is None else turning
        elif turning not in (None, 1):
            self.wrong.append(f"partial_rotary_factor {turning}: only 1.0")
        rope = _Settings({"rope_theta": self.get("rope_theta"), **rope}, self.wrong)
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind not in ROPES:
            self.wrong.append(f"rope type {kind!r}: only {', '.join(ROPES)}")
        scaling = {name: rope.number(name) for name in ROPES.get(kind, ())}
        if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            self.wrong.append("rope type llama3: low_freq_factor is not below high_freq_factor")
        return rope.number("rope_theta", 1e4), scaling or None


def _as_llama(config: Mapping[str, Any]) -> _Settings:
    """The settings under Llama's names, with the family's defaults."""
    kind: Any = config.get("model_type")
    wrong = [] if kind in MODEL_TYPES else [
        f"model_type {kind!r}: only {', '.join(MODEL_TYPES)}"]
    kind = "llama" if wrong else kind
    llamas = {name: config[own] for own, name in SETTINGS.get(kind, {}).items() if own in config}
    given = {**config, **llamas, "model_type": kind}
    defaults = {name: value for name, value in DEFAULTS.get(kind, {}).items()
                if given.get(name) is None}
    return _Settings(given | defaults, wrong)


def _own(c: _Settings, layers: range) -> dict[str, Any]:
    """A family's own fields of Config."""
    kind = c["model_type"]
    if kind == "gemma3_text":
        ropes, local = c.get("rope_parameters"), c.number("rope_local_base_freq", 1e4)
        if isinstance(ropes, Mapping) and SLIDING in ropes:
            local, scaled = _Settings({"rope_parameters": ropes[SLIDING]}, c.wrong).rope()
            c.wrong += [f"{SLIDING} with rope scaling {scaled}"] if scaled else []
        return {"norm_offset": 1.0, "post_norms": True, "qk_norm": True, "local_rope_theta": local,
                "embedding_multiplier": c.size("hidden_size") ** 0.5,
                "attention_multiplier": c.number("query_pre_attn_scalar", 256) ** -0.5}
    if kind == "lfm2":
        inner, step = c.size("intermediate_size"), c.size("block_multiple_of", 256)
        if c.get("block_auto_adjust_ff_dim", True):
            inner = int(c.number("block_ffn_dim_multiplier", 1.0) * (2 * inner // 3))
            inner = -(-inner // step) * step
        taps = c.size("conv_L_cache", 3, least=2, most=64)
        return {"intermediate_size": inner, "conv_size": taps, "qk_norm": True}
    if kind == "qwen3_5_text":
        return _gated_delta_nets(c)
    if kind == "smollm3":
        period = c.size("no_rope_layer_interval", 4)
        rotates = c.get("no_rope_layers") or [(i + 1) % period for i in layers]
        if isinstance(rotates, list) and len(rotates) >= len(layers):
            return {"no_rope_layers": tuple(i for i in layers if not rotates[i])}
        c.wrong.append(f"no_rope_layers {rotates!r}: expected 1 (rotates) or 0 for each layer")
    return {"qk_norm": kind == "qwen3"}


def _types(c: _Settings, layers: range, own: Mapping[str, Any]) -> list[str]:
    """The type of each layer of a family whose own fields of Config are `own`."""
    kind, other = c["model_type"], SLIDING       # the type of the layers that are not FULL
    full: Any = layers                           # the FULL ones, if layer_types is left out
    if kind == "gemma3_text":
        full = layers[(period := c.size("sliding_window_pattern", 6)) - 1::period]
    elif kind == "qwen3_5_text":
        other, full = DELTA, layers[(period := c.size("full_attention_interval", 4)) - 1::period]
    elif kind == "lfm2":
        other, full = CONV, c.get("full_attn_idxs") or layers
    elif kind == "llama" or c.get("sliding_window", 4096) is None or not (
            kind == "mistral" or c.get("use_sliding_window")):
        return [FULL] * len(layers)
    elif kind == "smollm3":
        full = [i for i in layers if i not in own.get("no_rope_layers", ())]
    else:
        full = layers[:c.size("max_window_layers", 28, least=0) if kind != "mistral" else 0]
    if not isinstance(full, (list, range)):
        c.wrong.append(f"full_attn_idxs {full!r} does not tell the layers of full attention")
        return []
    types = c.get("layer_types") or [FULL if i in full else other for i in layers]
    if isinstance(types, list) and [str(t) in (FULL, other) for t in types] == [True] * len(layers):
        return types
    c.wrong.append(f"layer_types {types!r}: only {FULL} and {other}, one for each layer")
    return []


def _gated_delta_nets(c: _Settings) -> dict[str, Any]:
    """Qwen3.5's own fields of Config."""
    sizes = {name: c.size(name) for name in DEFAULTS["qwen3_5_text"] if name.startswith("linear_")}
    share, C = c.number("partial_rotary_factor"), c.size("head_dim")
    if (turned := int(share * C)) not in range(2, C + 1, 2):
        c.wrong.append(f"partial_rotary_factor {share}: of a head, pairs of numbers turn")
    if sizes["linear_num_value_heads"] % sizes["linear_num_key_heads"]:
        c.wrong.append("linear_num_value_heads is no multiple of linear_num_key_heads")
    return {"norm_offset": 1.0, "qk_norm": True, "output_gate": True, "rotary_size": turned,
            "conv_size": c.size("linear_conv_kernel_dim", 4, least=2, most=64), **sizes}
