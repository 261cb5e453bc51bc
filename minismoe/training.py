"""The training loop: bucketed batches, accumulation, schedule, metrics, checkpoints, resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .checkpoint import read_json, replacing, write_json
from .data import Example, bucket, collate
from .experts import balance_loss, expert_layers, expert_use
from .loss import IGNORE, supervised_losses
from .model import CausalLM

CHECKPOINTS_KEPT = 2


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
    checkpoint_every: int = 200         # steps
    expert_use_every: int = 20          # steps
    seed: int = 0


class Interrupted(Exception):
    """Ctrl-C came; what was trained is saved."""


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

    Writes run/metrics.jsonl, a line a step, and run/checkpoints. Raises Interrupted after a saved
    Ctrl-C, and ArithmeticError, naming step and batch, where the loss is no longer finite.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    batches = schedule(examples, cfg)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    if resume:
        state = load_checkpoint(run, parameters, optimizer) or state
    begun = time.perf_counter() - state["seconds"]
    metrics = _metrics_from(run / "metrics.jsonl", state["step"])
    bar = tqdm(total=len(batches), initial=state["step"], desc="train", unit="step", smoothing=0.1)
    line: dict[str, Any] = {}
    with metrics, bar, _sigint() as interrupted:
        for step in range(state["step"], len(batches)):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(batches), cfg)
            line = step_that_fits(model, batches[step], cfg, pad_id, step)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now = time.perf_counter()
            state = {"step": step + 1, "tokens": state["tokens"] + line["tokens"],
                     "seconds": now - begun}
            line |= {"lr": group["lr"], "grad_norm": round(norm.item(), 5),
                     "tokens_per_second": round(line["tokens"] / (now - start), 1)}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:.0f} tok/s",
                                refresh=False)
            bar.update()
            if interrupted or (step + 1) % cfg.checkpoint_every == 0:
                save_checkpoint(run, parameters, optimizer, state)
            if interrupted:
                raise Interrupted(f"saved after step {step + 1} of {len(batches)}")
    return {**state, "loss": line.get("loss", math.nan)}


def step_that_fits(model: CausalLM, batch: Sequence[Example], cfg: TrainConfig, pad_id: int,
                   step: int = 0) -> dict[str, Any]:
    """train_step, begun again with half the micro-batch each time that memory runs out."""
    while True:
        try:
            return train_step(model, batch, cfg, pad_id, step)
        except (MemoryError, RuntimeError) as e:
            micro = min(cfg.micro_batch_size, len(batch)) // 2
            if not out_of_memory(e) or micro == 0:
                raise
            tqdm.write(f"step {step + 1}: out of memory, so {micro} examples at a time")
        cfg = replace(cfg, micro_batch_size=micro)
        model.zero_grad(set_to_none=True)                # of the micro-batches that were done
        for layer in expert_layers(model).values():
            layer.router_logits = None                   # the graph of the one that was not
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception says so; the allocators of CPU and MPS raise a plain RuntimeError."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(e) for words in ("out of memory", "can't allocate memory"))


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


@contextmanager
def _sigint() -> Iterator[list[int]]:
    """A list that is filled when Ctrl-C comes, so that a step ends first; a second one kills."""
    came: list[int] = []

    def handler(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _metrics_from(file: Path, step: int) -> Any:
    """The metrics file, open for writing, with the lines of the first `step` steps kept."""
    lines = file.read_text().splitlines(keepends=True)[:step] if step and file.exists() else []
    with replacing(file) as tmp:
        tmp.write_text("".join(lines))
    return file.open("a")


def save_checkpoint(run: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
                    state: dict[str, Any]) -> None:
    """Write run/checkpoints/step-N, whole or not at all, and keep the last two."""
    folder = run / "checkpoints" / f"step-{state['step']:08d}"
    tmp = folder.with_suffix(".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in parameters.items()},
              tmp / "experts.safetensors")
    save_file({f"{n}.{key}": torch.as_tensor(value) for n, p in parameters.items()
               for key, value in optimizer.state[p].items()}, tmp / "optimizer.safetensors")
    write_json(tmp / "state.json", state)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(tmp, folder)
    for old in sorted(folder.parent.glob("step-????????"))[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)


def load_checkpoint(run: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
                    ) -> dict[str, Any] | None:
    """Bring experts and optimizer to the newest checkpoint, and give its state; None without."""
    folders = sorted((run / "checkpoints").glob("step-????????"))
    if not folders:
        return None
    experts = load_file(folders[-1] / "experts.safetensors")
    moments = load_file(folders[-1] / "optimizer.safetensors")
    if set(experts) != set(parameters):
        raise ValueError(f"{folders[-1]} belongs to another allocation than {run}'s")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(experts[name])
            optimizer.state[parameter] = {
                key: moments[f"{name}.{key}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")}
    return dict(read_json(folders[-1] / "state.json"))


