"""train.py --plan: what a run takes, before it starts."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..io.process import peak_resident
from ..io.signals import Interrupted
from ..io.text import table
from ..method.allocate import Allocation
from ..method.experts import add_experts
from ..method.sensitivity import shapes_of
from ..model.checkpoint import read_config
from ..model.config import Config
from ..model.decoder import meta_model
from ..model.quantize import BLOCK
from ..training import distributed
from ..training.distributed import print0
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
    inputs = config.inputs
    has_data = inputs.data is not None or inputs.model is None
    tasks = [t.name for t in read_tasks(inputs)] if has_data else inputs.names or [""]
    sizes = read_config(folder := model_folder(inputs))[0]
    model = meta_model(sizes)
    allocation = probing.without_probe(config.allocating, shapes_of(model), tasks)
    parts = memory_by_part(sizes, allocation, getattr(torch, inputs.dtype), inputs.base_bits)
    note = "" if has_data else " (of one task)"
    if probing.needs_probe(config.allocating, len(tasks)):
        note = " (an example: the probe decides)"
    print0(f"a base of {sum(p.numel() for p in model.parameters()):,} parameters; {allocation}, "
           f"{parts['adapters'] // 4:,} trainable parameters{note}")
    print0(table(["memory", "MiB"], [[part, f"{size / MIB:,.1f}"] for part, size in parts.items()]))
    print0(f"disk: {parts['adapters'] * (1 + 4 * (KEPT + 1)) / MIB:,.1f} MiB for the adapter and "
           f"{KEPT + 1} checkpoints (one while it is written)")
    if has_data and any(folder.glob("*.safetensors")):
        time_steps(config, allocation)
    else:
        print0(f"time and peak memory: not measured without --data, and .safetensors in {folder}")


def memory_by_part(config: Config, allocation: Allocation, dtype: torch.dtype,
                   base_bits: int | None = None) -> dict[str, int]:
    """Bytes of what does not depend on the batch; activations come on top."""
    model, size = meta_model(config), dtype.itemsize
    base = sum(p.numel() for p in model.parameters()) * size
    if base_bits:
        for N, K in shapes_of(model).values():
            block = BLOCK * base_bits // 8 + 2                   # integers, and a scale of 16 bits
            base += N * (-(-K // BLOCK) * block - K * size)
    trained = 4 * allocation.trainable(shapes_of(model))         # float32, whatever the base is in
    return {"base weights": base, "adapters": trained, "gradients": trained,
            "optimizer": 2 * trained}


def time_steps(config: RunConfig, allocation: Allocation) -> None:
    """Train on the largest batch; print the time of a step and of the run, and the peak memory."""
    inputs, device = load_inputs(config.inputs), torch.device(config.inputs.device)
    add_experts(inputs.model, allocation)
    batches = schedule(inputs.examples, config.training)
    largest = max(batches, key=lambda batch: len(batch) * max(len(e.ids) for e in batch))
    with TemporaryDirectory() as run:
        try:                                 # an epoch is one batch
            train(inputs.model, largest, replace(config.training, epochs=STEPS), Path(run),
                  inputs.tokenizer.pad_id)
        except Interrupted as e:             # it says that the run is saved
            raise Interrupted(number=e.number) from None
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    if distributed.rank():
        return
    speed = sum(json.loads(line)["tokens_per_second"] for line in lines[1:]) / (STEPS - 1)
    tokens = sum(len(e.ids) for batch in batches for e in batch)
    first = "the probe and " if probing.needs_probe(config.allocating, len(inputs.tasks)) else ""
    print(f"largest batch: {len(largest)} examples of up to {max(len(e.ids) for e in largest)} "
          f"tokens, {sum(len(e.ids) for e in largest) / speed:.2f} s a step")
    print(f"training: {len(batches)} steps, {tokens:,} tokens, about {tokens / speed / 60:,.1f} "
          f"minutes, besides {first}two evaluations")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    print(f"peak memory: {peak / MIB:,.0f} MiB, as "
          f"{device if device.type == 'cuda' else 'this process'} counts it")
