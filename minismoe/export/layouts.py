"""The folders that programs open: ours, PEFT, transformers, onnxruntime-genai, transformers.js."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.templates import DEFAULT_TEMPLATE, chat_template
from ..data.tokenizer import ByteTokenizer, load_tokenizer
from ..io.files import inside, last_part, read_json, write_json
from ..method.experts import ExpertLinear, expert_layers, merged
from ..method.vocabulary import BYTES
from ..model.checkpoint import LEFT_OUT, MERGED, read_config, text_name, weight_files
from ..model.config import CONV, DELTA, FULL, Config, text_part
from ..model.decoder import CausalLM
from ..model.quantize import BlockWeight
from .contract import contract
from .graph import write_decoder
from .npu import compile_npu, write_npu
from .sampler import write_sampler
from .ship import Part
from .weights import PRECISIONS, GraphFormat

# How transformers.js names a model's file, by our precision: its dtype, and the suffix of that.
WEB_DTYPES = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "int8": ("int8", "_int8"),
              "int4-8": ("q4", "_q4"), "int4": ("q4", "_q4"), "q8": ("q8", "_quantized"),
              "q4f16": ("q4f16", "_q4f16")}

Experts = Mapping[str, ExpertLinear]         # by module; without routers
LEGAL = r"(licen[cs]e|notice|copying|use_policy)[\w.-]*$"        # files that go with the weights


def write_graph(part: Part, folder: Path) -> dict[str, Any]:
    """Write the decoder, sampler.onnx and what the layout's own program needs beside the
    files of `copy_base_files`; returns the entries of export.json on them."""
    config, sizes, name = part.config, part.shipped.config, "model.onnx"
    half = PRECISIONS[config.precision].half
    stops = read_json(folder / "generation_config.json")["eos_token_id"]
    if config.target == "npu":
        write_npu(folder, part.shipped, config.form, part.ranges)
        if config.chip:
            compile_npu(folder, config.chip)
    elif config.layout == "web":
        name = write_web(folder, part.shipped, config.form)
    else:
        write_decoder(folder / name, part.shipped, config.form)
    said = contract(folder, name, config.target, stops)
    if config.layout == "genai":
        write_genai(folder, config.context or 0, said["cache"] == "shared")
    write_sampler(folder / "sampler.onnx", sizes.vocab_size)
    return {"target": config.target, "precision": config.precision, "context": config.context,
            "static": config.static, "layers": len(sizes.attention_layers),
            "kv_heads": sizes.num_key_value_heads, "head_dim": sizes.head_dim,
            "vocab_size": sizes.vocab_size, "bits": {
                name: [leaf.weight.bits, leaf.weight.size]
                for name, leaf in part.shipped.named_modules()
                if isinstance(getattr(leaf, "weight", None), BlockWeight)},
            "cache_type": "float16" if config.target == "npu" or half else "float32",
            "contract": said,
            **({"soc": config.chip} if config.chip else {})}


def write_weights(layout: str, base: Path, name: str, trained: CausalLM, folder: Path) -> None:
    """Write the weights of layout hf, or the adapter of layout peft.

    base: the folder of the base. name: of the base, as it was given. trained: the model with its
    experts.
    """
    sizes, whole = read_config(base)         # the names that other programs know
    experts = {sizes.name(n): layer for n, layer in expert_layers(trained).items()}
    if layout == "peft":
        # How transformers names the text part of a model of text and images.
        root = "model." if text_part(whole) == whole else "model.language_model."
        write_peft(folder, {n.replace("model.", root, 1): m for n, m in experts.items()},
                   name if "/" in name and not Path(name).is_dir() else base.resolve().name)
        return
    write_hf(folder, base, experts)
    if experts:
        settings = read_json(folder / "config.json")
        write_json(folder / "config.json", {**settings, MERGED: last_part(name)})


def copy_base_files(base: Path, out: Path, whole: bool = True) -> None:
    """Copy configuration and tokenizer of the checkpoint `base`, completed for every reader.

    All stop ids of the chat template go to generation_config.json. The template goes to both of
    its places, since transformers.js reads tokenizer_config.json only. What the base says of its
    own ONNX files is left out. A model of bytes gets the tokenizer.json that it does without.
    whole: the folder holds a whole model, and not an adapter alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(base)
    config, settings, generation = (
        read_json(file) if (file := inside(base, name)).is_file() else {} for name in (
            "config.json", "tokenizer_config.json", "generation_config.json"))
    if (file := inside(base, "tokenizer.json")).is_file():
        copy_tokenizer(file, out / "tokenizer.json")
    for name in (str(f.relative_to(base)) for f in sorted((*base.glob("*"), *base.glob("*/*")))
                 if f.is_file()):
        if name == "special_tokens_map.json" or re.match(LEGAL, Path(name).parts[0], re.IGNORECASE):
            (out / name).parent.mkdir(exist_ok=True)     # a folder LICENSES
            shutil.copyfile(inside(base, name), out / name)
    if isinstance(tokenizer.backend, ByteTokenizer):
        write_json(out / "tokenizer.json", byte_level())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>",
                    "bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    template = chat_template(base, settings) or DEFAULT_TEMPLATE
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    bos = tokenizer.backend.special.get(tokenizer.bos)
    defaults = {"pad_token_id": tokenizer.pad_id} | ({} if bos is None else {"bos_token_id": bos})
    generation = {key: value for key, value in generation.items() if value is not None}
    write_json(out / "tokenizer_config.json", settings | {"chat_template": template})
    if whole:
        config.pop("transformers.js_config", None)
        write_json(out / "config.json", text_part(config))
        write_json(out / "generation_config.json",
                   defaults | generation | {"eos_token_id": tokenizer.stop_ids})


