"""What tests share: tiny configurations, random weights, experts, examples, and a script's end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minismoe import reference
from minismoe.data.tasks import Example, example_of
from minismoe.data.tokenizer import Tokenizer
from minismoe.data.tools import Message
from minismoe.data.turns import encode_line
from minismoe.method.experts import ExpertLinear, add_experts, expert_layers
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM

ROOT = Path(__file__).resolve().parents[1]
# A config.json of a model of bytes, which needs no tokenizer.json.
BYTES = {"model_type": "llama", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "tie_word_embeddings": True, "eos_token_id": 257}
DELTA = {"model_type": "qwen3_5_text", "head_dim": 64, "layer_types": [     # beside BYTES
    "linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
         "max_position_embeddings": 64}          # of the tests that count in float64
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500.0}
QUICK = ("--epochs", "1")         # for train.py
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
needs_other_device = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot have a device made in Python")
WINDOW = 5                               # below the length of every sequence in the tests

# name -> (model_type, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "hidden_size": 64, "num_attention_heads": 2,
                         "num_key_value_heads": 1}),
    "smollm2": ("llama", {"num_hidden_layers": 3, "hidden_size": 36, "num_attention_heads": 9,
                          "num_key_value_heads": 3, "tie_word_embeddings": True,
                          "rms_norm_eps": 1e-5,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW,
                               "max_window_layers": 1, "num_hidden_layers": 3}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_window": ("qwen3", {"head_dim": 8, "attention_bias": True, "use_sliding_window": True,
                               "sliding_window": WINDOW, "max_window_layers": 1}),
}
LLAMAS = tuple(FAMILIES)                 # families of Llama's modules
FAMILIES |= {
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3_window": ("smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True,
                                   "sliding_window": WINDOW, "tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {
        "num_hidden_layers": 4, "head_dim": 16, "sliding_window": WINDOW,
        "sliding_window_pattern": 2, "query_pre_attn_scalar": 20, "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_local_base_freq": 50.0}),
    "gemma3_untied": ("gemma3_text", {
        "num_key_value_heads": 1, "head_dim": 12, "layer_types": ["full_attention",
        "sliding_attention"], "sliding_window": 2 * WINDOW, "tie_word_embeddings": False}),
    "lfm2": ("lfm2", {"num_hidden_layers": 4, "block_multiple_of": 20, "layer_types": [
        "conv", "full_attention", "conv", "full_attention"]}),
    "lfm2_long": ("lfm2", {"num_hidden_layers": 3, "block_auto_adjust_ff_dim": False,
                           "full_attn_idxs": [1], "conv_L_cache": 4,
                           "tie_word_embeddings": False}),
    "qwen3_5": ("qwen3_5_text", {
        "num_hidden_layers": 4, "head_dim": 32, "tie_word_embeddings": True,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12, "rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "qwen3_5_long": ("qwen3_5_text", {
        "num_hidden_layers": 3, "head_dim": 64, "full_attention_interval": 2,
        "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 6,
        "linear_value_head_dim": 5, "linear_conv_kernel_dim": 2})}

# Config.jsons of models of text and images.
IMAGED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": SIZES | {
            "vocab_size": BYTES["vocab_size"], "num_hidden_layers": 4, "head_dim": 16,
            "sliding_window": 3, "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 20, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4, "eos_token_id": [2, 5]},
    "qwen3_5": {
        "text_config": SIZES | FAMILIES["qwen3_5"][1] | {"vocab_size": BYTES["vocab_size"]},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 8, "num_position_embeddings": 16},
        "eos_token_id": [2, 5]}}

# The config.json of https://huggingface.co/Qwen/Qwen3.5-0.8B. Its safetensors hold 873,438,784
# parameters: 752,393,024 of text (llama.cpp counts 752.39 M in its GGUF), 100,592,896 of images,
# and 20,452,864 of a head that predicts several tokens.
QWEN: dict[str, Any] = {
    "model_type": "qwen3_5", "tie_word_embeddings": True, "vision_config": {}, "text_config": {
        "model_type": "qwen3_5_text", "hidden_size": 1024, "intermediate_size": 3584,
        "vocab_size": 248320, "num_hidden_layers": 24, "num_attention_heads": 8, "head_dim": 256,
        "num_key_value_heads": 2, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_value_head_dim": 128,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "full_attention_interval": 4, "attn_output_gate": True, "mtp_num_hidden_layers": 1,
        "max_position_embeddings": 262144, "mamba_ssm_dtype": "float32", "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
            "rope_theta": 10000000, "partial_rotary_factor": 0.25}}}


def random_hf(family: str, kind: str = "", **changes: Any) -> Any:
    """A `transformers` model in which every parameter matters: of a family, or of a model_type.

    Its own initialisation leaves norms at 1, biases at 0 and attention almost uniform: a decoder
    that forgot any of them would pass.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, differs = FAMILIES.get(family, (kind, {}))
    config = AutoConfig.for_model(kind, **{**SIZES, **differs, **changes})
    auto = AutoModelForImageTextToText if kind in IMAGED else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(std=0.5, generator=generator)
        elif p.ndim == 1:
            p.data.uniform_(0.5, 1.5, generator=generator)
        else:
            scale = 1.0 if "embed" in name else 1.5 / p.shape[1] ** 0.5
            p.data.normal_(std=scale, generator=generator)
    return model.eval()


