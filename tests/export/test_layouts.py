"""Exported folders, each opened by the program that it is for; what is not installed is skipped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerators import needs
from exported import Runner, stored
from mixture import frozen_layer, merge
from safetensors import safe_open
from tiny import BYTES, CHATML, random_hf, save_imaged

import export
from minismoe.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from minismoe.export.graph import write_decoder
from minismoe.export.layouts import (
    copy_base_files,
    write_genai,
    write_hf,
    write_peft,
    write_web,
    write_weights,
)
from minismoe.export.weights import GraphFormat
from minismoe.io.files import read_json
from minismoe.method.experts import ExpertLinear, linear_layers
from minismoe.model.checkpoint import load_model
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM
from minismoe.training.evaluate import generate

SIZES = {"vocab_size": 340, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 0,
         "max_position_embeddings": 256}
EXPERTS = {"model.layers.0.self_attn.q_proj": (2, 2), "model.layers.1.self_attn.q_proj": (3, 2),
           "model.layers.1.self_attn.v_proj": (1, 3), "model.layers.0.mlp.down_proj": (1, 5),
           "model.layers.1.mlp.gate_proj": (2, 1)}       # how many, and their rank
CHAT = [{"role": "user", "content": "the cat?"}]
LIMIT, CONTEXT = 24, 128                          # new tokens; the merged model stops before


class Run(NamedTuple):
    """A base folder, frozen experts of some of its matrices, and what both together say."""

    base: Path
    experts: dict[str, ExpertLinear]
    merged: CausalLM
    prompt: list[int]
    tokens: list[int]                                # greedy, without the stop id
    text: str = ""


def adapted(base: Path, experts: dict[str, ExpertLinear]) -> CausalLM:
    """The model of a folder, with experts beside its weights."""
    model = load_model(base)
    for name, layer in experts.items():
        model.set_submodule(name, layer)
    return model


def merged(base: Path, experts: dict[str, ExpertLinear]) -> CausalLM:
    """The same, with the experts in the weights."""
    merge(model := adapted(base, experts))
    return model


def make_run(base: Path) -> Run:
    """A run of the tokenizer in `base`, whose merged model ends its answer with what only the chat
    template calls an end."""
    theirs, tokenizer = random_hf("llama", **SIZES), load_tokenizer(base)
    head = theirs.lm_head.weight.data
    for token, row in enumerate(head):               # only ASCII is ever said: logits of 0 are low
        text = tokenizer.decode([token])
        row *= bool(text) and text.isascii() and text.isprintable()
    theirs.save_pretrained(base)
    end = tokenizer.stop_ids[-1]
    model = load_model(base)
    experts = {name: frozen_layer(model.get_submodule(name), *sizes, seed=n)
               for n, (name, sizes) in enumerate(EXPERTS.items())}
    prompt = tokenizer.encode(tokenizer.render(CHAT, add_generation_prompt=True))[0]
    tokens = generate(merged(base, experts), [prompt], LIMIT, ())[0]
    stop = next(i for i in range(6, LIMIT) if tokens[i] not in tokens[:i])
    head[[end, tokens[stop]]] = head[[tokens[stop], end]]    # here, the end is what comes next
    theirs.save_pretrained(base)
    return Run(base, experts, merged(base, experts), prompt, tokens[:stop],
               tokenizer.decode(tokens[:stop]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> Run:
    """Of a byte-level BPE and ChatML; <|im_end|> is no eos of any configuration."""
    base = tmp_path_factory.mktemp("base")
    (base / "tokenizer.json").write_bytes(bpe.read_bytes())
    (base / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<s>"}))
    (base / "chat_template.jinja").write_text(CHATML)
    return make_run(base)


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without a tokenizer and without a template, as the built-in toy is."""
    base = tmp_path_factory.mktemp("bytes")
    (base / "config.json").write_text(json.dumps({"vocab_size": ByteTokenizer.vocab_size}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vocab_size", ByteTokenizer.vocab_size)
        return make_run(base)


@pytest.fixture(scope="module", params=["run", "byte_run"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["llama", "smollm3", "gemma3", "lfm2", "qwen3_5"])
def family_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of bytes: one to three frozen experts of all matrices of a family."""
    base = tmp_path_factory.mktemp(request.param)
    random_hf(request.param, vocab_size=BYTES["vocab_size"], hidden_size=64,
              head_dim=32 if request.param == "qwen3_5" else 16, eos_token_id=257,
              tie_word_embeddings=request.param in ("lfm2", "qwen3_5")).save_pretrained(base)
    experts = {name: frozen_layer(layer, 1 + n % 3, 2, scale=0.1, seed=n)
               for n, (name, layer) in enumerate(linear_layers(load_model(base)).items())}
    tokenizer, model = load_tokenizer(base), merged(base, experts)
    prompt = tokenizer.encode(tokenizer.render(CHAT, add_generation_prompt=True))[0]
    return Run(base, experts, model, prompt, generate(model, [prompt], LIMIT, [257])[0])


# Files of the base

def test_bytes_become_a_tokenizer_json(tmp_path: Path) -> None:
    """The built-in toy has no tokenizer file; what other programs get says the same."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"vocab_size": 259}))
    copy_base_files(tmp_path / "base", tmp_path / "out")
    ours, copied = load_tokenizer(tmp_path / "base"), load_tokenizer(tmp_path / "out")
    assert isinstance(ours.backend, ByteTokenizer) and isinstance(copied.backend, ByteTokenizer)
    theirs = FileTokenizer(tmp_path / "out/tokenizer.json")
    for text in ("the naïve café 日本 🙂\u2028 <|end|><|pad|> x  \n\t",
                 bytes(range(256)).decode("latin1")):
        ids = ours.encode(text)[0]
        assert theirs.encode(text)[0] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert copied.stop_ids == ours.stop_ids and copied.pad_id == ours.pad_id
    assert copied.render(CHAT, True) == ours.render(CHAT, True)
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert rendered == ours.render(CHAT, True)
    assert reference.encode(rendered, add_special_tokens=False) == ours.encode(rendered)[0]


# PEFT

def test_peft_of_every_matrix(run: Run, tmp_path: Path) -> None:
    """More names than PEFT keeps apart (it shortens lists from 20 on), in layers 1 and 11."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 12})
    model = transformers.LlamaForCausalLM(config)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
             and name != "lm_head" and "layers.11.mlp" not in name]
    write_peft(tmp_path, {n: frozen_layer(model.get_submodule(n), 1, 2) for n in names}, "base")
    adapted = {name.removeprefix("base_model.model.")
               for name, module in peft.PeftModel.from_pretrained(model, tmp_path).named_modules()
               if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert adapted == set(names)


def test_llama_cpp_converts_it(run: Run, tmp_path: Path) -> None:
    """MINISMOE_LLAMA_CPP is a checkout of llama.cpp, whose scripts and gguf-py are run."""
    checkout = Path(os.environ.get("MINISMOE_LLAMA_CPP", "/nowhere"))
    if not (checkout / "convert_lora_to_gguf.py").is_file():
        pytest.skip("MINISMOE_LLAMA_CPP names no checkout of llama.cpp")
    write_peft(tmp_path, run.experts, str(run.base))
    for command in ([checkout / "convert_lora_to_gguf.py", tmp_path, "--base", run.base,
                     "--outtype", "f32", "--outfile", tmp_path / "lora.gguf"],
                    ["-c", "import gguf, sys; r = gguf.GGUFReader(sys.argv[1]);"
                     "print(len(r.tensors), r.fields['adapter.lora.alpha'].contents())",
                     tmp_path / "lora.gguf"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(checkout / "gguf-py")})
        assert done.returncode == 0, done.stderr[-3000:]
    largest = max(E * r for E, r in EXPERTS.values())
    assert done.stdout.split() == [str(2 * len(EXPERTS)), str(float(largest))]


def test_peft_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to write"):
        write_peft(tmp_path, {}, "base")


# transformers

@pytest.fixture(scope="module")
def hf(any_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf")
    copy_base_files(any_run.base, out)
    write_hf(out, any_run.base, any_run.experts)
    return out


def test_transformers_says_the_same(any_run: Run, hf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    assert inputs["input_ids"][0].tolist() == any_run.prompt
    output = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)[0]
    assert output[len(any_run.prompt):-1].tolist() == any_run.tokens
    assert tokenizer.decode(output[len(any_run.prompt):], skip_special_tokens=True) == any_run.text


def test_we_open_our_own(any_run: Run, hf: Path) -> None:
    """Numbers that are merged may be rounded otherwise; all others are the same."""
    for (name, ours), theirs in zip(load_model(hf).named_parameters(), any_run.merged.parameters()):
        error = 1e-6 * (name.removesuffix(".weight") in EXPERTS)
        torch.testing.assert_close(ours, theirs, rtol=error, atol=error)


@torch.no_grad()
def test_transformers_and_peft_compute_the_same(family_run: Run, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run, auto = family_run, transformers.AutoModelForCausalLM
    model = adapted(run.base, run.experts)
    for layout in ("hf", "peft"):
        copy_base_files(run.base, tmp_path / layout)
        write_weights(layout, run.base, str(run.base), model, tmp_path / layout)
    ids = torch.arange(40).view(2, 20) * 6
    want = run.merged(ids)
    for model in (auto.from_pretrained(tmp_path / "hf"), peft.PeftModel.from_pretrained(
            auto.from_pretrained(run.base), tmp_path / "peft").eval()):
        assert (model(ids).logits - want).abs().max() <= 2e-5 * want.abs().max()
    assert (auto.from_pretrained(run.base)(ids).logits - want).abs().max() > 1e-3 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_shards_stay(run: Run, tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = random_hf("llama_tied", **SIZES).to(dtype)
    theirs.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    expected = {name: p.clone() for name, p in theirs.named_parameters()}
    experts = {}
    for name in ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"):
        experts[name] = layer = frozen_layer(theirs.get_submodule(name), 2, 1)
        layer.lora_A.data.fill_(0.5)
        layer.lora_B.data.fill_(1 / layer.scaling)
        expected[f"{name}.weight"] += 1
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", tmp_path / "base", experts)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert [f.name for f in files] == sorted(
        f.name for f in tmp_path.glob("base/*.safetensors")) and len(files) > 2
    (tmp_path / "out/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    for name, p in load_model(tmp_path / "out", dtype).named_parameters():
        assert p.dtype == dtype and torch.equal(p, expected[name]), name
    with safe_open(files[0], "pt") as f:
        assert f.metadata() == {"format": "pt"}


# onnxruntime-genai

def decoder(run: Run, out: Path, **options: Any) -> Any:
    """The merged model's graph and its tokenizer in `out`."""
    copy_base_files(run.base, out)
    form = GraphFormat(**{"target": "ort", "precision": "fp32", "context": CONTEXT} | options)
    write_decoder(out / "model.onnx", stored(run.merged, form), form)
    return load_tokenizer(run.base)


def greedy(run: Run, graph: Runner) -> list[int]:
    """New ids of the chat's prompt with the stop id, by a graph."""
    stops, ids, tokens = load_tokenizer(run.base).stop_ids, [*run.prompt], list[int]()
    while len(tokens) < LIMIT and not (tokens and tokens[-1] in stops):
        while ids:
            new = len(ids) % (graph.most or len(ids)) or graph.most or len(ids)
            logits, ids = graph(torch.tensor([ids[:new]])), ids[new:]
        tokens.append(int(logits[0, -1].argmax()))
        ids = tokens[-1:]
    return tokens


def genai_says(model: Any) -> tuple[list[int], list[int], str]:
    """Prompt ids, new ids with the stop id, and the streamed text, all by onnxruntime-genai."""
    import onnxruntime_genai as og

    tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template(json.dumps(CHAT), add_generation_prompt=True))
    params.set_search_options(max_length=len(prompt) + LIMIT)
    generator, stream = og.Generator(model, params), tokenizer.create_stream()
    generator.append_tokens(prompt)
    tokens: list[int] = []
    text = ""
    while not generator.is_done():
        generator.generate_next_token()
        tokens += [int(generator.get_next_tokens()[0])]
        text += stream.decode(tokens[-1])
    return [int(i) for i in prompt], tokens, text


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_genai_says_the_same_and_stops(any_run: Run, tmp_path: Path, target: str) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    tokenizer = decoder(any_run, tmp_path, target=target)
    write_genai(tmp_path, CONTEXT, share_buffer=target == "ort")
    prompt, tokens, text = genai_says(og.Model(str(tmp_path)))
    assert prompt == any_run.prompt
    assert tokens == [*any_run.tokens, tokenizer.stop_ids[-1]]
    assert text.removesuffix("<|im_end|>").removesuffix("<|end|>") == any_run.text


def test_genai_says_the_same_of_a_family(family_run: Run, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    decoder(family_run, tmp_path)
    write_genai(tmp_path, CONTEXT)
    prompt, tokens, _ = genai_says(og.Model(str(tmp_path)))
    assert (prompt, tokens[:len(family_run.tokens)]) == (family_run.prompt, family_run.tokens)


# In a process of its own: a provider's library serves one of the two onnxruntimes only.
ON_WEBGPU = """
import sys, onnxruntime_ep_webgpu, onnxruntime_genai as og
og.register_execution_provider_library("webgpu", onnxruntime_ep_webgpu.get_library_path())
config = og.Config(sys.argv[1])
config.append_provider("webgpu")
config.overlay('{"search": {"chunk_size": 31}}')         # tokens a step, as the runtime reads them
params = og.GeneratorParams(model := og.Model(config))
params.set_search_options(max_length=len(sys.argv) - 2 + int(sys.argv[2]))
generator = og.Generator(model, params)
generator.append_tokens(list(map(int, sys.argv[3:])))
while not generator.is_done():
    generator.generate_next_token()
    print(*generator.get_next_tokens())
"""


@needs("webgpu")
def test_genai_says_the_same_on_webgpu(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    tokenizer = decoder(run, tmp_path, target="ort")
    write_genai(tmp_path, CONTEXT)
    done = subprocess.run([sys.executable, "-c", ON_WEBGPU, str(tmp_path), str(LIMIT),
                           *map(str, run.prompt)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == [*run.tokens, tokenizer.stop_ids[-1]]


@pytest.mark.parametrize("block", [32, 64, 128])
def test_genai_reads_blocks_of_any_size(run: Run, tmp_path: Path, block: int) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    decoder(run, tmp_path, target="ort", precision="int4", block=block)
    write_genai(tmp_path, CONTEXT)
    assert genai_says(og.Model(str(tmp_path)))[1] == greedy(
        run, Runner(tmp_path / "model.onnx"))


@pytest.mark.parametrize("bos", [5, None])
def test_genai_without_a_stop(run: Run, tmp_path: Path, bos: int | None) -> None:
    """Some bases name no end, and some no start either; the configuration then leaves it out."""
    og = pytest.importorskip("onnxruntime_genai")
    decoder(run, tmp_path)
    file = tmp_path / "generation_config.json"
    generation = read_json(file) | {"eos_token_id": []}
    generation.pop("bos_token_id", None)
    file.write_text(json.dumps(generation | ({} if bos is None else {"bos_token_id": bos})))
    write_genai(tmp_path, CONTEXT)
    written = read_json(tmp_path / "genai_config.json")["model"]
    assert written.get("bos_token_id") == bos and written["eos_token_id"] == []
    assert genai_says(og.Model(str(tmp_path)))[1][:len(run.tokens)] == run.tokens


# transformers.js: MINISMOE_NODE_MODULES is where `npm install @huggingface/transformers` put it

NODE_MODULES = os.environ.get("MINISMOE_NODE_MODULES", "")
SCRIPT = """
import { createRequire } from "node:module";
import path from "node:path";
const [modules, folder, chat, limit] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } =
    createRequire(path.join(modules, "x.js"))("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + "/";
const name = path.basename(folder);
const session_options = { intraOpNumThreads: 1 };
const model = await AutoModelForCausalLM.from_pretrained(name, { session_options });
const tokenizer = await AutoTokenizer.from_pretrained(name);
const inputs = tokenizer.apply_chat_template(
    JSON.parse(chat), { add_generation_prompt: true, return_dict: true });
let text = "";
const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true, skip_special_tokens: true, callback_function: part => { text += part; } });
const output = await model.generate(
    { ...inputs, max_new_tokens: Number(limit), do_sample: false, streamer });
const prompt = inputs.input_ids.tolist()[0].map(Number);
console.log(JSON.stringify(
    { prompt, tokens: output.tolist()[0].map(Number).slice(prompt.length), text }));
"""
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and Path(NODE_MODULES, "@huggingface/transformers").is_dir()),
    reason="MINISMOE_NODE_MODULES names no node_modules with @huggingface/transformers")


def web_says(folder: Path) -> dict[str, Any]:
    """Prompt ids, new ids and the streamed text, by transformers.js in Node."""
    (folder.parent / "says.mjs").write_text(SCRIPT)
    command = ["node", folder.parent / "says.mjs", NODE_MODULES, folder, json.dumps(CHAT),
               str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def web_folder(run: Run, web: Path, precision: str = "fp32", block: int = 32) -> Path:
    """The layout of transformers.js, of a merged run."""
    copy_base_files(run.base, web)
    form = GraphFormat("ort", precision, CONTEXT, block)
    write_web(web, stored(run.merged, form), form)
    return web


@pytest.mark.parametrize("theirs", [
    None, [1], {"use_external_data_format": True, "dtype": {"model": "q8"}},
    {"kv_cache_dtype": {"q4f16": "float16"}, "device_config": {"wasm": {"dtype": "int8"}}}])
def test_what_a_base_says_for_transformers_js(run: Run, tmp_path: Path, theirs: Any) -> None:
    """In whatever form, it is of the base's own files, some of which the folder lacks."""
    base = shutil.copytree(run.base, tmp_path / "base")
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"transformers.js_config": theirs}))
    copy_base_files(base, tmp_path / "out")
    write_web(tmp_path / "out", run.merged, GraphFormat("ort", "fp32", CONTEXT))
    found = read_json(tmp_path / "out/config.json")["transformers.js_config"]
    assert found == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1},
                     "kv_cache_dtype": {"fp32": "float32"}}


