"""The model as it ships: a tree of modules, made from a run layer by layer.

Each linear layer of the run becomes what the folder stores in its place:

    merge      a BlockLinear of merged weights; in layout peft as freeze
    freeze     an ExpertLinear of one expert, beside floats or blocks
    dynamic    the ExpertLinear as it was trained, beside floats or blocks
    adapters   an AdapterLinear, beside floats or blocks

The writer of graphs, the check and the ranges of NPUs take this tree.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..io.drawing import terminal_heatmap
from ..io.progress import progress_bar
from ..io.text import clean
from ..method.experts import ExpertLinear, expert_layers, linear_layers
from ..method.freeze import Fit, TaskFits, frozen_layer, no_fits
from ..method.hooks import measuring
from ..model.checkpoint import load_adapter, load_model
from ..model.decoder import CausalLM
from ..model.quantize import BlockLinear, Blocks, BlockWeight, WideWeight, quantize
from .bits import choose_bits
from .calibration import Batches, Calibration, Samples, calibration_batches, shuffled_samples
from .gptq import DAMPING, TIED_DAMPING, gptq
from .leaves import AdapterLinear, MergedWeight, matrix, put_weight, routed, vocabularies
from .mixture import round_experts
from .ranges import PROMPTS, TEXTS, Ranges, activation_ranges, answered
from .settings import ExportConfig, Source
from .weights import Storage

Fits = Mapping[str, Fit]                     # module -> its fit
MUCH = 0.1                                   # a residual that costs exact match


class Part:
    """One graph of an export, or its folder of weights: the settings, and the tree that it stores.

    tree: in float32, on the CPU. fits: of the mixtures; none if they go on routing. ranges: of
    activations, for an NPU.
    """

    def __init__(self, config: ExportConfig, reference: CausalLM, fits: TaskFits):
        """reference: the source's model in float32. fits: are there when `place` reads them."""
        self.config, self.reference, self.fits = config, reference, fits
        self.tree = sharing_copy(reference)
        self.ranges: Ranges = {}
        self.in_4_bits = defaultdict[str, list[Blocks]](list)        # what --size may choose

    def place(self, names: Sequence[str]) -> None:
        """Put into the tree, in place of some modules, what ships of their experts."""
        config = self.config
        for name in names:
            layer = self.tree.get_submodule(name)
            if not isinstance(layer, ExpertLinear) or config.routing == "dynamic":
                continue
            of_tasks: Any = {task: of_task[name] for task, of_task in self.fits.items()}
            new: nn.Module
            if config.adapters:
                new = AdapterLinear(layer, of_tasks)
            elif config.routing == "merge" and config.layout != "peft":
                new = BlockLinear(MergedWeight(layer.weight, of_tasks[config.task]), layer.bias)
            else:
                new = frozen_layer(layer, of_tasks[config.task])
            self.tree.set_submodule(name, new)

    def unrounded(self) -> CausalLM:
        """The tree as it would be if no weight were rounded."""
        part = Part(self.config, self.reference, self.fits)
        part.place([*expert_layers(self.reference)])
        return part.tree

    def round(self, names: Sequence[str], R: Tensor | None) -> None:
        """Store matrices that read the same in few bits, for inputs whose `factor` is R."""
        for storage in self.config.form.options_of(names[0]) if names else ():
            if self.config.size and storage.bits == 8:
                continue                     # rounded once it is chosen
            weights = [matrix(self.tree.get_submodule(name)) for name in names]
            for name, blocks in zip(names, self.rounded(weights, storage, R)):
                if self.config.size:
                    self.in_4_bits[name].append(blocks)
                else:
                    put_weight(self.tree, name, BlockWeight(blocks, torch.float32))

    def rounded(self, weights: Sequence[Tensor], storage: Storage, R: Tensor | None = None,
                ) -> list[Blocks]:
        """Weights (out, in) in few bits: in 4, for what they read; in 8 bits, or where R is not
        known, each number is rounded to the nearest."""
        if storage.bits == 4 and R is not None:
            return gptq(weights, R, *storage)
        positive = self.config.target == "npu" and storage.bits == 8
        return [quantize(weight, *storage, positive=positive) for weight in weights]

    def choose(self, source: Source) -> None:
        """Store each matrix in the bits that --size gives it, by the harm on lines that the run was
        not trained on, as it is not certain of them."""
        names = [*linear_layers(self.tree), *vocabularies(self.tree)]
        storages = {name: self.config.form.options_of(name) for name in names}
        texts = calibration_batches(shuffled_samples(self.config, source, unseen=True), source)
        for name, number in choose_bits(storages, self.in_4_bits, self.tree, source.model, texts,
                                        self.config.size or 0).items():
            kept, storage = self.in_4_bits.pop(name, []), storages[name][number]
            blocks = kept[number] if storage.bits == 4 else self.rounded(      # 4 bits come first
                [matrix(self.tree.get_submodule(name))], storage)[0]
            put_weight(self.tree, name, BlockWeight(blocks, torch.float32))


