"""The checkpoint of a run: one file, whole or not there, with the state in its metadata.

The order of the lines follows from their plan and the seed, and training draws nothing at random,
so a checkpoint holds neither.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..io.files import replacing

NAME = "checkpoint.safetensors"


class TrainingState(TypedDict):
    """How far a run is."""

    step: int                # optimizer steps that are done
    steps: int               # of the whole run
    tokens: int              # of all of them
    seconds: float           # that they took
    loss: float              # of the last one; nan before
    metrics: int             # bytes of metrics.jsonl
    frozen: bool             # whether mixtures are plain LoRAs by now
    best: float              # what `Trainer.validate` found at ...
    best_step: int           # ... the best step


def save_checkpoint(run: Path, tensors: dict[str, Tensor], state: TrainingState) -> None:
    """Write tensors and state in place of those of an earlier step, whole or not at all."""
    with replacing(run / NAME) as file:
        save_file(tensors, file, {"state": json.dumps(state)})


def first_state(run: Path, steps: int, parameters: Mapping[str, Tensor],
                resume: bool) -> tuple[TrainingState, dict[str, Tensor]]:
    """The state and the tensors to begin with: those of the checkpoint if the run is resumed, or
    zeros and no tensor. A run that begins anew loses its checkpoint.

    steps: of the whole run; parameters: those that are trained, by name. Raises ValueError if the
    checkpoint is damaged, or of other experts or another number of steps, or if the run's
    metrics.jsonl is shorter than it was.
    """
    file, metrics = run / NAME, run / "metrics.jsonl"
    run.mkdir(parents=True, exist_ok=True)
    if not resume:
        file.unlink(missing_ok=True)
    if not file.exists():
        return TrainingState(step=0, steps=steps, tokens=0, seconds=0.0, loss=math.nan, metrics=0,
                             frozen=False, best=-math.inf, best_step=0), {}
    try:
        with safe_open(file, "pt") as saved:
            state: TrainingState = json.loads(saved.metadata()["state"])
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}    # noqa: SIM118
    except (KeyError, SafetensorError, TypeError, ValueError) as e:
        raise ValueError(f"{file} is damaged ({e}): remove it, and --resume trains from the first "
                         "step on") from None
    trained = {name.removesuffix("/value"): tensor.shape for name, tensor in tensors.items()
               if name.endswith("/value")}
    experts = {name: parameter.shape for name, parameter in parameters.items()
               if not (state["frozen"] and name.endswith(".router"))}
    if trained != experts or state["steps"] != steps:
        raise ValueError(f"{file} was trained on other experts or for another number of steps: "
                         "another allocation, other lines, batches or passes")
    if (metrics.stat().st_size if metrics.is_file() else 0) < state["metrics"]:
        raise ValueError(f"{metrics} has not all that it held at step {state['step']}: put it "
                         f"back, or remove {file} to train again")
    return state, tensors
