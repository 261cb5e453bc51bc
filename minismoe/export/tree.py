"""The model as it ships: a tree of modules, made from a run layer by layer.

Each linear layer of the run becomes what the folder stores in its place:

    merge      an nn.Linear of merged weights, or in few bits a BlockLinear
    freeze     an ExpertLinear of one expert, beside floats or blocks
    dynamic    the ExpertLinear as it was trained, beside floats or blocks
    adapters   an AdapterLinear, beside floats or blocks

The writer of graphs, the check and the ranges of NPUs take this tree.
"""

import copy
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..data.tasks import Batch, Example, probe_batches
from ..io.drawing import terminal_heatmap
from ..io.files import naming, replacing
from ..io.progress import progress_bar
from ..io.text import clean
from ..method.experts import expert_layers
from ..method.freeze import Fit, TaskFits, fit_group, frozen_layer, no_fits, readers_of
from ..method.hooks import measuring
from ..method.loss import IGNORE
from ..model.checkpoint import load_adapter, load_model
from ..model.decoder import CausalLM
from ..model.quantize import BlockLinear, WideWeight
from .leaves import AdapterLinear, MergedWeight, put_weight
from .mixture import round_experts
from .ranges import PROMPTS, TEXTS, Ranges, activation_ranges, answered
from .rounding import round_weights
from .settings import ExportConfig, Source
from .walk import Batches, Walk

SAMPLES, BATCH = 64, 16                      # to calibrate with, of each task, and at once
Fits = Mapping[str, Fit]                     # module -> its fit
Samples = Mapping[str, Sequence[Example]]    # by task; those of --prompts have none


@dataclass
class Shipped:
    """What one graph or folder of weights stores."""

    tree: CausalLM                           # in float32, on the CPU
    fits: TaskFits                           # of the mixtures; none if they go on routing
    ranges: Ranges                           # of activations, for an NPU


def in_float32(source: Source) -> CausalLM:
    """The source's model in float32, on the CPU. What is stored in 16 bits stays in its file, which
    is mapped into memory, and is converted where it is needed."""
    model, loaded = load_model(source.base, None), dict(source.model.named_parameters())
    for name, weight in model.named_parameters():        # the same pages as in the run's model
        if loaded[name].dtype == weight.dtype and loaded[name].device == weight.device:
            weight.data = loaded[name].data
    if expert_layers(source.model):
        load_adapter(model, source.run / "adapter")
    tied = model.config.tie_word_embeddings
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear | nn.Embedding) and layer.weight.dtype != torch.float32 and (
                not (tied and name == "lm_head")):
            put_weight(model, name, WideWeight(layer.weight))
    for name, weight in model.named_parameters():
        if not name.endswith(".stored"):
            weight.data = weight.data.float()
    return model


def ship(parts: Sequence[ExportConfig], source: Source, reference: CausalLM) -> list[Shipped]:
    """Freeze the mixtures of a run, and round the weights for each graph.

    parts: the settings of each graph, which differ in nothing but how weights are stored.
    reference: the model of the source in float32.
    """
    samples = shuffled_samples(parts[0], source)
    batches = calibration_batches(samples, source)
    fits, shipped = freeze_mixtures(parts[0], source, batches), []
    for config in parts:
        tree, ranges = placed(config, reference, fits), Ranges()
        if config.graph:
            round_weights(tree, config.form, source.model, batches, config.size)
            round_experts(tree, config.form)
        if config.target == "npu" and config.form.rounds:
            few = PROMPTS if config.prompts else TEXTS
            texts = [e.ids for examples in samples.values() for e in examples[:few]]
            ranges = activation_ranges(tree, answered(tree, texts, source.tokenizer.stop_ids)
                                       if config.prompts else texts)
        shipped.append(Shipped(tree, fits, ranges))
    return shipped


def shuffled_samples(config: ExportConfig, source: Source) -> Samples:
    """What an export is calibrated on: examples of the run, or of one task; or lines of --prompts.
    """
    samples = {task: examples for task, examples in source.examples.items()
               if config.task in (None, task)}
    if config.prompts:
        samples = {"prompts": unlabelled(config.prompts, source)}
    return {name: random.Random(0).sample(e, len(e)) for name, e in samples.items()}