def ship(configs: Sequence[ExportConfig], source: Source, reference: CausalLM, samples: Samples,
         ) -> list[Part]:
    """The parts of an export, frozen and rounded for samples.

    configs: the settings of the parts, which differ in nothing but how weights are stored.
    reference: the model of the source in float32.
    """
    batches = calibration_batches(samples, source)
    fits = fits_to_make(configs[0], source, batches)
    parts = [Part(config, reference, fits) for config in configs]
    freeze_and_round(parts, source.model, batches, fits)
    show_fits(fits)
    for part in parts:
        if part.config.size:
            part.choose(source)
        if part.config.graph:
            round_experts(part.tree, part.config.form)
        part.ranges = ranges_of(part.config, part.tree, samples, source)
    return parts


@torch.no_grad()
def freeze_and_round(parts: Sequence[Part], model: CausalLM, batches: Batches, fits: TaskFits,
                     ) -> None:
    """Fit the mixtures of a model, and place and round the matrices of each part, layer by layer.

    model: the run's, with the experts as they were trained. fits: of single experts at first.
    """
    table, *other = vocabularies(model)
    linears = linear_layers(model)

    def in_4_bits(name: str) -> bool:
        return any(storage.bits == 4
                   for part in parts for storage in part.config.form.options_of(name))

    to_fit = any(routed(linears[name]) for of_task in fits.values() for name in of_task)
    texts = Calibration(model, batches if to_fit or any(map(in_4_bits, (*linears, table))) else {})
    with measuring(model):
        for number in progress_bar(range(len(model.model.layers)), "freeze and round",
                                   unit="layer"):
            for layers, x in texts.through(number):      # what reads the same x (T, D)
                texts.fit(layers, x, fits)
                R = texts.factor(x) if in_4_bits([*layers][0]) else None
                for part in parts:
                    part.place([*layers])
                    part.round([*layers], R)
        R = None
        if in_4_bits(table):
            R = texts.factor(texts.of_head(), DAMPING if other else TIED_DAMPING)
    for part in parts:
        part.round([table], R)
        part.round(other, None)


def fits_to_make(config: ExportConfig, source: Source, batches: Batches) -> TaskFits:
    """The linear maps of mixtures that the folder holds, of which those of single experts are made;
    none if mixtures go on routing."""
    layers = expert_layers(source.model)
    if config.routing == "dynamic" or not layers:
        return {config.task: {}}
    return no_fits(layers, batches, [*batches] if config.adapters else [config.task])


def ranges_of(config: ExportConfig, tree: CausalLM, samples: Samples, source: Source) -> Ranges:
    """The ranges of activations on the samples, if an NPU stores them in few bits."""
    if config.target != "npu" or not config.form.rounds:
        return {}
    few = PROMPTS if config.prompts else TEXTS
    texts = [e.ids for examples in samples.values() for e in examples[:few]]
    return activation_ranges(tree, answered(tree, texts, source.tokenizer.stop_ids)
                             if config.prompts else texts)


def show_fits(by_task: TaskFits) -> None:
    """Print the share of each mixture's output that the fits miss, for each task."""
    for task, fits in by_task.items():
        missed = {name: f.residual for name, f in fits.items() if f.kind != "exact"}
        if not missed:                       # a single expert is a linear map
            continue
        of = f"{clean(task)}: " if task else ""
        print(terminal_heatmap(
            f"{of}share of the mixture's output that one linear map misses", missed))
        kinds, middle = [f.kind for f in fits.values()], median(missed.values())
        print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median "
              f"residual on held-out samples {100 * middle:.2f} %")
        if middle > MUCH:
            print(f"{of}one linear map misses {100 * middle:.0f} % of what the mixtures write, in "
                  "the median: calibrate on lines like those of the tasks, or keep the mixtures "
                  "(--routing dynamic)", file=sys.stderr)


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def in_float32(source: Source) -> CausalLM:
    """The source's model in float32, on the CPU: itself, if it is."""
    norm, loaded = source.model.model.norm.weight, dict(source.model.named_parameters())
    if norm.dtype == torch.float32 and norm.device.type == "cpu":
        return source.model
    model = load_model(source.base, None)
    for name, weight in model.named_parameters():        # the same pages as in the run's model
        if loaded[name].dtype == weight.dtype and loaded[name].device == weight.device:
            weight.data = loaded[name].data
    model.fingerprint = source.model.fingerprint         # a base of fewer tokens has another
    if expert_layers(source.model):
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
