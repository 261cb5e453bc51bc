"""What the scripts share: loading, probing with a bar, and how a process ends."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from . import distributed, failure, toy
from .allocate import Allocation, Unfit, allocate
from .checkpoint import load_model, read_config, resolve
from .data import Batch, Encoded, Example, Task, encode, encode_all, load_tasks, probe_batches
from .experts import linear_layers
from .files import inside, read_json
from .loss import IGNORE
from .model import CausalLM
from .report import clean, table, terminal_heatmap
from .resume import Interrupted, Norms, handling, interrupt, locked
from .sensitivity import Scores, overlap, probe
from .tokenizer import Tokenizer, load_tokenizer

PROBE_BATCH = 16
AUTO_START, AUTO_MOST = 16, 512          # samples a task of --samples auto
TOGETHER = ("--model and --data go together; without both, the tiny model and its own tasks are "
            "used")
KEEP_NORMS = 2.0                         # seconds after which a probe saves what it has measured


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's main and exit: 0 done, 1 failed with one line on stderr, 128 + the signal's
    number after Ctrl-C (130), SIGTERM (143) and SIGHUP (129)."""
    argv = sys.argv[1:]
    bound_memory()
    for stream in (sys.stdout, sys.stderr):      # a terminal that cannot spell a shade gets a "?"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with handling(interrupt):
            main(argv)
            sys.stdout.flush()           # what a closed pipe or a full disk does not take is said
        distributed.leave(0)
    except KeyboardInterrupt as e:
        if distributed.rank() == 0:
            print(f"\ninterrupted{f': {clean(e)}' if str(e) else ''}", file=sys.stderr)
        code = 128 + getattr(e, "number", signal.SIGINT)
        distributed.leave(code)
        sys.exit(code)
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, SafetensorError,
            ValueError) as e:
        failure.say(e, "--debug" in argv, f" (process {distributed.rank()})"
                    if distributed.world() > 1 else "")
        distributed.leave(1)
        sys.exit(1)


@contextmanager
def working_in(folder: Path, command: str) -> Iterator[None]:
    """Hold a folder for this run; an interruption meanwhile names the command that goes on."""
    with locked(folder) if distributed.rank() == 0 else nullcontext():
        try:
            yield
        except ConnectionError as e:
            raise ConnectionError(f"{e}; go on, with any number of processes: {command}") from None
        except KeyboardInterrupt as e:
            said = f"{e}; " if str(e) else ""
            raise Interrupted(f"{said}go on with: {command}",
                              getattr(e, "number", signal.SIGINT)) from None


def bound_memory() -> None:
    """Keep two caches of a CPU from growing with every length of batch that comes by.

    oneDNN keeps what it compiles for a shape, in bfloat16 23 MB a length of batch, up to 1,024
    shapes; 64 are those of one step. And glibc learns to keep freed tensors in its heap, which
    tensors of ever other sizes tear to pieces; a fixed threshold has it give large ones back. (At
    256 KiB it took small models twice the time to train, in pages that came and went.)
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")                # read when the first matrix is multiplied
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):          # a C library that is not glibc
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 20)                    # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 26)                    # M_TRIM_THRESHOLD


@dataclass
class Inputs:
    """Everything that a script reads: model, tokenizer, tasks and their training examples."""

    model: CausalLM
    tokenizer: Tokenizer
    tasks: list[Task]
    encoded: dict[str, Encoded]

    @property
    def examples(self) -> list[Example]:
        """The training examples of all tasks."""
        return [e for encoded in self.encoded.values() for e in encoded.examples]

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a process that goes on must find again: the model, and each task's lines."""
        found = {"the model": self.model.fingerprint}
        for task in self.tasks:
            content = hashlib.sha256(json.dumps(task.test).encode())
            for e in self.encoded[task.name].examples:
                content.update(repr((e.index, e.ids, e.labels)).encode())
            found[f"task {task.name}"] = content.hexdigest()[:16]
        return found


def load_inputs(args: argparse.Namespace) -> Inputs:
    """Load what the flags name, and print a table of it; with --show print examples and exit."""
    if args.model is not None and args.data is None:
        raise ValueError(TOGETHER)
    device = start(args)
    folder = base_folder(args)
    tokenizer, tasks, encoded = read_data(args, folder)
    model = load_base(args, folder)
    if args.shard:
        distributed.shard(model, device)
    size = sum(p.numel() for p in model.parameters()) + sum(
        m.weight.shape.numel() for m in linear_layers(model).values() if model.base_bits)
    print(f"model: {clean(model.name)}, {size / 1e6:.1f} M parameters, {device}, {args.dtype}"
          + (f", linear layers in {model.base_bits} bits" if model.base_bits else ""))
    describe(tasks, encoded, tokenizer)
    if empty := [name for name, e in encoded.items() if not e.examples]:
        raise ValueError(f"no example of {', '.join(empty)} keeps a supervised token within "
                         f"--max-length {context(args, folder)}")
    return Inputs(model, tokenizer, tasks, encoded)


