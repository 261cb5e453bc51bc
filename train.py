#!/usr/bin/env python3
"""Fine-tune a small language model with LoRA experts, allocated by sensitivity.

    python train.py                                        the tiny embedded model and its tasks
    python train.py --model FOLDER --data FOLDER --out RUN

Probes each weight matrix, gives it experts, evaluates, trains, and evaluates again. RUN then holds
config.json, sensitivity.json, allocation.json, before.json, metrics.jsonl, results.json,
answers.json (1 or 0 for each test line), routers.json and .svg, adapter/, checkpoints/. However a
run ended, --resume does what is missing, and leaves the files of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minismoe.cli import flags, probing, runs
from minismoe.cli import inputs as cli
from minismoe.cli import plan as limits
from minismoe.data.tasks import probe_batches
from minismoe.io import flags as kinds
from minismoe.io.drawing import routers_svg, terminal_heatmap
from minismoe.io.files import read_json, replacing, write_json
from minismoe.io.text import clean, table
from minismoe.method.allocate import Allocation, Unfit
from minismoe.method.experts import add_experts
from minismoe.model.checkpoint import save_adapter
from minismoe.training import distributed
from minismoe.training.distributed import once
from minismoe.training.evaluate import Accuracy, answer_prompts, evaluate
from minismoe.training.loop import TrainConfig, train
from minismoe.training.resume import discard
from minismoe.training.routers import collapsed, router_use

ROUTED = 32                              # examples a task that the routers are watched on


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; with --resume those of the run, which may not be changed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=kinds.text, metavar="RUN",
                        help="folder of the run (default: a new one in runs)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, from its newest checkpoint")
    parser.add_argument("--allocation", type=kinds.text, metavar="FILE",
                        help='an allocation.json, or a bare {"module": experts} mapping; default: '
                        "probe and allocate")
    parser.add_argument("--verbose", action="store_true", help="show some wrong answers a task")
    flags.add_input_flags(parser)
    flags.add_allocation_flags(parser)
    group = parser.add_argument_group("training")
    d = {f.name: f.default for f in fields(TrainConfig)}
    group.add_argument("--epochs", type=kinds.positive, default=d["epochs"],
                       help="passes over the training lines (default: %(default)s)")
    group.add_argument("--batch-size", type=kinds.positive_or_auto, default=d["batch_size"],
                       metavar="N|auto", help="examples an optimizer step (default: %(default)s); "
                       "auto: the default, with --micro-batch-size auto")
    group.add_argument("--micro-batch-size", type=kinds.positive_or_auto, metavar="N|auto",
                       help="examples computed at once, less memory by accumulation (default: "
                       "--batch-size); several processes share them. auto: the most that "
                       "fit --memory, or the device")
    group.add_argument("--memory", type=kinds.size, metavar="SIZE", help="what auto and --plan may "
                       "count on, as 4G or 512M (default: what the device has free)")
    group.add_argument("--plan", action="store_true", help="print parameters, memory by part, "
                       "time and disk of the run, and stop; --data and weights may be missing")
    group.add_argument("--recompute", action="store_true", help="activation checkpointing: about "
                       "a third slower, far less memory for long examples")
    group.add_argument("--lr", type=kinds.number, default=d["lr"],
                       help="peak learning rate (default: %(default)s)")
    group.add_argument("--warmup", type=kinds.part, default=d["warmup"],
                       help="share of the steps, then a cosine to 0 (default: %(default)s)")
    group.add_argument("--weight-decay", type=kinds.number, default=d["weight_decay"],
                       help="of AdamW (default: %(default)s)")
    group.add_argument("--max-grad-norm", type=kinds.above_zero, default=d["max_grad_norm"],
                       help="gradients are clipped to this norm, inf: never (default: "
                       "%(default)s)")
    group.add_argument("--router-aux-loss-coef", type=kinds.number,
                       default=d["router_aux_loss_coef"],
                       help="weight of the balance loss (default: %(default)s)")
    group.add_argument("--checkpoint-every", type=kinds.interval, default=d["checkpoint_every"],
                       metavar="N|Nm", help="optimizer steps, or minutes: 10m (default: "
                       "%(default)s)")
    args = parser.parse_args(argv)
    if args.resume:
        if not args.out:
            parser.error("--resume needs --out RUN")
        args = runs.resumed(parser, argv, Path(args.out))
    if args.batch_size == "auto":
        if args.micro_batch_size not in (None, "auto"):
            parser.error("--batch-size auto chooses the micro-batch: leave out --micro-batch-size")
        args.batch_size, args.micro_batch_size = d["batch_size"], "auto"
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    if args.allocation and (idle := [f"--{name.replace('_', '-')}" for name in flags.CHOOSING
                                     if getattr(args, name) != parser.get_default(name)]):
        parser.error(f"--allocation says what these would choose: leave out {', '.join(idle)}")
    return args


def main(argv: Sequence[str]) -> None:
    args, begun = parse(argv), time.perf_counter()
    if args.resume and (Path(args.out) / "results.json").exists():
        print(f"nothing is missing: {args.out} holds its results")
        return
    cli.start(args)
    if args.plan:
        limits.show_plan(args)
        return
    limits.settle_micro_batch(args)
    inputs = cli.load_inputs(args)
    for task in inputs.tasks:                # bad test lines are found before there is a run
        answer_prompts(inputs.tokenizer, task, inputs.model.config.max_position_embeddings)
    run = Path(args.out) if args.resume else runs.new_run(
        args.out, Path(args.model or "default").name)
    run = Path(distributed.gather(str(run))[0])
    # B starts at 0, so experts change nothing before training, and names that the model lacks are
    # found before there is a run.
    allocation = None
    if args.resume and (run / "allocation.json").exists():
        allocation = probing.read_allocation(args, run / "allocation.json")
    elif args.allocation:
        allocation = probing.read_allocation(args, args.allocation)
    elif not probing.needed(args):
        allocation = probing.foreseen(args, inputs)
    if allocation:
        adapt(args, inputs, allocation)
    else:                                    # flags that contradict each other are found as well
        probing.rehearse(args, inputs)
    if not args.resume and not distributed.rank():       # of a run whose config.json was removed
        for name in ("before.json", "results.json"):
            (run / name).unlink(missing_ok=True)
    with cli.working_in(run, f"python train.py --resume --out {shlex.quote(str(run))}"):
        runs.note(run, args, inputs, allocation)
        work(run, args, inputs, allocation)
    if not distributed.rank():
        print(f"{time.perf_counter() - begun:.0f} s in all; everything is in {clean(run)}\n"
              + next_commands(args, run))


def work(run: Path, args: argparse.Namespace, inputs: cli.Inputs, allocation: Allocation | None,
         ) -> None:
    """Probe and allocate, evaluate, train, evaluate; what `run` holds already is not done again."""
    seconds = {}
    if allocation is None:
        start = time.perf_counter()
        try:
            scores = probing.measure(args, inputs, run)
            allocation = probing.choose(args, scores)
        except Unfit:                    # with other flags, what was measured holds
            once((run / "config.json").unlink)
            raise
        seconds["probe"] = round(time.perf_counter() - start, 2)
        once(write_json, run / "sensitivity.json", scores.to_json(inputs.model.name))
        adapt(args, inputs, allocation)
    once(write_json, run / "allocation.json", allocation.to_json())
    runs.note(run, args, inputs, allocation)
    once(discard, run, "probe")
    trainable = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
    describe(inputs, allocation, trainable)

    if not known_before(run, inputs):
        once(write_json, run / "before.json",
             {n: vars(a) for n, a in score(inputs, "before", args.micro_batch_size).items()})
    inputs.model.model.recompute = args.recompute
    cfg = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)
                         if hasattr(args, f.name)})
    summary = train(inputs.model, inputs.examples, cfg, run, inputs.tokenizer.pad_id, args.resume)
    seconds["train"] = round(summary["seconds"], 2)
    once(save_adapter, inputs.model, run / "adapter", allocation, [t.name for t in inputs.tasks])

    show_routers(inputs, args, run)
    after = score(inputs, "after", args.micro_batch_size)
    if distributed.rank():
        return
    results = summarise(read_json(run / "before.json"), after, trainable,
                        sum(allocation.experts.values()), seconds)
    write_json(run / "answers.json", {name: a.right for name, a in after.items()})
    write_json(run / "results.json", results)
    report(results, after, args.verbose)
    print(f"{summary['step']} steps, {summary['tokens'] / summary['seconds']:.0f} tokens/s")


def known_before(run: Path, inputs: cli.Inputs) -> bool:
    """Whether before.json holds the base's answers to the test lines of these tasks."""
    file = run / "before.json"
    found = read_json(file) if file.exists() else {}
    return isinstance(found, dict) and {
        name: a.get("examples") for name, a in found.items()
        if isinstance(a, dict) and isinstance(a.get("correct"), int)} == {
        task.name: len(task.test) for task in inputs.tasks}


def adapt(args: argparse.Namespace, inputs: cli.Inputs, allocation: Allocation) -> None:
    """Add experts to the model, which begin the same whatever was drawn at random before."""
    if args.shard:                       # the base again, as what is divided can't get experts
        inputs.model = cli.load_base(args, cli.base_folder(args))
    torch.manual_seed(args.seed)
    add_experts(inputs.model, allocation)
    if args.shard:
        distributed.shard(inputs.model, torch.device(args.device))


def describe(inputs: cli.Inputs, allocation: Allocation, trainable: int) -> None:
    """Draw where the experts are, and count them."""
    print(probing.allocation_heatmap(inputs.model, allocation))
    print(f"{allocation}, {trainable:,} trainable parameters")


def score(inputs: cli.Inputs, when: str, micro: int) -> dict[str, Accuracy]:
    """Exact match on every task's test split, with a bar; `micro` says how much fits at once."""
    batch = min(32, 2 * distributed.share(micro))
    with tqdm(total=sum(len(t.test) for t in inputs.tasks), desc=f"evaluate {when}",
              unit="answer", disable=distributed.rank() > 0) as bar:
        return {t.name: evaluate(inputs.model, inputs.tokenizer, t, batch, bar.update)
                for t in inputs.tasks}


def show_routers(inputs: cli.Inputs, args: argparse.Namespace, run: Path) -> None:
    """Draw what the routers do on some training examples of each task, and write it down."""
    use = router_use(inputs.model, {
        name: probe_batches(e.examples, ROUTED, probing.PROBE_BATCH, inputs.tokenizer.pad_id,
                            args.device) for name, e in inputs.encoded.items()})
    if not use or distributed.rank():
        return
    write_json(run / "routers.json", use)
    with replacing(run / "routers.svg") as tmp:
        tmp.write_text(routers_svg(use), encoding="utf-8")
    print(terminal_heatmap("how far the routers tell the tasks apart, of 1",
                           {name: found["separation"] for name, found in use.items()}))
    if lost := collapsed(use):
        print(f"{len(lost)} experts get under 1 % of the gates: {', '.join(lost[:5])}"
              f"{', ...' if len(lost) > 5 else ''}; a larger --router-aux-loss-coef spreads them")


