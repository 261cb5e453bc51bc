"""The training loop: a `Trainer` takes a batch to gradients and a step; `train` logs and saves."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median, median_low
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.tasks import Example, collate
from ..io.progress import print_above_bar, progress_bar
from ..io.signals import Interrupted, waiting
from ..io.text import duration
from ..method.experts import (
    balance_loss,
    drop_routers,
    expert_layers,
    expert_parameters,
    routed,
    take_logits,
)
from ..method.freeze import freeze
from ..method.loss import IGNORE, head_losses, to_device
from ..model.decoder import CausalLM
from ..model.tokens import to_device_together
from .evaluate import HalvingBatch, evaluating, supervised, token_scores
from .plan import (
    ENOUGH,
    TaskPlan,
    TrainConfig,
    by_task,
    lines_to_fit,
    plan_tasks,
    planned_batches,
)
from .resume import TrainingState, first_state, save_checkpoint
from .schedule import default_lr, freezing_step, learning_rate

MEASURES = 10                 # of validation lines in a run
REMEDY = "try a lower --lr, or --dtype float32"

Settings = TypeVar("Settings", bound=TrainConfig)


def with_rate(cfg: Settings, model: CausalLM) -> Settings:
    """The same with a learning rate. Raises ValueError for a model without experts."""
    if not expert_layers(model):
        raise ValueError("the model has no experts to train: call add_experts first")
    return cfg if cfg.lr is not None else replace(cfg, lr=default_lr(model))


def loss_weights(examples: Sequence[Example], shares: Mapping[str, float]) -> Tensor:
    """How much each token (B, T) counts in the loss: 1 in an answer, prompt_weight where a user
    wrote it, times the share of its task."""
    rows = list[Tensor]()
    for e in examples:
        row = torch.tensor([float(label != IGNORE) for label in e.labels])
        row[e.asked] = e.prompt_weight
        rows.append(row * shares[e.task])
    return pad_sequence(rows, batch_first=True)


class Trainer:
    """The experts of a model, which are trained in place, and their optimizer.

    valid: validation examples, of tasks with these plans. fitting, evaluating: how many examples
    are computed at once. best: the experts that do best on `valid`, by name; empty if the last are
    kept. Raises ValueError for a model without a parameter to train.
    """

    def __init__(self, model: CausalLM, cfg: TrainConfig, pad_id: int,
                 valid: Sequence[Example] = (), plans: Mapping[str, TaskPlan] | None = None):
        self.model, self.cfg, self.pad_id = model, cfg, pad_id
        self.valid, self.plans = by_task(valid), plans or {}
        self.chooses = cfg.keep == "best" and min(
            (plan.valid for plan in self.plans.values()), default=0) >= ENOUGH
        self.fitting, self.evaluating = HalvingBatch(cfg.micro, "training"), evaluating(cfg.micro)
        self.layers, self.device = expert_layers(model), model.lm_head.weight.device
        self.best: dict[str, Tensor] = {}
        self.begin_optimizer()

    def begin_optimizer(self) -> None:
        """An optimizer of the experts that the model has now, without moments."""
        self.parameters = {name: p for name, p in expert_parameters(self.model).items()
                           if p.requires_grad}
        # With a smaller eps, an entry whose gradient is only rounding noise would move by the full
        # rate.
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0, fused=True)

    def gradients(self, batch: Sequence[Example], micro: int) -> Tensor:
        """The gradients of one optimizer step, added up in micro-batches of `micro` examples.

        Returns the sum of losses of each task, in order of name, and then the loss of prompts and
        the balance loss. Nothing waits for the device. The loss of a task is the mean over the
        step's supervised tokens, whatever the micro-batches, and each task counts by its lines: so
        long answers of one do not drown short ones of another. The balance loss is a statistic of
        each micro-batch, weighted by its tokens.
        """
        self.optimizer.zero_grad()
        take_logits(self.layers)             # they hold the graph of a batch that did not fit
        sums, tasks = list[Tensor](), sorted(lines := by_task(batch))
        shares = {task: len(of_task) / len(batch) / sum(e.supervised for e in of_task)
                  for task, of_task in lines.items()}
        for i in range(0, len(batch), micro):
            # Sorted rows put shared prefixes side by side.
            part = sorted(batch[i:i + micro], key=lambda e: e.ids)
            task = torch.tensor([*(tasks.index(e.task) for e in part), len(tasks)])      # prompts
            task = to_device_together({"": task}, self.device)[""]
            smoothing = to_device(torch.tensor([*(e.smoothing for e in part), 0.0]), self.device)
            found = supervised(self.model, part, self.pad_id, self.cfg.recompute,
                               loss_weights(part, shares))
            losses = head_losses(found.hidden, self.model.lm_head.weight, found.targets,
                                 smoothing[found.numbers])
            sums_by_task = losses.new_zeros(len(tasks) + 1).index_add(
                0, task[found.numbers], losses.detach() * found.repeats)
            balance = balance_loss(take_logits(self.layers), found.tokens.repeats)
            balance = balance * (sum(len(e.ids) for e in part) / sum(len(e.ids) for e in batch))
            loss = (losses * found.weights).sum()
            (loss + self.cfg.router_aux_loss_coef * balance).backward()
            sums.append(torch.cat([sums_by_task, balance.detach()[None]]))
        return torch.stack(sums).sum(0)

    def freeze(self, step: int, batches: Sequence[Sequence[Example]]) -> dict[str, Any]:
        """Make each mixture a plain LoRA by the first lines of the batches; returns what
        metrics.jsonl says of it. Gradients are several times as large without gates, so that
        moments of before would make steps of several times the rate: the optimizer begins anew."""
        lines = lines_to_fit(chain(*batches))
        missed = freeze(self.model, collate(lines, self.pad_id), self.fitting.size)
        self.begin_optimizer()
        middle = round(median(missed.values()), 5)
        print_above_bar(f"froze {len(missed)} mixtures after step {step} of {len(batches)}: the "
                        f"median LoRA misses {middle:.1%} of what its mixture added to lines held "
                        "out")
        return {"frozen": len(missed), "missed": middle}

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
        asked = sum(len(e.asked) for e in batch if e.prompt_weight)
        return {"step": number + 1, "loss": round(loss, 5), "balance": round(balance, 5),
                **({"prompt_loss": round(prompts / asked, 5)} if asked else {}),
                "tokens": tokens, "loss_by_task": {
                    task: round(total / answers[task], 5)
                    for task, total in zip(sorted(answers), by_task)},
                "grad_norm": round(norm, 5), "lr": lr,
                "tokens_per_second": round(tokens / (time.perf_counter() - start), 1)}

    def validate(self, step: int, state: TrainingState) -> dict[str, Any]:
        """The loss of validation examples after so many steps, and how many have a right answer, by
        task. `state` notes the best step, the later one of equals; `best` holds its experts.

        A task that is judged by answers does as well as the share of right ones; another as the
        likelihood of a token, exp(-loss). The best step has the best mean over tasks. Mixtures that
        are yet to be frozen are no candidates.
        """
        scores = {task: self.evaluating(partial(token_scores, self.model, lines, self.pad_id))
                  for task, lines in self.valid.items()}
        merit = fmean(found.lines / len(self.valid[task]) if self.plans[task].judged == "answers"
                      else math.exp(-found.loss) for task, found in scores.items())
        ships = self.cfg.routing == "dynamic" or not routed(self.model)
        if ships and merit >= state["best"]:
            state |= {"best": merit, "best_step": step}
            if self.chooses:
                self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        return {"valid_loss": round(fmean(found.loss for found in scores.values()), 5),
                "valid_loss_by_task": {t: round(found.loss, 5) for t, found in scores.items()},
                "valid_right_by_task": {task: found.lines for task, found in scores.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the experts, the best ones, and what AdamW holds for each."""
        return {f"{name}/{key}": tensor for name, p in self.parameters.items() for key, tensor in
                {"value": p.detach(), **self.optimizer.state[p]}.items()} | {
                    f"{name}/best": tensor for name, tensor in self.best.items()}

    def begin(self, run: Path, batches: Sequence[Sequence[Example]], resume: bool,
              continued: bool) -> TrainingState:
        """The state to begin with, whose tensors are taken over; see `first_state`. metrics.jsonl
        ends with its step; of experts that are `continued`, it has measures at step 0."""
        state, tensors = first_state(run, len(batches), self.parameters, resume)
        if state["frozen"]:
            drop_routers(self.model)         # the checkpoint holds none
            self.begin_optimizer()
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
        print(f"training: {len(batches)} steps of {self.cfg.batch_size} lines: about "
              f"{duration(seconds)}")

    def choice(self, state: TrainingState, steps: int) -> str:
        """Which step's experts are kept, and by what, in words."""
        if not self.best:
            return f"kept the last step, {state['step']}"
        by = " and ".join(sorted({plan.judged for plan in self.plans.values()}))
        return (f"kept step {state['best_step']} of {steps}, by the {by} of {ENOUGH} or more "
                "validation lines a task")

    def finish(self) -> None:
        """Put the best experts in place, if they are kept, and drop gradients."""
        self.optimizer.zero_grad()
        for name, tensor in self.best.items():
            self.parameters[name].data.copy_(tensor)


