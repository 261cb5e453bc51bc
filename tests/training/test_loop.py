"""The loop: accumulation, schedule, metrics, interruption, resume, and what stops it."""

import json
import math
import statistics
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import examples, interrupt_in, tiny, tiny_config

from minismoe import reference
from minismoe.data.tasks import Example, collate
from minismoe.io.files import read_json
from minismoe.method.experts import add_experts, expert_layers, linear_layers
from minismoe.method.loss import IGNORE
from minismoe.model.decoder import CausalLM
from minismoe.training import evaluate as evaluating
from minismoe.training import plan
from minismoe.training.evaluate import token_scores
from minismoe.training.loop import Interrupted, Trainer, train
from minismoe.training.plan import TaskPlan, TrainConfig, plan_tasks, planned_batches
from minismoe.training.schedule import LR, default_lr, freezing_step, learning_rate


def step_of(model: CausalLM, batch: list[Example], cfg: TrainConfig,
            ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sums of a step, and the gradient of each trained parameter by name."""
    trainer = Trainer(model, cfg, pad_id=0)
    sums = trainer.gradients(batch, cfg.micro)
    return sums, {name: p.grad for name, p in trainer.parameters.items()}


def test_a_batch_is_computed_at_once_unless_the_configuration_says_otherwise() -> None:
    assert [Trainer(tiny(), TrainConfig(batch_size=12, micro_batch_size=size), 0).fitting.size
            for size in (None, 4, 16)] == [12, 4, 12]


def test_recompute_changes_memory_only() -> None:
    found = []
    for recompute in (False, True):
        model, calls = tiny(dtype=torch.float64), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        cfg = TrainConfig(micro_batch_size=4, recompute=recompute)
        found.append(step_of(model, examples(4), cfg)[1])
        assert len(calls) == 1 + recompute
        # A graph there would keep all that was recomputed.
        left = [m.router_logits for m in expert_layers(model).values()]
        assert all(logits is None or logits.grad_fn is None for logits in left)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3 * 14
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_waits_for_the_device_between_the_batch_and_the_gradient(recompute: bool) -> None:
    """The meta device has shapes alone: whoever reads a value from it raises."""
    model = tiny().to("meta")
    cfg = TrainConfig(batch_size=6, micro_batch_size=4, recompute=recompute)
    sums, gradients = step_of(model, examples(6), cfg)
    assert sums.is_meta and all(gradient.is_meta for gradient in gradients.values())


@pytest.mark.parametrize(("steps", "warm"), [
    (1, 1), (2, 1), (7, 3), (26, 10), (200, 10), (600, 30)])
def test_the_default_warm_up_has_ten_steps_and_a_share(steps, warm) -> None:
    """Half of a short run."""
    rates = [learning_rate(i, steps, 1.0) for i in range(steps)]
    assert rates[:warm] == pytest.approx([(i + 1) / warm for i in range(warm)])
    assert all(a >= b > 0 for a, b in zip(rates[warm - 1:], rates[warm:]))


@pytest.mark.parametrize(("weight", "smoothing", "norm_limit"), [
    (0.0, 0.1, 0.21), (0.2, 0.0, 0.26)])
def test_training_equals_a_plain_loop(tmp_path, monkeypatch, weight: float, smoothing: float,
                                      norm_limit: float) -> None:
    """Whole logits, `reference.balance_loss`, clipping, AdamW and the rate, step by step. A task
    counts by its lines, a user's token at most `weight` times as much as one of an answer."""
    monkeypatch.setattr(plan, "MOST_SMOOTHING", smoothing)
    cfg = TrainConfig(epochs=2, batch_size=6, micro_batch_size=4, lr=0.02, seed=3, keep="last",
                      max_grad_norm=norm_limit, router_aux_loss_coef=0.3, prompt_loss=weight,
                      routing="dynamic")
    ours, plain = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    unseen = examples()[5:12]
    summary = train(ours, examples(), cfg, tmp_path, 0, valid=unseen)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
    batches, clipped = planned_batches(examples(), plan_tasks(examples(), [], cfg), cfg), set()
    for step, (batch, line) in enumerate(zip(batches, lines, strict=True)):
        losses, total, tokens = {"a": [], "b": []}, torch.zeros(()), sum(len(e.ids) for e in batch)
        for part in batch[:4], batch[4:]:
            ids, mask, labels = collate(part, 0)
            logits = plain.lm_head(plain.model(ids, mask))[:, :-1]
            for i, (e, row) in enumerate(zip(part, labels[:, 1:] != IGNORE)):
                losses[e.task].append(F.cross_entropy(
                    logits[i][row], labels[i, 1:][row], reduction="none"))
                same = [other for other in batch if other.task == e.task]
                share = len(same) / len(batch) / sum(other.supervised for other in same)
                asked = F.cross_entropy(logits[i][0], ids[i, 1])     # position 1 is a user's
                total = total + share * (weight * asked + F.cross_entropy(
                    logits[i][row], labels[i, 1:][row], reduction="sum",
                    label_smoothing=min(smoothing, 1.0 / int(row.sum()))))
            every = [reference.balance_loss(m.router_logits, m.top_k)
                     for m in expert_layers(plain).values()]
            balance = torch.stack(every).mean() * mask.sum() / tokens
            total = total + 0.3 * balance
        total.backward()
        norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
        clipped.add(bool(norm > norm_limit))
        for p in trained:
            p.grad *= min(1.0, norm_limit / (norm + 1e-6))
        rate = 0.005 * (step + 1) if step < 4 else 0.01 * (1 + math.cos(math.pi * (step - 4) / 4))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        by_task = {task: torch.cat(found).mean().item() for task, found in losses.items() if found}
        assert line["loss_by_task"] == pytest.approx(by_task, abs=2e-5)
        assert (line["grad_norm"], line["lr"]) == pytest.approx((norm.item(), rate), abs=2e-5)
        assert line["tokens"] == tokens
        for task, loss in line["valid_loss_by_task"].items():
            ids, mask, labels = collate([e for e in unseen if e.task == task], 0)
            logits = plain.lm_head(plain.model(ids, mask))[:, :-1].flatten(0, 1)
            assert loss == pytest.approx(F.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=IGNORE).item(), abs=2e-5)
    assert len(lines) == 8 and clipped == {True, False}
    assert summary["tokens"] == sum(line["tokens"] for line in lines)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_the_defaults_of_training_are_these() -> None:
    """In numbers: a test that reads a constant where the code does passes any."""
    cfg = TrainConfig()
    assert (cfg.batch_size, cfg.max_grad_norm, cfg.router_aux_loss_coef, cfg.prompt_loss) == (
        8, 1.0, 0.01, 0.2)
    assert (plan.PASSES, plan.LEAST_PASSES, plan.OPEN_PASSES, plan.ENOUGH) == (120, 3, 2, 50)
    assert (plan.MOST_SMOOTHING, plan.SMOOTHED, plan.PROMPT_SHARE) == (0.1, 1.0, 3.0)


