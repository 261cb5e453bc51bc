"""Freeze the mixtures of a run: fit linear maps, show their residuals, save them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from ..data.tasks import Batch, Example, probe_batches
from ..data.tokenizer import Tokenizer
from ..io.drawing import terminal_heatmap
from ..io.files import replacing
from ..io.text import clean
from ..method.freeze import Fit, TaskFits, fit
from ..method.loss import IGNORE
from ..training.evaluate import evaluate
from .heal import agreement
from .settings import FreezeConfig, Source

FROZEN_FORMAT = "minismoe.frozen/1"
BATCH = 16                                   # calibration samples at once
Fits = Mapping[str, Fit]                     # module -> its fit
Score = Callable[[Any, str], float]          # model, task -> from 0 to 1


@dataclass
class Frozen(TaskFits):
    """The mixtures of a run as linear maps, and the matrices that keep routing instead."""

    routed: list[str] = field(default_factory=list)


class Calibration:
    """The samples that mixtures are frozen with and scored on: of the run, or of --prompts."""

    def __init__(self, config: FreezeConfig, source: Source):
        self.config, self.source = config, source
        self.pools: Mapping[str, Sequence[Example]] = {
            name: random.Random(0).sample(e, len(e)) for name, e in source.examples.items()}
        if config.prompts:
            self.pools = {"prompts": unlabelled(config.prompts, source.tokenizer)}

    @property
    def examples(self) -> list[Example]:
        """The samples of all tasks."""
        return [e for pool in self.pools.values() for e in pool]

    @cached_property
    def batches(self) -> dict[str, list[Batch]]:
        """Padded batches by task, on the model's device."""
        device = self.source.model.lm_head.weight.device
        return {name: list(probe_batches(pool, self.config.calibration, BATCH,
                                         self.source.tokenizer.pad_id, device))
                for name, pool in self.pools.items()}

    def fits(self) -> dict[str, TaskFits]:
        """All mixtures, frozen, by kind of fit."""
        with tqdm(desc="freeze", unit="sample") as bar:
            return fit(self.source.model, self.batches, progress=bar.update)

    def score(self, model: Any, task: str) -> float:
        """Exact match on a task's test split, or without labels agreement with the mixture."""
        if self.config.prompts:
            return agreement(model, self.source.model, self.batches[task])
        tests = next(t for t in self.source.tasks if t.name == task)
        with tqdm(total=len(tests.test), desc=f"evaluate {clean(task)}", leave=False) as bar:
            return evaluate(model, self.source.tokenizer, tests, progress=bar.update).share


def unlabelled(file: str, tokenizer: Tokenizer) -> list[Example]:
    """One example a line of a file, without labels. ValueError if it is empty or no UTF-8."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is no UTF-8 text: {e}") from None
    prompts = [[{"role": "user", "content": line}] for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    ids = [tokenizer.encode(tokenizer.render(p, add_generation_prompt=True))[0] for p in prompts]
    return [Example("prompts", tokens, [IGNORE] * len(tokens)) for tokens in ids]


def show_residuals(source: Source, fits: Fits) -> None:
    """Print the share of each mixture's output that the fits miss."""
    residuals = {name: f.residual for name, f in fits.items()}
    print(terminal_heatmap("share of the mixture's output that one linear map misses", residuals))
    kinds = [f.kind for f in fits.values()]
    print(f"{', '.join(f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))}; median residual on "
          f"held-out samples {100 * median(residuals.values()):.2f} %")


def save_frozen(folder: str | Path, frozen: TaskFits) -> None:
    """Write folder/frozen.safetensors: <module>.lora_A and .lora_B, and <task>/<module>.lora_A."""
    fits = {**frozen.together, **{f"{task}/{name}": found for task, by_name in
                                  frozen.by_task.items() for name, found in by_name.items()}}
    tensors = {f"{name}.{part}": getattr(found, part).contiguous()
               for name, found in fits.items() for part in ("lora_A", "lora_B")}
    notes = {name: [found.kind, found.residual, found.energy] for name, found in fits.items()}
    with replacing(Path(folder) / "frozen.safetensors") as tmp:
        save_file(tensors, tmp, metadata={"format": FROZEN_FORMAT, "fits": json.dumps(notes)})
