"""The model that ships: a run's model, frozen and rounded layer by layer, before it is written.

Each linear layer of the run becomes what the folder stores in its place:

    merge      a BlockLinear of merged weights; in layout peft as freeze
    freeze     an ExpertLinear of one expert, beside floats or blocks
    dynamic    the ExpertLinear as it was trained, beside floats or blocks
    adapters   an AdapterLinear, beside floats or blocks

The writer of graphs, the check and the ranges of NPUs take this model.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..io.drawing import terminal_heatmap
from ..io.files import read_json
from ..io.progress import progress_bar
from ..io.text import clean
from ..method.experts import ExpertLinear, expert_layers, linear_layers
from ..method.freeze import TaskFits, frozen_layer, no_fits
from ..method.hooks import frozen
from ..model.checkpoint import DTYPES, load_adapter, load_model, stored_tensors, text_name
from ..model.decoder import CausalLM
from ..model.quantize import BlockLinear, BlockWeight, WideWeight, quantize
from .calibration import Batches, Calibration, Samples, calibration_batches
from .gptq import DAMPING, TIED_DAMPING, gptq
from .layers import (
    HEAD,
    AdapterLinear,
    MergedWeight,
    flat,
    matrix,
    put_weight,
    routed,
    vocabularies,
)
from .mixture import round_experts
from .ranges import PROMPTS, TEXTS, Ranges, activation_ranges, answered
from .settings import ExportConfig, Source

Written = tuple[str, Tensor | None, Tensor]  # a name, what is in a file, and what has to be


@dataclass
class Part:
    """What ships as one graph, or as a folder of weights."""

    config: ExportConfig
    shipped: CausalLM                        # in float32, on the CPU
    fits: TaskFits                           # of the mixtures; none if they go on routing
    ranges: Ranges = field(default_factory=dict)         # of activations, for an NPU


def ship(config: ExportConfig, source: Source, reference_fp32: CausalLM, samples: Samples,
         fits: TaskFits | None = None) -> Part:
    """The model of a source, frozen and rounded for samples.

    reference_fp32: the trained model in float32. fits: of another graph of the same folder.
    """
    batches = calibration_batches(samples, source)
    to_make = fits_to_make(config, source, batches) if fits is None else {}
    part = Part(config, sharing_copy(reference_fp32), fits or to_make)
    freeze_and_round(part, source.trained, batches, to_make)
    show_fits(to_make)
    if config.graph:
        round_experts(part.shipped, config.form)
    if config.target == "npu" and config.form.rounds:
        few = PROMPTS if config.prompts else TEXTS
        texts = [e.ids for examples in samples.values() for e in examples[:few]]
        part.ranges = activation_ranges(part.shipped, answered(
            part.shipped, texts, source.tokenizer.stop_ids) if config.prompts else texts)
    return part


@torch.no_grad()
def freeze_and_round(part: Part, model: CausalLM, batches: Batches, to_make: TaskFits) -> None:
    """Fit the mixtures of a model, and place and round the matrices of a part, layer by layer.

    model: the run's, with the experts as they were trained. to_make: fits; at first those of single
    experts, which are exact.
    """
    head, *embedding = vocabularies(model)               # or one table for both
    linears, ways = linear_layers(model), part.config.form
    in_4_bits = {n for n in (*linears, head) if (way := ways.way_of(n)) and way.bits == 4}
    to_fit = any(routed(linears[name]) for of_task in to_make.values() for name in of_task)
    texts = Calibration(model, batches if to_fit or in_4_bits else {})
    with frozen(model):
        texts.weigh()
        for number in progress_bar(range(len(model.model.layers)), "freeze and round",
                                   unit="layer"):
            for names, x in texts.run_layer(number).items():     # what reads the same x (T, D)
                texts.fit(names, x, to_make)
                place(part, names)
                round_all(part, names, texts.factor(names, x) if in_4_bits & {*names} else None)
        damping = DAMPING if embedding else TIED_DAMPING
        round_all(part, [head], texts.factor([HEAD], texts.of_head(), damping)
                  if head in in_4_bits else None)
    round_all(part, embedding, None)


def place(part: Part, names: Sequence[str]) -> None:
    """Put into the shipped model, in place of some modules, what ships of their experts."""
    config = part.config
    for name in names:
        layer = part.shipped.get_submodule(name)
        if not isinstance(layer, ExpertLinear) or config.routing == "dynamic":
            continue
        fits: Any = {task: of_task[name] for task, of_task in part.fits.items()}
        new: nn.Module
        if config.adapters:
            new = AdapterLinear(layer, fits)
        elif config.routing == "merge" and config.layout != "peft":
            new = BlockLinear(MergedWeight(layer.weight, fits[config.task]), layer.bias)
        else:
            new = frozen_layer(layer, fits[config.task])
        part.shipped.set_submodule(name, new)


def round_all(part: Part, names: Sequence[str], R: Tensor | None) -> None:
    """Store matrices that read the same in few bits: in 4, for inputs whose `factor` is R; in 8, or
    without R, each number is rounded to the nearest."""
    if not names or not (way := part.config.form.way_of(names[0])):
        return
    weights = [matrix(part.shipped.get_submodule(name)) for name in names]
    positive = part.config.target == "npu" and way.bits == 8
    blocks = gptq(weights, R, *way) if R is not None else [
        quantize(weight, *way, positive=positive) for weight in weights]
    for name, own in zip(names, blocks):
        put_weight(part.shipped, name, BlockWeight(own, torch.float32))


def unrounded(part: Part, reference_fp32: CausalLM) -> CausalLM:
    """The shipped model as it would be if no weight were rounded."""
    other = Part(part.config, sharing_copy(reference_fp32), part.fits)
    place(other, [*expert_layers(reference_fp32)])
    return other.shipped


def with_adapter(shipped: CausalLM, task: str | None) -> CausalLM:
    """A model that ships, from now on with the LoRAs of a task, if it has such, or with none."""
    for layer in shipped.modules():
        if isinstance(layer, AdapterLinear):
            layer.task = task
    return shipped


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def fits_to_make(config: ExportConfig, source: Source, batches: Batches) -> TaskFits:
    """The linear maps of mixtures that the folder holds, of which those of single experts are made;
    none if mixtures go on routing."""
    layers = expert_layers(source.trained)
    if config.routing == "dynamic" or not layers:
        return {config.task: {}}
    return no_fits(layers, batches, [*batches] if config.adapters else [config.task])


def show_fits(by_task: TaskFits) -> None:
    """Print the share of each mixture's output that the fits miss, for each task."""
    for task, fits in by_task.items():
        missed = {name: f.residual for name, f in fits.items() if f.kind != "exact"}
        if not missed:                       # a single expert is a linear map
            continue
        of, kinds = f"{clean(task)}: " if task else "", [f.kind for f in fits.values()]
        print(terminal_heatmap(
            f"{of}share of the mixture's output that one linear map misses", missed))
        print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median "
              f"residual on held-out samples {100 * median(missed.values()):.2f} %")


