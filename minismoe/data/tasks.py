"""From task files to batches: lines, chat messages, tokens and their labels, padded tensors.

A task is a folder with train.jsonl and, preferably, valid.jsonl and test.jsonl, or one .jsonl file.
files.py says which files are read, and lines.py what their lines hold.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..io.files import naming
from ..method.loss import IGNORE
from .answers import closed_answers, new_words, shared_instruction
from .files import WORDS, BadLines, Columns, read_splits, refuse_lines, task_places
from .tokenizer import Tokenizer
from .tools import Message
from .turns import Line, check_template, encode_line

HELD_OUT = 0.1                   # share of the training lines, for a split that has no file
MOST_TESTED, MOST_VALIDATED = 1000, 64       # lines of that share; validation is read many times
Batch = tuple[Tensor, Tensor, Tensor]        # input_ids, attention_mask, labels, each (B, T)


@dataclass
class Task:
    """Conversations of one task; each ends with an assistant's turn.

    Training reads `train`; `valid` says when it is best, and `test`, read last, how good it is.
    """

    name: str
    train: list[list[Message]]
    test: list[list[Message]]
    valid: list[list[Message]] = field(default_factory=list)
    has_valid: bool = True                               # a file says which lines these are
    notes: list[str] = field(default_factory=list)       # what the files hold, and how they are cut

    def __post_init__(self) -> None:
        """Find what all lines share, before --limit-train leaves some of them out."""
        # The answers, if they are a small set; whole lines that begin all prompts; and the share of
        # new words in answers, of which free text has many.
        self.choices = closed_answers(self.train, [*self.valid, *self.test])
        self.instruction = shared_instruction(self.train)
        self.new_words = new_words(self.train)


@dataclass
class Example:
    """One conversation as tokens; labels are IGNORE at unsupervised tokens.

    The plan of its task sets how it is trained: prompt_weight is the weight in the loss of the
    tokens at `asked`, and smoothing the share of probability that other tokens get.
    """

    task: str
    ids: list[int]
    labels: list[int]
    index: int = 0                # its place among the task's training conversations
    cut: bool = False             # by the length limit
    asked: list[int] = field(default_factory=list)       # positions of what users wrote
    new_words: float = 0.0        # their share in the task's answers
    prompt_weight: float = 0.0
    smoothing: float = 0.0

    @property
    def supervised(self) -> int:
        """How many tokens have a loss; the first one has none, as nothing predicts it."""
        return sum(label != IGNORE for label in self.labels[1:])


def load_tasks(data: str | Path, names: Sequence[str] = (), seed: int = 0, columns: Columns = (),
               ) -> list[Task]:
    """The tasks of a folder or file, or those of `names`, sorted by name. `seed` draws the lines
    that are held out; `columns` name the prompt's and the answer's column of tables.

    Raises FileNotFoundError if the folder or a task is missing, and ValueError with file, line and
    reason for the bad lines of all files.
    """
    places, others = task_places(Path(data))
    if missing := [name for name in names if name not in places]:
        raise FileNotFoundError(f"{data} has no task {', '.join(missing)}; "
                                f"it has {', '.join(places) or 'none'}")
    if not places:
        entries = [path.name for path in sorted(Path(data).glob("*"))]
        raise FileNotFoundError("; ".join([
            f"{data} holds no task: no .jsonl or .csv file, and no folder with a train.jsonl. It "
            f"holds {', '.join(entries[:10]) or 'nothing'}", *others]))
    bad = BadLines(list)
    tasks = [_load_task(name, places[name], seed, columns, bad) for name in sorted(names or places)]
    refuse_lines(bad)
    tasks[0].notes += others             # beside the tasks
    trained = {task.name: {comparable(messages) for messages in task.train} for task in tasks}
    for task in tasks:
        tested = {comparable(messages) for messages in task.test}
        task.notes += [f"{count} test lines are training lines of {name}"
                       for name, lines in trained.items() if (count := len(tested & lines))]
    return tasks


def comparable(messages: Sequence[Message]) -> bytes:
    """The same of two conversations that differ in white space around their texts alone."""
    stripped = [{**m, "content": m.get("content", "").strip()} for m in messages]
    return hashlib.blake2b(json.dumps(stripped).encode(), digest_size=16).digest()


def _load_task(name: str, path: Path, seed: int, columns: Columns, bad: BadLines) -> Task:
    """A task with its three splits. Lines for a test without a file are held out from training; no
    line is in two splits."""
    splits, notes = read_splits(path, columns, bad)
    train, found = splits["train"], splits.get("valid", [])
    count = len(train)
    if "test" in splits:
        test = splits["test"]
    else:
        test = hold_out(train, f"{seed} {name} test", 1, MOST_TESTED)
        notes.append(f"no test.jsonl: {len(test)} of {count} training lines held out")
        count -= len(test)
    valid = without(found, test)
    if known := len(found) - len(valid):
        notes.append(f"{known} validation lines left out, as they are in the test")
    train = without(train, [*test, *valid])
    if left_out := count - len(train):
        notes.append(f"{left_out} training lines left out, as they are in the test or validation")
        if not train:
            bad[path, "all its training lines are test or validation lines, too"].append(0)
    if twice := len(train) - len({comparable(messages) for messages in train}):
        notes.append(f"{twice} training lines are copies of others")
    return Task(name, train, test, valid, "valid" in splits, notes)


def hold_out(lines: Sequence[list[Message]], seed: str, least: int, most: int,
             ) -> list[list[Message]]:
    """A tenth of different lines, `least` to `most`, but never all of them."""
    distinct = [*{comparable(messages): messages for messages in lines}.values()]
    count = min(max(least, round(HELD_OUT * len(lines))), most, len(distinct) - 1)
    return random.Random(seed).sample(distinct, max(0, count))


def hold_out_validation(task: Task, seed: int) -> None:
    """Move some training lines of a task that has no file of validation lines to these."""
    count = len(task.train)
    task.valid = hold_out(task.train, f"{seed} {task.name} valid", 0, MOST_VALIDATED)
    task.train = without(task.train, task.valid)
    task.notes.append(f"no valid.jsonl, and free text: {len(task.valid)} of {count} training lines "
                      "held out")


def without(lines: Sequence[list[Message]], others: Iterable[list[Message]]) -> list[list[Message]]:
    """The conversations that are not among `others`, in their order."""
    known = {comparable(messages) for messages in others}
    return [messages for messages in lines if comparable(messages) not in known]


def encode_lines(task: Task, tokenizer: Tokenizer, split: str = "train") -> Iterator[Line]:
    """The lines of a task's split, "train", "valid" or "test", as tokens, whole.

    Raises the ValueErrors of `encode_line` and `check_template` with the task, the split, and the
    example's number as --show counts it.
    """
    checked = set[bool]()
    for number, messages in enumerate(getattr(task, split), 1):
        with naming(f"task {task.name}, {WORDS[split]} example {number}, "
                    f"{messages[0]['content'][:40]!r}", ValueError):
            calls = any("tool_calls" in message for message in messages)
            if calls not in checked:         # a template writes all lines alike
                check_template(messages, tokenizer)
                checked.add(calls)
            line = encode_line(messages, tokenizer)
        yield line


def example_of(task: str, line: Line) -> Example:
    """The example of a line, whole: the assistant's turns are supervised up to their end token."""
    ids, labels, asked = line.whole.ids, [IGNORE] * len(line.whole.ids), list[int]()
    for turn in line.turns:
        if turn.supervised:
            labels[turn.tokens.start:turn.tokens.stop] = ids[turn.tokens.start:turn.tokens.stop]
        else:
            asked += turn.tokens
    return Example(task, ids, labels, asked=asked)