def test_another_thread_can_train(tmp_path) -> None:
    """As in a notebook's worker; only a program's main thread may handle signals."""
    thread = threading.Thread(target=train, args=(
        tiny(), examples(), TrainConfig(epochs=1), tmp_path, 0))
    thread.start()
    thread.join()
    assert (tmp_path / "checkpoint.safetensors").is_file()


def measured(run: Path) -> dict[int, float]:
    """The loss of validation lines by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}


def overfitting(run: Path, resume: bool = False, continued: bool = False, **settings: Any,
                ) -> tuple[CausalLM, float]:
    """A model that is trained on lines that contradict 50 validation lines, and its loss there.
    Their answers are long and never the same, so that the loss decides."""
    model, valid = tiny(), [replace(e, task="a", ids=e.ids * 2, labels=e.labels + e.ids)
                            for e in examples(50)]
    draw = torch.Generator().manual_seed(2)
    lines = []
    for e in examples(8):
        answer = torch.randint(0, 50, (60,), generator=draw).tolist()
        lines.append(Example("a", [49 - i for i in e.ids] + answer,
                             [IGNORE] * len(e.ids) + answer, new_words=0.6))
    cfg = TrainConfig(**{"epochs": 8, "batch_size": 4, "lr": 0.03} | settings)
    train(model, lines, cfg, run, 0, resume, valid, continued)
    return model, token_scores(model, valid, 0)[0]


def test_the_best_step_is_kept(tmp_path) -> None:
    _, last = overfitting(tmp_path / "last", keep="last")
    _, best = overfitting(tmp_path / "best")
    assert [*measured(tmp_path / "best")] == [2, 4, 6, 8, 10, 12, 14, 16]     # a tenth, rounded up
    assert measured(tmp_path / "best") == measured(tmp_path / "last")
    losses = [*measured(tmp_path / "best").values()]
    assert (best, last) == pytest.approx((min(losses), losses[-1]), abs=1e-5)
    assert best < last - 0.01


def test_experts_that_were_better_before_are_kept(tmp_path, monkeypatch) -> None:
    """They are measured before the first step, once."""
    monkeypatch.setattr(plan, "MOST_SMOOTHING", 0.0)      # it keeps such a rate from doing harm
    before, validate, calls = tiny(), Trainer.validate, []
    monkeypatch.setattr(Trainer, "validate", lambda *a: calls.append(1) or validate(*a))
    for resume in False, True:
        after, loss = overfitting(tmp_path, resume, True, lr=0.5, epochs=2, routing="dynamic")
        assert [*measured(tmp_path)] == [0, 1, 2, 3, 4] and len(calls) == 5
        assert loss == pytest.approx(measured(tmp_path)[0], abs=1e-5)
        for (name, a), b in zip(before.named_parameters(), after.parameters()):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("count, chooses", [(50, True), (49, False)])
def test_right_answers_choose_the_step_if_there_are_enough(count: int, chooses: bool) -> None:
    """The later one of equals, by the mean over tasks. The validation lines are what the model
    answers at first; of another task, whose loss counts, there are enough."""
    model, valid = tiny(), [replace(e, task="u") for e in examples(50)]
    for i in range(count):
        with torch.no_grad():
            answer = int(model(torch.tensor([[i, 7]]))[0, -1].argmax())
        valid.append(Example("t", [i, 7, answer], [IGNORE, IGNORE, answer]))
    plans = {"t": TaskPlan(9, 1, 1, 0, 0, 0.0, "answers", count),
             "u": TaskPlan(9, 1, 1, 0, 0, 0.6, "loss", 50)}
    trainer = Trainer(model, TrainConfig(routing="dynamic"), 0, valid, plans)
    state: Any = {"best": -math.inf, "best_step": 0}
    first = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    right, merits = [], []
    for step, shift in enumerate((0.5, 0.0, 0.5, 0.0, 1.0), 1):
        for name, p in trainer.parameters.items():
            p.data.copy_(first[name] + shift * torch.randn(p.shape).to(p))
        found = trainer.validate(step, state)
        right.append(found["valid_right_by_task"]["t"])
        merits.append((right[-1] / count + math.exp(-found["valid_loss_by_task"]["u"])) / 2)
    assert right[1] == right[3] == count and max(right[0], right[2], right[4]) < count
    assert state == {"best": pytest.approx(max(merits), abs=1e-4), "best_step": 4}
    assert bool(trainer.best) == chooses
    assert all(torch.equal(trainer.best[name], first[name]) for name in trainer.best)
    assert trainer.choice(state | {"step": 5}, 5) == (
        "kept step 4 of 5, by the answers and loss of 50 or more validation lines a task"
        if chooses else "kept the last step, 5")


def test_a_resumed_run_keeps_the_same_best_step_to_the_bit(tmp_path, monkeypatch) -> None:
    straight, _ = overfitting(tmp_path / "straight")
    # After the best step.
    calls = interrupt_in(monkeypatch, "validate", len(measured(tmp_path / "straight")) - 1)
    with pytest.raises(Interrupted, match="saved after step 14 of 16"):
        overfitting(tmp_path / "cut")
    for _ in range(2):                                   # a run that has ended stays as it is
        resumed, _ = overfitting(tmp_path / "cut", resume=True)
        for (name, a), b in zip(straight.named_parameters(), resumed.parameters()):
            assert torch.equal(a, b), name
    assert len(calls) == 8                               # it did not begin anew
    assert measured(tmp_path / "cut") == measured(tmp_path / "straight")


# --- the freeze ---------------------------------------------------------------------------------

def frozen_run(run: Path, model: CausalLM, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """12 steps, of which the routing of 10 is not frozen."""
    cfg = TrainConfig(epochs=4, batch_size=4, lr=0.02, checkpoint_every=1, **settings)
    return train(model, examples(12), cfg, run, 0, resume)


def test_mixtures_become_plain_loras_on_the_way(tmp_path, capsys) -> None:
    model = tiny()
    assert frozen_run(tmp_path, model)["frozen"] == 10
    assert not any(m.router is not None for m in expert_layers(model).values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "frozen" in line] == [11]
    assert lines[10]["frozen"] == 14 and 0 < lines[10]["missed"] < 1
    missed = f"{lines[10]['missed']:.1%}"
    assert f"froze 14 mixtures after step 10 of 12: the median LoRA misses {missed}" in (
        capsys.readouterr().out)
    assert [line["balance"] for line in lines][10:] == [0, 0] and lines[9]["balance"] > 0
    # The optimizer begins anew: the rate rises again, over as many steps as at first.
    rates = [line["lr"] for line in lines]
    assert rates[10:] == pytest.approx([learning_rate(10, 12, 0.02) / 6,
                                        learning_rate(11, 12, 0.02) * 2 / 6])


def test_routers_stay_if_the_routing_is_dynamic(tmp_path) -> None:
    model = tiny()
    assert frozen_run(tmp_path, model, routing="dynamic")["frozen"] is None
    assert all(m.router is not None for m in expert_layers(model).values())


def test_single_experts_are_plain_loras_from_the_start(tmp_path, capsys) -> None:
    results = [frozen_run(tmp_path / routing, tiny(1), routing=routing)
               for routing in ("frozen", "dynamic")]
    assert [result["frozen"] for result in results] == [None, None]
    assert "froze" not in capsys.readouterr().out
    frozen, dynamic = ((tmp_path / routing / "metrics.jsonl").read_text().splitlines()
                       for routing in ("frozen", "dynamic"))
    assert [json.loads(line)["loss"] for line in frozen] == [
        json.loads(line)["loss"] for line in dynamic]


@pytest.mark.parametrize("step", [9, 10, 11])
def test_a_run_that_stops_around_the_freeze_ends_in_the_same_bytes(tmp_path, monkeypatch,
                                                                   step: int) -> None:
    whole, parts = tiny(), tmp_path / "parts"
    frozen_run(tmp_path / "whole", whole)
    interrupt_in(monkeypatch, "step", step)
    with pytest.raises(Interrupted, match=f"saved after step {step} of 12"):
        frozen_run(parts, tiny())
    model = tiny()
    assert frozen_run(parts, model, resume=True)["frozen"] == 10
    for (name, a), (same, b) in zip(whole.named_parameters(), model.named_parameters(),
                                    strict=True):
        assert name == same and torch.equal(a, b), name


@pytest.mark.parametrize("routing, kept", [("frozen", 21), ("dynamic", 3)])
def test_a_step_before_the_freeze_is_not_kept(tmp_path, monkeypatch, routing: str, kept: int,
                                              ) -> None:
    """Each time that they are measured, there are fewer right answers."""
    calls = list[int]()
    monkeypatch.setattr("minismoe.training.loop.token_scores", lambda *_: calls.append(1) or (
        evaluating.TokenScores(1.0, 0.0, 50 - len(calls))))
    valid = [replace(e, task=task) for e in examples(50) for task in "ab"]
    cfg = TrainConfig(epochs=8, batch_size=4, lr=0.02, routing=routing)
    choice = train(tiny(), examples(12), cfg, tmp_path, 0, False, valid)["choice"]
    assert choice.startswith(f"kept step {kept} of 24, by the ")


def plan_of(judged: str) -> TaskPlan:
    return TaskPlan(9, 1, 1, 0, 0, 0.0, judged, 50)


@pytest.mark.parametrize("judged, steps, wanted", [
    ("answers", 100, 80), ("loss", 100, 40), ("answers loss", 100, 40), ("answers", 12, 10),
    ("answers", 2, 1), ("answers", 1, 0), ("loss", 3, 1), ("answers", 0, 0)])
def test_runs_with_free_text_freeze_early(judged: str, steps: int, wanted: int) -> None:
    assert freezing_step(steps, {j: plan_of(j) for j in judged.split()}) == wanted


def test_not_finite_gradient_is_not_stepped(tmp_path, monkeypatch) -> None:
    model, step = tiny(), Trainer.gradients
    before = {name: p.clone() for name, p in model.named_parameters()}

    def overflows(trainer: Trainer, batch: list[Example], micro: int):
        result = step(trainer, batch, micro)
        next(iter(trainer.parameters.values())).grad[0] = math.inf
        return result

    monkeypatch.setattr(Trainer, "gradients", overflows)
    with pytest.raises(ArithmeticError, match=r"the norm of its gradient inf at step 1, on "
                       r"the training lines a 1, b 2, a 3, b 4 \(.*lower --lr"):
        train(model, examples(4), TrainConfig(batch_size=4), tmp_path, pad_id=0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_that_overflows_is_halved_for_good_and_counted_once(tmp_path, monkeypatch, error,
                                                                    ) -> None:
    """The second of three micro-batches overflows, and so does the first of half the size."""
    calls, pack = [], evaluating.Tokens

    def tight(ids, *rest, **more):
        calls.append(len(ids))
        if len(calls) in (2, 3):
            raise error
        return pack(ids, *rest, **more)

    batch, model = examples(12), tiny(dtype=torch.float64)
    cfg = TrainConfig(batch_size=12, micro_batch_size=4, router_aux_loss_coef=0.0)
    sums, expected = step_of(tiny(dtype=torch.float64), batch, cfg)
    monkeypatch.setattr(evaluating, "Tokens", tight)
    trainer = Trainer(model, cfg, 0)
    sums_again = trainer.fitting(partial(trainer.gradients, batch))
    assert calls == [4, 4, 2] + 12 * [1]
    torch.testing.assert_close(sums_again[:-1], sums[:-1])
    for name, p in trainer.parameters.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)
    trainer.step(1, batch, lr=1e-3)
    trainer.evaluating(partial(token_scores, model, batch, 0))
    assert calls[15:] == 12 * [1] + [10, 2]              # of similar length


@pytest.mark.parametrize("grads, halves", [
    ((False,), ["evaluation takes 16", "evaluation takes 8", "evaluation takes 4"]),
    ((True, False), ["training takes 4", "evaluation takes 16", "evaluation takes 8",
                     "evaluation takes 4"])])
def test_a_run_that_overflows_goes_on_in_halves(tmp_path, monkeypatch, capsys, grads, halves,
                                                ) -> None:
    """At each step, and at the loss of unseen lines: it says so once, and what a validation cannot
    hold changes no step."""
    pack, seen = evaluating.Tokens, set()

    def tight(ids, *rest, **more):
        if len(ids) > 4 and torch.is_grad_enabled() in grads:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.add((torch.is_grad_enabled(), len(ids)))
        return pack(ids, *rest, **more)

    monkeypatch.setattr(evaluating, "Tokens", tight)
    train(tiny(), examples(), TrainConfig(epochs=1), tmp_path, 0, valid=examples())
    said = capsys.readouterr().out
    assert sorted(line for line in said.splitlines() if "out of memory" in line) == sorted(
        f"out of memory, so from now on {half} examples at a time" for half in halves)
    assert max(seen) == (True, 4 if True in grads else 8)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   ZeroDivisionError()])
def test_a_batch_that_cannot_be_halved_raises(monkeypatch, error: Exception) -> None:
    """One example that overflows, and what is no lack of memory."""
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(evaluating, "Tokens", fail)
    with pytest.raises(type(error)):
        Trainer(tiny(), TrainConfig(), 0).step(0, examples(4), lr=1e-3)


def test_a_parameter_that_is_frozen_by_hand_stays(tmp_path) -> None:
    model = tiny()
    router = model.model.layers[0].mlp.up_proj.router.requires_grad_(False)
    before, others = router.clone(), model.model.layers[0].mlp.up_proj.lora_A.detach().clone()
    train(model, examples(), TrainConfig(epochs=1, lr=1e-2), tmp_path, 0)
    assert torch.equal(router, before)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.lora_A, others)


def test_a_model_without_experts_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no experts to train: call add_experts first"):
        train(CausalLM(tiny_config()), examples(), TrainConfig(), tmp_path, 0)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("factor, rank", [(1.0, 4), (0.25, 4), (4.0, 4), (1.0, 2)])
def test_the_default_rate_follows_the_sizes_of_weights_and_of_adapters(
        factor: float, rank: int, tmp_path: Path) -> None:
    """The head's size changes nothing; and training takes the rate that `default_lr` tells."""
    torch.manual_seed(0)
    model = CausalLM(tiny_config())
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
        for layer in linear_layers(model).values():
            layer.weight.mul_(factor)
    sizes = [(sum(x * x for row in layer.weight.tolist() for x in row) / layer.out_features) ** 0.5
             / layer.in_features for layer in linear_layers(model).values()]
    add_experts(model, dict.fromkeys(linear_layers(model), 2), rank=rank)
    wanted = LR * statistics.median(sizes) ** 0.75 / (2 * rank) ** 0.5
    assert default_lr(model) == pytest.approx(wanted, rel=0.05)
    train(model, examples(8), TrainConfig(epochs=1), tmp_path, pad_id=0)
    assert read_json(tmp_path / "metrics.jsonl")["lr"] == default_lr(model)
