"""Families against `transformers`, on random configurations of each."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture import frozen_layer, merge
from safetensors.torch import load_file, save_file
from tiny import QWEN, SIZES, close, edit_tensors, padded, random_hf, save_imaged
from transformers import AutoConfig, AutoModelForCausalLM

from minismoe.export.layouts import copy_base_files, write_hf, write_weights
from minismoe.io.files import read_json, write_json
from minismoe.method.loss import supervised_losses
from minismoe.model.checkpoint import load_model
from minismoe.model.config import Config, text_part
from minismoe.model.decoder import meta_model
from minismoe.training.evaluate import generate

KINDS = ("llama", "smollm3", "gemma3_text", "lfm2", "qwen3_5_text")


def some_config(kind: str, seed: int) -> dict[str, Any]:
    """A config.json of a family, of random sizes, many of them odd."""
    r = random.Random(f"{kind} {seed}")
    K, share, C, layers = r.choice((1, 2, 3)), r.choice((1, 2, 3)), r.choice((4, 6, 10)), r.choice(
        (2, 3, 5))
    D = K * share * (C if kind == "lfm2" else r.choice((5, 8)))
    config = SIZES | {
        "hidden_size": D, "intermediate_size": r.randint(11, 60), "num_hidden_layers": layers,
        "num_attention_heads": K * share, "num_key_value_heads": K, "head_dim": C,
        "tie_word_embeddings": r.random() < 0.5}
    if kind != "lfm2":
        config |= {"rms_norm_eps": r.choice((1e-6, 1e-2)), "attention_bias": r.random() < 0.3}
    window = r.choice((3, 7, 64))                    # of texts of up to 17 tokens
    types = ["full_attention", "sliding_attention"]
    if kind in ("llama", "smollm3"):
        config |= {"mlp_bias": r.random() < 0.3, "rope_theta": r.choice((50.0, 2e6))}
    if kind == "smollm3":
        config |= {"no_rope_layers": [r.randint(0, 1) for _ in range(layers)]}
        if r.random() < 0.5:
            config |= {"use_sliding_window": True, "sliding_window": window,
                       "layer_types": r.choices(types, k=layers)}
    if kind == "gemma3_text":
        config |= {"query_pre_attn_scalar": r.randint(1, 30), "sliding_window": window,
                   "rope_theta": 300.0, "rope_local_base_freq": r.choice((20.0, 300.0)),
                   **r.choice(({"layer_types": r.choices(types, k=layers)},
                               {"sliding_window_pattern": r.randint(1, 4)})),
                   "rope_scaling": r.choice((None, {"rope_type": "linear", "factor": 8.0}))}
    if kind == "qwen3_5_text":
        heads, types = r.choice((1, 2, 3)), ["linear_attention", "full_attention"]
        config |= {"linear_num_key_heads": heads,
                   "linear_num_value_heads": heads * r.choice((1, 2)),
                   "linear_key_head_dim": r.randint(2, 9), "linear_value_head_dim": r.randint(2, 9),
                   "linear_conv_kernel_dim": r.randint(2, 5), "rope_parameters": {
                       "rope_type": "default", "rope_theta": r.choice((50.0, 1e7)),
                       "partial_rotary_factor": r.choice(range(2, C + 1, 2)) / C}, **r.choice((
                           {"layer_types": [*r.choices(types, k=layers - 2), *r.sample(types, 2)]},
                           {"full_attention_interval": r.randint(1, layers)}))}
    if kind == "lfm2":
        config |= {"norm_eps": r.choice((1e-5, 1e-2)), "conv_L_cache": r.randint(2, 5),
                   "block_multiple_of": r.choice((1, 24)), "block_auto_adjust_ff_dim": r.random()
                   < 0.5, "block_ffn_dim_multiplier": r.choice((1.0, 1.3)),
                   "layer_types": [*r.choices(("conv", "full_attention"), k=layers - 2),
                                   *r.sample(("conv", "full_attention"), 2)]}
    return config


def close_in_float64(folder: Path, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor,
                     lengths: tuple[int, ...]) -> None:
    """Every gradient. transformers reads row by row without pads, which are NaN in its float64."""
    model = load_model(folder, torch.float64).requires_grad_(True)
    supervised_losses(model, ids, mask, labels)[0].mean().backward()
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64,
                                              attn_implementation="eager")
    rows = [(row[real.bool()], n - 1) for row, real, n in zip(ids, mask, lengths) if n > 1]
    for row, count in rows:
        loss = hf(row[None], labels=row[None]).loss
        (loss * count / sum(n for _, n in rows)).backward()
    theirs = dict(hf.named_parameters())
    largest = max(p.grad.abs().max() for p in theirs.values())
    # Delta nets and their norms stay float32 in transformers.
    tolerance = 1e-3 if model.config.delta_layers else 1e-4
    for name, p in model.named_parameters():
        its = theirs[model.config.name(name)].grad
        assert (p.grad - its).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("seed", [*range(3), *(
    pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
@pytest.mark.parametrize("kind", KINDS)
def test_random_models_equal_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    """Logits with pads on either side, every gradient, and greedy texts."""
    config = some_config(kind, seed)
    hf = random_hf("", kind, **config)
    hf.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert {model.config.name(n): p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in hf.named_parameters()}
    lengths = (17, random.Random(seed).randint(2, 16), 1)
    ids, right = padded(lengths, seed=seed, vocabulary=97)
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
            if (p.grad - theirs[model.config.name(name)].grad).abs().max() > 1e-4 * largest:
                # In float32 a norm over few numbers may lose more, in transformers, too.
                close_in_float64(tmp_path, ids, mask, labels, lengths)
                break
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    for prompt, text in zip(prompts, generate(model, prompts, 12, ())):
        said = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                           eos_token_id=None, use_cache=True)
        assert text == said[0, len(prompt):].tolist()


# Sizes as published, how many parameters they make, and what they mean. That of Gemma 3 1B
# equals the published count of keras-hub's presets.

GEMMA = {"model_type": "gemma3_text", "head_dim": 256, "num_attention_heads": 4,
         "num_key_value_heads": 1, "vocab_size": 262144, "sliding_window": 512,
         "max_position_embeddings": 32768, "hidden_activation": "gelu_pytorch_tanh"}
TEXT = QWEN["text_config"]
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma-3-1b": (999_885_952, GEMMA | {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": 256}),
    "SmolLM3-3B": (3_075_098_624, {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "vocab_size":
        128256, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "rope_theta": 5e6}),
    "Qwen3.5-0.8B": (752_393_024, QWEN),
    "LFM2-350M": (354_483_968, {
        "model_type": "lfm2", "hidden_size": 1024, "block_ff_dim": 6656, "vocab_size": 65536,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "norm_eps": 1e-5})}
EXPECTED: dict[str, dict[str, Any]] = {
    "gemma-3-1b": {"windows": ((512,) * 5 + (None,)) * 4 + (512, 512), "attention_scale": 1 / 16,
                   "ropes": (("local",) * 5 + ("global",)) * 4 + ("local", "local")},
    "SmolLM3-3B": {"no_rope_layers": tuple(range(3, 36, 4))},
    "Qwen3.5-0.8B": {"attention_layers": [*range(3, 24, 4)], "rotary_size": 64, "rope_theta": 1e7},
    "LFM2-350M": {"attention_layers": [2, 5, 8, 10, 12, 14]}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_make_the_published_models(name: str) -> None:
    count, settings = PUBLISHED[name]
    config = Config.from_dict(settings)
    assert sum(p.numel() for p in meta_model(config).parameters()) == count
    assert {key: getattr(config, key) for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize(("name", "change", "named"), [
    ("gemma-3-1b", {"model_type": "gemma3n_text"}, "gemma3n_text"),
    ("gemma-3-1b", {"model_type": "llava", "text_config": GEMMA}, "llava'"),
    ("gemma-3-1b", {"model_type": "gemma3", "text_config": GEMMA, "quantization_config": {
        "quant_method": "awq"}}, "awq"),
    ("gemma-3-1b", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma-3-1b", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
    ("gemma-3-1b", {"rope_parameters": {"full_attention": {"rope_type": "default"},
                                        "sliding_attention": {"rope_type": "yarn"}}}, "yarn"),
    ("gemma-3-1b", {"rope_parameters": {"full_attention": {"rope_type": "default"},
                                        "sliding_attention": "x"}}, "only one rope"),
    ("Qwen3.5-0.8B", {"quantization_config": {"quant_method": "fp8"}}, "(fp8): only bf16, fp16"),
    ("Qwen3.5-0.8B", {"text_config": TEXT | {
        "rope_parameters": {"partial_rotary_factor": 0.1}}}, "factor 0.1"),
    ("Qwen3.5-0.8B", {"text_config": TEXT | {"linear_num_value_heads": 24}}, "no multiple"),
    ("Qwen3.5-0.8B", {"text_config": TEXT | {"layer_types": ["conv"] * 24}}, "'conv'"),
    ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("SmolLM3-3B", {"num_local_experts": 8}, "num_local_experts = 8"),
    ("LFM2-350M", {"conv_bias": True}, "conv_bias = True"),
    ("LFM2-350M", {"conv_L_cache": 1}, "conv_L_cache = 1"),
    ("LFM2-350M", {"conv_L_cache": 65}, "conv_L_cache = 65"),
    ("LFM2-350M", {"full_attn_idxs": 3}, "3 does not tell"),
    ("LFM2-350M", {"layer_types": ["conv", {}] * 8}, "layer_types")])
def test_what_is_not_implemented_is_refused(name: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="not implemented") as e:
        Config.from_dict(PUBLISHED[name][1] | change)
    assert named in str(e.value)


# Text and images

def names(folder: Path) -> set[str]:
    """Names of all tensors in a folder's files."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "published"), [
    ("gemma3", True), ("gemma3", False), ("qwen3_5", False)])