def cut(lines: Iterable[Line], task: Task, max_length: int) -> list[Example]:
    """The examples of some lines, of at most `max_length` tokens; those without a supervised token
    before the limit are left out."""
    examples = list[Example]()
    for index, line in enumerate(lines):
        whole = example_of(task.name, line)
        ids, labels = whole.ids[:max_length], whole.labels[:max_length]
        if any(label != IGNORE for label in labels[1:]):
            asked = [i for i in whole.asked if i < max_length]
            examples.append(Example(task.name, ids, labels, index, len(whole.ids) > max_length,
                                    asked, task.new_words))
    return examples


def encode_all(task: Task, tokenizer: Tokenizer, max_length: int, split: str = "train",
               ) -> list[Example]:
    """The examples of a task's split, cut to `max_length` tokens; see `encode_lines` and `cut`."""
    return cut(encode_lines(task, tokenizer, split), task, max_length)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """input_ids, attention_mask and labels, each (B, T), of right-padded examples."""
    def padded(rows: Iterable[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, fill)
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
                  ) -> Iterator[Batch]:
    """Batches, of similar length within each, from the first `count` examples."""
    chosen = sorted(examples[:count], key=lambda e: len(e.ids))
    for i in range(0, len(chosen), batch_size):
        yield collate(chosen[i:i + batch_size], pad_id)
