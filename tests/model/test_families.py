"""Families beside Llama against `transformers`, on random configurations of each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, random_hf

from minismoe.method.loss import supervised_losses
from minismoe.model.checkpoint import load_model
from minismoe.training.evaluate import generate

KINDS = ("smollm3", "granite", "granitemoehybrid", "gemma3_text", "lfm2")


def some_config(kind: str, seed: int) -> dict[str, Any]:
    """A config.json of a family, of random sizes, many of them odd."""
    r = random.Random(f"{kind} {seed}")
    K, share, C, layers = r.choice((1, 2, 3)), r.choice((1, 2, 3)), r.choice((4, 6, 10)), r.choice(
        (2, 3, 5))
    D = K * share * (C if kind in ("lfm2", "granite", "granitemoehybrid") else r.choice((5, 8)))
    config = SIZES | {
        "hidden_size": D, "intermediate_size": r.randint(11, 60), "num_hidden_layers": layers,
        "num_attention_heads": K * share, "num_key_value_heads": K, "head_dim": C,
        "tie_word_embeddings": r.random() < 0.5}
    if kind != "lfm2":
        config |= {"rms_norm_eps": r.choice((1e-6, 1e-2)), "attention_bias": r.random() < 0.3}
    window = r.choice((3, 7, 64))                    # of texts of up to 17 tokens
    types = ["full_attention", "sliding_attention"]
    if kind == "smollm3":
        config |= {"no_rope_layers": [r.randint(0, 1) for _ in range(layers)],
                   "mlp_bias": r.random() < 0.3, "rope_theta": r.choice((50.0, 2e6))}
        if r.random() < 0.5:
            config |= {"use_sliding_window": True, "sliding_window": window,
                       "layer_types": r.choices(types, k=layers)}
    if kind.startswith("granite"):
        config |= {"embedding_multiplier": r.uniform(0.5, 12), "logits_scaling": r.uniform(0.5, 8),
                   "attention_multiplier": r.uniform(0.1, 1), "residual_multiplier": r.random()}
    if kind == "granitemoehybrid":
        config |= {"num_local_experts": 0, "shared_intermediate_size": r.randint(11, 60),
                   "layer_types": ["full_attention"] * layers, "mamba_n_heads": D,
                   "position_embedding_type": r.choice(("rope", None))}
    if kind == "gemma3_text":
        config |= {"query_pre_attn_scalar": r.randint(1, 30), "sliding_window": window,
                   "rope_theta": 300.0, "rope_local_base_freq": r.choice((20.0, 300.0)),
                   **r.choice(({"layer_types": r.choices(types, k=layers)},
                               {"sliding_window_pattern": r.randint(1, 4)})),
                   "rope_scaling": r.choice((None, {"rope_type": "linear", "factor": 8.0}))}
    if kind == "lfm2":
        config |= {"norm_eps": r.choice((1e-5, 1e-2)), "conv_L_cache": r.randint(2, 5),
                   "block_multiple_of": r.choice((1, 24)), "block_auto_adjust_ff_dim": r.random()
                   < 0.5, "block_ffn_dim_multiplier": r.choice((1.0, 1.3)),
                   "layer_types": [*r.choices(("conv", "full_attention"), k=layers - 2),
                                   *r.sample(("conv", "full_attention"), 2)]}
    return config


def compare(kind: str, seed: int, folder: Path) -> None:
    """Logits with pads on either side, every gradient, and greedy texts."""
    config = some_config(kind, seed)
    hf = random_hf("", kind, **config)
    hf.save_pretrained(folder)
    model, g = load_model(folder), torch.Generator().manual_seed(seed)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in hf.named_parameters()}
    lengths = (17, random.Random(seed).randint(2, 16), 1)
    ids = torch.randint(97, (3, 17), generator=g)
    right = (torch.arange(17) < torch.tensor(lengths)[:, None]).long()
    for mask in (right, right.flip(1)):
        labels = torch.where(mask.cumsum(1) > 1, ids * mask - 100 * (1 - mask), -100)
        for m in (hf, model):
            m.requires_grad_(True).zero_grad()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = hf(ids, attention_mask=mask, position_ids=positions, labels=labels)
        ours = model(ids, mask)
        close(ours[mask.bool()], found.logits[mask.bool()])
        found.loss.backward()
        supervised_losses(model, ids, mask, labels)[0].mean().backward()
        theirs = dict(hf.named_parameters())
        largest = max(p.grad.abs().max() for p in theirs.values())
        for name, p in model.named_parameters():
            assert (p.grad - theirs[name].grad).abs().max() <= 1e-4 * largest, name
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    for prompt, text in zip(prompts, generate(model, prompts, 12, ())):
        said = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                           eos_token_id=None, use_cache=True)
        assert text == said[0, len(prompt):].tolist()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 2e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_random_models_equal_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    compare(kind, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 60))
@pytest.mark.parametrize("kind", KINDS)
def test_many_random_models_equal_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    compare(kind, seed, tmp_path)
