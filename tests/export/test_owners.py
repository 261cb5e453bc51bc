"""Folders of each family, opened by the programs that they are for."""

import json
from pathlib import Path

import pytest
import torch
from exported import stored
from test_layouts import CHAT, CONTEXT, LIMIT, Run, genai_says, needs_node, web_says
from tiny import BYTES, random_hf, save_imaged

import export
from minismoe.data.tokenizer import load_tokenizer
from minismoe.export.graph import write_decoder
from minismoe.export.layouts import copy_base_files, write_genai, write_web, write_weights
from minismoe.export.weights import GraphFormat
from minismoe.method.experts import linear_layers
from minismoe.method.freeze import Fit
from minismoe.model.checkpoint import load_model
from minismoe.training.evaluate import generate


@pytest.fixture(scope="module", params=["llama", "smollm3", "granite", "granite4", "gemma3", "lfm2",
                                        "qwen3_5"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Low-rank pairs of several ranks in a family's matrices."""
    base, g = tmp_path_factory.mktemp(request.param), torch.Generator().manual_seed(0)
    random_hf(request.param, vocab_size=BYTES["vocab_size"], hidden_size=64,
              head_dim=32 if request.param == "qwen3_5" else 16, eos_token_id=257,
              mamba_n_heads=64, tie_word_embeddings=request.param in ("lfm2", "qwen3_5")
              ).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] == "granitemoehybrid":   # as it is published, and transformers.js reads
        config["layer_types"] = ["attention"] * 2
        (base / "config.json").write_text(json.dumps(config))
    merged, pairs = load_model(base), {}
    for name, linear in linear_layers(merged).items():
        out, inputs = linear.weight.shape
        R = 2 + len(pairs) % 3
        A, B = torch.randn(R, inputs, generator=g) * 0.1, torch.randn(out, R, generator=g) * 0.1
        pairs[name] = Fit(A, B)
        linear.weight = torch.nn.Parameter(linear.weight + B @ A, requires_grad=False)
    tokenizer = load_tokenizer(base)
    prompt = tokenizer.encode(tokenizer.render(CHAT, add_generation_prompt=True))[0]
    return Run(base, pairs, merged, prompt, generate(merged, [prompt], LIMIT, [257])[0])


@torch.no_grad()
def test_transformers_and_peft_compute_the_same(run: Run, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    for layout in ("hf", "peft"):
        copy_base_files(run.base, tmp_path / layout)
        write_weights(layout, run.base, str(run.base), run.pairs, tmp_path / layout)
    auto, ids = transformers.AutoModelForCausalLM, torch.arange(40).view(2, 20) * 6
    want = run.merged(ids)
    for model in (auto.from_pretrained(tmp_path / "hf"), peft.PeftModel.from_pretrained(
            auto.from_pretrained(run.base), tmp_path / "peft").eval()):
        assert (model(ids).logits - want).abs().max() <= 2e-5 * want.abs().max()
    assert (auto.from_pretrained(run.base)(ids).logits - want).abs().max() > 1e-3 * want.abs().max()


def graph(run: Run, folder: Path) -> Path:
    copy_base_files(run.base, folder)
    write_decoder(folder / "model.onnx", run.merged, GraphFormat("ort", "fp32", CONTEXT))
    return folder


def test_genai_says_the_same(run: Run, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    write_genai(graph(run, tmp_path), CONTEXT)
    prompt, tokens, _ = genai_says(og.Model(str(tmp_path)))
    assert (prompt, tokens[:len(run.tokens)]) == (run.prompt, run.tokens)


@needs_node
def test_transformers_js_says_the_same(run: Run, tmp_path: Path) -> None:
    copy_base_files(run.base, tmp_path / "web")
    write_web(tmp_path / "web", run.merged, GraphFormat("ort", "fp32", CONTEXT),
              load_tokenizer(run.base).stop_ids)
    said = web_says(tmp_path / "web")
    assert (said["prompt"], said["tokens"][:len(run.tokens)]) == (run.prompt, run.tokens)


@needs_node
@pytest.mark.parametrize("precision", ["fp32", "q8"])
def test_transformers_js_opens_the_text_of_a_model_with_images(
        precision: str, tmp_path: Path, succeed) -> None:
    """What export.py writes of a checkpoint with images says what PyTorch does."""
    base, web = tmp_path / "base", tmp_path / "web"
    save_imaged(base, True)
    succeed(export.main, "--model", base, "--out", web, "--layout", "web", "--precision", precision)
    model, tokenizer = load_model(base), load_tokenizer(base)
    if precision == "q8":
        model = stored(model, GraphFormat("ort", precision, CONTEXT))
    prompt = tokenizer.encode(tokenizer.render(CHAT, add_generation_prompt=True))[0]
    tokens = generate(model, [prompt], LIMIT, tokenizer.stop_ids)[0]
    said = web_says(web)
    assert (said["prompt"], said["tokens"][:len(tokens)]) == (prompt, tokens)