def start(args: argparse.Namespace) -> torch.device:
    """Join the other processes, if there are any. ValueError for a --shard that divides nothing."""
    device, _ = device_and_dtype(args)
    distributed.start(device)
    if args.shard and (args.base_bits or distributed.world() == 1):
        raise ValueError("--shard divides a model among processes: start several with torchrun, "
                         "without --base-bits")
    return device


def base_folder(args: argparse.Namespace) -> Path:
    """The folder of the model, which one process fetches, or makes."""
    with distributed.one_first():
        return toy.base_folder() if args.model is None else resolve(args.model)


def load_base(args: argparse.Namespace, folder: Path) -> CausalLM:
    """The model that the flags name, on their device; on the CPU where it is to be divided."""
    device, dtype = device_and_dtype(args)
    model = load_model(folder, dtype, "cpu" if args.shard else device, args.base_bits)
    model.name = args.model or "the embedded default"
    return model


def read_data(args: argparse.Namespace, folder: Path,
              ) -> tuple[Tokenizer, list[Task], dict[str, Encoded]]:
    """The tokenizer of `folder`, the tasks and their examples; with --show print some and exit."""
    names = [name.strip() for name in args.tasks.split(",")] if args.tasks else []
    if args.model is None:
        if args.data is not None:
            raise ValueError(TOGETHER)
        if len(set(names)) < len(names):
            raise ValueError(f"a task is asked for twice: {', '.join(names)}")
        if missing := [name for name in names if name not in toy.TASKS]:
            raise ValueError(f"the tiny model has no task {', '.join(missing)}; it has "
                             f"{', '.join(toy.TASKS)}")
        tasks = [t for t in toy.tasks(args.seed) if not names or t.name in names]
    else:
        tasks = load_tasks(args.data, names, args.seed)
    for task in tasks:
        task.train, task.test = task.train[:args.limit_train], task.test[:args.limit_test]
    tokenizer = load_tokenizer(folder)
    if args.show:
        show(tasks, tokenizer, args.show)
        sys.exit(0)
    length = context(args, folder)
    return tokenizer, tasks, {t.name: encode_all(t, tokenizer, length) for t in tasks}


def context(args: argparse.Namespace, folder: Path) -> int:
    """Tokens that an example may have: --max-length, or what the model was made for."""
    return min(args.max_length, read_config(folder)[0].max_position_embeddings)


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype mean here; the choice is written back into args.

    ValueError for a device that is not there.
    """
    if args.device == "auto":
        args.device = ("cuda" if torch.cuda.is_available()
                       else "mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(args.device)
    if not _is_there(device):
        raise ValueError(f"torch finds no device {args.device} here: --device auto takes what "
                         "there is")
    if args.dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                else device.type == "cpu" and _multiplies_bfloat16())
        args.dtype = "bfloat16" if fast and args.model is not None else "float32"
    return device, getattr(torch, args.dtype)


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":            # a tensor would open the first device in every process
        return (device.index or 0) < torch.cuda.device_count()
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):
        return False
    return True


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; without, float32 is the faster
    one."""
    return any(getattr(torch.cpu, f"_is_{kind}_supported", lambda: False)()
               for kind in ("amx_tile", "avx512_bf16"))


def read_run(run: Path) -> argparse.Namespace:
    """The input flags with which a run was made; ValueError where its config.json is none."""
    for name in ("config.json", "adapter", "export"):
        inside(run, name)
    content = read_json(run / "config.json")
    arguments = content.get("arguments") if isinstance(content, dict) else None
    arguments = arguments if isinstance(arguments, dict) else {}
    numbers = ("limit_train", "limit_test", "max_length", "seed")
    saved = {name: arguments.get(name) for name in ("model", "data", "tasks", *numbers)}
    if wrong := [f"{name} = {value!r}" for name, value in saved.items()
                 if type(value) is not (int if name in numbers else str)
                 and (value is not None or name in ("max_length", "seed"))]:
        raise ValueError(f"{run / 'config.json'} is none of a run: {', '.join(wrong)}")
    return argparse.Namespace(**{**arguments, **saved, "show": None})


