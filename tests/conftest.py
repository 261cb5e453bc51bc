"""Tiny checkpoints and a tiny tokenizer, made by the libraries that the tests compare with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"       # set before transformers reads it: no test downloads
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from minismoe.experts import expert_layers  # noqa: E402
from minismoe.model import CausalLM, Config  # noqa: E402

torch.set_num_threads(1)            # on tensors this small, threads wait for each other
settings.register_profile("minismoe", deadline=None, database=None, derandomize=True)
settings.load_profile("minismoe")

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500.0}
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


def random_hf(family: str, **changes: Any) -> Any:
    """A `transformers` model in which every parameter matters.

    Its own initialisation leaves norms at 1, biases at 0 and attention almost uniform: a decoder
    that forgot any of them would pass.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, differs = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**SIZES, **differs, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
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


@pytest.fixture
def signals() -> Iterator[None]:
    """SIGINT and SIGHUP as at a terminal; a job in the background, or nohup, has them ignored."""
    fresh = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for name, handler in fresh.items()
              if (number := getattr(signal, name, None))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """family -> (the `transformers` model, the folder that its save_pretrained wrote)."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in made:
            model, folder = random_hf(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = model, folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of a byte-level BPE in the manner of GPT-2, with the usual special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["the cat sat on the mat and the answer is yes or no, user and assistant say"] * 4,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                            show_progress=False, special_tokens=[
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>",
            "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]"]))
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Experts as training leaves them: B is no longer 0, and the router has an opinion."""
    generator = torch.Generator().manual_seed(seed)
    for layer in expert_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B, layer.router):
            if parameter is not None:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--model and --data of a random byte-level checkpoint and two small tasks."""
    root = tmp_path_factory.mktemp("inputs")
    config = {"model_type": "llama", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "tie_word_embeddings": True, "eos_token_id": 257}
    torch.manual_seed(0)
    model = CausalLM(Config.from_dict(config))
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(config))
    save_file(dict(model.named_parameters()), root / "model" / "model.safetensors")
    (root / "data" / "upper").mkdir(parents=True)
    for name, low, high in (("train", 0, 24), ("test", 24, 30)):
        (root / "data" / "upper" / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": f"say {i}", "completion": f"N{i}"}) + "\n"
            for i in range(low, high)))
    (root / "data" / "sum.jsonl").write_text("".join(
        json.dumps({"instruction": "add", "input": f"{i}+1", "output": str(i + 1)}) + "\n"
        for i in range(30)))
    return ["--model", str(root / "model"), "--data", str(root / "data")]
