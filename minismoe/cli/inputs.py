"""What the scripts read: the model, its tokenizer and the tasks that the flags name."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch

from ..data import toy
from ..data.files import WORDS
from ..data.lines import with_system
from ..data.tasks import (
    HELD_OUT,
    Example,
    Task,
    cut,
    encode_all,
    encode_lines,
    example_of,
    hold_out_validation,
    load_tasks,
)
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..data.turns import Line, encode_line
from ..io.hub import resolve
from ..io.text import clean, table
from ..method.loss import IGNORE
from ..model.checkpoint import load_model, read_config
from ..model.decoder import CausalLM, meta_model
from ..training.evaluate import Questions, ask
from ..training.plan import ENOUGH, can_match
from .flags import InputConfig

Config = TypeVar("Config", bound=InputConfig)
Item = TypeVar("Item")
VALIDATION_LINES = 64    # of each task: they are measured ten times while the model trains


@dataclass
class Inputs:
    """The model, its folder and tokenizer, the tasks, and by task their examples of each split."""

    folder: Path
    model: CausalLM
    tokenizer: Tokenizer
    tasks: list[Task]
    encoded: dict[str, list[Example]]    # of training lines
    valid: dict[str, list[Example]]
    test: dict[str, list[Example]]
    asked: dict[str, Questions]          # test lines; validation lines if the test is left out

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of the model and of each task's lines: a resumed run must find the same."""
        fingerprints = {"the model": self.model.fingerprint}
        for task in self.tasks:
            content = hashlib.sha256(json.dumps(task.test).encode())
            for e in self.encoded[task.name] + self.valid[task.name]:
                content.update(repr((e.index, e.ids, e.labels)).encode())
            fingerprints[f"task {task.name}"] = content.hexdigest()[:16]
        return fingerprints


def resolve_auto(config: Config) -> Config:
    """The same with a device and a dtype in place of "auto". Raises ValueError for a device that is
    not there."""
    device = torch.device(config.device if config.device != "auto" else
                          "cuda" if torch.cuda.is_available() else
                          "mps" if torch.backends.mps.is_available() else "cpu")
    if not _is_there(device):
        raise ValueError(f"torch finds no device {device} here: --device auto takes one that "
                         "is there")
    dtype = config.dtype
    if dtype == "auto":
        tiny = config.model is None
        dtype = "bfloat16" if not tiny and _multiplies_bfloat16(device) else "float32"
    return replace(config, device=str(device), dtype=dtype)


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":            # a tensor would open the first device in every process
        return (device.index or 0) < torch.cuda.device_count()
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):
        return False
    return True


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has hardware for bfloat16; without, it is slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(
        getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()
        for feature in ("amx_tile", "avx512_bf16"))


def load_inputs(config: InputConfig, quiet: bool = False) -> Inputs:
    """Load the model and the data, and print a table of it unless `quiet`. `config` holds no "auto"
    any more.

    Raises ValueError if a task has no example with a supervised token.
    """
    tasks = read_tasks(config)               # first: wrong data is found before a model is fetched
    for task in held_out_of(tasks):
        hold_out_validation(task, config.seed)
    folder = model_folder(config)
    tokenizer = load_tokenizer(folder)
    context = read_config(folder)[0].max_position_embeddings
    length = min(config.max_length, context)
    train = {t.name: encode_all(t, tokenizer, length) for t in tasks}
    if empty := [name for name, examples in train.items() if not examples]:
        raise ValueError(f"no example of {', '.join(empty)} keeps a supervised token within "
                         f"{length} tokens (--max-length, or what the model was made for)")
    lines = {split: {t.name: leave_out_long(t, split, encode_lines(t, tokenizer, split), context)
                     for t in tasks} for split in ("valid", "test")}
    valid, test = ({t.name: cut(of_split[t.name], t, length) for t in tasks}
                   for of_split in lines.values())
    judged = lines["test" if config.limit_test != 0 else "valid"]
    asked = {name: ask(of_task) for name, of_task in judged.items()}
    model = load_base(config, folder)
    if not quiet:
        size = sum(p.numel() for p in meta_model(model.config).parameters())
        bits = f", linear layers in {model.base_bits} bits" if model.base_bits else ""
        print(f"model: {clean(model.name)}, {size / 1e6:.1f} M parameters, {config.device}, "
              f"{config.dtype}{bits}")
        print_data(tokenizer, tasks, train, valid, test)
    return Inputs(folder, model, tokenizer, tasks, train, valid, test, asked)


def held_out_of(tasks: Sequence[Task]) -> list[Task]:
    """The tasks of free text that validation lines are held out of; none if not each task then has
    enough of them to say which step is best."""
    open_text = [task for task in tasks if not (task.has_valid or can_match(task.new_words))]
    counts = [HELD_OUT * len(task.train) if task in open_text else len(task.valid)
              for task in tasks]
    return open_text if min(counts) >= ENOUGH else []


