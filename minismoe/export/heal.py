"""Between training and export: heal a frozen mixture, keep routing where it matters, compare, save.

Nothing here changes the mixture that it is given: what is frozen or merged is a twin of the model,
which shares every weight that stays as it is.
"""

from __future__ import annotations

import copy
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from ..data.tasks import Batch, Example, collate
from ..io.files import replacing
from ..io.text import clean, table
from ..method.experts import expert_layers
from ..method.freeze import Fit, TaskFits, exact, freeze, merge
from ..method.loss import CHUNK, IGNORE
from ..model.decoder import CausalLM
from ..training.loop import TrainConfig, learning_rate, schedule, train_step

FROZEN_FORMAT = "minismoe.frozen/1"
HEAL_LR = 2e-4                               # A and B stand near their optimum, scaling folded in
Fits = Mapping[str, Fit]                     # module -> its fit


def twin(model: Any) -> Any:
    """A copy of the modules of a model, with the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def heal(model: CausalLM, fits: Fits, examples: Sequence[Example], steps: int, pad_id: int, *,
         keep: Collection[str] = (), lr: float = HEAL_LR, seed: int = 0) -> dict[str, Fit]:
    """Train frozen mixtures of `model` for a few steps, and give them back as fits.

    The loss is that of training; where no example has a label, it is the divergence from what the
    mixtures predict. What is in `keep` goes on routing and is not trained.
    """
    frozen, device = twin(model).train(), model.lm_head.weight.device
    freeze(frozen, fits, keep)
    layers = {n: layer for n, layer in expert_layers(frozen).items() if n not in set(keep)}
    parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    if not parameters:                                   # every matrix goes on routing
        return {}
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    cfg = TrainConfig(lr=lr, seed=seed, router_aux_loss_coef=0.0)
    cfg = replace(cfg, epochs=math.ceil(steps / math.ceil(len(examples) / cfg.batch_size)))
    labelled = any(label != IGNORE for e in examples for label in e.labels[1:])
    batches = schedule(examples, cfg)
    with trange(steps, desc="heal", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, cfg)
            if labelled:
                loss = train_step(frozen, batches[step], cfg, pad_id, step)["loss"]
            else:
                loss = distil_step(frozen, model, collate(batches[step], pad_id, device))
            torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            optimizer.step()
            frozen.zero_grad(set_to_none=True)           # of what is kept, and shared, as well
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
    return {n: replace(exact(layer), kind="healed", residual=fits[n].residual,
                       energy=fits[n].energy) for n, layer in layers.items()}


def distil_step(model: CausalLM, teacher: CausalLM, batch: Batch) -> float:
    """Gradients of the mean divergence KL(teacher || model) over the real tokens; its value.

    Logits exist for a chunk of tokens at a time, as in the loss of training.
    """
    ids, mask, _ = batch
    with torch.no_grad():
        target = teacher.model(ids, mask)[mask.bool()]                   # (N, D)
    hidden = model.model(ids, mask)[mask.bool()]
    leaf, total = hidden.detach().requires_grad_(), 0.0
    for wanted, given in zip(*(h.split(_rows(model)) for h in (target, leaf))):
        p, q = (_logits(model, h).log_softmax(-1) for h in (wanted, given))
        loss = F.kl_div(q, p, log_target=True, reduction="sum") / len(hidden)
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad)
    return total


@torch.no_grad()
def agreement(model: CausalLM, teacher: CausalLM, batches: Iterable[Batch]) -> float:
    """Share of real tokens after which both hold the same next token to be the likeliest."""
    same = count = 0
    for ids, mask, *_ in batches:
        hidden = [m.model(ids, mask)[mask.bool()] for m in (model, teacher)]
        for a, b in zip(*(h.split(_rows(model)) for h in hidden)):
            same += int((_logits(model, a).argmax(-1) == _logits(teacher, b).argmax(-1)).sum())
            count += len(a)
    return same / max(1, count)


def _rows(model: CausalLM) -> int:
    return max(1, CHUNK // model.lm_head.out_features)


def _logits(model: CausalLM, hidden: Tensor) -> Tensor:
    logits = model.lm_head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def auto(model: nn.Module, fits: Fits, score: Callable[[nn.Module], float],
         tolerances: Sequence[float]) -> list[list[str]]:
    """For each tolerance the fewest mixtures that keep routing, all others merged, such that
    score(merged) >= score(model) - tolerance.

    Mixtures are taken in order of what merging changes in their output: the energy that the fit
    misses as a share of all that the matrix writes, since a large residual of experts that add
    little to W x does no harm. Bisection over how many of them takes about log2(mixtures) scores.
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
        # Scores of few answers do not rise step by step, so none at all is tried by itself.
        return 0 if within(0) else bisect_left(range(len(order)), True, lo=1, key=within)

    return [order[:fewest(tolerance)] for tolerance in tolerances]


