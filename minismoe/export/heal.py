"""Heal a frozen model: train its maps for a few steps towards what the mixture predicts.

The mixture itself never changes: the student is a copy of the model with weights of its own where
they differ.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..data.tasks import Example, collate
from ..io.progress import progress_bar
from ..method.experts import expert_layers, expert_parameters
from ..method.freeze import Fit, exact
from ..method.loss import CHUNK
from ..model.decoder import CausalLM
from ..model.tokens import Tokens
from ..training import compiled
from ..training.copies import Copies
from ..training.loop import TrainConfig, schedule
from ..training.rate import learning_rate

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
    """A copy of the modules of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def heal(student: CausalLM, healing: Healing, lr: float = LR) -> dict[str, Fit]:
    """Train the maps of a student, the teacher's frozen mixtures, and return them as fits, by
    module. Its other weights are those that ship beside the maps."""
    student.train()
    compiling = compiled.wanted(student, healing.compile, healing.steps)
    maps, trained = Copies(student, alike=compiling), [*expert_parameters(student).values()]
    cfg = TrainConfig(
        epochs=math.ceil(healing.steps / math.ceil(len(healing.examples) / BATCH)),
        batch_size=BATCH)
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    with (compiled.compiled_layers(student, lambda: heal_step(
              student, maps, healing, healing.examples[:BATCH])) if compiling else nullcontext(),
          progress_bar(range(healing.steps), "heal", unit="step") as bar):
        optimizer.zero_grad()                # of the step that compiled the layers
        for step, batch in zip(bar, schedule(healing.examples, cfg)):
            optimizer.param_groups[0]["lr"] = learning_rate(
                step, healing.steps, lr, cfg.warmup)
            loss = heal_step(student, maps, healing, batch)
            torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"divergence {loss.item():.4f}", refresh=False)  # the one wait
    return {name: replace(exact(layer), kind="healed")
            for name, layer in expert_layers(student).items()}


def heal_step(student: CausalLM, maps: Copies, healing: Healing, batch: Sequence[Example],
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
        tokens = Tokens(ids, mask, student.config, student.lm_head.weight.device, own)
        with torch.no_grad():
            wanted = healing.teacher.model.rows(tokens)                               # (S, D)
        with maps.multiplying():
            hidden = student.model.rows(tokens)
            loss = divergences(hidden, student.lm_head.weight, wanted,
                               healing.teacher.lm_head.weight).sum() / count
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


class _Divergence(torch.autograd.Function):
    """KL(teacher || model) (S,) of hidden (S, D) under a frozen head (V, D). Plainly, with p the
    softmax and log_p the log_softmax of the teacher's logits (S, V):

        losses = (p * (log_p - (hidden @ head.T).log_softmax(-1))).sum(-1)

    Compared in tests/export/test_heal.py::test_equals_kl_divergence_of_full_logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor,
                ) -> Tensor:
        """theirs (S, D): the teacher's hidden states. Keeps the gradient (S, D) of hidden for the
        backward, and a chunk of logits at a time."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        gradient, step = torch.empty_like(hidden), max(1, CHUNK // head.shape[0])
        for i in range(0, len(hidden), step):
            part = slice(i, i + step)
            log_q = (hidden[part] @ head.T).to(dtype).log_softmax(-1)
            log_p = (theirs[part] @ their_head.T).to(dtype).log_softmax(-1)
            p = log_p.exp()
            losses[part] = (p * log_p.sub_(log_q)).sum(-1)
            gradient[part] = log_q.exp_().sub_(p).to(head.dtype) @ head      # d / d logits = q - p
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_losses[:, None].to(gradient.dtype), None, None, None


def divergences(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> Tensor:
    """KL(teacher || model) (S,) of the next tokens that hidden states (S, D) predict under a frozen
    head (V, D), both of the model and of its teacher."""
    return _Divergence.apply(hidden, head, theirs, their_head)


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
