"""From task files to batches: lines, chat messages, tokens and their labels, padded tensors.

A task is a folder with train.jsonl and, preferably, test.jsonl, or one .jsonl file. Each line is a
JSON object in one of three forms, all of which become chat messages:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}          ("input" may be absent or empty)

Beside "messages" may stand "tools", which they call (tools.py).
"""

import codecs
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..io.files import naming
from ..method.loss import IGNORE
from .tokenizer import Message, Tokenizer
from .tools import Function, calls_of, functions, with_tools

LONGEST_LINE = 1 << 20           # bytes: about 250,000 tokens, more than any model reads
KEPT = ("role", "content", "name", "tool_call_id", "tool_calls")         # of messages
MOST_CHOICES = 300               # answers of a task that are still a small set
HELD_OUT = 0.1                   # share of a task's lines for the test, if it has no test.jsonl
Batch = tuple[Tensor, Tensor, Tensor]        # input_ids, attention_mask, labels, each (B, T)


@dataclass
class Task:
    """Conversations of one task; each ends with an assistant's turn."""

    name: str
    train: list[list[Message]]
    test: list[list[Message]]
    note: str = ""                # how the test split was made, if not from test.jsonl

    def __post_init__(self) -> None:
        """Find what all lines share, before --limit-train leaves some of them out."""
        self.choices = closed_answers(self.train)            # the answers, if they are a small set
        self.instruction = shared_instruction(self.train)    # lines that begin all prompts


@dataclass
class Example:
    """One conversation as tokens; labels are IGNORE at unsupervised tokens."""

    task: str
    ids: list[int]
    labels: list[int]
    index: int = 0                # its place among the task's training conversations
    cut: bool = False             # by the length limit

    @property
    def supervised(self) -> int:
        """How many tokens have a loss; the first one has none, as nothing predicts it."""
        return sum(label != IGNORE for label in self.labels[1:])


def load_tasks(folder: str | Path, names: Sequence[str] = (), seed: int = 0) -> list[Task]:
    """The tasks of a folder, or those of `names`, sorted by name. `seed` draws held-out lines.

    Raises FileNotFoundError if the folder or a task is missing, and ValueError with file, line and
    reason for the first ten bad lines of all files.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is a file: give the folder that holds it"
                                if root.exists() else f"no such data folder: {root}")
    if (root / "train.jsonl").is_file():
        raise ValueError(f"{root} is itself a task: give the folder above it, "
                         f"and --tasks {root.resolve().name}")
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        is_file = path.is_file() and path.suffix == ".jsonl"
        if path.name.startswith("._") or not (is_file or (path / "train.jsonl").is_file()):
            continue                             # macOS writes files named ._*
        name = path.stem if is_file else path.name
        if name in found:
            raise ValueError(f"{root} holds {name} twice, as a folder and as a file")
        found[name] = path
    if missing := [n for n in names if n not in found]:
        raise FileNotFoundError(f"{root} has no task {', '.join(missing)}; "
                                f"it has {', '.join(found) or 'none'}")
    if not found:
        raise FileNotFoundError(f"{root} holds no task: a sub-folder with train.jsonl, or a .jsonl")
    bad: list[str] = []
    tasks = [_load_task(name, found[name], seed, bad) for name in sorted(names or found)]
    if bad:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"{len(bad)} bad lines: " + "; ".join(bad[:10]) + more)
    return tasks


def _load_task(name: str, path: Path, seed: int, bad: list[str]) -> Task:
    known, file = len(bad), path / "train.jsonl" if path.is_dir() else path
    train = _read_conversations(file, bad)
    if not train and len(bad) == known:
        bad.append(f"{file}: it holds no example")
    if path.is_dir() and (path / "test.jsonl").is_file():
        return Task(name, train, _read_conversations(path / "test.jsonl", bad))
    random.Random(f"{seed} {name}").shuffle(train)
    n = min(len(train) - 1, max(1, round(HELD_OUT * len(train)))) if train else 0
    return Task(name, train[n:], train[:n], f"no test split: {n} of {len(train)} lines held out")


def closed_answers(conversations: Sequence[Sequence[Message]]) -> list[str]:
    """The answers of a task, sorted, if they are a small closed set; else none.

    The share of lines whose answer is unique estimates how often a new line has an unseen answer
    (Good 1953): a set is closed if that is at most one line in a hundred.
    """
    if any("tool_calls" in messages[-1] for messages in conversations):
        return []
    counts = Counter(messages[-1]["content"].strip() for messages in conversations)
    once = sum(number == 1 for number in counts.values())
    closed = len(counts) <= MOST_CHOICES and 100 * once <= len(conversations)
    return sorted(counts) if closed else []


def shared_instruction(conversations: Sequence[Sequence[Message]]) -> str:
    """The whole lines that all prompts begin with, if each is one user's message; else ""."""
    if not all([m["role"] for m in messages[:-1]] == ["user"] for messages in conversations):
        return ""
    text = os.path.commonprefix([messages[0]["content"] for messages in conversations])
    return text[:text.rfind("\n") + 1]


def _read_conversations(file: Path, bad: list[str]) -> list[list[Message]]:
    """Conversations of a .jsonl file; file, line and reason of each bad line are added to `bad`.

    Lines end at "\\n" only: str.splitlines would also split at U+0085 and U+2028 inside strings.
    """
    conversations = []
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > LONGEST_LINE:
                raise ValueError(f"the line has {len(line):,} bytes; at most {LONGEST_LINE:,}")
            messages = to_messages(json.loads(line.decode("utf-8")))
            json.dumps(messages, ensure_ascii=False).encode()        # fails on half an emoji
            conversations.append(messages)
        except (ValueError, RecursionError) as e:
            bad.append(f"{file}:{number}: {e}")
    return conversations


