"""Heal a frozen mixture: train its linear maps for a few steps towards the mixture.

The mixture itself never changes: the student is a twin of the model, which shares every weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from ..data.tasks import Batch, Example, collate
from ..method.experts import expert_layers
from ..method.freeze import Fit, exact, freeze
from ..method.loss import CHUNK, IGNORE
from ..model.decoder import CausalLM
from ..training.loop import TrainConfig, learning_rate, schedule, train_step

HEAL_LR = 2e-4                               # low: A and B start near their optimum


def twin(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def heal(model: CausalLM, fits: Mapping[str, Fit], examples: Sequence[Example], steps: int,
         pad_id: int, *, keep: Collection[str] = (), lr: float = HEAL_LR) -> dict[str, Fit]:
    """Train the frozen mixtures of `model` for some steps, and return them as fits, by module.

    Matrices in `keep` go on routing and are not trained.
    """
    student = twin(model).train()
    freeze(student, fits, keep)
    layers = {n: layer for n, layer in expert_layers(student).items() if n not in set(keep)}
    parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    if parameters:                           # none if every matrix goes on routing
        tune(student, model, parameters, examples, steps, pad_id, lr)
    return {n: replace(exact(layer), kind="healed", residual=fits[n].residual,
                       energy=fits[n].energy) for n, layer in layers.items()}


def tune(student: CausalLM, teacher: CausalLM, parameters: Sequence[Tensor],
         examples: Sequence[Example], steps: int, pad_id: int, lr: float) -> None:
    """Train `parameters` of the student, in place.

    The loss is that of training. If no example has a label, it is the divergence from the teacher.
    """
    device = teacher.lm_head.weight.device
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    cfg = TrainConfig(lr=lr, router_aux_loss_coef=0.0)
    cfg = replace(cfg, epochs=math.ceil(steps / math.ceil(len(examples) / cfg.batch_size)))
    labelled = any(label != IGNORE for e in examples for label in e.labels[1:])
    with trange(steps, desc="heal", unit="step") as bar:
        for step, batch in zip(bar, schedule(examples, cfg)):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, cfg)
            if labelled:
                loss = train_step(student, batch, cfg, pad_id, step)["loss"]
            else:
                loss = distil_step(student, teacher, collate(batch, pad_id, device))
            torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            optimizer.step()
            student.zero_grad(set_to_none=True)          # shared parameters have gradients too
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)


def distil_step(student: CausalLM, teacher: CausalLM, batch: Batch) -> float:
    """Gradients of the mean divergence KL(teacher || student) over the real tokens; its value."""
    ids, mask, _ = batch
    with torch.no_grad():
        target = teacher.model(ids, mask)[mask.bool()]                   # (N, D)
    hidden = student.model(ids, mask)[mask.bool()]
    leaf, total = hidden.detach().requires_grad_(), 0.0
    for wanted, given in _logits((teacher, student), (target, leaf)):
        loss = F.kl_div(given.log_softmax(-1), wanted.log_softmax(-1), log_target=True,
                        reduction="sum") / len(hidden)
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad)
    return total


@torch.no_grad()
def agreement(model: CausalLM, teacher: CausalLM, batches: Iterable[Batch]) -> float:
    """Share of real tokens after which both models find the same next token the likeliest."""
    same, models = [], (model, teacher)
    for ids, mask, *_ in batches:
        for a, b in _logits(models, [m.model(ids, mask)[mask.bool()] for m in models]):
            same.append(a.argmax(-1) == b.argmax(-1))
    return int(torch.cat(same).sum()) / len(torch.cat(same))


def _logits(models: Sequence[CausalLM], hidden: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Logits of each model from its (N, D), in float32 or better, a chunk of tokens at a time."""
    rows = max(1, CHUNK // models[0].lm_head.out_features)
    for parts in zip(*(h.split(rows) for h in hidden)):
        logits = [m.lm_head(h) for m, h in zip(models, parts)]
        yield [x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits]
