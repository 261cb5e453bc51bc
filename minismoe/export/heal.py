"""Heal a frozen model: train its maps for a few steps towards what the mixture predicts.

The mixture itself never changes: the student is a copy of the model with weights of its own where
they differ.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.tasks import Example, collate
from ..io.progress import progress_bar
from ..method.experts import expert_layers, multiplying
from ..method.freeze import Fit, exact
from ..method.loss import divergences
from ..model.decoder import CausalLM
from ..model.tokens import Tokens
from ..training import compiled
from ..training.loop import TrainConfig, learning_rate, schedule
from ..training.vector import ExpertVector

LR = 2e-4                                    # low: the maps start near their optimum
BATCH = 16                                   # examples a step


@dataclass(frozen=True)
class Healing:
    """How maps are trained, and towards which predictions."""

    teacher: CausalLM                        # with its mixtures
    examples: Sequence[Example]
    steps: int
    pad_id: int
    micro_batch_size: int = 16
    compile: str = "off"                     # see training/compiled.py


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def heal(student: CausalLM, healing: Healing, lr: float = LR) -> dict[str, Fit]:
    """Train the maps of a student, the teacher's frozen mixtures, and return them as fits, by
    module. Its other weights are those that ship beside the maps."""
    student.train()
    compiling = compiled.wanted(student, healing.compile, healing.steps)
    maps, cfg = ExpertVector(student, alike=compiling), TrainConfig(
        epochs=math.ceil(healing.steps / math.ceil(len(healing.examples) / BATCH)),
        batch_size=BATCH)
    if compiling:
        compiled.compile_layers(student, lambda: heal_step(student, maps, healing,
                                                           healing.examples[:BATCH]))
        maps.vector.grad = None              # of the step that compiled them
    optimizer = torch.optim.AdamW([maps.vector], betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    with progress_bar(range(healing.steps), "heal", unit="step") as bar:
        for step, batch in zip(bar, schedule(healing.examples, cfg)):
            optimizer.param_groups[0]["lr"] = learning_rate(
                step, healing.steps, lr, cfg.warmup)
            loss = heal_step(student, maps, healing, batch)
            torch.nn.utils.clip_grad_norm_([maps.vector], cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"divergence {loss.item():.4f}", refresh=False)  # the one wait
    return {name: replace(exact(layer), kind="healed")
            for name, layer in expert_layers(student).items()}


def heal_step(student: CausalLM, maps: ExpertVector, healing: Healing, batch: Sequence[Example],
              ) -> Tensor:
    """Add up the gradients of one step, in micro-batches; returns its loss, the mean of
    KL(mixture || student) over the batch's own tokens, prompts and answers alike. Nothing waits for
    the device."""
    parts, losses = [], list[Tensor]()
    for i in range(0, len(batch), healing.micro_batch_size):
        # Sorted rows put shared prefixes side by side, so that the model computes them once.
        part = sorted(batch[i:i + healing.micro_batch_size], key=lambda e: e.ids)
        ids, mask, _ = collate(part, healing.pad_id)
        parts.append((ids, mask, own_tokens(ids, mask)))
    count = sum(int(own.sum()) for _, _, own in parts)
    for ids, mask, own in parts:
        tokens = Tokens(ids, mask, student.config, maps.vector.device, own)
        with torch.no_grad():
            wanted = healing.teacher.model.rows(tokens)                               # (S, D)
        with multiplying(maps.groups, maps.stacks()):
            hidden = student.model.rows(tokens)
            loss = divergences(hidden, student.lm_head.weight, wanted,
                               healing.teacher.lm_head.weight).sum() / count
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def own_tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The tokens (B, T) after those that all right-padded rows begin with, such as an instruction.
    The last token of each row is its own."""
    real = attention_mask.bool()
    if len(real) == 1:
        return real
    alike = int(((input_ids == input_ids[:1]) & real).all(0).cumprod(0).sum())
    own = real.clone()
    own[:, :min(alike, int(real.sum(1).min()) - 1)] = False
    return own