def to_messages(line: Any) -> list[Message]:
    """One parsed line as messages; ValueError says why it has none of the three forms."""
    if not isinstance(line, dict):
        raise ValueError(f"not a JSON object but {type(line).__name__}")
    if "messages" in line:
        tools = functions(line.get("tools"), "tools")
        return with_tools(_checked_messages(line["messages"], tools), tools)
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


def _checked_messages(messages: Any, tools: Sequence[Function]) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list, or empty")
    found: list[Message] = []
    for m in messages:
        calls = calls_of(m.get("tool_calls"), tools) if isinstance(m, dict) else []
        if not (isinstance(m, dict) and isinstance(m.get("role"), str)
                and isinstance(m.get("content"), str | None if calls and found else str)):
            raise ValueError("each message needs a string role and a string content")
        if refused := [key for key in ("tool_calls", "reasoning_content") if m.get(key)
                       and (key, m["role"]) != ("tool_calls", "assistant")]:
            raise ValueError(f"a message has {' and '.join(refused)}, which is not supported")
        if m["role"] == "assistant" and m.get("weight") not in (None, 1):
            raise ValueError(f"a message has weight {m['weight']!r}: every answer is trained on")
        if m["role"] == "tool" and not any(
                "tool_calls" in before or before["role"] == "tool" for before in found[-1:]):
            raise ValueError("a tool turn follows no call: put an assistant's tool_calls before it")
        m = {**m, "tool_calls": calls or None}
        found.append({key: m[key] for key in KEPT if m.get(key) is not None})
    if found[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    if not (found[-1].get("content", "").strip() or "tool_calls" in found[-1]):
        raise ValueError("the last answer is empty")
    if len(found) == 1:
        raise ValueError("nothing comes before the answer")
    return found


def supervised_spans(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, list[range]]:
    """The rendered conversation, and the ranges of characters that are the assistant's turns.

    A turn begins where the rendering of the messages before it, with the generation prompt, ends,
    as at inference. A first message has no prompt, so it is no turn. Raises ValueError if the
    template renders earlier turns differently once more messages follow, or if an answer does not
    begin where the generation prompt ends.
    """
    text, spans = tokenizer.render(messages), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before = tokenizer.render(messages[:i], add_generation_prompt=True)
        after = text if i + 1 == len(messages) else tokenizer.render(messages[:i + 1])
        if not text.startswith(after):
            raise ValueError(
                f"the chat template renders turn {i + 1} of {len(messages)} differently when more "
                "follows: give a template whose output only grows, or data with one answer a line")
        if not after.startswith(before):
            raise ValueError("the chat template does not begin an answer as its generation prompt, "
                             f"which ends in {before[-20:]!r}: give a template that does")
        turn, answer = after[len(before):], message.get("content", "").strip()
        opening = turn[:turn.find(answer)] if answer in turn else ""
        if opens := [t for t in tokenizer.special if t in opening and t in before]:
            raise ValueError(f"the chat template opens an answer by {opens[0]}, which its "
                             "generation prompt leaves out: give a template that heeds "
                             "add_generation_prompt")
        if not all(c["function"]["name"] in turn for c in message.get("tool_calls", ())):
            raise ValueError("the chat template leaves out tool_calls: give a template that writes "
                             "them, or write the calls as the turn's content")
        spans.append(range(len(before), len(after)))
    return text, spans


def encode(task: str, messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """Tokens of a conversation; the assistant's turns are supervised up to their end token."""
    text, spans = supervised_spans(messages, tokenizer)
    ids, starts = tokenizer.encode(text)
    labels = [IGNORE] * len(ids)
    for span in spans:
        for i, (token, start) in enumerate(zip(ids, starts)):
            if start in span:
                labels[i] = token
                if token in tokenizer.stop_ids:      # a line end after it is not generated
                    break
    return Example(task, ids, labels)


def encode_all(task: Task, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """The training examples of a task, cut to `max_length` tokens.

    An example without a supervised token before the limit is dropped. Raises the ValueErrors of
    `encode` with the task, and the example's number as --show counts it.
    """
    found = []
    for index, messages in enumerate(task.train):
        with naming(f"task {task.name}, training example {index + 1}, "
                    f"{messages[0]['content'][:40]!r}", ValueError):
            whole = encode(task.name, messages, tokenizer)
        ids, labels = whole.ids[:max_length], whole.labels[:max_length]
        if any(label != IGNORE for label in labels[1:]):
            found.append(Example(task.name, ids, labels, index, len(whole.ids) > max_length))
    return found


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """input_ids, attention_mask and labels, each (B, T), of right-padded examples."""
    def padded(rows: Iterable[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, fill).to(device)
    return (padded((e.ids for e in examples), pad_id),
            padded(([1] * len(e.ids) for e in examples), 0),
            padded((e.labels for e in examples), IGNORE))


def bucket(examples: Sequence[Example], batch_size: int, seed: int) -> list[list[Example]]:
    """Shuffled batches of examples of similar length, to save padding: sorted within windows of 16
    batches only, so that batches stay mixed."""
    rng, order, window = random.Random(seed), list(examples), 16 * batch_size
    rng.shuffle(order)
    batches = []
    for i in range(0, len(order), window):
        near = sorted(order[i:i + window], key=lambda e: len(e.ids))
        batches += [near[j:j + batch_size] for j in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


def probe_batches(examples: Sequence[Example], count: int, batch_size: int, pad_id: int,
                  device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Batches, of similar length within each, from the first `count` examples."""
    chosen = sorted(examples[:count], key=lambda e: len(e.ids))
    for i in range(0, len(chosen), batch_size):
        yield collate(chosen[i:i + batch_size], pad_id, device)