def describe(tasks: Sequence[Task], encoded: Mapping[str, Encoded], tokenizer: Tokenizer) -> None:
    """Print how much each task holds, and what the length limit took."""
    rows = []
    for task in tasks:
        e = encoded[task.name]
        lengths = [len(x.ids) for x in e.examples] or [0]
        answers = sum(label != IGNORE for x in e.examples for label in x.labels)
        rows.append([clean(task.name), len(task.train), len(task.test),
                     f"{sum(lengths) / len(lengths):.0f}", max(lengths),
                     f"{answers / max(1, len(e.examples)):.1f}", e.truncated, e.dropped])
    print(table(["task", "train", "test", "tokens", "longest", "supervised", "cut", "left out"],
                rows))
    for task in tasks:
        if task.note:
            print(f"{clean(task.name)}: {task.note}")
    if dropped := sum(e.dropped for e in encoded.values()):
        print(f"{dropped} examples were left out: --max-length would remove their whole answer")
    if not tokenizer.has_template:
        print("chat template: the checkpoint brings none, so the default one is used (--show 1)")


def show(tasks: Sequence[Task], tokenizer: Tokenizer, count: int) -> None:
    """Print examples as the model sees them; what is supervised is green, or in [[ ]] in a file."""
    mark, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    for task in tasks:
        for messages in task.train[:count]:
            example = encode(task.name, messages, tokenizer)
            supervised = sum(label != IGNORE for label in example.labels)
            print(f"--- {clean(task.name)}: {len(example.ids)} tokens, {supervised} supervised")
            text = tokenizer.render(messages)
            starts = tokenizer.encode(text)[1]
            parts: list[str] = []
            inside = False
            for i, start in enumerate(starts):
                if (example.labels[i] != IGNORE) != inside:
                    inside = not inside
                    parts.append(mark if inside else end)
                stop = starts[i + 1] if i + 1 < len(starts) else len(text)
                parts.append(clean(text[start:stop], "\n"))
            print("".join(parts) + (end if inside else ""))


def choose(args: argparse.Namespace, scores: Scores) -> Allocation:
    """The allocation that the flags ask for; Unfit where it does not fit what the scores choose."""
    found = allocate(scores, strategy=args.strategy, group=args.group, keep=args.keep,
                     budget_experts=args.budget_experts, budget_params=args.budget_params,
                     min_experts=args.min_experts, max_experts=args.max_experts,
                     targets=args.targets, rank=args.rank, alpha=args.alpha, top_k=args.top_k,
                     seed=args.seed)
    if small := [f"{m} {[*scores.shapes[m]]}" for m in found.experts
                 if found.rank_of(m) > min(scores.shapes[m])]:
        raise Unfit(f"rank {found.rank} is more than the matrix itself has: {', '.join(small)}")
    return found


def guess(args: argparse.Namespace, sizes: dict[str, tuple[int, int]], tasks: Sequence[str],
          ) -> Allocation:
    """The allocation of the flags as it might come out: tasks agree in most of their votes."""
    if getattr(args, "allocation", None):
        found = read_allocation(args, args.allocation)
        if wrong := [name for name in found.experts if name not in sizes]:
            raise ValueError(f"no linear layer that can be adapted: {', '.join(wrong)}")
        return found
    rng, scores = random.Random(0), Scores(sizes)
    common = {name: rng.random() for name in sizes}
    for task in tasks:
        scores[task] = {name: value + 0.1 * rng.random() for name, value in common.items()}
    return choose(args, scores)


def rehearse(args: argparse.Namespace, inputs: Inputs) -> None:
    """ValueError for allocation flags that are wrong whatever the probe will find."""
    with suppress(Unfit):
        guess(args, probe(inputs.model, {}).shapes, list(inputs.encoded))


