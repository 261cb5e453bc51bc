"""The delta rule against its plain loop, and delta nets on texts of several chunks."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from mixture import merge
from tiny import close, padded, random_hf, randomise
from torch import Tensor

from minismoe.method.experts import add_experts, linear_layers
from minismoe.method.freeze import freeze
from minismoe.method.hooks import reads
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM
from minismoe.model.delta import CHUNK, delta_rule
from minismoe.model.tokens import Cache, Tokens

LENGTHS = (150, 70, 3)           # of texts: three chunks, two, and a part of one


def plain_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, S: Tensor,
               ) -> tuple[Tensor, Tensor]:
    """y (B, H, T, V) and the memory after it, token by token. q and k (B, H, T, K), v
    (B, H, T, V), g and b (B, H, T), S (B, H, K, V)."""
    y = []
    for t in range(q.shape[2]):
        S = g[:, :, t, None, None].exp() * S
        said = (S * k[:, :, t, :, None]).sum(2)
        S = S + k[:, :, t, :, None] * (b[:, :, t, None] * (v[:, :, t] - said))[:, :, None]
        y.append((S * q[:, :, t, :, None]).sum(2))
    return torch.stack(y, 2), S


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_chunks_equal_the_plain_loop(length: int) -> None:
    """Outputs, the memory and every gradient, in float64; a chunk of one token, too."""
    torch.manual_seed(0)
    B, H, K, V = 2, 3, 5, 4
    q, k = (torch.nn.functional.normalize(torch.randn(B, H, length, K).double(), dim=-1)
            for _ in range(2))
    inputs = (q, k, torch.randn(B, H, length, V).double(), -torch.rand(B, H, length).double(),
              torch.rand(B, H, length).double(), torch.randn(B, H, K, V).double())
    size = CHUNK if length > 1 else 1

    def chunked(*rows: Tensor) -> tuple[Tensor, Tensor]:
        more = -length % size
        q, k, v, g, b = (torch.nn.functional.pad(
            x.view(B, H, length, -1), (0, 0, 0, more)).view(B, H, -1, size, x[0, 0, 0].numel())
            .permute(2, 0, 1, 3, 4) for x in rows[:5])
        y, S = delta_rule(q, k, v, g, b, rows[5])
        return y.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length], S

    found = []
    for rule in (chunked, plain_rule):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, S = rule(*leaves)
        up = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in (y, S)]
        found.append([y, S, *torch.autograd.grad((y, S), leaves, up)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    folder = tmp_path_factory.mktemp("qwen3_5")
    hf = random_hf("qwen3_5")
    hf.save_pretrained(folder)
    return hf, load_model(folder)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_long_texts_equal_transformers(pair: tuple[Any, CausalLM], side: str) -> None:
    """In one pass, and prompts of unequal lengths in a cache, before a chunk and single tokens."""
    (hf, model), (ids, mask) = pair, padded(LENGTHS, vocabulary=97)
    whole = [hf(torch.cat((row[:n], row[:9]))[None]).logits[0] for row, n in zip(ids, LENGTHS)]
    rows, real = (x if side == "right" else torch.stack([
        row.roll(LENGTHS[0] - n) for row, n in zip(x, LENGTHS)]) for x in (ids, mask))
    cache = Cache(model, 3, LENGTHS[0] + 9)
    once, first = model(rows, real), model(rows, real, cache)
    steps = [model(ids[:, :5], cache=cache), *(model(ids[:, t:t + 1], cache=cache)
                                               for t in range(5, 9))]
    for n, wanted in enumerate(whole):
        close(once[n][real[n].bool()], wanted[:LENGTHS[n]])
        close(torch.cat([first[n][real[n].bool()], *(x[n] for x in steps)]), wanted)


def test_shared_prefixes_change_neither_logits_nor_gradients(pair: tuple[Any, CausalLM]) -> None:
    """Sequences of a prefix of 66 tokens, which linear layers hold once."""
    model = pair[1].requires_grad_(True)
    ids = padded(LENGTHS, vocabulary=97)[0]
    ids[1:, :66] = ids[0, :66]
    mask, found = torch.ones_like(ids), []
    needed = torch.arange(LENGTHS[0]).expand_as(ids) >= 70
    for read in (needed, None):
        model.zero_grad()
        tokens = Tokens(ids, mask, model.config, torch.device("cpu"), read)
        assert tokens.shared == (read is not None)
        hidden = tokens.unpack(model.model.rows(tokens))[needed]
        model.lm_head(hidden).logsumexp(-1).mean().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_experts_are_frozen_and_merged(pair: tuple[Any, CausalLM]) -> None:
    """Routed ones on every matrix; those that read the same x are one group."""
    model = load_model(pair[1].name, torch.float64)
    layers = linear_layers(model)
    with pytest.raises(ValueError, match=r"rank 5 .*in_proj_a \[4, 32\]; give a smaller"):
        add_experts(model, dict.fromkeys(layers, 1), rank=5)
    randomise(add_experts(model, dict.fromkeys(layers, 2), rank=2))
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(97, (8, 20), generator=g), torch.ones(8, 20).long()
    assert freeze(model, (ids, mask, ids)).keys() == layers.keys()
    joined = copy.deepcopy(model)
    merge(joined)
    torch.testing.assert_close(model(ids, mask), joined(ids, mask))
    names = [f"model.layers.1.linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")]
    ((read, x),) = reads({name: joined.get_submodule(name) for name in names}, [
        partial(joined.model, ids, mask)]).items()
    assert [*read] == names and len(x) == mask.sum()

