"""What the scripts share: loading, and how a process ends."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..data import toy
from ..data.tasks import Encoded, Example, Task, encode, encode_all, load_tasks
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..io.hub import resolve
from ..io.process import bound_memory
from ..io.signals import Interrupted, handling, interrupt, locked
from ..io.text import clean, print_error, table
from ..method.experts import linear_layers
from ..method.loss import IGNORE
from ..model.checkpoint import load_model, read_config
from ..model.decoder import CausalLM
from ..training import distributed

TOGETHER = ("--model and --data go together; without both, the tiny model and its own tasks are "
            "used")


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
        print_error(e, "--debug" in argv, f" (process {distributed.rank()})"
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
        return toy.checkpoint_folder() if args.model is None else resolve(args.model)


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
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    mark, end = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
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
