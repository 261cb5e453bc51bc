"""The decoder against `transformers`, in every family, padding and way of feeding it tokens."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, LLAMA3, padded, tiny_config
from torch import Tensor

from minismoe.model.attention import attend
from minismoe.model.checkpoint import load_model
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM
from minismoe.model.tokens import Cache, Tokens

LENGTHS = (17, 9, 1)                             # of three rows: full, padded, and a single token
CACHED = ("llama3", "llama_biases", "mistral_window", "qwen2_window", "qwen3", "gemma3", "lfm2",
          "lfm2_long", "smollm3_window", "qwen3_5", "qwen3_5_long")
Checkpoint = Callable[[str], tuple[Any, Path]]
close = partial(tiny.close, tolerance=1e-5)


def random_ids(batch: int = len(LENGTHS), length: int = LENGTHS[0], seed: int = 0) -> Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))


def expected(hf: Any, ids: Tensor) -> Tensor:
    """Logits of one whole row by `transformers`, (T, V)."""
    return hf(ids[None]).logits[0]


# Logits

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(checkpoint: Checkpoint, family: str) -> None:
    hf, folder = checkpoint(family)
    model, ids = load_model(folder), random_ids()
    assert model.config.max_position_embeddings == hf.config.max_position_embeddings
    close(model(ids), hf(ids).logits)
    for side in ("right", "left"):
        mask = padded(LENGTHS, side)[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        theirs = hf(ids, attention_mask=mask, position_ids=positions).logits
        close(model(ids, mask)[mask.bool()], theirs[mask.bool()])


@torch.no_grad()
def test_no_windows_mean_that_all_layers_run_and_see_all() -> None:
    """Layers of convolutions read no window, so that none of them would be missed."""
    model = CausalLM(tiny_config(windows=(), conv_layers=(0, 1), conv_size=3))
    assert model.config.windows == (None, None)
    hidden, ids = list[Tensor](), torch.arange(6)[None]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, inputs, y: hidden.append(y))
    model(ids)
    assert len(hidden) == 2


@torch.no_grad()
def test_holes_in_a_mask_are_skipped(checkpoint: Checkpoint) -> None:
    hf, folder = checkpoint("llama3")
    ids = random_ids(1)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0]])
    close(load_model(folder)(ids, mask)[0, mask[0].bool()], expected(hf, ids[mask.bool()]))


@torch.no_grad()
def test_pads_reach_nothing(checkpoint: Checkpoint) -> None:
    """Whatever stands at a pad, real positions are bitwise equal, and hidden states there are 0."""
    model, mask = load_model(checkpoint("qwen3")[1]), padded(LENGTHS, "left")[1]
    ids, others = random_ids(), random_ids(seed=1)
    others = torch.where(mask.bool(), ids, others)
    assert not torch.equal(ids, others)
    assert torch.equal(model.model(ids, mask), model.model(others, mask))
    assert not model.model(ids, mask)[~mask.bool()].any()
    assert model.model(ids, mask)[mask.bool()].abs().amax(-1).min() > 0


# Cache

@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", CACHED)
@torch.no_grad()
def test_a_cache_equals_one_pass(checkpoint: Checkpoint, family: str, side: str) -> None:
    """A prompt of unequal lengths, a chunk of three tokens, then single tokens. A row whose step is
    masked stands still: the others go on exactly, and it can go on later."""
    hf, folder = checkpoint(family)
    model, mask, ids = load_model(folder), padded(LENGTHS, side)[1], random_ids()
    more, alive = random_ids(3, 9, seed=2), torch.ones(3, 9, dtype=torch.long)
    alive[1, 4:6] = 0                            # stops, and resumes
    alive[2, 5:] = 0                             # stops for good
    cache = Cache(model, 3, 17 + 9)
    first, *steps = [model(ids, mask, cache), model(more[:, :3], cache=cache),
                     model(more[:, 3:4], cache=cache)]
    steps += [model(more[:, t:t + 1], alive[:, t:t + 1], cache) for t in range(4, 9)]
    assert cache.lengths == [17 + 9, 9 + 7, 1 + 5]
    for row, (real, on) in enumerate(zip(mask.bool(), alive.bool())):
        whole = expected(hf, torch.cat([ids[row][real], more[row][on]]))
        close(torch.cat([first[row][real], torch.cat(steps, 1)[row][on]]), whole)


# Config

MINIMAL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4}
YARN = {"rope_type": "yarn", "factor": 4.0}
WRONG: dict[str, tuple[Any, ...]] = {                # values of a key, which the message names
    "vocab_size": (None, 1048577), "hidden_size": ("32", 32.0, True), "intermediate_size": (-48,),
    "num_hidden_layers": (0, 257), "max_position_embeddings": (-1,), "head_dim": ([8], 7),
    "num_key_value_heads": (3,), "num_attention_heads": ([4],), "rope_theta": ("ten", -1.0),
    "rms_norm_eps": ("small", math.nan), "partial_rotary_factor": (0.5,),
    "model_type": (["llama"],), "quantization_config": ("awq",)}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({key: value}, key) for key, values in WRONG.items() for value in values),
    ({"model_type": "gpt2"}, "gpt2"),
    ({"model_type": None}, "model_type None"),
    ({"rope_scaling": YARN}, "yarn"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_scaling": "yarn"}, "yarn"),
    ({"rope_parameters": ["x"], "rope_scaling": {"rope_type": "default"}}, "only one rope"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LLAMA3},
     "rope_parameters and rope_scaling contradict"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "factor": "eight"}}, "eight"),
    ({"rope_scaling": {**LLAMA3, "factor": 0}}, "factor = 0"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": [1]}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"hidden_act": None}, "hidden_act None"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    *(({"model_type": "mistral", "sliding_window": n}, "sliding_window") for n in ("4096", 0)),
    *(({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4} | more, named)
      for more, named in (({"max_window_layers": "all"}, "max_window_layers"),
                          ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
                          ({"layer_types": ["sliding_attention"]}, "layer_types")))]


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=lambda x: str(x)[:60])
def test_config_refuses_what_is_not_implemented(change: dict[str, Any], named: str) -> None:
    Config.from_dict(MINIMAL)
    with pytest.raises(ValueError, match="not implemented") as e:
        Config.from_dict({**MINIMAL, **change})
    assert named in str(e.value)


def test_rope_of_old_and_new_config_files_is_read() -> None:
    old: dict[str, Any] = {"rope_theta": 500.0, "rope_scaling": {"type": "llama3"} | {
        k: v for k, v in LLAMA3.items() if not k.startswith("rope_")}}
    new = {"rope_parameters": LLAMA3 | {"rope_theta": 500}}
    both = new | {"rope_scaling": LLAMA3 | {"rope_theta": 500}}
    half = new | {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    wanted, *others = (Config.from_dict(MINIMAL | rope) for rope in (old, new, both, half))
    # A checkpoint's fingerprint reads the config's repr, so that must not tell the forms apart.
    assert all(config == wanted and repr(config) == repr(wanted) for config in others)
    assert wanted.rope_scaling == {k: v for k, v in LLAMA3.items() if not k.startswith("rope_")}
    assert wanted.rope_theta == 500.0
    plain = Config.from_dict(MINIMAL | {"rope_theta": 7e5, "rope_scaling": None})
    assert plain.rope_scaling is None
    assert plain == Config.from_dict(
        MINIMAL | {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}})
    assert Config.from_dict(MINIMAL).rope_theta == 10000.0


def test_windows_of_silent_configs_are_those_of_transformers() -> None:
    """What a config leaves out means what it means in `transformers`."""
    qwen = dict(MINIMAL, model_type="qwen2", sliding_window=8, max_window_layers=1)
    assert Config.from_dict({**MINIMAL, "model_type": "mistral"}).windows == (4096, 4096)
    assert Config.from_dict({**MINIMAL, "sliding_window": 8}).windows == (None, None)    # llama
    assert Config.from_dict(qwen).windows == (None, None)
    assert Config.from_dict({**qwen, "use_sliding_window": True}).windows == (None, 8)
    assert Config.from_dict({**qwen, "use_sliding_window": True, "layer_types": [
        "sliding_attention", "full_attention"]}).windows == (8, None)


# Packing

masks = st.integers(1, 6).flatmap(lambda T: st.lists(
    st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=4)).filter(
        lambda mask: any(map(any, mask)))
TINY = Config.from_dict(dict(MINIMAL, hidden_size=4, num_attention_heads=1, intermediate_size=4))


def tokens_of(mask: list[list[bool]], windows: tuple[int | None, ...], cache: Cache | None = None,
              ) -> Tokens:
    config, places = Config(**{**TINY.__dict__, "windows": windows}), torch.tensor(mask)
    return Tokens(places.long(), places.long(), config, torch.device("cpu"), cache=cache)


@given(masks)
def test_packing_and_unpacking_lose_nothing(mask: list[list[bool]]) -> None:
    tokens, real = tokens_of(mask, (None,)), torch.tensor(mask)
    B, T = real.shape
    x = torch.arange(1.0, B * T * 6 + 1).view(B, T, 2, 3)                # all different, none 0
    packed = x[real]
    assert torch.equal(tokens.unpack(packed), x * real[..., None, None])
    sequences = tokens.sequences(packed)                                 # (B, heads, T, C)
    assert sequences.shape == (B, 2, T, 3)
    for row, own, places in zip(sequences.transpose(1, 2), x, real):
        assert torch.equal(row[:int(places.sum())], own[places])
    assert torch.equal(tokens.flat(sequences), packed.flatten(1))
    assert torch.equal(tokens.positions, (real.cumsum(1) - 1)[real])


def test_gradients_of_packed_tokens_are_summed_over_the_rows_that_share_them() -> None:
    """Tokens 0 and 1 begin both rows of 4 places; row 0 has one more token, row 1 two."""
    ids, mask = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9]]), torch.tensor([[1, 1, 1, 0], [1] * 4])
    needed = mask.bool() & (torch.arange(4) > 1)
    tokens = Tokens(ids, mask, TINY, torch.device("cpu"), needed)
    assert tokens.ids.tolist() == [5, 6, 7, 8, 9] and tokens.read.tolist() == [2, 3, 4]
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    places, up = [0, 1, 2, 4, 5, 6, 7], torch.randn(8, 2, 3, dtype=torch.float64)
    y = tokens.sequences(x).transpose(1, 2).flatten(0, 1)                # (B*T, heads, C)
    assert torch.equal(y[places], x[[0, 1, 2, 0, 1, 3, 4]])
    up[3] = 0                                            # of a pad, which nothing reads
    (found,) = torch.autograd.grad(y, x, up)
    torch.testing.assert_close(found, torch.stack(
        [up[0] + up[4], up[1] + up[5], up[2], up[6], up[7]]))
    z = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    flat = tokens.flat(z)
    assert torch.equal(flat, z.transpose(1, 2).reshape(8, 6)[[0, 1, 2, 6, 7]])
    (found,) = torch.autograd.grad(flat, z, up[:5].flatten(1))
    wanted = torch.zeros(8, 2, 3, dtype=torch.float64)
    wanted[[0, 1, 2, 6, 7]] = up[:5]
    assert torch.equal(found, wanted.view(2, 4, 2, 3).transpose(1, 2))
    assert tokens.repeats.tolist() == [2, 2, 1, 1, 1]


@given(masks, masks, st.integers(1, 8))
def test_masks_show_each_query_its_window(
        first: list[list[bool]], then: list[list[bool]], window: int) -> None:
    """What each query sees, in a first batch alone and in a second that follows it in a cache."""
    then = [then[b % len(then)] for b in range(len(first))]
    cache = Cache(CausalLM(TINY), len(first), len(first[0]) + len(then[0]))
    past = [0] * len(first)
    for mask, given_cache in ((first, None), (first, cache), (then, cache)):
        tokens = tokens_of(mask, (None, window), given_cache)
        for w in (None, window):
            for b, row in enumerate(mask):
                for t in range(sum(row)):        # queries stand at the left of their row
                    at = t + (past[b] if given_cache else 0)
                    wanted = [k for k in range(at + 1) if w is None or at - k < w]
                    if tokens.masks[w] is None:
                        assert wanted == list(range(at + 1)), "causality does not say it all"
                    else:                # without a cache, one mask serves all rows
                        assert len(tokens.masks[w]) == (len(first) if given_cache else 1)
                        mask_of_row = tokens.masks[w][b if given_cache else 0, 0, t]
                        assert mask_of_row.nonzero()[:, 0].tolist() == wanted
        if given_cache:
            assert cache.lengths == past                 # a forward pass alone advances it
            past = [n + sum(row) for n, row in zip(past, mask, strict=True)]
            assert tokens.ends == past
            cache.lengths = past


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_attention_in_bfloat16_loses_no_more_than_rounding(heads: tuple[int, int], masked: bool,
                                                           size: float) -> None:
    """Scores are up to some hundreds, where bfloat16 has steps of 2: they must not be rounded."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 40, 8).bfloat16() for n in (heads[0], heads[1], heads[1]))
    mask = torch.ones(40, 40, dtype=torch.bool).tril().triu(-9)[None, None] if masked else None
    found = attend(q.requires_grad_(), k, v, mask, size * 0.3)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, is_causal=mask is None,
        scale=size * 0.3, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.003 * exact.norm()
