"""Kernels that a training step starts: what a GPU waits for if the model is small.

    python tests/benchmarks/launches.py

Prints, for a Llama of SmolLM2's width, the kernels that one decoder layer starts, forward and
backward (the slope between 2 and 8 layers), and those of the rest of a step; how often a step waits
for the device; and the time of a step with next to nothing to compute, on one CPU thread. Beside a
mixture of 8 experts of rank 8 on all matrices: a plain LoRA of ours of rank 64, PEFT's, and a batch
of the probe.

A kernel is an operator that is no view and makes no empty tensor. Steps are counted as a GPU runs
them, on tensors without memory: attention and RMSNorm, which torch has in one kernel, count as one
forward and one backward. So no GPU is needed, and the counts are exact.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minismoe.data.tasks import Example, collate
from minismoe.method.allocate import Allocation
from minismoe.method.experts import add_experts, linear_layers
from minismoe.method.sensitivity import sample_norms
from minismoe.model.decoder import CausalLM, Config
from minismoe.training.loop import Trainer
from minismoe.training.plan import TrainConfig

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
        "detach", "_reshape_alias", "lift_fresh", "alias"}
# What reads a value, or a number of values, from the device; and copies to or from it that are not
# asked to be asynchronous, such as of a Python number by new_tensor.
COPY = "waiting copy"
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "_unique2", COPY}
WIDE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 16}
SIDES = ("mixture", "LoRA", "probe", "PEFT")


class Kernels(TorchDispatchMode):
    """Counts operators on a device by name while it is on."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.seen, self.device = Counter[str](), device

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = op.overloadpacket.__name__, op(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)}
        waits = name == "lift_fresh" and self.device != "cpu" or name in (
            "_to_copy", "copy_") and len(devices) > 1 and not (
                (kwargs or {}).get("non_blocking") or args[2:3] == (True,))
        if self.device in devices and (waits or not op.is_view and name not in FREE):
            self.seen[COPY if waits else name] += 1
        return out


class One(torch.autograd.Function):
    """An operator that is one kernel forward and one backward; y is as large as the first input."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return torch.zeros_like(inputs[0])                       # the kernel that is counted

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, *others = ctx.saved_tensors
        return torch.zeros_like(first), *(torch.empty_like(x) for x in others)


@contextmanager
def fused() -> Iterator[None]:
    """Meanwhile attention and RMSNorm are one kernel each, as on a GPU."""
    attention, norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = lambda q, k, v, *args, **more: One.apply(q, k, v)
    F.rms_norm = lambda x, shape, weight, eps: One.apply(x, weight)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm


def config(layers: int, sizes: dict[str, int]) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 256, "num_hidden_layers": layers,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            **sizes}


def examples(count: int) -> list[Example]:
    """Examples of unequal lengths whose first half has no loss."""
    found = []
    for i in range(count):
        ids = [(7 * i + 3 * t) % 256 for t in range(8 + i)]
        found.append(Example("", ids, [-100] * 4 + ids[4:], i))
    return found


def step_of(side: str, layers: int, dtype: torch.dtype, device: str, sizes: dict[str, int],
            batch: list[Example]) -> Callable[[], object]:
    """One step of training, forward and backward."""
    rank = 8 if sizes is WIDE else 2
    if side == "PEFT":
        import transformers
        from peft import LoraConfig, get_peft_model
        with torch.device(device):
            model = get_peft_model(
                transformers.LlamaForCausalLM(transformers.LlamaConfig(**config(layers, sizes))).to(
                    dtype), LoraConfig(r=8 * rank, lora_alpha=16 * rank,
                                       target_modules="all-linear"))
        ids, mask, labels = (x.to(device) for x in collate(batch, 0))
        return lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    with torch.device(device):
        ours = CausalLM(Config.from_dict(config(layers, sizes))).to(dtype)
    linear = linear_layers(ours.requires_grad_(False))
    if side == "probe":
        return partial(sample_norms, ours, linear, *collate(batch, 0))
    counts = dict.fromkeys(linear, 8 if side == "mixture" else 1)
    rank = rank if side == "mixture" else 8 * rank
    with torch.device(device):
        add_experts(ours, Allocation(counts, rank=rank, alpha=2 * rank))
    cfg = TrainConfig(batch_size=len(batch), micro_batch_size=len(batch))
    return partial(Trainer(ours, cfg, 0).gradients, batch, len(batch))


def counted(side: str, layers: int, dtype: torch.dtype) -> Counter[str]:
    """The kernels of one step on a device without memory; PEFT's on a CPU, with fused attention."""
    device = "cpu" if side == "PEFT" else "meta"
    step = step_of(side, layers, dtype, device, WIDE, examples(8))
    with fused():
        step()
        with Kernels(device) as kernels:
            step()
    return kernels.seen


def kernels(side: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Counter[str], int, int]:
    """Kernels of one layer by name; those of a step besides; and its waits for the device."""
    few, many = counted(side, 2, dtype), counted(side, 8, dtype)
    layer = Counter({name: (many[name] - few[name]) // 6 for name in many})
    # The loop reads the losses and the norm of the gradient, or the probe's norms: one wait more.
    waits = 1 + sum(many[name] for name in WAITS)
    return +layer, few.total() - 2 * layer.total(), waits


def seconds(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of a step, medians over rounds in turn."""
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(rounds + 3):
        for side, step in steps.items():
            start = time.process_time()
            step()
            times[side].append(time.process_time() - start)
    return {side: statistics.median(found[3:]) for side, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of the timed step")
    parser.add_argument("--operators", action="store_true", help="also each layer's by name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        spent = seconds({side: step_of(side, 16, dtype, "cpu", NARROW, examples(2))
                         for side in SIDES}, args.rounds)
        theirs = kernels("PEFT", dtype)[0].total()
        print(f"{dtype}: kernels a layer, to PEFT's, besides, waits; empty step: ms, to PEFT's")
        for side in SIDES:
            layer, besides, waits = kernels(side, dtype)
            print(f"{side:8} {layer.total():4} {layer.total() / theirs:5.2f} {besides:4} {waits:3}"
                  f"  {1e3 * spent[side]:6.1f} {spent[side] / spent['PEFT']:5.2f}", flush=True)
            if args.operators:
                print("   ", ", ".join(f"{n} {name}" for name, n in layer.most_common()))


if __name__ == "__main__":
    main()
