"""Heal a frozen model: train it for a few steps on labels or, without any, towards the mixture.

`heal_maps` trains A and B of the frozen maps, `heal_scales` the scales of blocks in few bits. The
mixture itself never changes: the student is a copy of the model that shares every weight.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.tasks import Example, collate
from ..io.progress import progress_bar
from ..method.experts import expert_layers
from ..method.freeze import Fit, exact, freeze
from ..method.loss import CHUNK, IGNORE
from ..model.decoder import CausalLM
from ..model.quantize import Blocks
from ..training.loop import TrainConfig, learning_rate, schedule
from .scales import round_weights, scale_model

MAPS_LR = 2e-4                               # low: A and B start near their optimum
SCALES_LR = 2e-3                             # of the logarithms of the scales
BATCH = 16                                   # examples a step


@dataclass(frozen=True)
class Healing:
    """What a student is trained on; `teacher` is its target only if no example has labels."""

    teacher: CausalLM
    examples: Sequence[Example]
    steps: int
    pad_id: int
    micro_batch_size: int = 16

    @property
    def labelled(self) -> bool:
        """Whether any token is supervised. If none is, all real tokens are followed."""
        return any(label != IGNORE for e in self.examples for label in e.labels[1:])


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def heal_maps(healing: Healing, fits: Mapping[str, Fit], *, precision: str = "fp32",
              block: int | None = None, lr: float = MAPS_LR) -> dict[str, Fit]:
    """Train the frozen mixtures of the teacher, and return them as fits, by module.

    precision, block: how the base that ships beside the maps is quantised; if a block is given, the
    student's base is rounded the same way.
    """
    student = sharing_copy(healing.teacher).train()
    freeze(student, fits)
    if block:
        round_weights(student, precision, block)
    layers = expert_layers(student)
    tune(student, healing, [p for m in layers.values() for p in (m.lora_A, m.lora_B)], lr)
    return {n: replace(exact(layer), kind="healed", residual=fits[n].residual)
            for n, layer in layers.items()}


def heal_scales(healing: Healing, blocks: Mapping[str, Blocks], lr: float = SCALES_LR,
                ) -> dict[str, Blocks]:
    """Train the scales of all quantised weights of a model; returns the blocks with them."""
    student = sharing_copy(healing.teacher).train()
    scaled = scale_model(student, blocks)
    tune(student, healing, [weight.delta for weight in scaled.values()], lr)
    return {name: replace(blocks[name], scales=weight.scales_now())
            for name, weight in scaled.items()}


def tune(student: CausalLM, healing: Healing, parameters: Sequence[Tensor], lr: float) -> None:
    """Train `parameters` of the student, in place."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    epochs = math.ceil(healing.steps / math.ceil(len(healing.examples) / BATCH))
    cfg = TrainConfig(epochs=epochs, batch_size=BATCH, lr=lr)
    with progress_bar(range(healing.steps), "heal", unit="step") as bar:
        for step, batch in zip(bar, schedule(healing.examples, cfg)):
            optimizer.param_groups[0]["lr"] = learning_rate(step, healing.steps, cfg)
            loss = heal_step(student, healing, batch)
            torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            optimizer.step()
            student.zero_grad(set_to_none=True)          # shared parameters have gradients too
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)


def heal_step(student: CausalLM, healing: Healing, batch: Sequence[Example]) -> float:
    """Add up the gradients of one step, in micro-batches; returns its loss.

    The loss is the mean cross-entropy of the supervised tokens; without labels, the mean of
    KL(teacher || student) over the real tokens.
    """
    teacher, total = healing.teacher, 0.0
    device, labelled = teacher.lm_head.weight.device, healing.labelled
    count = (sum(label != IGNORE for e in batch for label in e.labels[1:]) if labelled
             else sum(len(e.ids) for e in batch))
    for i in range(0, len(batch), healing.micro_batch_size):
        # Sorted rows put shared prefixes side by side, so that the model computes them once.
        part = sorted(batch[i:i + healing.micro_batch_size], key=lambda e: e.ids)
        ids, mask, labels = collate(part, healing.pad_id, device)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        needed = mask.bool() & (targets != IGNORE) if labelled else mask.bool()
        hidden = student.model(ids, mask, needed=needed)[needed]                 # (N, D)
        leaf, targets = hidden.detach().requires_grad_(), targets[needed]
        models, inputs = [student], [leaf]
        if not labelled:
            with torch.no_grad():
                models.append(teacher)
                inputs.append(teacher.model(ids, mask, needed=needed)[needed])
        rows = max(1, CHUNK // teacher.lm_head.out_features)
        for logits, target in zip(_logits(models, inputs), targets.split(rows)):
            q, *p = [x.log_softmax(-1) for x in logits]
            loss = (F.nll_loss(q, target, reduction="sum") if labelled else
                    F.kl_div(q, p[0], log_target=True, reduction="sum")) / count
            loss.backward()
            total += loss.item()
        hidden.backward(leaf.grad)
    return total


def _logits(models: Sequence[CausalLM], hidden: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Logits of each model from its (N, D), in float32 or better, a chunk of tokens at a time."""
    rows = max(1, CHUNK // models[0].lm_head.out_features)
    for parts in zip(*(h.split(rows) for h in hidden)):
        logits = [m.lm_head(h) for m, h in zip(models, parts)]
        yield [x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits]
