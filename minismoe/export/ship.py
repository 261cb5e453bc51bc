"""Make the parts of an export from a run: freeze and round its model, layer by layer."""

import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from ..io.drawing import terminal_heatmap
from ..io.progress import progress_bar
from ..io.text import clean
from ..method.experts import expert_layers, linear_layers
from ..method.freeze import TaskFits, no_fits
from ..method.hooks import frozen
from ..model.checkpoint import load_adapter, load_model
from ..model.decoder import CausalLM
from ..model.quantize import WideWeight
from .calibration import Batches, Calibration, Samples, calibration_batches
from .gptq import DAMPING, TIED_DAMPING
from .layers import HEAD, put_weight, routed, vocabularies
from .mixture import round_experts
from .part import Part
from .ranges import PROMPTS, TEXTS, Ranges, activation_ranges, answered
from .rounding import round_all
from .settings import ExportConfig, Source

MUCH = 0.1                                   # a residual that costs exact match


def ship(configs: Sequence[ExportConfig], source: Source, reference_fp32: CausalLM,
         samples: Samples) -> list[Part]:
    """The parts of an export, frozen and rounded for samples.

    configs: the settings of the parts, which differ in nothing but how weights are stored.
    reference_fp32: the model of the source in float32.
    """
    batches = calibration_batches(samples, source)
    fits = fits_to_make(configs[0], source, batches)
    parts = [Part(config, reference_fp32, fits) for config in configs]
    freeze_and_round(parts, source.trained, batches, fits)
    show_fits(fits)
    for part in parts:
        if part.config.graph:
            round_experts(part.shipped, part.config.form)
        part.ranges = ranges_of(part.config, part.shipped, samples, source)
    return parts


@torch.no_grad()
def freeze_and_round(parts: Sequence[Part], model: CausalLM, batches: Batches, fits: TaskFits,
                     ) -> None:
    """Fit the mixtures of a model, and place and round the matrices of each part, layer by layer.

    model: the run's, with the experts as they were trained. fits: of single experts at first.
    """
    head, *embedding = vocabularies(model)               # or one table for both
    linears = linear_layers(model)

    def in_4_bits(name: str) -> bool:
        ways = [part.config.form.way_of(name) for part in parts]
        return any(way and way.bits == 4 for way in ways)

    to_fit = any(routed(linears[name]) for of_task in fits.values() for name in of_task)
    to_round = any(map(in_4_bits, (*linears, head)))
    texts = Calibration(model, batches if to_fit or to_round else {})
    with frozen(model):
        if to_round:
            texts.weigh()
        for number in progress_bar(range(len(model.model.layers)), "freeze and round",
                                   unit="layer"):
            for names, x in texts.run_layer(number).items():     # what reads the same x (T, D)
                texts.fit(names, x, fits)
                R = texts.factor(names, x) if in_4_bits(names[0]) else None
                for part in parts:
                    part.place(names)
                    round_all(part, names, R)
        R = None
        if in_4_bits(head):
            R = texts.factor([HEAD], texts.of_head(), DAMPING if embedding else TIED_DAMPING)
    for part in parts:
        round_all(part, [head], R)
        round_all(part, embedding, None)


def fits_to_make(config: ExportConfig, source: Source, batches: Batches) -> TaskFits:
    """The linear maps of mixtures that the folder holds, of which those of single experts are made;
    none if mixtures go on routing."""
    layers = expert_layers(source.trained)
    if config.routing == "dynamic" or not layers:
        return {config.task: {}}
    return no_fits(layers, batches, [*batches] if config.adapters else [config.task])


def ranges_of(config: ExportConfig, shipped: CausalLM, samples: Samples, source: Source) -> Ranges:
    """The ranges of activations on the samples, if an NPU stores them in few bits."""
    if config.target != "npu" or not config.form.rounds:
        return {}
    few = PROMPTS if config.prompts else TEXTS
    texts = [e.ids for examples in samples.values() for e in examples[:few]]
    return activation_ranges(shipped, answered(shipped, texts, source.tokenizer.stop_ids)
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
