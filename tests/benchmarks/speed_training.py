"""The works of speed.py that train: a step, the probe, and families of models at equal size."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from exported import export
from torch import nn

from minismoe.data.tasks import bucket, collate, encode_all, load_tasks
from minismoe.data.tokenizer import load_tokenizer
from minismoe.io.process import peak_resident
from minismoe.method.experts import add_experts, linear_layers
from minismoe.method.loss import supervised_losses
from minismoe.method.sensitivity import probe
from minismoe.model.checkpoint import load_model
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator
from minismoe.training.loop import Trainer
from minismoe.training.plan import TrainConfig

EXPERTS, RANK, WARM = 8, 8, 2
Figures = dict[str, float]                   # what a side measures, by name and unit


def clocked(work: Callable[[], object], rounds: int, clock: Callable[[], float]) -> float:
    """The median of some rounds, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times[1:])


def batches(args: argparse.Namespace) -> tuple[list, int]:
    """Batches of training examples, all tasks mixed, bucketed by length as in training; the pad."""
    tokenizer = load_tokenizer(args.model)
    examples = [e for task in load_tasks(args.data, args.tasks)
                for e in encode_all(task, tokenizer, 512)]
    return bucket(examples, args.batch_size, seed=0)[:WARM + args.count], tokenizer.pad_id


def our_step(args: argparse.Namespace, dtype: Any, pad: int) -> tuple[list, Callable]:
    model = load_model(args.model, dtype)
    add_experts(model, dict.fromkeys(linear_layers(model), EXPERTS), rank=RANK)
    cfg = TrainConfig(batch_size=args.batch_size, micro_batch_size=args.batch_size)
    trainer = Trainer(model, cfg, pad)
    return [*trainer.parameters.values()], lambda batch: trainer.gradients(batch, cfg.micro)


def peft_step(args: argparse.Namespace, dtype: Any, pad: int) -> tuple[list, Callable]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rank = EXPERTS * RANK
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))

    def step(batch: list) -> None:
        ids, mask, labels = collate(batch, pad)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()

    return [p for p in model.parameters() if p.requires_grad], step


def train(args: argparse.Namespace, side: str) -> Figures:
    """Steps of 8 experts of rank 8 on all linear layers, or of PEFT's LoRA of rank 64."""
    torch.manual_seed(0)
    work, pad = batches(args)
    parameters, step = (our_step if side == "ours" else peft_step)(
        args, getattr(torch, args.dtype), pad)
    optimizer, rates = torch.optim.AdamW(parameters, lr=1e-3, fused=True), []
    for batch in work:
        start = time.perf_counter()
        step(batch)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(sum(len(e.ids) for e in batch) / (time.perf_counter() - start))
    return {"tokens/s": statistics.median(rates[WARM:]), "peak MB": peak_resident() / 1e6}


def backward(model: Any, found: list) -> None:
    """Loss, and the gradient of each layer's output: the least that any probe needs."""
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, out: out.requires_grad_())
    for batch in found:
        supervised_losses(model, *batch)[0].sum().backward()
    hook.remove()


def published(model: Any, found: list) -> None:
    """The paper's protocol: one sample and the weight gradients of one layer a step, here of the
    middle one."""
    layers = model.model.layers
    weights = [m.weight.requires_grad_() for m in layers[len(layers) // 2].modules()
               if isinstance(m, nn.Linear)]
    ids, mask, labels = (x[:1] for x in found[0])
    used = int(mask.sum())
    supervised_losses(model, ids[:, :used], mask[:, :used], labels[:, :used])[0].mean().backward()
    for weight in weights:
        weight.grad.square().sum().item()
        weight.grad = None
        weight.requires_grad_(False)


def score(args: argparse.Namespace, side: str) -> Figures:
    """Milliseconds for each pair of a sample and a matrix: of the probe, of a plain backward pass,
    and of the paper's protocol."""
    model = load_model(args.model, getattr(torch, args.dtype))
    work, pad = batches(args)
    found = [collate(batch, pad) for batch in work]
    samples, matrices = sum(map(len, work)), len(linear_layers(model))
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "probe": (lambda: probe(model, {"all": found}), samples * matrices),
        "backward": (lambda: backward(model, found), samples * matrices),
        "published": (lambda: published(model, found), matrices // len(model.model.layers))}
    way, pairs = ways[side]
    return {"ms a pair": 1e3 * clocked(way, 3, time.perf_counter) / pairs}


OWN: dict[str, dict[str, Any]] = {           # what differs from Llama
    "llama": {}, "smollm3": {},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 64},
    "lfm2": {"block_auto_adjust_ff_dim": False}, "qwen3_5_text": {}}


def shape(family: str, layers: int, width: int) -> dict[str, Any]:
    """A config.json; 8 layers of width 768 have 45 M parameters in linear layers."""
    heads = max(8, width // 64)              # of Qwen3.5's delta nets; their gates have rank 8
    mixed: dict[str, Any] = {
        "lfm2": {"layer_types": ["conv", "full_attention"] * (layers // 2)},
        "qwen3_5_text": {"linear_num_key_heads": heads, "linear_num_value_heads": heads}}
    return {"model_type": family, "vocab_size": 259, "hidden_size": width,
            "num_hidden_layers": layers, "intermediate_size": 2 * width, "head_dim": 64,
            "num_attention_heads": width // 64, "num_key_value_heads": width // 128 or 1,
            "tie_word_embeddings": True, **OWN[family], **mixed.get(family, {})}


def family(args: argparse.Namespace, side: str) -> Figures:
    """CPU milliseconds for each million parameters of linear layers: 48 decoded tokens, and one
    training step of 4 texts of 64 tokens."""
    torch.manual_seed(0)
    model = CausalLM(Config.from_dict(shape(side, args.layers, args.width)))
    billions = sum(m.weight.numel() for m in linear_layers(model).values()) / 1e9
    figures = {}
    for precision in ("fp32", "int4"):
        with tempfile.TemporaryDirectory() as folder:
            generator = Generator(export(model, Path(folder) / "out", context=256,
                                         precision=precision), threads=1)
            generator.tokenizer.stop_ids = []

            def decode(generator: Generator = generator) -> None:
                generator.reset()
                list(generator.generate([65] * 16, 48))

            figures[f"decoding, {precision}"] = clocked(decode, 3, time.process_time) / billions
    add_experts(model, dict.fromkeys(linear_layers(model), 1), rank=8)
    ids = torch.randint(259, (4, 64), generator=torch.Generator().manual_seed(0))
    return figures | {"training": clocked(lambda: supervised_losses(
        model, ids, torch.ones_like(ids), ids)[0].mean().backward(), 3, time.process_time)
        / billions}
