"""Training speed and memory: a mixture of 8 experts of rank 8 against PEFT's LoRA of rank 64.

    python tests/benchmarks/train_speed.py --model SMOLLM2_135M --data FOLDER

Both sides see the same batches and adapt all linear layers. Each measurement runs in a process of
its own, the sides in turn. Prints medians over rounds, and ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from minismoe.data.tasks import bucket, collate, encode_all, load_tasks
from minismoe.data.tokenizer import load_tokenizer
from minismoe.method.experts import add_experts, linear_layers
from minismoe.model.checkpoint import load_model
from minismoe.training.loop import TrainConfig, Trainer

RANK, WARM = 8, 2


def batches(args: argparse.Namespace, count: int) -> tuple[list, int]:
    """Batches of training examples, all tasks mixed, bucketed by length as in training; the pad."""
    tokenizer = load_tokenizer(args.model)
    names = args.tasks.split(",") if args.tasks else ()
    examples = [e for task in load_tasks(args.data, names)
                for e in encode_all(task, tokenizer, 512)]
    return bucket(examples, args.batch_size, seed=0)[:count], tokenizer.pad_id


def ours(args: argparse.Namespace, dtype: torch.dtype) -> tuple:
    model = load_model(args.model, dtype)
    add_experts(model, dict.fromkeys(linear_layers(model), args.experts), rank=RANK)
    cfg = TrainConfig(batch_size=args.batch_size, micro_batch_size=args.batch_size)
    trainer = Trainer(model, cfg, pad_id=0)      # pads count nowhere, whatever they are
    return [*trainer.parameters.values()], lambda examples, pad: trainer.gradients(
        examples, cfg.micro)


def peft(args: argparse.Namespace, dtype: torch.dtype) -> tuple:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
        LoraConfig(r=args.experts * RANK, lora_alpha=2 * args.experts * RANK,
                   target_modules="all-linear"))

    def step(examples: list, pad: int) -> None:
        ids, mask, labels = collate(examples, pad)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    return [p for p in model.parameters() if p.requires_grad], step


def child(args: argparse.Namespace) -> None:
    """Measure one side in this process and print the result as JSON."""
    torch.manual_seed(0)
    work, pad = batches(args, WARM + args.steps)
    parameters, step = SIDES[args.side](args, getattr(torch, args.dtype))
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    import resource  # POSIX alone has it

    rates = []
    for examples in work:
        start = time.perf_counter()
        step(examples, pad)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(sum(len(e.ids) for e in examples) / (time.perf_counter() - start))
    print(json.dumps({"rate": statistics.median(rates[WARM:]),
                      "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


SIDES = {"ours": ours, "peft": peft}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", help="comma list; default: all of the folder")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side and dtype")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--experts", type=int, default=8, help="of each matrix")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        child(args)
        return
    print(f"{args.experts} experts of rank {RANK}, or a LoRA of rank {args.experts * RANK}, batch "
          f"{args.batch_size}, {args.steps} steps x {args.rounds} rounds, "
          f"{torch.get_num_threads()} threads")
    print("dtype      side   tokens/s   peak MiB   by round")
    for dtype in args.dtypes.split(","):
        seen: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, results in seen.items():
                run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side,
                                      "--dtype", dtype], check=True, stdout=subprocess.PIPE)
                results.append(json.loads(run.stdout.splitlines()[-1]))
        middle = {side: {k: statistics.median(r[k] for r in results) for k in ("rate", "peak")}
                  for side, results in seen.items()}
        for side, m in middle.items():
            print(f"{dtype:10} {side:5} {m['rate']:9.0f} {m['peak']:10.0f}   "
                  + " ".join(f"{r['rate']:.0f}" for r in seen[side]))
        pairs = [a["rate"] / b["rate"] for a, b in zip(seen["ours"], seen["peft"])]
        print(f"{dtype:10} ours / peft: {statistics.median(pairs):.2f} x tokens/s, "
              f"{middle['ours']['peak'] / middle['peft']['peak']:.2f} x peak memory", flush=True)


if __name__ == "__main__":
    main()
