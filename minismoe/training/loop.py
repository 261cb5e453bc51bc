"""The training loop: a `Trainer` takes a batch to gradients and a step; `train` logs and saves."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tasks import Example, bucket
from ..io import flags
from ..io.flags import flag
from ..io.progress import print_above_bar, progress_bar
from ..io.signals import Interrupted, waiting
from ..method.experts import balance_loss, expert_parameters, take_logits
from ..method.loss import head_losses
from ..model.decoder import CausalLM
from ..model.tokens import to_device_together
from . import compiled, distributed, verdict
from .copies import Copies
from .distributed import rank0_only
from .evaluate import Fitting, evaluating, supervised, token_scores
from .rate import default_lr, learning_rate
from .resume import TrainingState, first_state, save_checkpoint

MEASURES = 10                 # of the loss of validation lines in a run
REMEDY = "try a lower --lr, or --dtype float32"


@dataclass(frozen=True)
class TrainConfig:
    """How experts are trained; with data, model and allocation it determines the result."""

    epochs: int = flag(3, "passes over the training lines (default: %(default)s)", flags.natural)
    batch_size: int = flag(
        8, "examples per optimizer step (default: %(default)s)", flags.positive, metavar="N")
    micro_batch_size: int | None = flag(
        None, "examples computed at once by all processes together; fewer need less memory "
        "(default: --batch-size)", flags.positive, metavar="N")
    recompute: bool = flag(
        False, "activation checkpointing: about a third slower, far less memory for long examples")
    compile: str = flag(
        "auto", "compile the decoder layers, which takes a minute, and saves the time that small "
        "models wait for kernels to start. auto (default): on CUDA, for work long enough to pay",
        choices=("auto", "on", "off"))
    lr: float | None = flag(None, "peak learning rate, after a warm-up; a cosine takes it to 0 "
                            "(default: it follows the size of the base's weights)", flags.number)
    checkpoint_every: int = flag(
        200, "optimizer steps (default: %(default)s)", flags.positive, metavar="N")
    keep: str = flag("best", "the experts of the step with the least loss of validation lines "
                     "(default), or of the last step", choices=("best", "last"))
    patience: int | None = flag(
        None, "end after N measures of the loss of validation lines without a better one "
        "(default: never)", flags.positive, metavar="N")
    seed: int = 0
    # Without a flag:
    max_grad_norm: float = 1.0           # gradients are clipped to this norm
    router_aux_loss_coef: float = 0.01   # weight of the balance loss

    @property
    def micro(self) -> int:
        """Examples computed at once."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


def schedule(examples: Sequence[Example], cfg: TrainConfig) -> list[list[Example]]:
    """The batches of all epochs; a resumed run computes the same ones."""
    return [batch for epoch in range(cfg.epochs)
            for batch in bucket(examples, cfg.batch_size, cfg.seed * 1000 + epoch)]


