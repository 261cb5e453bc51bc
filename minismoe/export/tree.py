"""The model as it ships: a tree of modules, made from a run layer by layer.

Each linear layer of the run becomes what the folder stores in its place:

    merge      an nn.Linear of merged weights, or in few bits a BlockLinear
    freeze     an ExpertLinear of one expert, beside floats or blocks
    dynamic    the ExpertLinear as it was trained, beside floats or blocks
    adapters   an AdapterLinear, beside floats or blocks

The writer of graphs, the check and the ranges of NPUs take this tree.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from ..io.drawing import terminal_heatmap
from ..io.text import clean
from ..method.experts import ExpertLinear, expert_layers
from ..method.freeze import Fit, TaskFits, frozen_layer, no_fits
from ..model.checkpoint import load_adapter, load_model
from ..model.decoder import CausalLM
from ..model.quantize import BlockLinear, WideWeight
from .bits import Ways, choose_ways
from .calibration import Batches, Samples, calibration_batches, layer_by_layer, shuffled_samples
from .leaves import AdapterLinear, MergedWeight, put_weight
from .mixture import round_experts
from .ranges import PROMPTS, TEXTS, Ranges, activation_ranges, answered
from .rounding import rounded, store
from .settings import ExportConfig, Source

Fits = Mapping[str, Fit]                     # module -> its fit


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
    """Freeze the mixtures of a run, and round the weights for each graph, layer by layer.

    parts: the settings of each graph, which differ in nothing but how weights are stored.
    reference: the model of the source in float32.
    """
    samples = shuffled_samples(parts[0], source)
    batches = calibration_batches(samples, source)
    fits = fits_to_make(parts[0], source, batches)
    trees = [sharing_copy(reference) for _ in parts]
    ways = [dict[str, Ways]() for _ in parts]
    for names, factors in layer_by_layer(source.model, batches, fits, [
            part.form for part in parts if part.graph]):
        for config, tree, of_tree in zip(parts, trees, ways):
            place(tree, names, config, fits)
            if config.graph and config.form.rounds:
                of_tree |= {name: rounded(tree.get_submodule(name), name, config.form,
                                          factors.get(name)) for name in names}
                if not config.size:          # then each weight has one way
                    store(tree, config.form, ((name, way) for name, of_name in of_tree.items()
                                              for way in of_name.items()))
                    of_tree.clear()
    if any(fits.values()):
        show_fits(fits)
    for config, tree, of_tree in zip(parts, trees, ways):
        if config.size:                      # harm shows on lines that the run is not certain of
            unseen = calibration_batches(shuffled_samples(config, source, unseen=True), source)
            store(tree, config.form, choose_ways(of_tree, tree, source.model, unseen,
                                                 config.size).items())
        if config.graph:
            round_experts(tree, config.form)
    return [Shipped(tree, fits, ranges_of(config, tree, samples, source))
            for config, tree in zip(parts, trees)]


def ranges_of(config: ExportConfig, tree: CausalLM, samples: Samples, source: Source) -> Ranges:
    """The ranges of activations on the samples, if an NPU stores them in few bits."""
    if config.target != "npu" or not config.form.rounds:
        return Ranges()
    few = PROMPTS if config.prompts else TEXTS
    texts = [e.ids for examples in samples.values() for e in examples[:few]]
    return activation_ranges(tree, answered(tree, texts, source.tokenizer.stop_ids)
                             if config.prompts else texts)


def fits_to_make(config: ExportConfig, source: Source, batches: Batches) -> TaskFits:
    """The linear maps of mixtures that the folder holds, of which those of single experts are made;
    none if mixtures go on routing."""
    layers = expert_layers(source.model)
    if config.routing == "dynamic" or not layers:
        return {config.task: {}}
    wanted = [*batches] if config.adapters else [config.task]
    return no_fits(layers, batches, wanted)


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def place(tree: CausalLM, names: Sequence[str], config: ExportConfig, fits: TaskFits) -> None:
    """Put into a tree, in place of some modules, what ships of their experts, beside floats."""
    for name in names:
        layer: Any = tree.get_submodule(name)
        if not isinstance(layer, ExpertLinear) or config.routing == "dynamic":
            continue
        if config.adapters:
            tree.set_submodule(name, AdapterLinear(layer, {
                task: of_task[name] for task, of_task in fits.items() if task}))
        elif config.merges and config.graph:
            tree.set_submodule(name, BlockLinear(
                MergedWeight(layer.weight, fits[config.task][name]), layer.bias))
        else:
            tree.set_submodule(name, frozen_layer(layer, fits[config.task][name]))


def show_fits(by_task: TaskFits) -> None:
    """Print the share of each mixture's output that the fits miss, for each task."""
    for task, fits in by_task.items():
        missed = {name: f.residual for name, f in fits.items() if f.kind != "exact"}
        if not missed:                       # a single expert is a linear map
            continue
        of = f"{clean(task)}: " if task else ""
        print(terminal_heatmap(
            f"{of}share of the mixture's output that one linear map misses", missed))
        kinds = [f.kind for f in fits.values()]
        print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median "
              f"residual on held-out samples {100 * median(missed.values()):.2f} %")
