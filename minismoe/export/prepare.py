"""From a run to what an export stores: mixtures become linear maps, and weights are rounded.

The way of one weight: `merged_weights` reads it from the base and adds its linear map,
`rounded_weights` rounds it, and `Prepared.read` gives it to the graph.
"""

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from safetensors.torch import save_file
from torch import Tensor

from ..data.tasks import Batch, Example, probe_batches
from ..io.drawing import terminal_heatmap
from ..io.files import naming, replacing
from ..io.progress import progress_bar
from ..method.experts import expert_layers
from ..method.freeze import Fit, TaskFits, fit, merged
from ..method.loss import IGNORE
from ..model.checkpoint import weights
from ..model.config import Config
from ..model.decoder import CausalLM
from ..model.quantize import Blocks
from .gptq import quantize_model, refine
from .heal import Healing, heal
from .mixture import Adapter, AdapterInput
from .ranges import Ranges, shipped_ranges
from .settings import ExportConfig, Source
from .weights import ReadWeight

SAMPLES, BATCH = 64, 16                      # to calibrate with, of each task, and at once
Fits = Mapping[str, Fit]                     # module -> its fit
Samples = Mapping[str, Sequence[Example]]    # by task; those of --prompts have none


@dataclass
class Prepared:
    """What one graph or folder of weights stores."""

    sizes: Config                            # of the decoder
    fits: TaskFits                           # of the mixtures; none if they go on routing
    read: ReadWeight                         # weight by Hugging Face name
    adapters: Mapping[str, Adapter]          # what stays beside the weights, by module
    blocks: Mapping[str, Blocks]             # weights that were rounded on samples, by name
    ranges: Ranges                           # of activations, for an NPU


def prepare(parts: Sequence[ExportConfig], source: Source) -> list[Prepared]:
    """Freeze the mixtures of a run, then heal and round them for each graph.

    parts: the settings of each graph, which differ in nothing but how weights are stored.
    """
    samples = shuffled_samples(parts[0], source)
    batches = calibration_batches(samples, source)
    fits = freeze_mixtures(parts[0], source, batches)
    if parts[0].merges:                      # towards floats, whatever the graphs store
        heal_maps(parts[0], source, samples, fits, {})
    return [prepare_part(part, source, samples, batches, TaskFits(
        dict(fits.together), {task: dict(f) for task, f in fits.by_task.items()}))
        for part in parts]


def shuffled_samples(config: ExportConfig, source: Source) -> Samples:
    """What mixtures are frozen and healed with: examples of the run, or lines of --prompts."""
    samples = source.examples
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


def freeze_mixtures(config: ExportConfig, source: Source, batches: Mapping[str, Sequence[Batch]],
                    ) -> TaskFits:
    """All mixtures as linear maps; none if they go on routing."""
    if config.routing == "dynamic" or not expert_layers(source.model):
        return TaskFits({}, {})
    if not os.access(source.run / "adapter", os.W_OK):       # the fits go there, after the work
        raise ValueError(f"{source.run / 'adapter'} cannot be written: copy the run")
    with progress_bar(desc="freeze", unit="sample") as bar:
        fits = fit(source.model, batches, progress=bar.update)[config.fit]
    show_residuals(fits.for_task(config.task))
    return fits


def prepare_part(config: ExportConfig, source: Source, samples: Samples,
                 batches: Mapping[str, Sequence[Batch]], fits: TaskFits) -> Prepared:
    """Heal and round what one graph stores, and save the fits beside the run's adapter."""
    stored = merged_weights(source.base, {})
    if config.merges:
        stored = merged_weights(source.base, fits.for_task(config.task))
    blocks = rounded_weights(config, source.model, stored, batches)
    if not config.merges:
        heal_maps(config, source, samples, fits, blocks)
    if fits.together:
        save_fits(source.run / "adapter", fits)
    adapters: Mapping[str, Adapter] = {}
    if not config.merges:
        adapters = (dict.fromkeys(fits.together, AdapterInput()) if config.adapters else
                    fits.for_task(config.task) or expert_layers(source.model))
    ranges = (shipped_ranges(config, source, samples, fits.for_task(config.task), blocks)
              if config.target == "npu" else {})
    return Prepared(source.model.config, fits, lambda name: blocks.get(name) or stored(name),
                    adapters, blocks, ranges)


def heal_maps(config: ExportConfig, source: Source, samples: Samples, fits: TaskFits,
              blocks: Mapping[str, Blocks]) -> None:
    """Heal the fits that the export holds, in place, beside the weights that ship with them."""
    for task in samples if config.adapters else [config.task]:
        found = fits.for_task(task)
        if config.heal and found:
            examples = samples[task] if task else [e for part in samples.values() for e in part]
            healing = Healing(source.model, examples, config.heal, source.tokenizer.pad_id,
                              source.micro_batch_size, config.compile)
            found.update(heal(healing, found, blocks))


def merged_weights(base: Path, fits: Fits) -> Callable[[str], Tensor]:
    """A function that reads a tensor of a checkpoint by name, with the fit of its module merged."""
    stored = weights(base)

    def weight(name: str) -> Tensor:
        found = fits.get(name.removesuffix(".weight"))
        return merged(stored(name).float(), found) if found else stored(name)
    return weight


def rounded_weights(config: ExportConfig, model: CausalLM, stored: Callable[[str], Tensor],
                    batches: Mapping[str, Sequence[Batch]]) -> dict[str, Blocks]:
    """The stored weights in few bits, rounded for what the model reads on the batches of the task,
    or of all tasks; none if there are no batches, or nothing to round."""
    if not (config.block and batches):
        return {}
    blocks = quantize_model(model, stored, config.precision, config.block)
    refine(model, blocks, stored, [batch for task, several in batches.items()
                                   if config.task in (None, task) for batch in several])
    return {name: replace(found, data=found.data.cpu(), scales=found.scales.cpu())
            for name, found in blocks.items()}


def show_residuals(fits: Fits) -> None:
    """Print the share of each mixture's output that the fits miss."""
    print(terminal_heatmap("share of the mixture's output that one linear map misses",
                           {name: f.residual for name, f in fits.items()}))
    kinds = [f.kind for f in fits.values()]
    missed = median([f.residual for f in fits.values() if f.kind != "exact"] or [0.0])
    print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median residual on "
          f"held-out samples {100 * missed:.2f} %")


def save_fits(folder: Path, fits: TaskFits) -> None:
    """Write folder/frozen.safetensors: <module>.lora_A and .lora_B, and <task>/<module>.lora_A."""
    every = {**fits.together, **{f"{task}/{name}": found for task, by_name in
                                 fits.by_task.items() for name, found in by_name.items()}}
    tensors = {f"{name}.{part}": getattr(found, part).contiguous()
               for name, found in every.items() for part in ("lora_A", "lora_B")}
    notes = {name: [found.kind, found.residual] for name, found in every.items()}
    with replacing(folder / "frozen.safetensors") as tmp:
        save_file(tensors, tmp, metadata={"format": "minismoe.frozen/1", "fits": json.dumps(notes)})