def save_imaged(folder: Path, published: bool, tied: bool = True, kind: str = "gemma3",
                **options: Any) -> Any:
    """Write a random model of text and images, Gemma 3's under one of its two namings."""
    hf = random_hf(f"{kind}_images", kind, **IMAGED[kind], tie_word_embeddings=tied)
    hf.save_pretrained(folder, save_original_format=published, **options)
    return hf


def cut(file: Path) -> None:
    """Take the last bytes off a file."""
    file.write_bytes(file.read_bytes()[:-100])


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def tiny_config(**changes: Any) -> Config:
    """A decoder's sizes as small as tests of ours take them: 2 layers of width 32."""
    sizes: dict[str, Any] = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    sizes |= changes
    sizes.setdefault("windows", (None,) * sizes["num_hidden_layers"])
    return Config(**sizes)


def save_bytes_model(folder: Path, large: bool = False, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint of BYTES, with some of its config.json changed. large: answers
    vary, as weights are larger than usual."""
    config = BYTES | changes
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = CausalLM(Config.from_dict(config))
    for p in model.parameters():
        if large and p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    return folder


def small_model(kind: str, **sizes: Any) -> torch.nn.Module:
    """A random model of SMALL sizes: ours of a model_type, or of transformers ("hf-llama"). Biases
    and norms are no neutral ones."""
    sizes = SMALL | sizes
    torch.manual_seed(0)
    model: torch.nn.Module
    if kind.startswith("hf-"):
        from transformers import AutoConfig, AutoModelForCausalLM
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind[3:], **sizes))
    else:
        model = CausalLM(Config.from_dict(sizes | {"model_type": kind}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.25)
    return model.eval()


def encode(task: str, messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """The example of a conversation, whole."""
    return example_of(task, encode_line(messages, tokenizer))


def write_lines(file: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write a task's file of prompts and completions, into a folder that it makes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": prompt, "completion": completion}) + "\n"
                            for prompt, completion in pairs))


def padded(lengths: Sequence[int], pad: str = "right", seed: int = 1,
           vocabulary: int = SMALL["vocab_size"]) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask, (B, T) each, of rows of these lengths with pads on one side."""
    ids = torch.randint(0, vocabulary, (len(lengths), max(lengths)),
                        generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids, mask if pad == "right" else mask.flip(1)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    """Assert that no logit differs by more than this share of the largest."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Experts as training leaves them: B is no longer 0, and the router has an opinion."""
    generator = torch.Generator().manual_seed(seed)
    for layer in expert_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B, layer.router):
            if parameter is not None:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def plain(layer: ExpertLinear) -> reference.Mixture:
    """The same layer as the reference computes it, with the very same parameters."""
    return reference.Mixture(layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.router,
                             layer.top_k, layer.scaling)


def tiny(*experts: int, dtype: torch.dtype = torch.float32, layers: int = 2) -> CausalLM:
    """A model with experts on every matrix, for the training loop: 3, or these in turn."""
    torch.manual_seed(0)
    model = CausalLM(tiny_config(num_hidden_layers=layers)).to(dtype)
    linear = [n for n, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    add_experts(model, dict(zip(linear, cycle(experts or [3]))), rank=4)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def examples(count: int = 24) -> list[Example]:
    """Random examples of two tasks, 4 to 10 tokens long, for the training loop."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for i in range(count):
        ids = torch.randint(0, 50, (4 + i % 7,), generator=generator).tolist()
        result.append(Example("ab"[i % 2], ids, [-100, -100, *ids[2:]], i, asked=[1]))
    return result


def interrupt_in(monkeypatch: pytest.MonkeyPatch, method: str, turn: int,
                 number: int = signal.SIGINT) -> list[str]:
    """Send this process a signal in a Trainer's method, at its call number `turn`; its calls."""
    from minismoe.training.loop import Trainer

    calls, original = list[str](), getattr(Trainer, method)

    def counted(*args: Any) -> Any:
        calls.append(method)
        if len(calls) == turn:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(Trainer, method, counted)
    return calls


def exit_code(command: Callable[[], object], *args: object) -> int:
    """The exit code of a command that reads these arguments, in this process."""
    before, sys.argv = sys.argv, ["script", *map(str, args)]
    try:
        command()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def finish(main: Callable[[Sequence[str]], None], *args: object,
           capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script's main as the command line calls it."""
    from minismoe.cli.script import run_script

    return (exit_code(lambda: run_script(main), *args), *capsys.readouterr())


def python(*words: object, input: str = "", timeout: float = 120, folder: Path = ROOT,
           **environment: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in a process of its own, which finds the package and the tests' modules."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, text=True, input=input,
                          capture_output=True, timeout=timeout,
                          env={**os.environ, "PYTHONPATH": paths, **environment})


class Shapes(TorchDispatchMode):
    """The shape of every tensor that an operation gives back while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [(func.overloadpacket.__name__, tuple(t.shape))
                      for t in (out if isinstance(out, tuple | list) else (out,))
                      if isinstance(t, Tensor)]
        return out
