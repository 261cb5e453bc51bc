"""The model that ships: a run's model, placed and rounded layer by layer, before it is written.

Each linear layer of the run becomes what the folder stores in its place:

    merge      a BlockLinear of merged weights; in layout peft as freeze
    freeze     the ExpertLinear, which has no router, beside floats or blocks
    dynamic    the ExpertLinear with its router, beside floats or blocks

The writer of graphs, the check and the ranges of NPUs take this model.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..io.files import read_json
from ..io.progress import progress_bar
from ..method.experts import (
    ExpertLinear,
    drop_routers,
    expert_layers,
    expert_parameters,
    linear_layers,
    routed,
)
from ..method.hooks import frozen
from ..model.checkpoint import DTYPES, load_adapter, load_model, stored_tensors, text_name
from ..model.decoder import CausalLM
from ..model.quantize import BlockLinear, BlockWeight, WideWeight, quantize
from .calibration import Calibration, Samples, calibration_batches
from .gptq import DAMPING, TIED_DAMPING, gptq
from .layers import HEAD, MergedWeight, flat, matrix, put_weight, vocabularies
from .mixture import round_experts
from .ranges import PROMPTS, TEXTS, Ranges, activation_ranges, answered
from .settings import ExportConfig, Source

Written = tuple[str, Tensor | None, Tensor]  # a name, what is in a file, and what has to be


@dataclass
class Part:
    """What ships as one graph, or as a folder of weights."""

    config: ExportConfig
    shipped: CausalLM                        # in float32, on the CPU
    ranges: Ranges = field(default_factory=dict)         # of activations, for an NPU


def ship(config: ExportConfig, source: Source, reference_fp32: CausalLM, samples: Samples) -> Part:
    """The model of a source, placed and rounded for samples.

    reference_fp32: the trained model in float32.
    """
    part = Part(config, sharing_copy(reference_fp32))
    place_and_round(part, source, samples)
    if config.graph:
        round_experts(part.shipped, config.form)
    if config.target == "npu" and config.form.rounds:
        few = PROMPTS if config.prompts else TEXTS
        texts = [e.ids for examples in samples.values() for e in examples[:few]]
        part.ranges = activation_ranges(part.shipped, answered(
            part.shipped, texts, source.tokenizer.stop_ids) if config.prompts else texts)
    return part


@torch.no_grad()
def place_and_round(part: Part, source: Source, samples: Samples) -> None:
    """Place what ships of the experts, and round the matrices of a part, layer by layer."""
    model, form = source.trained, part.config.form
    head, *embedding = vocabularies(model)               # or one table for both
    in_4_bits = {n for n in (*linear_layers(model), head)
                 if (way := form.way_of(n)) and way.bits == 4}
    texts = Calibration(model, calibration_batches(samples, source) if in_4_bits else {})
    with frozen(model):
        texts.weigh()
        for number in progress_bar(range(len(model.model.layers)), "round", unit="layer"):
            for names, x in texts.run_layer(number).items():     # what reads the same x (T, D)
                place(part, names)
                round_all(part, names, texts.factor(names, x) if in_4_bits & {*names} else None)
        damping = DAMPING if embedding else TIED_DAMPING
        round_all(part, [head], texts.factor([HEAD], texts.of_head(), damping)
                  if head in in_4_bits else None)
    round_all(part, embedding, None)


def place(part: Part, names: Sequence[str]) -> None:
    """Merge the experts of some modules of the shipped model into their weights, if they ship so;
    else the experts stay beside the weights."""
    if part.config.routing != "merge" or part.config.layout == "peft":
        return
    for name in names:
        layer = part.shipped.get_submodule(name)
        if isinstance(layer, ExpertLinear):
            merged = BlockLinear(MergedWeight(layer.weight, layer), layer.bias)
            part.shipped.set_submodule(name, merged)


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
    other = Part(part.config, sharing_copy(reference_fp32))
    place(other, [*expert_layers(reference_fp32)])
    return other.shipped


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


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
        if not routed(source.trained):
            drop_routers(model)
        trained = expert_parameters(source.trained)      # frozen by now, unlike those in the file
        for name, parameter in expert_parameters(model).items():
            parameter.data.copy_(trained[name])
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
