"""Checkpoints that are whole or not there, and that are checked before training goes on.

run/checkpoints/step-NUMBER holds experts.safetensors and state.json, which has the SHA-256 of both.
The last two are kept: if the newest is damaged, training goes on from the one before. The order of
the data follows from its seed, and training draws nothing at random, so a checkpoint holds neither.
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.tasks import Example
from ..io.files import read_json, replacing, sha256, sha256_of_json

KEPT = 2                                     # checkpoints of a run
TENSORS = "experts.safetensors"              # see `Trainer.tensors`


class TrainingState(TypedDict):
    """How far a run is."""

    step: int                # optimizer steps that are done
    tokens: int              # of all of them
    seconds: float           # that they took
    loss: float              # of the last one; nan before
    metrics: int             # bytes of metrics.jsonl
    best: float              # right answers to validation lines, or minus their loss, at ...
    best_step: int           # ... the best step
    since_best: int          # measures since
    order: str               # hash of the batches
    layout: str              # hash of the names and shapes of what is trained


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((run / "checkpoints").glob("step-????????"))


def save_checkpoint(run: Path, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and `state`, whole or not at all; remove old checkpoints."""
    folder = run / "checkpoints" / f"step-{state['step']:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    with replacing(folder, folder=True) as tmp:
        with replacing(tmp / TENSORS) as file:           # it names a file that a full disk refuses
            save_file(tensors, file)
        state = {**state, "sha256": sha256(tmp / TENSORS)}
        (tmp / "state.json").write_text(json.dumps(
            {"state": state, "sha256": sha256_of_json(state)}), encoding="utf-8")
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


def newest(run: Path) -> tuple[Path, TrainingState] | None:
    """Folder and state of the newest whole checkpoint, if there is one. Damaged ones are named on
    stderr and renamed: they would count among the two that are kept."""
    for folder in reversed(checkpoints(run)):
        try:
            return folder, _checked_state(folder)
        except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError) as e:
            damaged = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
            then = ("going on from the one before" if checkpoints(run) else
                    "no whole one is left, so it begins anew")
            print(f"{folder} is damaged ({e}), and now {damaged.name}: {then}", file=sys.stderr)
    return None


def _checked_state(folder: Path) -> TrainingState:
    """The state of a checkpoint; an exception if a file is missing or not what was written."""
    saved = read_json(folder / "state.json")
    if saved["sha256"] != sha256_of_json(saved["state"]):
        raise ValueError("state.json does not have its checksum")
    if sha256(folder / TENSORS) != saved["state"]["sha256"]:
        raise ValueError(f"{TENSORS} does not have its checksum")
    state: TrainingState = saved["state"]
    return state


def first_state(run: Path, batches: Sequence[Sequence[Example]], parameters: Mapping[str, Tensor],
                resume: bool) -> tuple[TrainingState, dict[str, Tensor]]:
    """The state and tensors to begin with: those of the newest whole checkpoint if the run is
    resumed, or zeros and no tensor. A run that begins anew loses its old checkpoints.

    parameters: those that are trained, by name. Raises ValueError if the checkpoint is of other
    experts or batches, or if the run's metrics.jsonl is shorter than it was.
    """
    order = sha256_of_json([[(e.task, e.index) for e in batch] for batch in batches])
    layout = sha256_of_json([[name, *p.shape] for name, p in parameters.items()])
    fresh = TrainingState(step=0, tokens=0, seconds=0.0, loss=math.nan, metrics=0,
                          best=-math.inf, best_step=0, since_best=0, order=order, layout=layout)
    run.mkdir(parents=True, exist_ok=True)
    if not resume:
        for old in checkpoints(run):
            shutil.rmtree(old)
    checkpoint = newest(run) if resume else None
    if checkpoint is None:
        return fresh, {}
    folder, state = checkpoint
    if state["layout"] != fresh["layout"]:
        raise ValueError(f"{folder} belongs to another allocation than {run}'s")
    if state["order"] != fresh["order"]:
        raise ValueError(f"{folder} was trained on other batches: another data, seed, batch size "
                         "or number of epochs")
    metrics = run / "metrics.jsonl"
    if (metrics.stat().st_size if metrics.is_file() else 0) < state["metrics"]:
        raise ValueError(f"{metrics} has not all that it held at {folder.name}: put it back, or "
                         f"remove {folder.parent} to train again")
    return state, load_file(folder / TENSORS)