def unlabelled(file: str, source: Source) -> list[Example]:
    """One example a line of a file, without labels, cut to the model's positions. Raises ValueError
    for a file that is empty or not UTF-8."""
    with naming(f"{file} is no UTF-8 text", ValueError):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    prompts = [[{"role": "user", "content": line}] for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    render, most = source.tokenizer.render, source.model.config.max_position_embeddings
    ids = [source.tokenizer.encode(render(p, add_generation_prompt=True))[0] for p in prompts]
    return [Example("prompts", tokens[:most], [IGNORE] * len(tokens[:most])) for tokens in ids]


def calibration_batches(samples: Samples, source: Source) -> dict[str, list[Batch]]:
    """Padded batches of the first SAMPLES, by task, on the model's device."""
    device, pad_id = source.model.lm_head.weight.device, source.tokenizer.pad_id
    return {name: [*probe_batches(examples, SAMPLES, BATCH, pad_id, device)]
            for name, examples in samples.items()}


@torch.no_grad()
def freeze_mixtures(config: ExportConfig, source: Source, batches: Batches) -> TaskFits:
    """All mixtures as the linear maps that the folder holds, fitted layer by layer and saved beside
    the run's adapter; none if they go on routing."""
    model, mixtures = source.model, expert_layers(source.model)
    if config.routing == "dynamic" or not mixtures:
        return {config.task: {}}
    if not os.access(source.run / "adapter", os.W_OK):       # the fits go there, after the work
        raise ValueError(f"{source.run / 'adapter'} cannot be written: copy the run")
    names = {layer: name for name, layer in mixtures.items() if layer.router is not None}
    wanted = [*batches] if config.adapters else [config.task]
    fits = no_fits(mixtures, batches, wanted, [config.fit])[config.fit]
    walk = Walk(model.model, batches if names else {})
    with measuring(model):
        bar = progress_bar(walk.layers(), "freeze", len(model.model.layers), unit="layer")
        for _, layer, runs in bar:
            fit_group(readers_of(layer, names), runs, {config.fit: fits}, packed=True)
    for task, by_name in fits.items():
        show_residuals(task, by_name)
    save_fits(source.run / "adapter", fits)
    return fits


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def placed(config: ExportConfig, reference: CausalLM, fits: TaskFits) -> CausalLM:
    """A copy of the reference with what ships in place of each mixture, in floats."""
    tree = sharing_copy(reference)
    for name, layer in expert_layers(tree).items():
        if config.adapters:
            tree.set_submodule(name, AdapterLinear(layer, {
                task: by_name[name] for task, by_name in fits.items() if task}))
        elif config.routing != "dynamic":
            fit = fits[config.task][name]
            merges = config.merges and config.graph
            tree.set_submodule(name, frozen_layer(layer, fit) if not merges else BlockLinear(
                MergedWeight(layer.weight, fit), layer.bias))
    return tree


def show_residuals(task: str | None, fits: Fits) -> None:
    """Print the share of each mixture's output that the fits miss, of one task or of all."""
    of = f"{clean(task)}: " if task else ""
    print(terminal_heatmap(f"{of}share of the mixture's output that one linear map misses",
                           {name: f.residual for name, f in fits.items()}))
    kinds = [f.kind for f in fits.values()]
    missed = median([f.residual for f in fits.values() if f.kind != "exact"] or [0.0])
    print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median residual on "
          f"held-out samples {100 * missed:.2f} %")


def save_fits(folder: Path, fits: TaskFits) -> None:
    """Write folder/frozen.safetensors: <module>.lora_A and .lora_B of all tasks together, and
    <task>/<module>.lora_A and .lora_B of one."""
    by_path = {f"{task}/{name}" if task else name: fit
               for task, by_name in fits.items() for name, fit in by_name.items()}
    tensors = {f"{name}.{part}": getattr(fit, part).contiguous()
               for name, fit in by_path.items() for part in ("lora_A", "lora_B")}
    notes = {name: [fit.kind, fit.residual] for name, fit in by_path.items()}
    with replacing(folder / "frozen.safetensors") as tmp:
        save_file(tensors, tmp, metadata={"format": "minismoe.frozen/1", "fits": json.dumps(notes)})
