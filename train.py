#!/usr/bin/env python3
"""Fine-tune a small language model with LoRA experts, allocated by sensitivity.

    python train.py                                        the built-in toy and its tasks
    python train.py --model FOLDER --data FOLDER --out RUN

Probes each weight matrix if there are several tasks, gives it experts, evaluates, trains, and
evaluates again. RUN then holds config.json, sensitivity.json, allocation.json, before.json and
after.json (each answer 1 or 0, and the wrong ones in words), metrics.jsonl and loss.svg,
results.json, adapter/ and checkpoint.safetensors. If a run stops after the probe, --resume
completes it, and its files equal those of an undisturbed run, except for times.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from minismoe.cli import probing, results, runs, script
from minismoe.cli.flags import RunConfig
from minismoe.cli.inputs import Inputs, load_inputs, print_examples, resolve_auto
from minismoe.io.files import write_json
from minismoe.io.progress import progress_bar
from minismoe.io.text import clean
from minismoe.method.allocate import Allocation
from minismoe.method.experts import add_experts, routed
from minismoe.method.sensitivity import Scores
from minismoe.model.checkpoint import load_adapter, save_adapter
from minismoe.model.decoder import meta_model
from minismoe.training.evaluate import SHOWN, Judgement, evaluating, judge
from minismoe.training.loop import train, with_rate
from minismoe.training.plan import TaskPlan, plan_table, plan_tasks


def main(argv: Sequence[str]) -> None:
    # Configure.
    begun, config = time.perf_counter(), runs.configure(argv, __doc__)
    if runs.is_complete(config) and not config.show:
        print(f"nothing is missing: {config.out} holds its results")
        return
    config = resolve_auto(config)
    if config.data is None:                          # the toy's prompts hold random letters, and
        config = replace(config, prompt_loss=0.0)    # to learn these spoils what its base knows
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")   # TF32, where products are not in bfloat16
    if config.show:
        print_examples(config, config.show)
        return
    runs.folder_of(config)                           # raises before hours of work

    # Load.
    inputs = load_inputs(config)
    if config.limit_test != 0 and (bare := [t.name for t in inputs.tasks if not t.test]):
        raise ValueError(f"task {', '.join(bare)} has no test line: add a test.jsonl, or write at "
                         "least two different lines into its only file; --limit-test 0 skips the "
                         "test")

    # Probe and allocate, unless the flags, or the run that goes on, name the allocation.
    now = time.perf_counter()
    allocation, scores = give_experts(config, inputs)
    seconds = {"probe": round(time.perf_counter() - now, 2)} if scores else {}
    probing.print_experts(inputs.model, allocation)
    given, config = config, with_rate(config, inputs.model)
    if given.lr is None:
        print(f"learning rate: {config.lr}, by the size of the base's weights")
    examples, valid = ([*chain(*split.values())] for split in (inputs.encoded, inputs.valid))
    plans = plan_tasks(examples, valid, config)
    print(plan_table(plans))

    # From here on the folder is a run, which --resume continues.
    with runs.run_folder(config) as run:
        runs.write_config(run, config, inputs, allocation, plans)
        if scores is not None:
            write_json(run / "sensitivity.json", scores.to_json(inputs.model.name))
        write_json(run / "allocation.json", allocation.to_json())
        train_and_evaluate(run, config, inputs, allocation, plans, seconds)
    print(f"{time.perf_counter() - begun:.0f} s in all; everything is in {clean(run)}\n"
          + runs.next_commands(run, config))


def give_experts(config: RunConfig, inputs: Inputs) -> tuple[Allocation, Scores | None]:
    """Put experts on the model: those of --init, those that the flags name, or as a probe says,
    whose scores are returned, too."""
    if config.init:
        return load_adapter(inputs.model, Path(config.init) / "adapter"), None
    size = min(probing.PROBE_BATCH, config.micro)
    allocation, scores = probing.allocation_of(config, inputs, size)
    if not scores and len(inputs.encoded) == 1 and allocation.strategy == "lora":
        print(f"one task: a plain LoRA of rank {allocation.rank}, without a probe; several tasks "
              "share experts by votes")
    torch.manual_seed(config.seed)           # the same experts whatever was drawn before
    add_experts(inputs.model, allocation)
    return allocation, scores


def train_and_evaluate(run: Path, config: RunConfig, inputs: Inputs, allocation: Allocation,
                       plans: Mapping[str, TaskPlan], seconds: dict[str, float]) -> None:
    """Evaluate, train, evaluate again, save; what `run` holds already is not done again."""
    trainable = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in meta_model(inputs.model.config).parameters())
    print(f"{allocation}, {trainable:,} trainable parameters, {trainable / base:.1%} of the "
          "base's")
    if not routed(inputs.model):
        print("no matrix has a router: there is nothing to freeze")
    elif max(allocation.experts.values()) <= allocation.top_k:
        print(f"no matrix has more than {allocation.top_k} experts: all are active for each token")

    # Evaluate the base. B starts at 0, so that the experts change no answer yet.
    before = None
    if not (run / "before.json").exists():
        before = score(inputs, "before", config, plans)
        write_json(run / "before.json", before)
    known = results.read_before(run / "before.json", inputs.encoded)

    # Train.
    examples, valid = ([*chain(*split.values())] for split in (inputs.encoded, inputs.valid))
    summary = train(inputs.model, examples, config, run, inputs.tokenizer.pad_id,
                    config.resume, valid, bool(config.init))
    seconds["train"] = round(summary["seconds"], 2)
    if summary["step"]:
        print(f"{summary['step']} steps, {summary['tokens'] / summary['seconds']:.0f} tokens/s; "
              f"{summary['choice']}")
    save_adapter(inputs.model, run / "adapter", allocation, [task.name for task in inputs.tasks])

    # Evaluate again, and save what came out.
    after = before if before and not summary["step"] else score(inputs, "after", config, plans)
    results.save_results(run, known, after, {
        "trainable_parameters": trainable, "experts": sum(allocation.experts.values()),
        "kept": summary["choice"], "seconds": seconds}, summary["frozen"])


@torch.no_grad()
def score(inputs: Inputs, when: str, config: RunConfig, plans: Mapping[str, TaskPlan],
          ) -> dict[str, Judgement]:
    """What the model does with the test lines of each task, with a bar."""
    judgements, fitting = {}, evaluating(config.micro)
    with progress_bar(
            total=sum(len(asked.lines) for asked in inputs.asked.values()), unit="line",
            desc=f"evaluate {when}") as bar:
        for i, (name, asked) in enumerate(inputs.asked.items()):
            exact = config.limit_test != 0 and (config.exact_match == "on" or (
                config.exact_match == "auto" and plans[name].judged == "answers"))
            shown = len(range(i, SHOWN, len(inputs.asked)))          # of SHOWN among all tasks
            judgements[name] = judge(inputs.model, inputs.tokenizer, asked, inputs.test[name],
                                     exact, shown, fitting, bar.update)
    return judgements


if __name__ == "__main__":
    script.run_script(main)
