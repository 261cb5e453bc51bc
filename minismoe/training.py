"""The training loop: bucketed batches, accumulation, schedule, metrics, checkpoints, resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Example, bucket, collate
from .experts import balance_loss, expert_layers, expert_use
from .loss import IGNORE, supervised_losses
from .model import CausalLM
from .resume import (
    Interrupted,
    digest,
    discard,
    due,
    load_checkpoint,
    save_checkpoint,
    waiting,
)


@dataclass(frozen=True)
class TrainConfig:
    """What the loop needs to know; together with data and model it determines the result."""

    epochs: int = 3
    batch_size: int = 16                # examples an optimizer step
    micro_batch_size: int = 16          # examples computed at once; the rest by accumulation
    lr: float = 4e-3                    # its peak
    warmup: float = 0.05                # share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    router_aux_loss_coef: float = 0.01
    checkpoint_every: int | str = 200   # steps, or minutes ("10m")
    expert_use_every: int = 20          # steps
    seed: int = 0


def learning_rate(step: int, steps: int, cfg: TrainConfig) -> float:
    """Linear warm-up to cfg.lr, then half a cosine to 0."""
    warm = max(1, round(cfg.warmup * steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def schedule(examples: Sequence[Example], cfg: TrainConfig) -> list[list[Example]]:
    """The batches of all epochs; a resumed run computes the same ones."""
    return [batch for epoch in range(cfg.epochs)
            for batch in bucket(examples, cfg.batch_size, cfg.seed * 1000 + epoch)]


def train(model: CausalLM, examples: Sequence[Example], cfg: TrainConfig, run: Path, pad_id: int,
          resume: bool = False) -> dict[str, float]:
    """Train the experts of `model`, in place; gives steps, tokens, seconds and the last loss.

    Writes run/metrics.jsonl, a line a step, and run/checkpoints. Raises Interrupted after Ctrl-C,
    SIGTERM or SIGHUP, the finished step saved; ValueError where it can't go on from a checkpoint;
    ArithmeticError, naming step and batch, where the loss is no longer finite.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    batches = schedule(examples, cfg)
    order = digest([[(e.task, e.index) for e in batch] for batch in batches])
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "loss": math.nan, "metrics": 0}
    if resume:
        state = load_checkpoint(run, parameters, optimizer, order) or state
    else:
        discard(run, "step")
    begun, saved = time.perf_counter() - state["seconds"], time.monotonic()
    metrics = _metrics_from(run / "metrics.jsonl", state["metrics"])
    bar = tqdm(total=len(batches), initial=state["step"], desc="train", unit="step", smoothing=0.1)
    with metrics, bar, waiting() as signals:
        for step in range(state["step"], len(batches)):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(batches), cfg)
            line = train_step(model, batches[step], cfg, pad_id, step)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now = time.perf_counter()
            line |= {"lr": group["lr"], "grad_norm": round(norm.item(), 5),
                     "tokens_per_second": round(line["tokens"] / (now - start), 1)}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            state = {"step": step + 1, "tokens": state["tokens"] + line["tokens"],
                     "seconds": now - begun, "loss": line["loss"], "order": order,
                     "metrics": os.fstat(metrics.fileno()).st_size}
            if signals or due(cfg.checkpoint_every, step + 1, saved) or step + 1 == len(batches):
                os.fsync(metrics.fileno())
                save_checkpoint(run, parameters, optimizer, state)
                saved = time.monotonic()
                if signals:
                    break
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:.0f} tok/s",
                                refresh=False)
            bar.update()
        if signals:
            raise Interrupted(f"saved after step {state['step']} of {len(batches)}", signals[0])
    return {k: state[k] for k in ("step", "tokens", "seconds", "loss")}


def train_step(model: CausalLM, batch: Sequence[Example], cfg: TrainConfig, pad_id: int,
               step: int = 0) -> dict[str, Any]:
    """Gradients of one optimizer step, in micro-batches, and its metrics.

    The loss is the mean over the step's supervised tokens, whatever the micro-batches. The balance
    loss is a statistic of each micro-batch, weighted by its tokens.
    """
    device, layers = model.model.norm.weight.device, expert_layers(model)
    supervised = sum(label != IGNORE for e in batch for label in e.labels[1:])
    tokens = sum(len(e.ids) for e in batch)
    total = balance = torch.zeros((), device=device)
    by_task: dict[str, list[Tensor]] = defaultdict(list)
    for i in range(0, len(batch), cfg.micro_batch_size):
        part = batch[i:i + cfg.micro_batch_size]
        ids, mask, labels = collate(part, pad_id, device)
        losses, rows = supervised_losses(model, ids, mask, labels, share_prefix=True)
        balanced = balance_loss(layers.values(), mask) * (sum(len(e.ids) for e in part) / tokens)
        loss = losses.sum() / supervised + cfg.router_aux_loss_coef * balanced
        loss.backward()
        total, balance = total + losses.detach().sum(), balance + balanced.detach()
        for row, example in enumerate(part):
            by_task[example.task].append(losses.detach()[rows == row])
    mean = (total / supervised).item()
    if not math.isfinite(mean):
        names = ", ".join(f"{e.task} {e.index}" for e in batch)
        raise ArithmeticError(f"the loss is {mean} at step {step + 1}, on the training lines "
                              f"{names}: try a lower --lr, or --dtype float32")
    line = {"step": step + 1, "loss": round(mean, 5), "balance": round(balance.item(), 5),
            "tokens": tokens, "loss_by_task": {
                task: round(torch.cat(by_task[task]).mean().item(), 5) for task in sorted(by_task)}}
    if step % cfg.expert_use_every == 0:
        line["expert_use"] = {name: [round(u, 3) for u in use]
                              for name, use in expert_use(layers, mask).items()}
    return line


def _metrics_from(file: Path, size: int) -> TextIO:
    """The metrics file, open for appending behind its first `size` bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    metrics = file.open("a", encoding="utf-8", newline="\n")
    metrics.truncate(size)
    return metrics