def compare(model: nn.Module, fits: Mapping[str, TaskFits], tasks: Sequence[str],
            score: Callable[[nn.Module, str], float], healed: Fits | None = None,
            tolerances: Sequence[float] = ()) -> list[dict[str, Any]]:
    """A row for the mixture and for each way to be rid of routing.

    fits: as `freeze.fit` gives them. score(model, task) -> exact match. A row has the model's name,
    the score of each task and their mean, the median held-out residual of the mixtures that are
    merged, and the parameters that stay beside the base.
    """
    def row(name: str, used: Mapping[str, Fits], keep: Collection[str] = ()) -> dict[str, Any]:
        scores, current, last = {}, model, None
        for task in tasks:
            if used and used[task] is not last:
                current, last = twin(model), used[task]
                merge(current, used[task], keep)
            scores[task] = score(current, task)
        lost = [f.residual for task in used for n, f in used[task].items()
                if f.kind != "exact" and n not in keep]
        return {"model": name, "tasks": scores, "mean": sum(scores.values()) / len(scores),
                "residual": median(lost or [0.0]),
                "parameters": sum(p.numel() for p in current.parameters() if p.requires_grad)}

    every = {kind: dict.fromkeys(tasks, found.together) for kind, found in fits.items()}
    rows = [row("mixture", {}), *(row(f"merged, {kind}", every[kind]) for kind in fits)]
    rows.append(row("merged, linear, a task", fits["linear"].by_task))
    if healed:
        rows.append(row("merged, healed", dict.fromkeys(tasks, healed)))

    def mean(candidate: nn.Module) -> float:
        return sum(score(candidate, task) for task in tasks) / len(tasks)

    for tolerance, keep in zip(tolerances, auto(model, fits["linear"].together, mean, tolerances)):
        rows.append(row(f"auto, {100 * tolerance:g} points: {len(keep)} routed",
                        every["linear"], keep))
    return rows


def comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compare` as a table."""
    return table(["model", *map(clean, rows[0]["tasks"]), "mean", "residual", "parameters"],
                 [[row["model"], *(f"{s:.3f}" for s in row["tasks"].values()),
                   f"{row['mean']:.3f}", f"{100 * row['residual']:.2f} %",
                   f"{row['parameters']:,}"] for row in rows])


def save_frozen(folder: str | Path, fits: TaskFits) -> None:
    """Write fits to folder/frozen.safetensors, those of a task under the prefix "<task>/"."""
    tensors, notes = {}, {}
    for task in (None, *fits.by_task):
        for name, fit in fits.of(task).items():
            path = f"{task}/{name}" if task else name
            tensors[f"{path}.lora_A"] = fit.lora_A.contiguous()
            tensors[f"{path}.lora_B"] = fit.lora_B.contiguous()
            notes[path] = [fit.kind, fit.residual, fit.energy]
    with replacing(Path(folder) / "frozen.safetensors") as tmp:
        save_file(tensors, tmp, metadata={"format": FROZEN_FORMAT, "fits": json.dumps(notes)})


def load_frozen(folder: str | Path) -> TaskFits:
    """What `save_frozen` wrote; FileNotFoundError without it, ValueError for a broken file."""
    file = Path(folder) / "frozen.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {file.name}: the adapter is not frozen yet")
    fits = TaskFits({}, {})
    try:
        with safe_open(file, framework="pt") as f:
            meta = f.metadata() or {}
            if meta.get("format") != FROZEN_FORMAT:
                raise ValueError(f"{file} is not of the form {FROZEN_FORMAT}")
            for path, note in json.loads(meta["fits"]).items():
                task, _, name = path.rpartition("/")
                found = fits.by_task.setdefault(task, {}) if task else fits.together
                found[name] = Fit(
                    f.get_tensor(f"{path}.lora_A"), f.get_tensor(f"{path}.lora_B"), *note)
    except (SafetensorError, AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is no valid frozen adapter: {e}") from None
    return fits
