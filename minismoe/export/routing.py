"""Decide which mixtures keep routing, and measure the cost of each way to freeze the others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from statistics import mean, median
from typing import Any

from torch import nn

from ..io.text import clean, table
from ..method.experts import expert_layers
from ..method.freeze import Fit, TaskFits, merge
from .frozen import Calibration, Fits, Frozen, Score, save_frozen, show_residuals
from .heal import heal, twin
from .settings import ExportConfig, Source


def freeze_routing(config: ExportConfig, source: Source) -> Frozen:
    """Freeze the mixtures of a run as the settings say, and save the fits beside its adapter."""
    layers = list(expert_layers(source.model))
    if not layers or config.routing == "dynamic":
        return Frozen({}, {}, layers)
    data = Calibration(config, source)
    frozen = Frozen(**vars(data.fits()[config.fit]))
    show_residuals(source, frozen.of(config.task))
    if config.routing == "auto":
        tasks, fits = [config.task] if config.task else list(data.pools), frozen.of(config.task)
        (frozen.routed,) = fewest_routed(
            source.model, fits, lambda m: mean(data.score(m, t) for t in tasks), [config.tolerance])
        print(f"auto: routing stays in {len(frozen.routed)} of {len(fits)} matrices")

    def healed(fits: Fits, task: str | None) -> dict[str, Fit]:
        examples = data.pools[task] if task else data.examples
        return heal(source.model, fits, examples, config.heal or 0, source.tokenizer.pad_id,
                    keep=frozen.routed)

    if config.heal:
        for task in data.pools if config.adapters else [config.task] if config.task else []:
            frozen.by_task[task] = healed(frozen.by_task[task], task)
        if not config.adapters and not config.task:
            frozen.together = healed(frozen.together, None)
    save_frozen(source.run / "adapter", frozen)
    return frozen


def fewest_routed(model: nn.Module, fits: Fits, score: Callable[[nn.Module], float],
                  tolerances: Sequence[float]) -> list[list[str]]:
    """For each tolerance, the fewest mixtures that have to keep routing so that
    score(all others merged) >= score(model) - tolerance.

    Mixtures are ordered by what merging changes: the energy that the fit misses, as a share of the
    output of the matrix. (A large residual does no harm if the experts add little to W x.)
    Bisection over how many of them takes about log2(mixtures) scores.
    """
    order = sorted((n for n, layer in expert_layers(model).items() if layer.router is not None),
                   key=lambda n: -fits[n].residual * fits[n].energy)
    reference = score(model)

    @cache
    def kept(count: int) -> float:
        candidate = twin(model)
        merge(candidate, fits, order[:count])
        return score(candidate)

    def fewest(tolerance: float) -> int:
        def within(count: int) -> bool:
            return kept(count) >= reference - tolerance - 1e-9     # 0.06 is below 0.07 - 0.01
        # Scores of few answers are not monotonic, so that no routing at all is tried by itself.
        return 0 if within(0) else bisect_left(range(len(order)), True, lo=1, key=within)

    return [order[:fewest(tolerance)] for tolerance in tolerances]


def cost_rows(model: nn.Module, kinds: Mapping[str, TaskFits], healed: Fits, score: Score,
              tolerances: Sequence[float] = ()) -> list[dict[str, Any]]:
    """A row for the mixture and for each way to freeze it: its name, the score of each
    task and their mean, the median held-out residual of the merged mixtures, and the number of
    parameters that stay beside the base.

    kinds: the fits by kind, "linear" among them. healed: of all tasks together.
    """
    linear = kinds["linear"]
    tasks = list(linear.by_task)

    def row(name: str, used: Mapping[str, Fits], keep: Collection[str] = ()) -> dict[str, Any]:
        scores, current, last = {}, model, None
        for task in tasks:
            if used and used[task] is not last:
                current, last = twin(model), used[task]
                merge(current, used[task], keep)
            scores[task] = score(current, task)
        lost = [f.residual for task in used for n, f in used[task].items()
                if f.kind != "exact" and n not in keep]
        return {"model": name, "tasks": scores, "mean": mean(scores.values()),
                "residual": median(lost or [0.0]),
                "parameters": sum(p.numel() for p in current.parameters() if p.requires_grad)}

    rows = [row("mixture", {})]
    rows += [row(f"merged, {kind}", dict.fromkeys(tasks, found.together))
             for kind, found in kinds.items()]
    rows.append(row("merged, linear, a task", linear.by_task))
    rows.append(row("merged, healed", dict.fromkeys(tasks, healed)))
    routed = fewest_routed(model, linear.together, lambda m: mean(score(m, t) for t in tasks),
                           tolerances) if tolerances else []
    for tolerance, keep in zip(tolerances, routed):
        rows.append(row(f"auto, {100 * tolerance:g} points: {len(keep)} routed",
                        dict.fromkeys(tasks, linear.together), keep))
    return rows


def cost_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `cost_rows` as text."""
    return table(["model", *map(clean, rows[0]["tasks"]), "mean", "residual", "parameters"],
                 [[row["model"], *(f"{s:.3f}" for s in row["tasks"].values()),
                   f"{row['mean']:.3f}", f"{100 * row['residual']:.2f} %",
                   f"{row['parameters']:,}"] for row in rows])
