"""The flags that scripts share, and what their values may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from .allocate import GROUPS, STRATEGIES

CHOOSING = ("strategy", "keep", "budget_experts", "budget_params", "group", "targets",
            "min_experts", "max_experts")                    # what a given allocation makes idle


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model and which data, and where they run."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", type=text, help="checkpoint folder or hub name org/name; "
                       "default: a tiny byte-level model, made on first use and kept in the user's "
                       "cache")
    group.add_argument("--data", type=text, help="folder with a sub-folder (train.jsonl, "
                       "test.jsonl) or one .jsonl file a task; default: the tasks that come with "
                       "the tiny model")
    group.add_argument("--tasks", type=text,
                       help="comma list of task names; default: all of --data")
    group.add_argument("--limit-train", type=positive, metavar="N",
                       help="use the first N training lines of each task; default: all")
    group.add_argument("--limit-test", type=positive, metavar="N",
                       help="use the first N test lines of each task; default: all")
    group.add_argument("--max-length", type=positive, default=1024, metavar="TOKENS",
                       help="longer training examples are cut (default: %(default)s)")
    group.add_argument("--seed", type=seed, default=0, help="of every random choice (default: 0)")
    group.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto (default)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                       help="of the frozen weights and activations; experts are held, and "
                       "routers and norms computed, in float32 anyway. auto: bfloat16 where the "
                       "device multiplies it in hardware, and float32 for the tiny model")
    group.add_argument("--shard", action="store_true", help="under torchrun (torch 2.8): each "
                       "process holds a part of the frozen blocks, for models too large for one "
                       "device; slower")
    group.add_argument("--base-bits", type=int, choices=(8, 4), help="hold the frozen linear "
                       "layers in so many bits: less memory, a little slower, less exact")
    group.add_argument("--show", type=positive, metavar="N", help="print N examples a task as the "
                       "model sees them before --max-length, supervised tokens marked, and stop")
    group.add_argument("--debug", action="store_true", help="show a traceback on failure")


def add_allocation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the probe and of `allocate`."""
    group = parser.add_argument_group("probe and allocation")
    group.add_argument("--samples", type=positive_or_auto, default=32, metavar="N|auto",
                       help="training examples a task to probe (default: 32); auto doubles them "
                       "until --overlap is reached, up to 512")
    group.add_argument("--overlap", type=share, default=0.95, metavar="F", help="split-half "
                       "overlap of the selected matrices that auto aims at (default: 0.95)")
    group.add_argument("--strategy", choices=STRATEGIES, default="votes",
                       help="how experts are given to matrices (default: votes, the paper's)")
    group.add_argument("--keep", type=share, metavar="F", help="share of its group that a task "
                       "votes for (default: 0.6 where no budget is given)")
    group.add_argument("--budget-experts", type=positive, metavar="N",
                       help="instead of --keep: at most N experts in all")
    group.add_argument("--budget-params", type=positive, metavar="N",
                       help="instead of --keep: at most N trainable parameters")
    group.add_argument("--group", choices=GROUPS, default="attention_mlp",
                       help="matrices that are ranked together (default: attention_mlp)")
    group.add_argument("--targets", help="comma list of projections (q_proj) or of module patterns "
                       "(model.layers.1?.*) that may get experts; default: all linear layers")
    group.add_argument("--min-experts", type=int, default=0, metavar="N",
                       help="experts that every matrix gets at least (default: 0)")
    group.add_argument("--max-experts", type=positive, metavar="N",
                       help="experts a matrix gets at most (default: as many as tasks for "
                       "votes and random; lora and ranks keep to one, and spend what such "
                       "votes do)")
    group.add_argument("--rank", type=positive, default=8, help="of each expert (default: 8)")
    group.add_argument("--alpha", type=above_zero, help="an expert's output is scaled by alpha / "
                       "rank (default: twice the rank)")
    group.add_argument("--top-k", type=positive, default=2, metavar="K",
                       help="experts active a token (default: 2)")


def checked(kind: Callable[[str], Any], good: Callable[[Any], bool], wrong: str,
            ) -> Callable[[str], Any]:
    """An argparse type: what `kind` reads, where it is `good`."""
    def read(text: str) -> Any:
        if not good(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text or 'it'} {wrong}")
        return value
    read.__name__ = kind.__name__            # which argparse names where `kind` reads nothing
    return read


positive = checked(int, lambda n: n >= 1, "is not at least 1")
seed = checked(int, lambda n: -1 << 63 <= n < 1 << 63, "has more than 64 bits")
text = checked(str, bool, "is empty")          # as an unset variable of a shell is
number = checked(float, lambda x: 0 <= x < math.inf, "is no number of at least 0")
above_zero = checked(float, lambda x: x > 0, "is not above 0 (inf is no limit)")
part = checked(float, lambda x: 0 <= x <= 1, "is not in [0, 1]")
share = checked(float, lambda x: 0 < x <= 1, "is not in (0, 1]")


def interval(text: str) -> int | str:
    """An argparse type: a number of steps, 200, or of minutes, 10m."""
    if not text.endswith("m"):
        return positive(text)
    if not 0 < float(text[:-1]) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time")
    return text


def positive_or_auto(text: str) -> int | str:
    """An argparse type: a whole number of at least 1, or auto."""
    return text if text == "auto" else positive(text)


def size(text: str) -> int:
    """An argparse type: bytes, as 4G (GiB), 512M (MiB), or a number of them from 1 MiB on."""
    unit = {"M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    found = float(text[:-1]) * unit if unit else float(text)
    if not 1 << 20 <= found < 1 << 50:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 4G or 512M")
    return int(found)
