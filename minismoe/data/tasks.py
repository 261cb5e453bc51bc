"""Task files to batches: lines, chat messages, tokens and their supervision, padding.

A task is a folder with train.jsonl and, better, test.jsonl, or one .jsonl file. Each line is a JSON
object of one of three forms, all of which become chat messages:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}          ("input" may be absent or empty)
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..method.loss import IGNORE
from .tokenizer import Message, Tokenizer

LINE = 1 << 20                   # bytes at most: about 250,000 tokens, more than any model reads
HELD_OUT = 0.1                   # share of a task's lines that is test where it brings none
Batch = tuple[Tensor, Tensor, Tensor]        # input_ids, attention_mask, labels, each (B, T)


@dataclass
class Task:
    """Conversations of one task; every one ends with the assistant's turn."""

    name: str
    train: list[list[Message]]
    test: list[list[Message]]
    note: str = ""                # how the test split was made, where it did not come with the data


@dataclass
class Example:
    """One conversation as the model reads it; labels are IGNORE where unsupervised."""

    task: str
    ids: list[int]
    labels: list[int]
    index: int = 0                # its place among the task's training conversations


@dataclass
class Encoded:
    """A task's training examples, and how many were cut or left out by the length limit."""

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0


def load_tasks(folder: str | Path, names: Sequence[str] = (), seed: int = 0) -> list[Task]:
    """All tasks of a folder (or the named ones), sorted by name.

    Raises FileNotFoundError for a missing folder or task, and ValueError with the file, line and
    reason of the first ten bad lines of all files.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is a file: give the folder that holds it"
                                if root.exists() else f"no such data folder: {root}")
    paths = [p for p in sorted(root.iterdir()) if not p.name.startswith("._") and (       # a Mac's
        (p / "train.jsonl").is_file() or (p.is_file() and p.suffix == ".jsonl"))]
    found = {p.stem if p.is_file() else p.name: p for p in paths}
    if (root / "train.jsonl").is_file():
        raise ValueError(f"{root} is itself a task: give the folder above it, "
                         f"and --tasks {root.resolve().name}")
    if missing := [n for n in names if n not in found]:
        raise FileNotFoundError(f"{root} has no task {', '.join(missing)}; "
                                f"it has {', '.join(found) or 'none'}")
    if twice := [n for n in found if root / n in paths and root / f"{n}.jsonl" in paths]:
        raise ValueError(f"{root} holds {', '.join(twice)} twice, as a folder and as a file")
    if len(set(names)) < len(names):
        raise ValueError(f"a task is asked for twice: {', '.join(names)}")
    if not found:
        raise FileNotFoundError(f"{root} holds no task: a sub-folder with train.jsonl, or a .jsonl")
    bad: list[str] = []
    tasks = [_load_task(name, found[name], seed, bad) for name in sorted(set(names) or found)]
    if bad:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"{len(bad)} bad lines: " + "; ".join(bad[:10]) + more)
    return tasks


def _load_task(name: str, path: Path, seed: int, bad: list[str]) -> Task:
    known = len(bad)
    train_file, test_file = (path / "train.jsonl", path / "test.jsonl") if path.is_dir() else (
        path, None)
    train = read_lines(train_file, bad)
    if not train and len(bad) == known:
        bad.append(f"{train_file}: it holds no example")
    if test_file is not None and test_file.is_file():
        return Task(name, train, read_lines(test_file, bad))
    random.Random(f"{seed} {name}").shuffle(train)
    n = min(len(train) - 1, max(1, round(HELD_OUT * len(train)))) if train else 0
    return Task(name, train[n:], train[:n], f"no test split: {n} of {len(train)} lines held out")


def read_lines(file: Path, bad: list[str]) -> list[list[Message]]:
    """Conversations of a .jsonl file; what is wrong with others is added to `bad`.

    Lines end at "\\n" only: str.splitlines would also split at U+0085 and U+2028 inside strings.
    """
    conversations = []
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            if len(line) > LINE:
                raise ValueError(f"the line has {len(line):,} bytes; at most {LINE:,} are read")
            messages = to_messages(json.loads(line.decode("utf-8")))
            "".join(m["role"] + m["content"] for m in messages).encode()    # no half of an emoji
            conversations.append(messages)
        except (ValueError, RecursionError) as e:
            bad.append(f"{file}:{number}: {e}")
    return conversations


def to_messages(line: Any) -> list[Message]:
    """One parsed line as messages; ValueError says why it is none of the three forms."""
    if not isinstance(line, dict):
        raise ValueError(f"not a JSON object but {type(line).__name__}")
    if "messages" in line:
        if line.get("tools") not in (None, [], "", "[]", "null"):        # as some write none
            raise ValueError("tools are not supported")
        return _check_messages(line["messages"])
    if "prompt" in line and "completion" in line:
        fields = [line["prompt"], line["completion"]]
    elif "instruction" in line and "output" in line:
        given = line.get("input")
        fields = [line["instruction"], "" if given is None else given, line["output"]]
    else:
        raise ValueError("needs messages, or prompt and completion, or instruction and output; "
                         f"it has {', '.join(map(str, line)) or 'nothing'}")
    if not all(isinstance(value, str) for value in fields):
        raise ValueError("every field must be a string")
    *asked, answer = fields
    prompt = "\n".join(value for value in asked if value)
    if not prompt.strip() or not answer.strip():
        raise ValueError("the prompt or the answer is empty")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _check_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list, or empty")
    for m in messages:
        if not (isinstance(m, dict) and isinstance(m.get("role"), str)
                and isinstance(m.get("content"), str)):
            raise ValueError("each message needs a string role and a string content")
        if refused := [key for key in ("tool_calls", "reasoning_content") if m.get(key)]:
            raise ValueError(f"a message has {' and '.join(refused)}, which is not supported")
        if m["role"] == "assistant" and m.get("weight") not in (None, 1):
            raise ValueError(f"a message has weight {m['weight']!r}: every answer is trained on")
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    if not messages[-1]["content"].strip():
        raise ValueError("the last answer is empty")
    if len(messages) == 1:
        raise ValueError("nothing comes before the answer")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def supervised_spans(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, list[range]]:
    """The rendered conversation, and the characters of it that the assistant's turns take up.

    A turn begins where the conversation before it, rendered with the generation prompt, ends: at
    inference the model continues from just there. So a greeting before any question is none.
    ValueError where the template does not render a conversation's beginning as the beginning of
    its text, or leaves it to the model to open its turn.
    """
    text, spans = tokenizer.render(messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            before = tokenizer.render(messages[:i], add_generation_prompt=True)
            after = text if i + 1 == len(messages) else tokenizer.render(messages[:i + 1])
            if not text.startswith(after):
                raise ValueError(
                    f"the chat template renders turn {i + 1} of {len(messages)} differently when "
                    "more follows, so the answer's place is unknown: give a template whose output "
                    "only grows, or data with one answer a line")
            if not after.startswith(before):
                raise ValueError(
                    "the chat template does not begin an answer as its generation prompt, which "
                    f"ends in {before[-20:]!r}: give a template that does")
            head, found, _ = after[len(before):].partition(
                message["content"].strip() or after)         # a blank answer has no place
            if opens := [t for t in tokenizer.special if found and t in head and t in before]:
                raise ValueError(
                    f"the chat template opens an answer by {opens[0]}, which its generation prompt "
                    "leaves out: give a template that heeds add_generation_prompt")
            spans.append(range(len(before), len(after)))
    return text, spans


def encode(task: str, messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """Tokens of a conversation; supervised are the assistant's turns up to their end token."""
    text, spans = supervised_spans(messages, tokenizer)
    ids, starts = tokenizer.encode(text)
    labels = [IGNORE] * len(ids)
    for span in spans:
        for i, (token, start) in enumerate(zip(ids, starts)):
            if start in span:
                labels[i] = token
                if token in tokenizer.stop_ids:      # what follows it, a line end, is not generated
                    break
    return Example(task, ids, labels)