def leave_out_long(task: Task, split: str, lines: Iterable[Line], context: int) -> list[Line]:
    """The lines of a split whose prompts do not fill the model's context. The others leave the
    task, which notes how many they are."""
    short = [line for line in lines if len(line.prompt) < context]
    if long := len(getattr(task, split)) - len(short):
        task.notes.append(f"{long} {WORDS[split]} lines left out: their prompts fill the model's "
                          f"context of {context:,} tokens")
    setattr(task, split, [[*line.messages] for line in short])
    return short


def read_tasks(config: InputConfig) -> list[Task]:
    """The tasks of --data, or those of the toy. Raises ValueError for a task that is missing or
    named twice."""
    names = [name.strip() for name in (config.only_tasks or "").split(",") if name.strip()]
    if len(set(names)) < len(names):
        raise ValueError(f"a task is named twice: {', '.join(names)}")
    if config.data is not None:
        columns = [name.strip() for name in config.columns.split(",")] if config.columns else []
        tasks = load_tasks(config.data, names, config.seed, columns)
    else:
        if missing := [name for name in names if name not in toy.TASKS]:
            raise ValueError(f"the built-in toy has no task {', '.join(missing)}; it has "
                             f"{', '.join(toy.TASKS)}")
        tasks = [t for t in toy.tasks(config.seed) if not names or t.name in names]
    for task in tasks:
        task.train = drawn(task.train, config.limit_train, config.seed)
        task.valid = drawn(task.valid, VALIDATION_LINES, config.seed)
        task.test = drawn(task.test, config.limit_test, config.seed)
        if config.system:
            for lines in (task.train, task.valid, task.test):
                lines[:] = [with_system(messages, config.system) for messages in lines]
    return tasks


def drawn(lines: list[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` lines, in their order: a file may be sorted by its answers."""
    if limit is None or len(lines) <= limit:
        return lines
    return [lines[i] for i in sorted(random.Random(seed).sample(range(len(lines)), limit))]


def model_folder(config: InputConfig) -> Path:
    """The folder of the model, which is fetched if it is on the hub."""
    return toy.FOLDER if config.model is None else resolve(config.model)


def load_base(config: InputConfig, folder: Path) -> CausalLM:
    """The model on its device; with a dtype that torch has not, its weights are as stored."""
    device = torch.device(config.device)
    if (device.type, config.dtype) == ("cpu", "bfloat16") and not _multiplies_bfloat16(device):
        print("--dtype bfloat16: this CPU has no instructions that multiply bfloat16, so a step "
              "takes several times as long as with --dtype float32")
    model = load_model(folder, getattr(torch, config.dtype, None), config.device, config.base_bits)
    model.name = config.model or "the built-in toy"
    return model


def print_data(tokenizer: Tokenizer, tasks: Sequence[Task],
               *splits: Mapping[str, Sequence[Example]]) -> None:
    """Print how much each task holds, and what the length limit cut or left out of the `splits`,
    training, validation and test."""
    rows = []
    for task in tasks:
        examples = splits[0][task.name]
        lengths, left_out = [len(e.ids) for e in examples], len(task.train) - len(examples)
        rows.append([clean(task.name), len(task.train), len(task.valid), len(task.test),
                     f"{fmean(lengths):.0f}", max(lengths),
                     f"{fmean(e.supervised for e in examples):.1f}",
                     left_out + sum(e.cut for e in examples), left_out])
    print(table(["task", "train", "valid", "test", "tokens", "longest", "supervised", "cut",
                 "left out"], rows))
    for task in tasks:
        notes = task.notes + [
            f"{lost} {word} lines have no loss: --max-length would remove their whole answer"
            for (split, word), of_task in zip(WORDS.items(), splits)
            if (lost := len(getattr(task, split)) - len(of_task[task.name]))]
        if notes:
            print(f"{clean(task.name)}: {clean('; '.join(notes))}")
    if tokenizer.template is None:
        print('chat template: the checkpoint brings none, so a turn is "User: ...", and an answer '
              f'"Assistant: ...{clean(tokenizer.eos)}" (--show 1 prints an example)')


def print_examples(config: InputConfig, count: int) -> None:
    """Print `count` examples of each task as the model sees them; supervised text stands in
    [[ ]]."""
    tasks, tokenizer = read_tasks(config), load_tokenizer(model_folder(config))
    for task in tasks:
        for number, messages in enumerate(task.train[:count], 1):
            line = encode_line(messages, tokenizer)
            example = example_of(task.name, line)
            print(f"--- {clean(task.name)} {number}: {len(example.ids)} tokens, "
                  f"{example.supervised} supervised")
            text, _, starts = line.whole
            texts = (text[i:j] for i, j in pairwise([*starts, len(text)]))
            for is_answer, tokens in groupby(zip(example.labels, texts), lambda t: t[0] != IGNORE):
                piece = clean("".join(text for _, text in tokens), "\n")
                print(f"[[{piece}]]" if is_answer else piece, end="")
            print()
