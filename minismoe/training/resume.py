"""What a run survives by: its lock, checkpoints that are whole or not there, signals that wait.

A checkpoint is a folder of safetensors files and a state.json, which holds the SHA-256 of each and
its own. It is written under another name, flushed to disk and renamed, and the last two are kept:
where the newest is damaged, the one before is taken. Between two optimizer steps no gradient is
accumulated, and the order of the data follows from its seed, so a checkpoint holds neither.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..io.files import new_folder, read_json, sha256
from ..io.text import clean
from . import distributed

KEPT = 2                                     # checkpoints of a kind
Tensors = Mapping[str, Tensor]


def same_threads(count: int) -> None:
    """Compute with as many threads as an earlier process did: the order of sums depends on it."""
    if count != (now := torch.get_num_threads()):
        print(f"threads: {count} as before, and not {now}: results stay the same to the last bit")
        torch.set_num_threads(count)


def due(every: int | str, step: int, since: float) -> bool:
    """Whether to save after `step` steps: every so many, or minutes ("10m") of time.monotonic."""
    if isinstance(every, str):
        return time.monotonic() - since >= 60 * float(every[:-1])
    return step % every == 0


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_state(run: Path, kind: str, number: int, files: Mapping[str, Tensors],
               state: Mapping[str, Any]) -> None:
    """Write run/checkpoints/KIND-NUMBER, whole or not at all, and keep the last two of its kind."""
    folder = run / "checkpoints" / f"{kind}-{number:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as tmp:
        for name, tensors in files.items():
            save_file(dict(tensors), tmp / name)
        state = {**state, "files": {name: sha256(tmp / name) for name in files}}
        (tmp / "state.json").write_text(json.dumps({"state": state, "sha256": digest(state)}))
    for old in states(run, kind)[:-KEPT]:
        shutil.rmtree(old)


def states(run: Path, kind: str) -> list[Path]:
    """The checkpoints of a kind, the newest last."""
    return sorted((run / "checkpoints").glob(f"{kind}-????????"))


def load_state(run: Path, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """Folder and state of the newest whole checkpoint of a kind; None without.

    A damaged one is named on stderr, and removed: it would count as one of the two that are kept.
    """
    for folder in reversed(states(run, kind)):
        try:
            return folder, _checked(folder)
        except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError) as e:
            shutil.rmtree(folder)
            then = ("going on from the one before" if states(run, kind) else
                    "no whole one is left, so it begins anew")
            print(f"{folder} is damaged ({e}): {then}", file=sys.stderr)
    return None


def _checked(folder: Path) -> dict[str, Any]:
    saved = read_json(folder / "state.json")
    state: dict[str, Any] = saved["state"]
    if saved["sha256"] != digest(state):
        raise ValueError("state.json does not have its checksum")
    for name, wanted in state["files"].items():
        if sha256(folder / name) != wanted:
            raise ValueError(f"{name} does not have its checksum")
    return state


def discard(run: Path, kind: str) -> None:
    """Remove the checkpoints of a kind, and their folder where it held no others."""
    for folder in states(run, kind):
        shutil.rmtree(folder)
    with suppress(OSError):
        (run / "checkpoints").rmdir()


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What two records disagree in, in one line; empty where nothing."""
    return ", ".join(f"{clean(key)} {now.get(key, 'absent')} (was {before.get(key, 'absent')})"
                     for key in {**before, **now} if now.get(key) != before.get(key))


class Norms:
    """The squared norms (n, M) of a probe's samples by task, kept where a later process finds them.

    What a probe of another `identity` left is dropped, and the differences are said on stderr.
    """

    def __init__(self, run: Path, identity: Mapping[str, Any]):
        self.run, self.identity = run, dict(identity)
        self.kept: dict[str, Tensor] = {}
        if found := load_state(run, "probe"):
            folder, state = found
            if said := differences(self.identity, state["identity"]):
                print(f"{folder} is left from another probe and dropped: {said}", file=sys.stderr)
                discard(run, "probe")
            else:
                norms = load_file(folder / "norms.safetensors")
                self.kept = {task: n.clone() for task, n in norms.items()}   # the file goes
                if state.get("processes", 1) == distributed.world():
                    same_threads(state["threads"])
        self.saved, self.count = time.monotonic(), sum(map(len, self.kept.values()))

    def rows(self, task: str, start: int, stop: int) -> Tensor:
        """What is known of samples start to stop: (n, M), n = 0 where nothing is."""
        return self.kept[task][start:stop] if task in self.kept else torch.empty(0)

    def save(self, samples: Tensors, after: float = 0.0) -> None:
        """Keep `samples`, if there are new ones and `after` seconds have passed since the last."""
        count = sum(map(len, samples.values()))
        if count > self.count and time.monotonic() - self.saved >= after:
            save_state(self.run, "probe", count, {"norms.safetensors": samples},
                       {"identity": self.identity, "threads": torch.get_num_threads(),
                        "processes": distributed.world()})
            self.saved, self.count = time.monotonic(), count


def save_checkpoint(run: Path, parameters: Tensors, optimizer: torch.optim.Optimizer,
                    state: Mapping[str, Any]) -> None:
    """Write what training goes on from: experts, optimizer, random states, and `state`."""
    save_state(run, "step", state["step"], {
        "experts.safetensors": {n: p.detach().contiguous() for n, p in parameters.items()},
        "optimizer.safetensors": {
            f"{n}.{key}": torch.as_tensor(value) for n, p in parameters.items()
            for key, value in optimizer.state[p].items()},
        "random.safetensors": _random_states()}, state)


def load_checkpoint(run: Path, parameters: Tensors, optimizer: torch.optim.Optimizer, order: str,
                    ) -> dict[str, Any] | None:
    """Bring all that save_checkpoint wrote to where it was, and give its state; None without.

    Raises ValueError where the checkpoint is that of other experts or batches, or the run's
    metrics.jsonl is not as long as it was.
    """
    found = load_state(run, "step")
    if found is None:
        return None
    folder, state = found
    experts = load_file(folder / "experts.safetensors")
    if {n: t.shape for n, t in experts.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{folder} belongs to another allocation than {run}'s")
    if state["order"] != order:
        raise ValueError(f"{folder} was trained on other batches: another data, seed, batch size "
                         "or number of epochs")
    metrics = run / "metrics.jsonl"
    if (metrics.stat().st_size if metrics.is_file() else 0) < state.get("metrics", 0):
        raise ValueError(f"{metrics} has not all that it held at {folder.name}: put it back, or "
                         f"remove {folder.parent} to train again")
    moments = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(experts[name])
            optimizer.state[parameter] = {       # copies: the file may not stay mapped
                key: moments[f"{name}.{key}"].to(parameter.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq")}
    for device, random_state in load_file(folder / "random.safetensors").items():
        _set_random_state(device, random_state)
    return state


def _random_states() -> dict[str, Tensor]:
    """The states of torch's generators by device, "cpu" first."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.get_rng_state()
    return found


def _set_random_state(device: str, state: Tensor) -> None:
    """Set a generator's state, where this machine has the device."""
    if device == "cpu":
        torch.set_rng_state(state)
    elif device == "mps" and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state)
    elif device.startswith("cuda:") and int(device[5:]) < torch.cuda.device_count():
        torch.cuda.set_rng_state(state, device)
