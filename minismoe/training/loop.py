"""The training loop: a `Trainer` takes a batch to gradients and a step; `train` logs and saves."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.tasks import Example, are_short, bucket
from ..io import flags
from ..io.flags import flag
from ..io.progress import print_above_bar, progress_bar
from ..io.signals import Interrupted, waiting
from ..io.text import duration
from ..method.experts import balance_loss, expert_layers, expert_parameters, take_logits
from ..method.loss import head_losses
from ..model.decoder import CausalLM
from ..model.tokens import to_device_together
from .evaluate import HalvingBatch, evaluating, supervised, token_scores
from .resume import TrainingState, first_state, save_checkpoint
from .schedule import defaults, learning_rate

MEASURES = 10                 # of validation lines in a run
ENOUGH = 50                   # validation lines with short answers that can tell steps apart
REMEDY = "try a lower --lr, or --dtype float32"


@dataclass(frozen=True)
class TrainConfig:
    """How experts are trained; with data, model and allocation it determines the result."""

    epochs: int | None = flag(None, "passes over the training lines (default: it follows their "
                              "number, and is printed)", flags.natural, metavar="N")
    batch_size: int = flag(
        8, "examples per optimizer step (default: %(default)s)", flags.positive, metavar="N")
    micro_batch_size: int | None = flag(
        None, "examples computed at once; fewer need less memory (default: --batch-size)",
        flags.positive, metavar="N")
    recompute: bool = flag(
        False, "activation checkpointing: about a third slower, far less memory for long examples")
    lr: float | None = flag(None, "peak learning rate, after a warm-up; a cosine takes it to 0 "
                            "(default: it follows the size of the base's weights)", flags.number)
    checkpoint_every: int = flag(
        200, "optimizer steps (default: %(default)s)", flags.positive, metavar="N")
    keep: str = flag(
        "best", "which step's experts are kept. best (default): with short answers, the step with "
        f"most right answers to validation lines, if there are {ENOUGH} or more; with long "
        "answers, the step with the least loss of them; else the last step. last: always the last",
        choices=("best", "last"))
    patience: int | None = flag(
        None, "end after N measures of validation lines without a better one (default: never)",
        flags.positive, metavar="N")
    seed: int = 0
    # Without a flag:
    max_grad_norm: float = 1.0           # gradients are clipped to this norm
    router_aux_loss_coef: float = 0.01   # weight of the balance loss
    prompt_loss_weight: float | None = None      # see `default_prompt_loss_weight`
    label_smoothing: float | None = None         # see `default_smoothing`

    @property
    def micro(self) -> int:
        """Examples computed at once."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


Settings = TypeVar("Settings", bound=TrainConfig)


def with_defaults(cfg: Settings, model: CausalLM, examples: Sequence[Example]) -> Settings:
    """The same with numbers, from schedule.py, for what the model and the lines decide. Raises
    ValueError for a model without experts."""
    if not expert_layers(model):
        raise ValueError("the model has no experts to train: call add_experts first")
    return replace(cfg, **{name: number for name, number in defaults(model, examples).items()
                           if getattr(cfg, name) is None})


def all_batches(examples: Sequence[Example], cfg: TrainConfig) -> list[list[Example]]:
    """The batches of all epochs, a number; a resumed run computes the same ones."""
    return [batch for epoch in range(cfg.epochs or 0)
            for batch in bucket(examples, cfg.batch_size, cfg.seed * 1000 + epoch)]