def copy_tokenizer(file: Path, out: Path) -> None:
    """Copy a tokenizer.json without white space, and each pair of a merge as one text.

    Both forms mean the same. The file is a third as large, and `tokenizers` reads Gemma's in three
    quarters of the time and less than half of the memory.
    """
    content = read_json(file)
    merges = content["model"].get("merges")  # BPE has them, and no other model
    if merges and all(isinstance(pair, list) and " " not in "".join(pair)
                      and not pair[0].startswith("#version") for pair in merges):    # a comment
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    out.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def byte_level() -> dict[str, Any]:
    """ByteTokenizer as a tokenizer.json: BPE over bytes as in GPT-2, without merges."""
    vocab = {character: byte for byte, character in enumerate(BYTES)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"added_tokens": [{"id": i, "content": t, **flags, "special": True}
                             for t, i in ByteTokenizer.special.items()],
            "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}}


def write_peft(out: Path, experts: Experts, base_model: str) -> None:
    """Write an adapter folder that PEFT, vLLM and llama.cpp read alike.

    They disagree about scaling and about uneven ranks, so every LoRA is padded with zeros to R,
    the largest rank, and lora_alpha = r = R. Full names are targets: a short one such as "q_proj"
    would also adapt layers without experts. Raises ValueError if there are none.
    """
    if not experts:
        raise ValueError("no matrix is adapted: there is nothing to write for PEFT")
    loras = {name: layer.lora() for name, layer in experts.items()}
    R, tensors = max(len(A) for A, _ in loras.values()), {}
    for name, (A, B) in loras.items():
        key, more = f"base_model.model.{name}", R - len(A)
        tensors[f"{key}.lora_A.weight"] = F.pad(A.float(), (0, 0, 0, more))
        tensors[f"{key}.lora_B.weight"] = F.pad(B.float(), (0, more)).contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(out / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": R, "lora_alpha": R, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0,
        "target_modules": sorted(experts), "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True})


def write_hf(out: Path, base: Path, experts: Experts) -> None:
    """Write the weights of `base` with the experts merged into them."""
    named = {f"{module}.weight": layer for module, layer in experts.items()}
    rewrite_weights(base, out, lambda name, weight: (
        merged(weight, named[name]) if name in named else weight))


def rewrite_weights(base: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Write the weights of `base`, each as change(its name in a model of text, it) gives it.

    Dtypes and shards stay; `LEFT_OUT` is left out.
    """
    if not (base / "model.safetensors").is_file():
        index = read_json(inside(base, "model.safetensors.index.json"))
        write_json(out / "model.safetensors.index.json", index | {"weight_map": {
            text_name(n): f for n, f in index["weight_map"].items() if not LEFT_OUT.match(n)}})
    for file in weight_files(base):
        tensors = {}
        with safe_open(file, framework="pt") as f:           # mapped into memory, not read
            metadata = f.metadata()
            for stored in f.keys():                          # noqa: SIM118
                if not LEFT_OUT.match(stored):
                    name = text_name(stored)
                    tensors[name] = change(name, f.get_tensor(stored))
        save_file(tensors, out / file.name, metadata)


def write_genai(out: Path, context: int, share_buffer: bool = True) -> None:
    """Write genai_config.json beside model.onnx and the files of `copy_base_files`.

    context: tokens of prompt and completion. share_buffer: the graph writes new keys into the
    buffer of the past ones, as GroupQueryAttention does; a portable graph returns a longer copy.
    """
    config, generation = read_json(out / "config.json"), read_json(out / "generation_config.json")
    sizes = Config.from_dict(config)
    sampling = {key: generation[key] for key in (
        "do_sample", "temperature", "top_k", "top_p", "repetition_penalty") if key in generation}
    stops = generation["eos_token_id"]
    bos = generation.get("bos_token_id", stops[0] if stops else None)
    kinds = ["conv"] * bool(sizes.convolutions) + ["recurrent"] * bool(sizes.delta_layers)
    states = {"conv_cache_size": sizes.conv_size - 1, "layer_types": [
                  CONV if i in sizes.conv_layers else DELTA if i in sizes.delta_layers else FULL
                  for i in range(sizes.num_hidden_layers)],
              "inputs": {f"past_{kind}_names": f"past_{kind}.%d" for kind in kinds},
              "outputs": {f"present_{kind}_names": f"present_{kind}.%d" for kind in kinds},
              } if kinds else {}
    write_json(out / "genai_config.json", {
        "model": {
            "type": config["model_type"], "context_length": context,
            "vocab_size": sizes.vocab_size, "eos_token_id": stops,
            "pad_token_id": generation["pad_token_id"],
            **({} if bos is None else {"bos_token_id": bos}),
            "decoder": {                     # inputs and outputs have its default names
                "filename": "model.onnx", "session_options": {"provider_options": []},
                "head_size": sizes.head_dim, "hidden_size": sizes.hidden_size,
                "num_attention_heads": sizes.num_attention_heads,
                "num_key_value_heads": sizes.num_key_value_heads,
                "num_hidden_layers": sizes.num_hidden_layers, **states}},
        # A shared buffer is allocated for max_length at once.
        "search": {"do_sample": False, **sampling, "max_length": context,
                   "past_present_share_buffer": share_buffer}})


def write_web(out: Path, model: CausalLM, form: GraphFormat) -> str:
    """Write the decoder where transformers.js looks for it, name it in out/config.json, and add the
    page that loads it. Returns its place in the folder."""
    shutil.copytree(Path(__file__).with_name("page"), out, dirs_exist_ok=True)
    dtype, suffix = WEB_DTYPES[form.precision]
    name = f"model{suffix}.onnx"
    (out / "onnx").mkdir(exist_ok=True)
    write_decoder(out / "onnx" / name, model, form, "_data")        # as it is fetched
    config = read_json(out / "config.json")
    config["transformers.js_config"] = {
        "dtype": dtype, "use_external_data_format": {name: 1},           # how many data files
        "kv_cache_dtype": {dtype: str(form.dtype)[6:]}}      # version 3 asks for it
    write_json(out / "config.json", config)
    return f"onnx/{name}"
