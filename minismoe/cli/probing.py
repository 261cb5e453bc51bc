"""The probe as the scripts run it, with a bar, and the allocation that follows from it."""

import random
import sys
from dataclasses import replace

from torch import Tensor, nn

from ..data.tasks import probe_batches
from ..io.drawing import terminal_heatmap
from ..io.files import naming, read_json
from ..io.progress import progress_bar
from ..io.text import clean, table
from ..method.allocate import (
    FORMAT,
    KEEP,
    Allocation,
    AllocationSettings,
    allocate,
    is_whole,
    select,
)
from ..method.experts import linear_layers
from ..method.sensitivity import Scores, probe, shapes_of
from .flags import SETTINGS, AllocationConfig
from .inputs import Inputs

PROBE_BATCH = 16                                     # samples at once


def allocation_of(config: AllocationConfig, inputs: Inputs, size: int = PROBE_BATCH,
                  ) -> tuple[Allocation, Scores | None]:
    """The allocation that the flags or their file decide; else what a probe of `size` samples at
    once says, and its scores. Raises ValueError for what does not fit, before the probe if no score
    could change that."""
    allocation, settings = read_allocation(config)
    if allocation is None:
        settings = without_small(settings, inputs)
        if known := known_allocation(settings, inputs):
            return known, None
        scores = run_probe(config, settings, inputs, size)
        return choose(settings, scores), scores
    # Of --strategy lora, a budget chose the rank.
    if config.rank not in (AllocationConfig.rank, allocation.rank) and config.strategy != "lora":
        print(f"{clean(config.allocation)} says rank {allocation.rank}, which is taken, and not "
              f"{config.rank}", file=sys.stderr)
    return allocation, None                  # `add_experts` checks it


def read_allocation(config: AllocationConfig) -> tuple[Allocation | None, AllocationSettings]:
    """The experts that the file of --allocation holds, if it does, and how experts are given: as
    the flags say, or that file. A bare mapping takes rank, alpha and top-k from the flags."""
    settings = AllocationSettings(
        strategy=config.strategy, budget_params=config.budget_params, min_experts=1,
        rank=config.rank)
    if not (file := config.allocation):
        return None, settings
    value = read_json(file)
    if value.get("top_k") == 1:          # Switch takes the softmax of all; Mixtral, as here, of k
        raise ValueError(f"{file}: top_k 1 would teach routers nothing but balance, as the softmax "
                         "of a single logit is 1, whatever it is: give 2 or more")
    if value and value.keys() <= {*SETTINGS}:
        if not is_whole(least := value.get("min_experts", 0), 0):
            raise ValueError(f"{file}: min_experts must be a whole number >= 0, got {least!r}")
        return None, replace(settings, **value)
    if "format" not in value:
        if not any("." in name for name in value):
            raise ValueError(f"{file} holds no module, and {', '.join(value) or 'nothing'} besides "
                             f"settings: {', '.join(SETTINGS)}")
        value = {"format": FORMAT, "experts": value, "rank": config.rank,
                 "alpha": 2 * config.rank, "top_k": settings.top_k}
    with naming(file, ValueError):
        return Allocation.from_json(value), settings


def without_small(settings: AllocationSettings, inputs: Inputs) -> AllocationSettings:
    """The settings without the matrices that have a side below the rank, if others are left. Prints
    which they are."""
    shapes = shapes_of(inputs.model)
    small = [name for name, shape in shapes.items() if min(shape) < settings.rank]
    if not 0 < len(small) < len(shapes):
        return settings
    kinds = sorted({name.rpartition(".")[2] for name in small})
    print(f"{len(small)} matrices get no experts, as they have a side below --rank "
          f"{settings.rank}: {', '.join(kinds)}")
    return replace(settings, target_modules=",".join(shapes.keys() - small))


def known_allocation(settings: AllocationSettings, inputs: Inputs) -> Allocation | None:
    """The allocation that the settings alone decide; None if it takes a probe. Raises ValueError
    for settings that do not fit whatever the probe finds."""
    equal = Scores(shapes_of(inputs.model))
    for task in inputs.encoded:
        equal[task] = dict.fromkeys(equal.shapes, 0.0)
    every = settings.min_experts > 0         # each matrix gets an expert
    # One task gives no matrix more than one expert, so where each has at least one, all have the
    # same, whatever the scores.
    if settings.strategy != "votes" or every and len(inputs.encoded) == 1:
        return choose(settings, equal)
    if every:                                # the smallest that any scores can give must fit
        choose(replace(settings, strategy="uniform"), equal)
    return None


def choose(settings: AllocationSettings, scores: Scores) -> Allocation:
    """The allocation of these settings, a plain LoRA by its name. ValueError if it does not fit."""
    allocation = allocate(scores, settings)
    allocation.check_rank(scores.shapes)
    if {*allocation.experts.values()} == {1} and len(allocation.experts) == len(
            select(scores.shapes, settings.target_modules)):
        return replace(allocation, strategy="lora")
    return allocation


def run_probe(config: AllocationConfig, settings: AllocationSettings, inputs: Inputs,
              size: int = PROBE_BATCH) -> Scores:
    """Probe all tasks, `size` samples at once, with a bar; print how far the result can be trusted.
    Raises ArithmeticError for gradients that are not finite."""
    batches = [(name, batch) for name, e in inputs.encoded.items() for batch in probe_batches(
        random.Random(config.seed).sample(e, len(e)), config.samples, size,
        inputs.tokenizer.pad_id)]
    scores = Scores(shapes_of(inputs.model))

    samples = sum(len(batch[0]) for _, batch in batches)
    with progress_bar(desc="probe", unit="sample", total=samples) as bar:
        for name, batch in batches:
            norms = probe(inputs.model, {name: [batch]}).samples[name]
            scores.add(name, norms.double())
            bar.update(len(norms))

    if bad := [task for task, norms in scores.samples.items() if not norms.isfinite().all()]:
        raise ArithmeticError(f"the probe of {', '.join(bad)} found gradients that are not finite: "
                              "is the checkpoint whole? If it is, try --dtype float32")
    print_overlap(settings, scores)
    return scores


def print_overlap(settings: AllocationSettings, scores: Scores) -> None:
    """Print how many of the matrices that one half of a task's samples votes for the other half
    votes for, too, as a share. Random votes for a share `keep` of all agree in that share."""
    keep = settings.keep or KEEP           # a budget takes the keep that fits only afterwards
    def voted(samples: Tensor) -> set[str]:
        one_task = dict(zip(scores.shapes, samples.sum(0).tolist()))
        return {*allocate({"": one_task}, keep=keep,
                          target_modules=settings.target_modules).experts}

    rows = []
    for task, samples in scores.samples.items():
        halves = voted(samples[::2]), voted(samples[1::2])
        overlap = len(halves[0] & halves[1]) / len(halves[0])
        rows.append([clean(task), len(samples), f"{overlap:.2f}" if len(samples) > 1 else "-"])
    print(table(["task", "samples probed", f"split-half overlap (by chance: {keep:.2f})"], rows))


def print_experts(model: nn.Module, allocation: Allocation) -> None:
    """Print the experts of every linear layer but the head, unless each has one."""
    experts = {name: allocation.experts.get(name, 0) for name in linear_layers(model)}
    if {*experts.values()} != {1}:
        print(terminal_heatmap("experts a matrix", experts, digits=True))