class Trainer:
    """The experts of a model, which are trained in place, and their optimizer.

    valid: validation examples. fitting, evaluating: how many examples are computed at once. best:
    the experts that do best on `valid`, by name. Raises ValueError for a model without a parameter
    to train.
    """

    def __init__(self, model: CausalLM, cfg: TrainConfig, pad_id: int,
                 valid: Sequence[Example] = ()):
        self.model, self.cfg, self.pad_id, self.valid = model, cfg, pad_id, valid
        # Of short answers, the loss rises by overconfidence while more of them become right.
        self.by_answers = are_short([e.supervised for e in valid])
        self.chooses = cfg.keep == "best" and (len(valid) >= ENOUGH or not self.by_answers)
        self.fitting, self.evaluating = HalvingBatch(cfg.micro, "training"), evaluating(cfg.micro)
        self.layers, self.device = expert_layers(model), model.lm_head.weight.device
        self.parameters = {n: p for n, p in expert_parameters(model).items() if p.requires_grad}
        self.best: dict[str, Tensor] = {}
        self.prompt_weight = cfg.prompt_loss_weight or 0.0
        # With a smaller eps, an entry whose gradient is only rounding noise would move by the full
        # rate.
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0, fused=True)

    def gradients(self, batch: Sequence[Example], micro: int) -> Tensor:
        """The gradients of one optimizer step, added up in micro-batches of `micro` examples.

        Returns the sum of losses of each task, in order of name, and then the loss of prompts and
        the balance loss. Nothing waits for the device. The loss is the mean over the step's
        supervised tokens, whatever the micro-batches. The other two are statistics of each
        micro-batch, weighted by its tokens.
        """
        self.optimizer.zero_grad()
        take_logits(self.layers)             # they hold the graph of a batch that did not fit
        sums = list[Tensor]()
        tasks, answers = sorted({e.task for e in batch}), sum(e.supervised for e in batch)
        for i in range(0, len(batch), micro):
            # Sorted rows put shared prefixes side by side.
            part = sorted(batch[i:i + micro], key=lambda e: e.ids)
            task = torch.tensor([*(tasks.index(e.task) for e in part), len(tasks)])      # prompts
            task = to_device_together({"": task}, self.device)[""]
            hidden, targets, numbers, tokens = supervised(
                self.model, part, self.pad_id, self.cfg.recompute, prompts=self.prompt_weight > 0)
            losses = head_losses(hidden, self.model.lm_head.weight, targets,
                                 self.cfg.label_smoothing or 0.0)
            by_task = losses.new_zeros(len(tasks) + 1).index_add(
                0, task[numbers], losses * tokens.repeats[tokens.read])
            balance = balance_loss(take_logits(self.layers), tokens.repeats)
            balance = balance * (sum(len(e.ids) for e in part) / sum(len(e.ids) for e in batch))
            loss = (by_task[:-1].sum() + self.prompt_weight * by_task[-1]) / answers
            (loss + self.cfg.router_aux_loss_coef * balance).backward()
            sums.append(torch.cat([by_task.detach(), balance.detach()[None]]))
        return torch.stack(sums).sum(0)

    def step(self, number: int, batch: Sequence[Example], lr: float) -> dict[str, Any]:
        """One step of the optimizer; returns its line of metrics.jsonl. Raises ArithmeticError, and
        changes nothing, if the loss or the norm of its gradient is not finite."""
        start = time.perf_counter()
        sums = self.fitting(partial(self.gradients, batch))
        clipped = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.cfg.max_grad_norm)
        # The one wait for the device: all figures are read at once.
        *by_task, prompts, balance, norm = torch.cat([sums, clipped[None]]).tolist()
        answers = Counter[str]()
        for e in batch:
            answers[e.task] += e.supervised
        loss, tokens = sum(by_task) / answers.total(), sum(len(e.ids) for e in batch)
        if not math.isfinite(loss + prompts + norm):
            lines = ", ".join(f"{e.task} {e.index + 1}" for e in batch)
            raise ArithmeticError(
                f"the loss is {loss} and the norm of its gradient {norm} at step {number + 1}, on "
                f"the training lines {lines} (counted as --show prints them): {REMEDY}")
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        of_prompts = prompts / max(1, tokens - len(batch) - answers.total())
        return {"step": number + 1, "loss": round(loss, 5), "balance": round(balance, 5),
                **({"prompt_loss": round(of_prompts, 5)} if self.prompt_weight else {}),
                "tokens": tokens, "loss_by_task": {
                    task: round(total / answers[task], 5)
                    for task, total in zip(sorted(answers), by_task)},
                "grad_norm": round(norm, 5), "lr": lr,
                "tokens_per_second": round(tokens / (time.perf_counter() - start), 1)}

    def validate(self, step: int, state: TrainingState) -> dict[str, float]:
        """The mean loss of validation examples after so many steps, and how many have a right
        answer. `state` notes the best step, the later one of equals, and how many measures were
        worse since; `best` holds its experts."""
        loss, _, right = self.evaluating(partial(
            token_scores, self.model, self.valid, self.pad_id))
        merit = right if self.by_answers else -loss
        state["since_best"] += 1
        if merit >= state["best"]:
            state |= {"best": merit, "best_step": step, "since_best": 0}
            if self.chooses:
                self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        return {"valid_loss": round(loss, 5), "valid_right": right}

    def gives_up(self, state: TrainingState) -> bool:
        """Whether as many measures as --patience says have passed without a better one."""
        return bool(self.cfg.patience and state["since_best"] >= self.cfg.patience)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the experts, the best ones, and what AdamW holds for each."""
        return {f"{name}/{key}": tensor for name, p in self.parameters.items() for key, tensor in
                {"value": p.detach(), **self.optimizer.state[p]}.items()} | {
                    f"{name}/best": tensor for name, tensor in self.best.items()}

    def begin(self, run: Path, batches: Sequence[Sequence[Example]], resume: bool,
              continued: bool) -> TrainingState:
        """The state to begin with, whose tensors are taken over; see `first_state`. metrics.jsonl
        ends with its step; of experts that are `continued`, it has measures at step 0."""
        state, tensors = first_state(run, batches, self.parameters, resume)
        metrics, line = run / "metrics.jsonl", ""
        if state["step"]:
            os.truncate(metrics, state["metrics"])
        else:
            if continued and self.valid and batches:
                line = json.dumps({"step": 0, **self.validate(0, state)}) + "\n"
            metrics.write_text(line, encoding="utf-8", newline="\n")
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

    def announce(self, batches: Sequence[Sequence[Example]], first: int) -> None:
        """Print how many steps and passes a run has, and about how long its steps take from the
        `first` on, by the time of the gradients of a usual one."""
        sizes = [sum(len(e.ids) for e in batch) for batch in batches[first:]]
        seconds = 0.0
        if sizes:
            usual, begun = batches[first + sizes.index(median_low(sizes))], time.perf_counter()
            self.fitting(partial(self.gradients, usual)).tolist()        # waits for the device
            seconds = (time.perf_counter() - begun) * sum(sizes) / median_low(sizes)
        print(f"training: {len(batches)} steps of {self.cfg.batch_size} lines, "
              f"{self.cfg.epochs} passes over all: about {duration(seconds)}")

    def finish(self) -> None:
        """Put the best experts in place, if they are kept, and drop gradients."""
        self.optimizer.zero_grad()
        for name, tensor in self.best.items():
            self.parameters[name].data.copy_(tensor)


def train(model: CausalLM, examples: Sequence[Example], cfg: TrainConfig, run: Path, pad_id: int,
          resume: bool = False, valid: Sequence[Example] = (), continued: bool = False,
          ) -> dict[str, float]:
    """Train the experts of `model` in place; returns steps, tokens, seconds, last loss, kept step.

    Writes run/checkpoints and run/metrics.jsonl. Experts that were trained before (continued) are
    measured first, as they may be the best. Raises Interrupted after a signal, once the step is
    saved; ValueError for another run's checkpoint; ArithmeticError for a loss not finite."""
    cfg = with_defaults(cfg, model, examples)
    batches, peak = all_batches(examples, cfg), cfg.lr or 0.0
    trainer = Trainer(model, cfg, pad_id, valid)
    state = trainer.begin(run, batches, resume, continued)
    steps, first, every = len(batches), state["step"], math.ceil(len(batches) / MEASURES)
    trainer.announce(batches, first)
    with ((run / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as metrics,
          progress_bar(range(first, steps), "train", steps, unit="step", initial=first,
                       smoothing=0.1) as bar,
          waiting() as signals):
        begun, note = time.perf_counter() - state["seconds"], ""
        for step in bar:
            if trainer.gives_up(state):
                print_above_bar(f"ended after step {step} by --patience")
                break
            lr, done = learning_rate(step, steps, peak), step + 1
            line = trainer.step(step, batches[step], lr)
            if valid and (done % every == 0 or done == steps):
                line |= trainer.validate(done, state)
                right = f", {line['valid_right']} of {len(valid)} right" * trainer.by_answers
                note = f", validation {line['valid_loss']:.3f}{right}"
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            state |= {"step": done, "tokens": state["tokens"] + line["tokens"],
                      "seconds": time.perf_counter() - begun, "loss": line["loss"],
                      "metrics": os.fstat(metrics.fileno()).st_size}
            due = done % cfg.checkpoint_every == 0 or done == steps
            if due or signals or trainer.gives_up(state):
                os.fsync(metrics.fileno())           # a checkpoint counts on the lines before it
                save_checkpoint(run, trainer.tensors(), state)
            bar.set_postfix_str(f"loss {line['loss']:.3f}{note}, {line['tokens_per_second']:.0f} "
                                "tok/s", refresh=False)
            if signals:
                break
        if signals:                                  # one may come after the last step, too
            raise Interrupted(f"saved after step {state['step']} of {steps}", signals[0])
    trainer.finish()
    return {**{k: state[k] for k in ("step", "tokens", "seconds", "loss")},
            "kept": state["best_step"] if trainer.best else state["step"]}