@needs_node
@pytest.mark.parametrize("precision, block", [
    ("fp32", 32), ("fp16", 32), ("q8", 32), ("int4", 32), ("int4", 64), ("int4", 128)])
def test_transformers_js_says_the_same(any_run: Run, tmp_path: Path, precision: str,
                                       block: int) -> None:
    web, run = web_folder(any_run, tmp_path / "web", precision, block), any_run
    (name, count), = read_json(web / "config.json")["transformers.js_config"][
        "use_external_data_format"].items()          # Node finds the data without, a browser not
    assert {file.name for file in (web / "onnx").iterdir()} == {name, f"{name}_data"} and count == 1
    said = web_says(web)
    if precision == "fp32":
        stop = load_tokenizer(run.base).stop_ids[-1]
        assert said == {"prompt": run.prompt, "tokens": [*run.tokens, stop], "text": run.text}
    elif precision == "fp16":
        assert said["tokens"][0] == run.tokens[0]
    else:
        assert said["tokens"] == greedy(run, Runner(web / "onnx" / name))


@needs_node
def test_transformers_js_says_the_same_of_a_family(family_run: Run, tmp_path: Path) -> None:
    copy_base_files(family_run.base, tmp_path / "web")
    write_web(tmp_path / "web", family_run.merged, GraphFormat("ort", "fp32", CONTEXT))
    said = web_says(tmp_path / "web")
    assert (said["prompt"], said["tokens"][:len(family_run.tokens)]) == (
        family_run.prompt, family_run.tokens)


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