def train(model: CausalLM, examples: Sequence[Example], cfg: TrainConfig, run: Path, pad_id: int,
          resume: bool = False, valid: Sequence[Example] = (), continued: bool = False,
          ) -> dict[str, Any]:
    """Train the experts of `model` in place; returns steps, tokens, seconds, last loss, and which
    step is kept, and after which step mixtures became plain LoRAs, if they did.

    Writes run/checkpoint.safetensors and run/metrics.jsonl. Experts that were trained before
    (continued) are measured first, as they may be the best. Raises Interrupted after a signal, once
    the step is saved; ValueError for a damaged checkpoint or another run's; ArithmeticError for a
    loss that is not finite."""
    cfg, plans = with_rate(cfg, model), plan_tasks(examples, valid, cfg)
    batches, peak = planned_batches(examples, plans, cfg), cfg.lr or 0.0
    trainer = Trainer(model, cfg, pad_id, valid, plans)
    steps, every = len(batches), math.ceil(len(batches) / MEASURES)
    freezes = cfg.routing == "frozen" and routed(model)
    freeze_at = freezing_step(steps, plans) if freezes else None
    state = trainer.begin(run, batches, resume, continued)
    first = state["step"]
    trainer.announce(batches, first)
    with ((run / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as metrics,
          progress_bar(range(first, steps), "train", steps, unit="step", initial=first,
                       smoothing=0.1) as bar,
          waiting() as signals):
        begun, note = time.perf_counter() - state["seconds"], ""
        for step in bar:
            froze = trainer.freeze(step, batches) if step == freeze_at else {}
            since = 0 if freeze_at is None or step < freeze_at else freeze_at
            lr, done = learning_rate(step, steps, peak, since), step + 1
            line = trainer.step(step, batches[step], lr) | froze
            if valid and (done % every == 0 or done == steps):
                line |= trainer.validate(done, state)
                note = f", validation {line['valid_loss']:.3f}"
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            state |= {"step": done, "tokens": state["tokens"] + line["tokens"],
                      "seconds": time.perf_counter() - begun, "loss": line["loss"],
                      "frozen": not routed(model), "metrics": os.fstat(metrics.fileno()).st_size}
            if done % cfg.checkpoint_every == 0 or done == steps or signals:
                os.fsync(metrics.fileno())           # a checkpoint counts on the lines before it
                save_checkpoint(run, trainer.tensors(), state)
            bar.set_postfix_str(f"loss {line['loss']:.3f}{note}, {line['tokens_per_second']:.0f} "
                                "tok/s", refresh=False)
            if signals:
                break
        if signals:                                  # one may come after the last step, too
            raise Interrupted(f"saved after step {state['step']} of {steps}", signals[0])
    trainer.finish()
    return {**{k: state[k] for k in ("step", "tokens", "seconds", "loss")}, "frozen": freeze_at,
            "choice": trainer.choice(state, steps)}
