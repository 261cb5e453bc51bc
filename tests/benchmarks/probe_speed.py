"""The cost of the probe, against a plain backward and against the published protocol.

    python tests/benchmarks/probe_speed.py --model SMOLLM2_135M --data FOLDER

Timed in turn in one process, on the same samples: the probe; a forward of the frozen model and a
backward of activations only, which any gradient needs; and the published protocol, which takes one
sample and the weight gradients of one decoder layer a step.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import nn
from train_speed import batches as some_batches

from minismoe.data.tasks import collate
from minismoe.method.loss import supervised_losses
from minismoe.method.sensitivity import probe
from minismoe.model.checkpoint import load_model


def backward_of_activations(model: nn.Module, batches: list) -> None:
    """Forward, loss, and the gradient of each layer's output: the least that any probe needs."""
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, out: out.requires_grad_())
    for ids, mask, labels in batches:
        supervised_losses(model, ids, mask, labels)[0].sum().backward()
    hook.remove()


def published(model: nn.Module, batches: list, layers: range) -> int:
    """The published protocol: batch size 1 and the weight gradients of one decoder layer a step.

    Returns the number of (sample, matrix) pairs scored.
    """
    pairs = 0
    for layer in layers:
        weights = [m.weight for m in model.model.layers[layer].modules()
                   if isinstance(m, nn.Linear)]
        for weight in weights:
            weight.requires_grad_(True)
        ids, mask, labels = (t[:1] for t in batches[layer % len(batches)])
        used = int(mask.sum())
        losses, _ = supervised_losses(model, ids[:, :used], mask[:, :used], labels[:, :used])
        losses.mean().backward()
        pairs += sum(w.grad.square().sum().item() >= 0 for w in weights)
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
    return pairs


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", help="comma list; default: all of the folder")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        measure(args, dtype)


def measure(args: argparse.Namespace, dtype: str) -> None:
    """Time the three sides in turn, and print medians and ratios."""
    chosen, pad = some_batches(args, args.batches)
    batches = [collate(b, pad) for b in chosen]
    count = sum(len(b[0]) for b in batches)
    model = load_model(args.model, getattr(torch, dtype))
    layers = range(0, len(model.model.layers), 3)
    frozen, probed, pair = [], [], []
    probe(model, {"all": batches[:1]})                                  # warm-up
    for _ in range(args.rounds):
        frozen.append(timed(lambda: backward_of_activations(model, batches))[0])
        seconds, scores = timed(lambda: probe(model, {"all": batches}))
        probed.append(seconds)
        seconds, pairs = timed(lambda: published(model, batches, layers))
        pair.append(seconds / pairs)
    matrices = len(scores.shapes)
    ratios = [a / b for a, b in zip(probed, frozen)]
    cheaper = [p / (s / (count * matrices)) for p, s in zip(pair, probed)]
    print(f"{dtype}: {count} samples x {matrices} matrices, {args.rounds} rounds\n"
          f"  frozen forward, activation backward  {statistics.median(frozen):7.2f} s\n"
          f"  probe                                {statistics.median(probed):7.2f} s, "
          f"{statistics.median(ratios):.2f} x\n"
          f"  a (sample, matrix) pair: published {statistics.median(pair) * 1e3:.2f} ms, "
          f"probe {statistics.median(probed) / count / matrices * 1e3:.3f} ms: "
          f"{statistics.median(cheaper):.0f} x cheaper", flush=True)


if __name__ == "__main__":
    main()