@torch.no_grad()
def test_images_are_left_out(kind: str, published: bool, tied: bool, tmp_path: Path) -> None:
    """Loaded, and exported for `transformers` to open, in one file or in several."""
    hf = save_imaged(tmp_path / "base", published, tied, kind,
                     max_shard_size="1GB" if published else "20KB")
    start = "language_model.model." if published else "model.language_model."
    assert f"{start}norm.weight" in names(tmp_path / "base")
    ids, model = torch.randint(97, (2, 17)), load_model(tmp_path / "base")
    want = hf(ids).logits
    assert (model(ids) - want).abs().max() <= 1e-4 * want.abs().max()
    changed = "model.layers.1.mlp.up_proj"
    copy_base_files(tmp_path / "base", tmp_path / "out")
    layer = frozen_layer(model.get_submodule(changed), 2, 3)
    write_hf(tmp_path / "out", tmp_path / "base", {changed: layer})
    model.set_submodule(changed, layer)
    merge(model)
    want = model(ids)
    assert names(tmp_path / "out") == {n for n, _ in model.named_parameters()} - (
        {"lm_head.weight"} if tied else set())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == {
        "gemma3": "Gemma3ForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM"}[kind]
    for opened in (theirs(ids).logits, load_model(tmp_path / "out")(ids)):
        assert (opened - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
@torch.no_grad()
def test_peft_adapts_the_text_of_a_model_with_images(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    hf, folder = save_imaged(tmp_path / "base", True, kind=kind), tmp_path / "peft"
    name, model = "model.layers.1.mlp.up_proj", load_model(tmp_path / "base")
    model.set_submodule(name, frozen_layer(model.get_submodule(name), 3, 2))
    copy_base_files(tmp_path / "base", folder)
    write_weights("peft", tmp_path / "base", "base", model, folder)
    ids = torch.randint(97, (2, 17))
    merge(model)
    want = model(ids)
    assert (hf(ids).logits - want).abs().max() > 1e-3 * want.abs().max()
    found = peft.PeftModel.from_pretrained(hf, folder)(ids).logits
    assert (found - want).abs().max() <= 1e-4 * want.abs().max()


@torch.no_grad()
def test_heads_of_several_tokens_are_left_out(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with images as of one without; it is said, and they are not exported."""
    base, out = tmp_path / "base", tmp_path / "out"
    hf = random_hf("qwen3_5", vocab_size=259)
    hf.save_pretrained(base)
    ids = torch.arange(20)[None]
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(
        {"mtp.fc.weight": torch.zeros(2), "mtp.layers.0.mlp.up_proj.weight": torch.zeros(2)}))
    close(load_model(base)(ids), hf(ids).logits)
    assert "mtp.*, heads that predict several tokens, is left out" in capsys.readouterr().err
    copy_base_files(base, out)
    write_hf(out, base, {})
    assert names(out) == {*hf.state_dict()} - {"lm_head.weight"}


def test_only_known_parts_are_left_out(tmp_path: Path) -> None:
    """Names that are broken, and images beside another family, are surplus."""
    save_imaged(tmp_path, True)
    config, tensors = read_json(tmp_path / "config.json"), load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: torch.zeros(2) for name in (
        "language_model.model.norms.weight", "audio_tower.a", "language_model.extra")},
        tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as e:
        load_model(tmp_path)
    assert {part.split(": ")[-1] for part in str(e.value).split("; ")} == {
        "model.norms.weight is surplus", "audio_tower.a is surplus",
        "language_model.extra is surplus"}
    write_json(tmp_path / "config.json", text_part(config))
    with pytest.raises(ValueError, match="multi_modal_projector.*is surplus"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", config | {"text_config": None})
    with pytest.raises(ValueError, match="config.json: text_config .* is None, not an object"):
        load_model(tmp_path)


def test_what_a_text_config_leaves_out() -> None:
    """Gemma 3 4B as it is published: head sizes and theta are defaults, and the head is tied."""
    config = Config.from_dict({"model_type": "gemma3", "vision_config": {}, "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}})
    theirs = AutoConfig.for_model("gemma3_text")
    assert sum(p.numel() for p in meta_model(config).parameters()) == 3_880_263_168
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (256, 4, 1e6)
    bare = Config.from_dict({"model_type": "gemma3", "text_config": {}})
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                 "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                 "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(bare, name) == getattr(theirs, name), name
    assert bare.windows == tuple(None if t == "full_attention" else theirs.sliding_window
                                 for t in theirs.layer_types)