class Trainer:
    """The experts of a model, which are trained in place, and their optimizer.

    fitting, evaluating: how many examples are computed at once. best: the experts with the
    least loss of validation examples, by name. Raises ValueError for a model without a parameter to
    train.
    """

    def __init__(self, model: CausalLM, cfg: TrainConfig, pad_id: int, same_shapes: bool = False):
        self.model, self.cfg, self.pad_id = model, cfg, pad_id
        self.fitting, self.evaluating = Fitting(cfg.micro, "training"), evaluating(cfg.micro)
        self.copies, self.device = Copies(model, same_shapes), model.lm_head.weight.device
        self.parameters = {n: p for n, p in expert_parameters(model).items() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no experts to train: call add_experts first")
        self.best: dict[str, Tensor] = {}
        distributed.exchange([*self.parameters.values()], first=True)
        # With a smaller eps, an entry whose gradient is only rounding noise would move by the full
        # rate.
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0, fused=True)

    def gradients(self, batch: Sequence[Example], micro: int) -> Tensor:
        """The gradients of one optimizer step, added up in micro-batches of `micro` examples.

        Returns the sum of losses of each task, in order of name, and then the balance loss. Nothing
        waits for the device. The loss is the mean over the step's supervised tokens, whatever the
        micro-batches. The balance loss is a statistic of each micro-batch, weighted by its tokens.
        Several processes share each micro-batch: each has the gradients, and the losses, of its
        part.
        """
        self.optimizer.zero_grad()
        take_logits(self.copies.layers)      # they hold the graph of a batch that did not fit
        sums = list[Tensor]()
        tasks, answers = sorted({e.task for e in batch}), sum(e.supervised for e in batch)
        for i in range(0, len(batch), micro):
            part = batch[i:i + micro]
            mine = part[distributed.rank()::distributed.world()]
            # A process without an example computes one all the same, and counts it as 0.
            counts = float(bool(mine))
            # Sorted rows put shared prefixes side by side.
            mine = sorted(mine or part[:1], key=lambda e: e.ids)
            task = torch.tensor([tasks.index(e.task) for e in mine])
            task = to_device_together({"": task}, self.device)[""]
            with self.copies.multiplying():
                hidden, targets, numbers, tokens = supervised(
                    self.model, mine, self.pad_id, self.cfg.recompute)
                losses = head_losses(hidden, self.model.lm_head.weight, targets)
                balance = balance_loss(take_logits(self.copies.layers), tokens.repeats,
                                       partial(distributed.all_sum, times=counts))
                balance = balance * (sum(len(e.ids) for e in part) / sum(len(e.ids) for e in batch))
                loss = losses.sum() / answers + self.cfg.router_aux_loss_coef * balance
                (counts * loss).backward()
            by_task = losses.new_zeros(len(tasks)).index_add(0, task[numbers], losses.detach())
            sums.append(counts * torch.cat([by_task, balance.detach()[None]]))
        return torch.stack(sums).sum(0)

    def step(self, number: int, batch: Sequence[Example], lr: float) -> dict[str, Any]:
        """One step of the optimizer; returns its line of metrics.jsonl. Raises ArithmeticError, and
        changes nothing, if the loss or the norm of its gradient is not finite."""
        start = time.perf_counter()
        sums = self.fitting(partial(self.gradients, batch))
        distributed.exchange([p.grad for p in self.parameters.values() if p.grad is not None])
        clipped = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.cfg.max_grad_norm)
        # The one wait for the device: all figures are read at once.
        *by_task, balance, norm = torch.cat([distributed.all_sum(sums), clipped[None]]).tolist()
        answers = Counter[str]()
        for e in batch:
            answers[e.task] += e.supervised
        loss, tokens = sum(by_task) / answers.total(), sum(len(e.ids) for e in batch)
        if not math.isfinite(loss + norm):
            lines = ", ".join(f"{e.task} {e.index + 1}" for e in batch)
            raise ArithmeticError(
                f"the loss is {loss} and the norm of its gradient {norm} at step {number + 1}, on "
                f"the training lines {lines} (counted as --show prints them): {REMEDY}")
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return {"step": number + 1, "loss": round(loss, 5), "balance": round(balance, 5),
                "tokens": tokens, "loss_by_task": {
                    task: round(total / answers[task], 5)
                    for task, total in zip(sorted(answers), by_task)},
                "grad_norm": round(norm, 5), "lr": lr,
                "tokens_per_second": round(tokens / (time.perf_counter() - start), 1)}

    def validate(self, examples: Sequence[Example], state: TrainingState) -> float:
        """Mean loss of validation examples. `state` notes the least, and how often it was not
        reached since; `best` holds its experts."""
        loss = round(self.evaluating(partial(
            token_scores, self.model, examples, self.pad_id))[0], 5)
        state["since_best"] += 1
        if loss < state["best_loss"]:
            state |= {"best_loss": loss, "since_best": 0}
            if self.cfg.keep == "best":
                self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        return loss

    def gives_up(self, state: TrainingState) -> bool:
        """Whether as many measures as --patience says have passed without a better one."""
        return bool(self.cfg.patience and state["since_best"] >= self.cfg.patience)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the experts, the best ones, and what AdamW holds for each."""
        return {f"{name}/{key}": tensor for name, p in self.parameters.items() for key, tensor in
                {"value": p.detach(), **self.optimizer.state[p]}.items()} | {
                    f"{name}/best": tensor for name, tensor in self.best.items()}

    def begin(self, run: Path, batches: Sequence[Sequence[Example]], resume: bool,
              valid: Sequence[Example]) -> TrainingState:
        """The state to begin with, whose tensors are taken over; see `first_state`. metrics.jsonl
        ends with its step; at step 0 it holds the loss of `valid`, if there is any."""
        state, tensors = first_state(run, batches, self.parameters, resume)
        metrics, line = run / "metrics.jsonl", ""
        if state["step"]:
            rank0_only(os.truncate, metrics, state["metrics"])
        else:
            if valid and batches:
                line = json.dumps({"step": 0, "valid_loss": self.validate(valid, state)}) + "\n"
            rank0_only(metrics.write_text, line, "utf-8", None, "\n")
        for full in [*tensors]:              # it is emptied: the file may not stay mapped
            name, _, key = full.rpartition("/")
            parameter = self.parameters[name]
            tensor = tensors.pop(full).to(parameter.device, copy=True)
            if key == "value":
                parameter.data.copy_(tensor)
            elif key == "best":
                self.best[name] = tensor
            else:
                self.optimizer.state[parameter][key] = tensor
        return state

    def finish(self) -> None:
        """Put the best experts in place, if they are kept, and drop gradients."""
        self.optimizer.zero_grad()
        for name, tensor in self.best.items():
            self.parameters[name].data.copy_(tensor)


def train(model: CausalLM, examples: Sequence[Example], cfg: TrainConfig, run: Path, pad_id: int,
          resume: bool = False, valid: Sequence[Example] = (), continued: bool = False,
          ) -> dict[str, float]:
    """Train the experts of `model` in place; returns steps, tokens, seconds and the last loss.

    Writes run/checkpoints and run/metrics.jsonl. Experts that were trained before (continued) are
    measured first, as they may be the best. Raises Interrupted after a signal, once the step is
    saved; ValueError for another run's checkpoint; ArithmeticError for a loss not finite."""
    batches = schedule(examples, cfg)
    compiling = compiled.wanted(model, cfg.compile, len(batches))
    trainer = Trainer(model, cfg, pad_id, same_shapes=compiling)
    peak = default_lr(model) if cfg.lr is None else cfg.lr
    state = trainer.begin(run, batches, resume, valid if continued else ())
    steps, first = len(batches), state["step"]
    every = math.ceil(steps / MEASURES)
    compilation = compiled.compiled_layers(model, lambda: trainer.fitting(partial(
        trainer.gradients, batches[0]))) if compiling else nullcontext()
    with (compilation, (run / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as metrics,
          progress_bar(range(first, steps), "train", steps, unit="step", initial=first,
                       smoothing=0.1, disable=distributed.rank() > 0) as bar,
          waiting(distributed.rank() == 0) as signals):
        begun, note = time.perf_counter() - state["seconds"], ""
        for step in bar:
            if trainer.gives_up(state):
                rank0_only(print_above_bar, f"ended after step {step} by --patience")
                break
            lr, done = learning_rate(step, steps, peak), step + 1
            line = trainer.step(step, batches[step], lr)
            if valid and (done % every == 0 or done == steps):
                line["valid_loss"] = trainer.validate(valid, state)
                note = f", validation {line['valid_loss']:.3f}"
            rank0_only(metrics.write, json.dumps(line) + "\n")
            metrics.flush()
            if done == steps // 2:
                rank0_only(verdict.warn, run, examples, peak, default_lr(model), continued)
            state |= {"step": done, "tokens": state["tokens"] + line["tokens"],
                      "seconds": time.perf_counter() - begun, "loss": line["loss"],
                      "metrics": os.fstat(metrics.fileno()).st_size}
            signal, saves = _signal_to_any(signals), done % cfg.checkpoint_every == 0
            if saves or signal or trainer.gives_up(state) or done == steps:
                os.fsync(metrics.fileno())           # a checkpoint counts on the lines before it
                rank0_only(save_checkpoint, run, trainer.tensors(), state)
            bar.set_postfix_str(f"loss {line['loss']:.3f}{note}, {line['tokens_per_second']:.0f} "
                                "tok/s", refresh=False)
            if signal:
                break
        if signal := _signal_to_any(signals):        # one may come after the last step, too
            raise Interrupted(f"saved after step {state['step']} of {steps}", signal)
    trainer.finish()
    return {k: state[k] for k in ("step", "tokens", "seconds", "loss")}


def _signal_to_any(signals: Sequence[int]) -> int:
    """The signal that asked any process to end, for one alone may get it; 0 if none did."""
    return max(distributed.gather(signals[0] if signals else 0))