def encode_all(task: Task, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """The training examples of a task, cut to `max_length` tokens.

    An example whose answer lies wholly behind the limit would teach nothing; it is left out.
    Raises ValueError, naming the example, where `encode` does.
    """
    result = Encoded()
    for index, messages in enumerate(task.train):
        try:
            example = encode(task.name, messages, tokenizer)
        except ValueError as e:
            raise ValueError(f"task {task.name}, training line {index + 1}, "
                             f"{messages[0]['content'][:40]!r}: {e}") from None
        example.index = index
        if len(example.ids) > max_length:
            result.truncated += 1
            example.ids, example.labels = example.ids[:max_length], example.labels[:max_length]
        if any(label != IGNORE for label in example.labels[1:]):
            result.examples.append(example)
        else:
            result.dropped += 1
    return result


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """input_ids, attention_mask, labels of right-padded examples, each (B, T)."""
    longest = max(len(e.ids) for e in examples)
    ids, mask, labels = (torch.tensor(
        [list(row) + [fill] * (longest - len(row)) for row in rows], device=device)
        for rows, fill in (((e.ids for e in examples), pad_id),
                           (([1] * len(e.ids) for e in examples), 0),
                           ((e.labels for e in examples), IGNORE)))
    return ids, mask, labels


def bucket(examples: Sequence[Example], batch_size: int, seed: int) -> list[list[Example]]:
    """Shuffled batches of examples of similar length: pads would be computed for nothing.

    Only neighbours of a shuffled order are sorted by length, so batches stay mixed.
    """
    rng = random.Random(seed)
    order = list(examples)
    rng.shuffle(order)
    window = 16 * batch_size
    batches = []
    for i in range(0, len(order), window):
        near = sorted(order[i:i + window], key=lambda e: len(e.ids))
        batches += [near[j:j + batch_size] for j in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


def probe_batches(examples: Sequence[Example], count: int, batch_size: int, pad_id: int,
                  device: torch.device | str, skip: int = 0) -> Iterator[Batch]:
    """`count` examples after the first `skip`, in batches of similar length."""
    chosen = sorted(examples[skip:skip + count], key=lambda e: len(e.ids))
    for i in range(0, len(chosen), batch_size):
        yield collate(chosen[i:i + batch_size], pad_id, device)
