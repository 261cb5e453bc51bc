"""Freeze the mixtures of a run, and heal what ships."""

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..data.tasks import Batch, Example, probe_batches
from ..io.drawing import terminal_heatmap
from ..io.files import naming, replacing
from ..method.experts import expert_layers
from ..method.freeze import Fit, TaskFits, fit, merged
from ..method.loss import IGNORE
from ..model.checkpoint import weights
from ..model.quantize import Blocks
from .gptq import refine
from .heal import Lesson, heal_maps, heal_scales
from .scales import quantize_model
from .settings import ExportConfig, Source

SAMPLES, BATCH = 64, 16                      # to calibrate with, of each task, and at once
MISSED = 0.015                               # median residual above which merging loses answers
Fits = Mapping[str, Fit]                     # module -> its fit


@dataclass
class Frozen(TaskFits):
    """The mixtures of a run as linear maps; none if they go on routing."""

    blocks: dict[str, Blocks] = field(default_factory=dict)      # healed weights in few bits


class Calibration:
    """The samples that mixtures are frozen with, of the run or --prompts."""

    def __init__(self, config: ExportConfig, source: Source):
        self.config, self.source = config, source
        pools = source.examples
        if config.prompts:
            pools = {"prompts": unlabelled(config.prompts, source)}
        self.pools = {name: random.Random(0).sample(e, len(e)) for name, e in pools.items()}

    def lesson(self, task: str | None, steps: int) -> Lesson:
        """What a student of the mixture is healed on: the samples of a task, or of all."""
        examples = self.pools[task] if task else [e for pool in self.pools.values() for e in pool]
        return Lesson(self.source.model, examples, steps, self.source.tokenizer.pad_id,
                      self.source.micro_batch_size)

    @cached_property
    def batches(self) -> dict[str, list[Batch]]:
        """Padded batches by task, on the model's device."""
        device, pad_id = self.source.model.lm_head.weight.device, self.source.tokenizer.pad_id
        return {name: list(probe_batches(pool, SAMPLES, BATCH, pad_id, device))
                for name, pool in self.pools.items()}

    def fits(self) -> dict[str, TaskFits]:
        """All mixtures, frozen, by kind of fit."""
        with tqdm(desc="freeze", unit="sample") as bar:
            return fit(self.source.model, self.batches, progress=bar.update)


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


def freeze_routing(parts: Sequence[ExportConfig], source: Source) -> list[Frozen]:
    """Freeze the mixtures of a run for each graph, and save the fits beside its adapter.

    parts: the settings of each graph, which differ in nothing but how weights are stored.
    """
    config, layers = parts[0], expert_layers(source.model)
    if config.routing == "dynamic":
        return [Frozen({}, {})] * len(parts)
    data, found = Calibration(config, source), TaskFits({}, {})
    if layers:
        if not os.access(source.run / "adapter", os.W_OK):       # the fits go there, after the work
            raise ValueError(f"{source.run / 'adapter'} cannot be written: copy the run")
        found = data.fits()[config.fit]
        show_residuals(found.of(config.task))
    frozen = [Frozen(dict(found.together), {t: dict(f) for t, f in found.by_task.items()})
              for _ in parts]
    for part, its_frozen in zip(parts, frozen):
        if data.pools:
            heal_frozen(part, source, data, its_frozen)
        if layers:
            save_frozen(source.run / "adapter", its_frozen)
    return frozen


def heal_frozen(config: ExportConfig, source: Source, data: Calibration, frozen: Frozen) -> None:
    """Train the frozen maps for config.heal steps; quantise merged weights, and train their scales.

    Scales win back what rounding loses, but not what merging loses: maps that are merged into
    blocks are trained first if they miss over MISSED. All other maps are always trained.
    """
    block = None if config.adapters or config.routing == "freeze" else config.block
    for task in data.pools if config.adapters else [config.task]:
        fits = frozen.of(task)
        if config.heal and fits and (not block or missed(fits) > MISSED):
            fits.update(heal_maps(data.lesson(task, config.heal), fits, precision=config.precision,
                                  block=None if block else config.block))
    if not block:
        return
    weight = merged_weights(source.base, frozen.of(config.task))
    blocks = quantize_model(source.model, weight, config.precision, block)
    refine(source.model, blocks, weight, [batch for task, several in data.batches.items()
                                          if config.task in (None, task) for batch in several])
    if config.heal:
        blocks = heal_scales(data.lesson(config.task, config.heal), blocks)
    frozen.blocks = {name: replace(found, data=found.data.cpu(), scales=found.scales.cpu())
                     for name, found in blocks.items()}


def merged_weights(base: Path, fits: Fits) -> Callable[[str], Tensor]:
    """A function that reads a tensor of a checkpoint by name, with the fit of its module merged."""
    stored = weights(base)

    def weight(name: str) -> Tensor:
        found = fits.get(name.removesuffix(".weight"))
        return merged(stored(name).float(), found) if found else stored(name)
    return weight


def show_residuals(fits: Fits) -> None:
    """Print the share of each mixture's output that the fits miss."""
    print(terminal_heatmap("share of the mixture's output that one linear map misses",
                           {name: f.residual for name, f in fits.items()}))
    kinds = [f.kind for f in fits.values()]
    print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median residual on "
          f"held-out samples {100 * missed(fits):.2f} %")


def missed(fits: Fits) -> float:
    """The median share of a mixture's output that its map misses; single experts miss nothing."""
    return median([f.residual for f in fits.values() if f.kind != "exact"] or [0.0])


def save_frozen(folder: Path, frozen: TaskFits) -> None:
    """Write folder/frozen.safetensors: <module>.lora_A and .lora_B, and <task>/<module>.lora_A."""
    fits = {**frozen.together, **{f"{task}/{name}": found for task, by_name in
                                  frozen.by_task.items() for name, found in by_name.items()}}
    tensors = {f"{name}.{part}": getattr(found, part).contiguous()
               for name, found in fits.items() for part in ("lora_A", "lora_B")}
    notes = {name: [found.kind, found.residual] for name, found in fits.items()}
    with replacing(folder / "frozen.safetensors") as tmp:
        save_file(tensors, tmp, metadata={"format": "minismoe.frozen/1", "fits": json.dumps(notes)})