def read_allocation(args: argparse.Namespace, file: str | Path) -> Allocation:
    """An allocation file; a bare mapping takes rank, alpha and top-k from the flags."""
    value = read_json(file)
    if isinstance(value, dict) and "format" not in value:
        value = {"format": "minismoe.allocation/1", "experts": value, "rank": args.rank,
                 "alpha": args.alpha or 2 * args.rank, "top_k": args.top_k}
    elif isinstance(value, dict) and file == getattr(args, "allocation", None):
        for name, default in (("rank", 8), ("alpha", None), ("top_k", 2)):
            if (asked := getattr(args, name)) not in (default, value.get(name)):
                print(f"{clean(file)} says {name} {value.get(name)!r}, which is taken, and not "
                      f"{asked}", file=sys.stderr)
    try:
        return Allocation.from_json(value)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def measure(args: argparse.Namespace, inputs: Inputs, run: Path) -> Scores:
    """Probe all tasks, with a bar, and print how far the result can be trusted.

    What is measured is kept in run/checkpoints now and then: a later process begins where an
    earlier one, of the same model, data and samples, ended.
    """
    auto = args.samples == "auto"
    wanted, size = AUTO_START if auto else args.samples, probe_batch(args)
    pools = {name: random.Random(args.seed).sample(e.examples, len(e.examples))
             for name, e in inputs.encoded.items()}
    most = min(AUTO_MOST if auto else wanted, max(map(len, pools.values())))
    with distributed.one_first():        # which may remove what another probe left
        kept = Norms(run, inputs.identity | {
            f"--{flag}": getattr(args, flag) for flag in ("samples", "seed", "dtype", "base_bits")})
    scores, done = probe(inputs.model, {}), 0

    def norms(item: tuple[str, Batch]) -> list[list[float]]:
        return probe(inputs.model, {item[0]: [item[1]]}).samples[item[0]].tolist()

    with tqdm(desc="probe", unit="sample", total=0, disable=distributed.rank() > 0) as bar:
        while True:
            bar.total += sum(len(p[done:wanted]) for p in pools.values())
            batches: list[tuple[str, Batch]] = []
            for name, pool in pools.items():
                if len(pool) > done:
                    known = kept.rows(name, done, wanted)
                    if len(known) < min(wanted, len(pool)) - done:       # whole batches of ours
                        known = known[:len(known) // size * size]
                    if len(known):
                        scores.add(name, known)
                        bar.update(len(known))
                    missing = list(probe_batches(
                        pool, wanted - done, size, inputs.tokenizer.pad_id, args.device,
                        done))[-(-len(known) // size):]
                    batches += [(name, batch) for batch in missing]
            try:
                for (name, batch), found in zip(batches, distributed.spread(norms, batches)):
                    scores.add(name, torch.tensor(found, dtype=torch.float64))
                    bar.update(len(batch[0]))
                    distributed.once(kept.save, scores.samples, KEEP_NORMS)
            finally:
                distributed.once(kept.save, scores.samples)
            agreement, done = trust(args, scores), wanted
            if not auto or lowest(agreement) >= args.overlap or done >= most:
                break
            wanted = min(2 * done, most)
    say_agreement(args, scores, agreement, done)
    return scores


def say_agreement(args: argparse.Namespace, scores: Scores, agreement: Mapping[str, float],
                  done: int) -> None:
    """Print how many samples of each task were probed, and the overlap of their halves."""
    rows = [[clean(t), len(scores.samples[t]), "-" if math.isnan(a) else f"{a:.2f}"]
            for t, a in agreement.items()]
    print(table(["task", "samples probed", "split-half overlap"], rows))
    if args.samples == "auto":
        least = lowest(agreement)
        print(f"--samples auto stopped at {done} a task: the lowest overlap is {least:.2f}, "
              f"{'at' if least >= args.overlap else 'below'} the target of {args.overlap:.2f}")


def lowest(agreement: Mapping[str, float]) -> float:
    """The lowest overlap; tasks of a single sample have none. 1 where none has one."""
    return min((a for a in agreement.values() if not math.isnan(a)), default=1.0)


def probe_batch(args: argparse.Namespace) -> int:
    """Samples probed at once by each process: fewer where training itself must do with a small
    part of a micro-batch."""
    most = getattr(args, "micro_batch_size", PROBE_BATCH * distributed.world())
    return min(PROBE_BATCH, -(-most // distributed.world()))


def trust(args: argparse.Namespace, scores: Scores) -> dict[str, float]:
    """Split-half overlap of the matrices that each task would vote for."""
    names = list(scores.shapes)

    def select(one_task: dict[str, float]) -> set[str]:
        return set(allocate({"": one_task}, group=args.group, keep=args.keep or 0.6,
                            targets=args.targets).experts)

    return {task: overlap(samples, names, select) for task, samples in scores.samples.items()}


def allocation_heatmap(model: CausalLM, allocation: Allocation) -> str:
    """Experts of every linear layer but the head, or their ranks where these differ."""
    what, counts = (("rank", allocation.ranks) if allocation.ranks else
                    ("experts", allocation.experts))
    return terminal_heatmap(f"{what} a matrix", {name: counts.get(name, 0)
                                                 for name in linear_layers(model)}, digits=True)


def new_run(out: str | None, name: str) -> Path:
    """The folder of a new run: the one asked for, which must hold none, or the next free name."""
    if out is not None:
        if (Path(out) / "config.json").exists():
            raise FileExistsError(f"{out} holds a run already: go on with --resume, or choose "
                                  "another --out")
        return Path(out)
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder
