#!/usr/bin/env python3
"""Fine-tune a small language model with LoRA experts, allocated by sensitivity.

    python train.py                                        the tiny embedded model and its tasks
    python train.py --model FOLDER --data FOLDER --out RUN

Probes each weight matrix, gives it experts, evaluates, trains, and evaluates again. RUN then holds
config.json, sensitivity.json, allocation.json, metrics.jsonl, results.json, answers.json (1 or 0
for each test line), adapter/, checkpoints/.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minismoe import cli
from minismoe.allocate import Allocation
from minismoe.checkpoint import read_json, save_adapter, versions, write_json
from minismoe.evaluate import Accuracy, evaluate
from minismoe.experts import add_experts
from minismoe.report import clean, table, terminal_heatmap
from minismoe.training import Interrupted, TrainConfig, train

RESUMABLE = ("resume", "debug", "verbose", "device", "show")   # flags that a resumed run may change


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; with --resume those of the run, which may not be changed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="RUN", help="folder of the run (default: a new one "
                        "in runs)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, from its newest checkpoint")
    parser.add_argument("--allocation", metavar="FILE", help="an allocation.json, or a bare "
                        '{"module": experts} mapping; default: probe and allocate')
    parser.add_argument("--verbose", action="store_true", help="show some wrong answers a task")
    cli.add_input_flags(parser)
    cli.add_allocation_flags(parser)
    group = parser.add_argument_group("training")
    d = {f.name: f.default for f in fields(TrainConfig)}
    group.add_argument("--epochs", type=cli.positive, default=d["epochs"],
                       help="passes over the training lines (default: %(default)s)")
    group.add_argument("--batch-size", type=cli.positive, default=d["batch_size"],
                       help="examples an optimizer step (default: %(default)s)")
    group.add_argument("--micro-batch-size", type=cli.positive, metavar="N", help="examples "
                       "computed at once, less memory by accumulation (default: --batch-size)")
    group.add_argument("--recompute", action="store_true", help="activation checkpointing: about "
                       "a third slower, far less memory for long examples")
    group.add_argument("--lr", type=float, default=d["lr"],
                       help="peak learning rate (default: %(default)s)")
    group.add_argument("--warmup", type=float, default=d["warmup"],
                       help="share of the steps, then a cosine to 0 (default: %(default)s)")
    group.add_argument("--weight-decay", type=float, default=d["weight_decay"],
                       help="of AdamW (default: %(default)s)")
    group.add_argument("--max-grad-norm", type=float, default=d["max_grad_norm"],
                       help="gradients are clipped to this norm (default: %(default)s)")
    group.add_argument("--router-aux-loss-coef", type=float, default=d["router_aux_loss_coef"],
                       help="weight of the balance loss (default: %(default)s)")
    group.add_argument("--checkpoint-every", type=cli.positive, default=d["checkpoint_every"],
                       metavar="STEPS", help="optimizer steps (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.resume:
        if not args.out:
            parser.error("--resume needs --out RUN")
        saved = read_json(Path(args.out) / "config.json")["arguments"]
        args = parser.parse_args(argv, argparse.Namespace(**{**saved, "out": args.out}))
        changed = [f"--{k.replace('_', '-')} {v} (was {saved[k]})" for k, v in vars(args).items()
                   if k not in (*RESUMABLE, "out") and saved.get(k) != v]
        if changed:
            raise ValueError("a resumed run keeps its flags: " + ", ".join(changed))
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    begun, seconds = time.perf_counter(), {}
    inputs = cli.load_inputs(args)
    run = Path(args.out) if args.resume else cli.new_run(
        args.out, Path(args.model or "default").name)

    # Probe and allocate, unless the allocation is given. B starts at 0, so experts change nothing
    # before training, and names that the model lacks are found before any long work.
    if args.allocation or args.resume:
        allocation = cli.read_allocation(args, args.allocation or run / "allocation.json")
    else:
        start = time.perf_counter()
        scores = cli.measure(args, inputs)
        allocation = cli.choose(args, scores)
        seconds["probe"] = round(time.perf_counter() - start, 2)
        write_json(run / "sensitivity.json", scores.to_json(inputs.model.name))
    add_experts(inputs.model, allocation)
    trainable = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
    describe(inputs, allocation, trainable)

    # Evaluate, train, evaluate.
    if args.resume:
        before = read_json(run / "before.json")
    else:
        before = {name: vars(a) for name, a in score(inputs, "before").items()}
        start_run(run, args, inputs, allocation, before)
    inputs.model.model.recompute = args.recompute
    cfg = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)
                         if hasattr(args, f.name)})
    try:
        summary = train(inputs.model, inputs.examples, cfg, run, inputs.tokenizer.pad_id,
                        args.resume)
    except Interrupted as e:
        raise KeyboardInterrupt(f"{e}; go on with: python train.py --resume --out {run}") from None
    seconds["train"] = round(summary["seconds"], 2)
    save_adapter(inputs.model, run / "adapter", allocation, [t.name for t in inputs.tasks])
    after = score(inputs, "after")

    results = summarise(before, after, trainable, sum(allocation.experts.values()), seconds)
    write_json(run / "answers.json", {name: a.right for name, a in after.items()})
    write_json(run / "results.json", results)
    report(results, after, args.verbose)
    print(f"{summary['step']} steps, {summary['tokens'] / summary['seconds']:.0f} tokens/s, "
          f"{time.perf_counter() - begun:.0f} s in all; everything is in {clean(run)}")
    print(next_commands(args, run))


def describe(inputs: cli.Inputs, allocation: Allocation, trainable: int) -> None:
    """Draw where the experts are, and count them."""
    print(terminal_heatmap("experts a matrix", cli.expert_counts(inputs.model, allocation),
                           digits=True))
    print(f"{clean(allocation.strategy)}: {sum(allocation.experts.values())} experts of rank "
          f"{allocation.rank} on {len(allocation.experts)} matrices, "
          f"{trainable:,} trainable parameters")


def start_run(run: Path, args: argparse.Namespace, inputs: cli.Inputs, allocation: Allocation,
              before: dict[str, dict]) -> None:
    """Write what a resumed run starts from; config.json last, as it makes the folder a run."""
    write_json(run / "allocation.json", allocation.to_json())
    write_json(run / "before.json", before)
    write_json(run / "config.json", {
        "format": "minismoe.run/1", "arguments": vars(args), "versions": versions(),
        "fingerprint": inputs.model.fingerprint, "machine": platform.platform(),
        "threads": torch.get_num_threads()})


def score(inputs: cli.Inputs, when: str) -> dict[str, Accuracy]:
    """Exact match on every task's test split, with a bar."""
    with tqdm(total=sum(len(t.test) for t in inputs.tasks), desc=f"evaluate {when}",
              unit="answer") as bar:
        return {t.name: evaluate(inputs.model, inputs.tokenizer, t, progress=bar.update)
                for t in inputs.tasks}


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
                print(f"{clean(name)}: {clean(prompt[-200:])!r}\n"
                      f"  expected {clean(expected)!r}, got {clean(given)!r}")


def next_commands(args: argparse.Namespace, run: Path) -> str:
    """What a person would want to type now."""
    if args.model is None:
        return ("Next:\n"
                f"  python export.py {run} --precision int4       freeze, quantise, and chat\n"
                "  python probe.py --out runs/probe                      see the sensitivities\n"
                "  python train.py --strategy uniform --budget-params N  compare at equal size\n"
                "  python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data FOLDER   "
                "a real model on your data\n"
                "  python train.py --help                                the form of the data, "
                "and every flag")
    return (f"Next: python export.py {run} --precision int4, or compare with --strategy uniform or "
            "lora at the same --budget-params")


if __name__ == "__main__":
    cli.run(main)
