"""train.py --plan: what a run takes, before it starts."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..io.process import peak_resident
from ..io.text import table
from ..method.allocate import Allocation
from ..method.experts import add_experts
from ..method.sensitivity import shapes_of
from ..model.checkpoint import read_config
from ..model.config import Config
from ..model.decoder import meta_model
from ..model.quantize import BLOCK
from ..training import distributed
from ..training.loop import schedule, train
from ..training.resume import KEPT
from . import probing
from .flags import RunConfig
from .inputs import load_inputs, model_folder, read_tasks

MIB = 1 << 20
STEPS = 3                        # that are trained; the first one warms up


def show_plan(config: RunConfig) -> None:
    """Print what a run takes: what follows from config.json and, if weights and data are there, the
    time and the peak memory of three training steps."""
    inputs, folder = config.inputs, model_folder(config.inputs)
    sizes, has_data = read_config(folder)[0], inputs.data is not None or inputs.model is None
    tasks = [t.name for t in read_tasks(inputs, folder)[1]] if has_data else inputs.names or [""]
    allocation = probing.guess(config.allocating, shapes_of(meta_model(sizes)), tasks)
    parts = memory_by_part(sizes, allocation, getattr(torch, inputs.dtype), inputs.base_bits)
    print(f"{allocation}, {parts['adapters'] // 4:,} trainable parameters"
          + " (an example: the probe decides)" * probing.needed(config.allocating))
    print(table(["memory", "MiB"], [[part, f"{size / MIB:,.1f}"] for part, size in parts.items()]))
    print(f"disk: {parts['adapters'] * (1 + 3 * (KEPT + 1)) / MIB:,.1f} MiB for the adapter and "
          f"{KEPT + 1} checkpoints (one while it is written)")
    if has_data and any(folder.glob("*.safetensors")):
        measure(config, allocation)
    else:
        print(f"time and peak memory were not measured: that takes --data, and .safetensors in "
              f"{folder}")


def memory_by_part(config: Config, allocation: Allocation, dtype: torch.dtype,
                   base_bits: int | None = None) -> dict[str, int]:
    """Bytes of what does not depend on the batch; activations come on top."""
    model, size = meta_model(config), dtype.itemsize
    shapes = shapes_of(model)
    trained = allocation.trainable(shapes)
    base = sum(p.numel() for p in model.parameters()) * size
    if base_bits:
        for N, K in shapes.values():
            G = -(-K // BLOCK)
            row = G * (BLOCK * base_bits // 8) + 2 * G                           # data, scales
            base += N * (row - K * size)
    return {"base weights": base, "adapters": 4 * trained, "gradients": 4 * trained,
            "optimizer": 8 * trained}


def measure(config: RunConfig, allocation: Allocation) -> None:
    """Train on the largest batch of the schedule, and print how long a step and the run take, and
    the peak memory."""
    inputs, device = load_inputs(config.inputs), torch.device(config.inputs.device)
    add_experts(inputs.model, allocation)
    inputs.model.model.recompute = config.training.recompute
    batches = schedule(inputs.examples, config.training)
    largest = max(batches, key=lambda batch: len(batch) * max(len(e.ids) for e in batch))
    with TemporaryDirectory() as folder:     # an epoch is one batch
        train(inputs.model, largest, replace(config.training, epochs=STEPS), Path(folder),
              inputs.tokenizer.pad_id)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    if distributed.rank():
        return
    speeds = [json.loads(line)["tokens_per_second"] for line in lines[1:]]
    speed = sum(speeds) / len(speeds)
    own, every = (sum(len(e.ids) for batch in some for e in batch) for some in ([largest], batches))
    print(f"the largest batch: {len(largest)} examples of up to {max(len(e.ids) for e in largest)} "
          f"tokens, {own / speed:.2f} s a step; {len(batches)} steps with {every:,} tokens take "
          f"about {every / speed / 60:,.1f} minutes, besides "
          f"{'the probe and ' * probing.needed(config.allocating)}two evaluations")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    print(f"peak memory: {peak / MIB:,.0f} MiB, as "
          f"{device if device.type == 'cuda' else 'this process'} counts it")