def summarise(before: dict[str, dict[str, Any]], after: dict[str, Accuracy], trainable: int,
              experts: int, seconds: dict[str, float]) -> dict:
    """The content of results.json."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, a in after.items():
        b = Accuracy(before[name]["correct"], before[name]["examples"])
        tasks[name] = {"before": round(b.share, 4), "after": round(a.share, 4),
                       "interval": [round(x, 4) for x in a.interval], "examples": a.examples}
    mean = {when: round(sum(t[when] for t in tasks.values()) / len(tasks), 4)
            for when in ("before", "after")}
    return {"format": "minismoe.results/1", "metric": "exact_match",
            "trainable_parameters": trainable, "experts": experts, "seconds": seconds,
            "tasks": tasks, "mean": mean}


def report(results: dict, after: dict[str, Accuracy], verbose: bool) -> None:
    """Print the table of results, and wrong answers where they are wanted."""
    rows = [[clean(name), f"{t['before']:.3f}", f"{t['after']:.3f}",
             "{:.3f} to {:.3f}".format(*t["interval"]), t["examples"]]
            for name, t in results["tasks"].items()]
    mean = results["mean"]
    rows.append(["mean", f"{mean['before']:.3f}", f"{mean['after']:.3f}", "", ""])
    print(table(["exact match", "before", "after", "95 % interval", "answers"], rows))
    if verbose:
        for name, accuracy in after.items():
            for prompt, expected, given in accuracy.wrong[:3]:
                print(f"{clean(name)}: {prompt[-200:]!r}\n  expected {expected!r}, got {given!r}")


def next_commands(args: argparse.Namespace, run: Path) -> str:
    """What a person would want to type now."""
    name, size = shlex.quote(str(run)), read_json(run / "results.json")["trainable_parameters"]
    if args.model is None:
        return (f"Next: freeze, quantise and chat; see the sensitivities; compare at equal size; "
                "your own data\n"
                f"  python export.py {name} --precision int4-8\n"
                "  python probe.py --out runs/probe\n"
                f"  python train.py --strategy uniform --budget-params {size}\n"
                "  python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data FOLDER\n"
                "  python train.py --help")
    return (f"Next: python export.py {name} --precision int4-8, or compare with --strategy uniform "
            f"or lora\nat the same size: --budget-params {size}")


if __name__ == "__main__":
    cli.run(main)