# OpenVINO, which takes the portable graphs

def in_openvino(file: Path) -> Runner:
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(str(file), "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})       # else it rounds activations too
    names = {name for port in model.inputs for name in port.get_names()}

    def run(feed: dict[str, Any]) -> dict[str, Any]:
        found = model({name: feed[name] for name in feed.keys() & names})
        return {name: value.copy() for port, value in found.items() for name in port.get_names()}

    return Runner(file, run=run)


@pytest.mark.parametrize("static", [None, (1, 8, 88), (1, 1, 100)])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4-8", "int4"])
def test_openvino_says_the_same(run: Run, tmp_path: Path, precision: str,
                                static: tuple[int, int, int] | None) -> None:
    """fp32 as PyTorch does; quantised as onnxruntime does with the same graph."""
    pytest.importorskip("openvino")
    tokenizer = decoder(run, tmp_path, target="portable", precision=precision, static=static)
    expected = [*run.tokens, tokenizer.stop_ids[1]]
    if precision != "fp32":
        expected = greedy(run, Runner(tmp_path / "model.onnx", exact=True))
    assert greedy(run, in_openvino(tmp_path / "model.onnx")) == expected


@pytest.mark.parametrize(("precision", "vocab", "hidden", "block"), [
    ("int8", 270_001, 32, 32), ("int4", 270_001, 32, 32), ("int4", 301, 192, 64),
    ("int8", 301, 128, 128), ("int4", 300, 128, 128)])
def test_openvino_reads_large_tables_and_large_blocks(
        tmp_path: Path, precision: str, vocab: int, hidden: int, block: int) -> None:
    """It computes places in integers as floats, which are inexact from 2^24 on."""
    pytest.importorskip("openvino")
    config = Config.from_dict({**SIZES, "vocab_size": vocab, "num_hidden_layers": 1,
                               "hidden_size": hidden, "intermediate_size": hidden,
                               "num_attention_heads": hidden // 16,
                               "model_type": "llama", "tie_word_embeddings": True})
    model, file = CausalLM(config), tmp_path / "model.onnx"
    form = GraphFormat("portable", precision, CONTEXT, block)
    write_decoder(file, stored(model, form), form)
    found = []
    for graph in Runner(file, exact=True), in_openvino(file):
        logits = graph(torch.tensor([[3, 4, vocab // 2, vocab - 2, vocab - 1]]))
        found.append([logits, *map(torch.from_numpy, graph.past.values())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)
