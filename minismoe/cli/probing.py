"""The probe as the scripts run it, with a bar, and the allocation that follows from it."""

import random
import sys
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..data.tasks import probe_batches
from ..io.drawing import terminal_heatmap
from ..io.files import naming, read_json
from ..io.progress import progress_bar
from ..io.text import clean, table
from ..method.allocate import FORMAT, KEEP, Allocation, allocate
from ..method.experts import linear_layers
from ..method.sensitivity import Scores, probe, shapes_of
from .flags import AllocationConfig, RunConfig
from .inputs import Inputs

PROBE_BATCH = 16                                     # samples at once


def allocation_of(config: RunConfig, inputs: Inputs, size: int = PROBE_BATCH,
                  ) -> tuple[Allocation, Scores | None]:
    """The allocation of --allocation, or that of a strategy which reads no score; else what a probe
    of `size` samples at once says, and its scores. Raises ValueError for what does not fit."""
    if config.allocation:
        return read_allocation(config), None         # `add_experts` checks it
    shapes = large_matrices(inputs, config.rank)
    # One task gives no matrix more than one expert, so each gets one whatever its scores.
    if config.strategy != "votes" or len(inputs.encoded) == 1:
        equal = {task: dict.fromkeys(shapes, 0.0) for task in inputs.encoded}
        return choose(config, equal, shapes, config.strategy), None
    # Votes of one task leave each matrix one expert: a budget below that is too small whatever the
    # scores of all tasks are, so it is refused before the probe.
    choose(config, {"": dict.fromkeys(shapes, 0.0)}, shapes)
    scores = run_probe(config, inputs, shapes, size)
    return choose(config, scores, shapes), scores


def read_allocation(config: RunConfig) -> Allocation:
    """The experts in the file of --allocation. A bare {module: experts} takes the rank of --rank;
    a rank that the file says is taken."""
    value = read_json(config.allocation or "")
    if "format" not in value:
        value = {"format": FORMAT, "experts": value, "rank": config.rank}
    with naming(config.allocation, ValueError):
        allocation = Allocation.from_json(value)
        if allocation.top_k == 1:        # Switch takes the softmax of all; Mixtral, as here, of k
            raise ValueError("top_k 1 would teach routers nothing but balance, as the softmax of a "
                             "single logit is 1, whatever it is: give 2 or more")
    if config.rank not in (RunConfig.rank, allocation.rank):
        print(f"{clean(config.allocation)} says rank {allocation.rank}, which is taken, and not "
              f"{config.rank}", file=sys.stderr)
    return allocation


def large_matrices(inputs: Inputs, rank: int) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of the matrices without a side below the rank; prints which others there
    are. Raises ValueError if all are smaller."""
    shapes = shapes_of(inputs.model)
    large = {name: shape for name, shape in shapes.items() if min(shape) >= rank}
    if not large:
        Allocation(dict.fromkeys(shapes, 1), rank).check_rank(shapes)
    if small := shapes.keys() - large.keys():
        kinds = sorted({name.rpartition(".")[2] for name in small})
        print(f"{len(small)} matrices get no experts, as they have a side below --rank {rank}: "
              f"{', '.join(kinds)}")
    return large


def choose(config: AllocationConfig, scores: Mapping[str, Mapping[str, float]],
           shapes: Mapping[str, tuple[int, int]], strategy: str = "votes") -> Allocation:
    """The allocation to matrices of these shapes by their scores, a plain LoRA by its name. Raises
    ValueError if none fits the budget."""
    of_large = {task: {name: values[name] for name in shapes} for task, values in scores.items()}
    allocation = allocate(of_large, strategy=strategy, budget_params=config.budget_params,
                          min_experts=1, rank=config.rank, shapes=shapes)
    return replace(allocation, strategy="lora") if {*allocation.experts.values()} == {1} else (
        allocation)


def run_probe(config: AllocationConfig, inputs: Inputs, shapes: Mapping[str, tuple[int, int]],
              size: int = PROBE_BATCH) -> Scores:
    """Probe all tasks, `size` samples at once, with a bar; print how far votes for matrices of
    these shapes can be trusted. Raises ArithmeticError for gradients that are not finite."""
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
    print_overlap(scores, shapes)
    return scores


def print_overlap(scores: Scores, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Print how many of the matrices that one half of a task's samples votes for the other half
    votes for, too, as a share. Random votes for a share KEEP of all agree in that share."""
    def voted(samples: Tensor) -> set[str]:
        one_task = dict(zip(scores.shapes, samples.sum(0).tolist()))
        return {*allocate({"": {name: one_task[name] for name in shapes}}).experts}

    rows = []
    for task, samples in scores.samples.items():
        halves = voted(samples[::2]), voted(samples[1::2])
        overlap = len(halves[0] & halves[1]) / len(halves[0])
        rows.append([clean(task), len(samples), f"{overlap:.2f}" if len(samples) > 1 else "-"])
    print(table(["task", "samples probed", f"split-half overlap (by chance: {KEEP:.2f})"], rows))


def print_experts(model: nn.Module, allocation: Allocation) -> None:
    """Print the experts of every linear layer but the head, unless each has one."""
    experts = {name: allocation.experts.get(name, 0) for name in linear_layers(model)}
    if {*experts.values()} != {1}:
        print(terminal_heatmap("experts a matrix", experts, digits=True))
