"""Checkpoints that are whole or not there, and that are checked before training goes on.

run/checkpoints/step-NUMBER holds experts.safetensors, optimizer.safetensors and state.json, which
lists the SHA-256 of both and its own. The last two are kept: if the newest is damaged, training
goes on from the one before. The order of the data follows from its seed, and training draws nothing
at random, so a checkpoint holds neither.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..io.files import new_folder, read_json, replacing, sha256, sha256_of_json

KEPT = 2                                     # checkpoints of a run
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW holds for a parameter


def due(every: int | str, step: int, since: float) -> bool:
    """Whether to save after `step` steps. `every` counts steps, or minutes ("10m") after `since`, a
    time.monotonic."""
    if isinstance(every, str):
        return time.monotonic() - since >= 60 * float(every[:-1])
    return step % every == 0


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((run / "checkpoints").glob("step-????????"))


def save_checkpoint(run: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
                    state: Mapping[str, Any]) -> None:
    """Write the experts, their moments and `state`, whole or not at all; remove older ones."""
    folder = run / "checkpoints" / f"step-{state['step']:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    files = {
        "experts.safetensors": {n: p.detach().contiguous() for n, p in parameters.items()},
        "optimizer.safetensors": {f"{n}.{key}": moment for n, p in parameters.items()
                                  for key, moment in optimizer.state[p].items()}}
    with new_folder(folder) as tmp:
        for name, tensors in files.items():
            with replacing(tmp / name) as file:          # it names a file that a full disk refuses
                save_file(tensors, file)
        state = {**state, "files": {name: sha256(tmp / name) for name in files}}
        (tmp / "state.json").write_text(json.dumps(
            {"state": state, "sha256": sha256_of_json(state)}))
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and state of the newest whole checkpoint, if there is one. Damaged ones are named on
    stderr and removed: they would count among the two that are kept."""
    for folder in reversed(checkpoints(run)):
        try:
            return folder, _checked_state(folder)
        except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError) as e:
            shutil.rmtree(folder)
            then = ("going on from the one before" if checkpoints(run) else
                    "no whole one is left, so it begins anew")
            print(f"{folder} is damaged ({e}): {then}", file=sys.stderr)
    return None


def _checked_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint; an exception if a file is missing or not what was written."""
    saved = read_json(folder / "state.json")
    state: dict[str, Any] = saved["state"]
    if saved["sha256"] != sha256_of_json(state):
        raise ValueError("state.json does not have its checksum")
    for name, wanted in state["files"].items():
        if sha256(folder / name) != wanted:
            raise ValueError(f"{name} does not have its checksum")
    return state


def load_checkpoint(run: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
                    order: str) -> dict[str, Any] | None:
    """Load the newest whole checkpoint in place, and give its state; None if there is none.

    Raises ValueError if it is of other experts or of other batches (`order` is their digest), or
    if the run's metrics.jsonl is shorter than it was.
    """
    if (found := newest(run)) is None:
        return None
    folder, state = found
    experts = load_file(folder / "experts.safetensors")
    if {n: t.shape for n, t in experts.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{folder} belongs to another allocation than {run}'s")
    if state["order"] != order:
        raise ValueError(f"{folder} was trained on other batches: another data, seed, batch size "
                         "or number of epochs")
    metrics = run / "metrics.jsonl"
    if (metrics.stat().st_size if metrics.is_file() else 0) < state["metrics"]:
        raise ValueError(f"{metrics} has not all that it held at {folder.name}: put it back, or "
                         f"remove {folder.parent} to train again")
    moments = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(experts[name])
            optimizer.state[parameter] = {       # copies: the file may not stay mapped
                key: moments[f"{name}.{key}"].to(parameter.device, copy=True) for key in MOMENTS}
    return state
