"""Does a family cost more than Llama at equal size? CPU time per parameter of the linear layers.

    python tests/benchmarks/family_speed.py

Random models of one shape: a step of training (one expert of rank 8 a matrix, 4 texts of 64 tokens,
float32), and a decoded token by onnxruntime in fp32 and int4. One thread; the families in turn, and
the ratio to Llama within a round. Prints medians over rounds.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from exported import export

from minismoe.io.text import table
from minismoe.method.allocate import Allocation
from minismoe.method.experts import add_experts, linear_layers
from minismoe.method.loss import supervised_losses
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator

OWN: dict[str, dict[str, Any]] = {           # what differs from Llama
    "llama": {}, "smollm3": {}, "granite": {},
    "granitemoehybrid": {"num_local_experts": 0, "position_embedding_type": "rope"},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 64},
    "lfm2": {"block_auto_adjust_ff_dim": False}, "qwen3_5_text": {}}


def shape(family: str, layers: int, width: int) -> Config:
    """8 layers of width 768 have 45 M parameters in linear layers."""
    mixed: dict[str, Any] = {}
    if family == "lfm2":
        mixed = {"layer_types": ["conv", "full_attention"] * (layers // 2)}
    if family == "qwen3_5_text":             # in proportion, as Qwen3.5-0.8B
        heads = max(8, width // 64)          # of 128 numbers; their gates have rank 8
        mixed = {"linear_num_key_heads": heads, "linear_num_value_heads": heads}
    if family == "granitemoehybrid":
        mixed = {"layer_types": ["attention"] * layers, "shared_intermediate_size": 2 * width}
    return Config.from_dict({
        "model_type": family, "vocab_size": 259, "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": 2 * width, "num_attention_heads": width // 64, "head_dim": 64,
        "num_key_value_heads": width // 128 or 1, "tie_word_embeddings": True, **OWN[family],
        **mixed})


def training(model: CausalLM) -> Callable[[], None]:
    """One step, forward and backward."""
    add_experts(model, Allocation(dict.fromkeys(linear_layers(model), 1), 8, 16.0))
    ids = torch.randint(259, (4, 64), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        supervised_losses(model, ids, torch.ones_like(ids), ids)[0].mean().backward()

    return step


def decoding(model: CausalLM, folder: Path, precision: str, tokens: int) -> Callable[[], None]:
    """So many tokens after a prompt of 16."""
    generator = Generator(export(model, folder, context=256, precision=precision), threads=1)
    generator.tokenizer.stop_ids = []

    def step() -> None:
        generator.reset()
        for _ in itertools.islice(generator.generate([65] * 16), tokens):
            pass

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=48, help="decoded in a round (default: 48)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sides: dict[str, dict[str, Callable[[], None]]] = {}
    sizes = {}
    with TemporaryDirectory() as folder:
        for family in OWN:
            torch.manual_seed(0)
            model = CausalLM(shape(family, args.layers, args.width))
            sizes[family] = sum(m.weight.numel() for m in linear_layers(model).values())
            sides[family] = {f"decoding, {p}": decoding(
                model, Path(folder, f"{family}-{p}"), p, args.tokens) for p in ("fp32", "int4")}
            sides[family]["training"] = training(model)
        ratios: dict[tuple[str, str], list[float]] = {}
        for number, kind in itertools.product(range(args.rounds + 1), sides["llama"]):
            seconds = {}
            for family, steps in sides.items():
                start = time.process_time()
                steps[kind]()
                seconds[family] = (time.process_time() - start) / sizes[family]
            for family in OWN:
                if number:                   # the first round warms up
                    ratios.setdefault((family, kind), []).append(seconds[family] / seconds["llama"])
    kinds = list(sides["llama"])
    print(table(["family", "M parameters", *kinds], [
        [family, f"{sizes[family] / 1e6:.1f}",
         *(f"{statistics.median(ratios[family, kind]):.2f}" for kind in kinds)] for family in OWN]))


if __name__ == "__main__":
    main()