def in_float32(source: Source) -> CausalLM:
    """The source's model in float32, on the CPU: itself, if it is."""
    norm, loaded = source.trained.model.norm.weight, dict(source.trained.named_parameters())
    if norm.dtype == torch.float32 and norm.device.type == "cpu":
        return source.trained
    model = load_model(source.base, None)
    for name, weight in model.named_parameters():        # the same pages as in the run's model
        if loaded[name].dtype == weight.dtype and loaded[name].device == weight.device:
            weight.data = loaded[name].data
    model.fingerprint = source.trained.fingerprint         # a base of fewer tokens has another
    if expert_layers(source.trained):
        load_adapter(model, source.run / "adapter")
    return widened(model)


def widened(model: CausalLM) -> CausalLM:
    """A model, changed in place, that computes in float32. What is stored in 16 bits stays in its
    file, which is mapped into memory, and is converted where it is needed."""
    for name in (*linear_layers(model), *vocabularies(model)):
        leaf: Any = model.get_submodule(name)
        if leaf.weight.dtype != torch.float32:
            put_weight(model, name, WideWeight(leaf.weight))
    for name, weight in model.named_parameters():
        if not name.endswith(".stored"):
            weight.data = weight.data.float()
    return model


def merged_weights(shipped: CausalLM, exported: CausalLM, base: Path) -> Iterator[Written]:
    """The weights of layout hf, as they are stored, and those that ship, in the base's dtypes."""
    stored = stored_tensors(base)
    for name, weight in exported.named_parameters():
        module, _, kind = name.rpartition(".")
        leaf = shipped.get_submodule(module)
        wanted = matrix(leaf) if kind == "weight" else getattr(leaf, kind)
        yield name, weight, wanted.to(DTYPES[stored[shipped.config.name(name)].content.get_dtype()])


def adapter_weights(shipped: CausalLM, folder: Path) -> Iterator[Written]:
    """The LoRAs of layout peft, if PEFT is told to take them, and those that ship, which zeros fill
    up to one rank."""
    settings = read_json(folder / "adapter_config.json")
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {text_name(name): [tensors.get(f"base_model.model.{name}.lora_{kind}.weight")
                               for kind in "AB"] for name in settings["target_modules"]}
    for name, layer in expert_layers(shipped).items():
        name, (A, B, _) = shipped.config.name(name), flat(layer)
        more = settings["r"] - len(A)
        wanted = F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
        yield from zip((f"{name}.lora_A", f"{name}.lora_B"), found.get(name, [None] * 2), wanted)
