"""Which files hold task lines, and these lines as conversations.

A file is NAME.jsonl, with a JSON object a line, or a table NAME.csv or NAME.tsv, whose first row
names its columns. The text is UTF-8, with or without a byte order mark. lines.py says what a line
holds.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .lines import form_of, notable, to_messages
from .tools import Message

WORDS = {"train": "training", "valid": "validation", "test": "test"}     # of splits
ENDING = re.compile(r"\.(jsonl|csv|tsv)$", re.IGNORECASE)
TABLE = re.compile(r"\.[ct]sv$", re.IGNORECASE)
UNREAD = (".json", ".parquet")           # endings of files that may hold lines in another format
LONGEST_LINE = 1 << 20           # bytes: about 250,000 tokens, more than any model reads
Columns = Sequence[str]          # those of prompt and answer in tables; () if a form names them
BadLines = defaultdict[tuple[Path, str], list[int]]      # (file, reason) -> numbers of lines


def task_places(data: Path) -> tuple[dict[str, Path], list[str]]:
    """{task: its folder or file}, and what to say of files beside them. A sub-folder with a
    train.jsonl, or a file of lines, is a task; so is `data`, if it is a file or holds train.jsonl.
    """
    if not data.exists():
        raise FileNotFoundError(f"no such data folder: {data}")
    places, folders, others = scan(data)
    if data.is_dir() and places.keys() & WORDS.keys():
        refuse_without_train(data, places)
        return {data.resolve().name: data}, []
    for folder in folders:
        files, _, notes = scan(folder)
        if not files:
            others += notes
            continue
        refuse_without_train(folder, files)
        if folder.name in places:
            raise ValueError(f"{data} holds {folder.name} twice, as a folder and as a file")
        places[folder.name] = folder
    return places, others


def refuse_without_train(folder: Path, files: Mapping[str, Path]) -> None:
    """Raise ValueError if no file of a task has the name of training lines."""
    if "train" not in files:
        names = ", ".join(file.name for file in files.values())
        raise ValueError(f"{folder} holds {names}, and no train.jsonl: give the file of its "
                         "training lines that name, or move the others elsewhere")


def scan(data: Path) -> tuple[dict[str, Path], list[Path], list[str]]:
    """Files of task lines, by name without ending; folders; and what to say of other files that may
    hold lines: in a folder, or of one file. What is hidden is left out.

    ValueError for two files of a name, and for what is no file: a link that leads nowhere, a pipe
    or a device.
    """
    files, folders, others = dict[str, Path](), list[Path](), list[str]()
    paths = sorted(p for p in data.iterdir() if p.name[0] != ".") if data.is_dir() else [data]
    for path in paths:
        name = ENDING.sub("", path.name)
        if path.is_dir():
            folders.append(path)
        elif path.suffix.lower() in UNREAD:
            others.append(f"{path.name} not read: write its lines into a .jsonl file, one JSON "
                          "object a line, or into a .csv file")
        elif name != path.name:
            if not path.is_file():
                raise ValueError(f"{path} is no file, but a link that leads nowhere, a pipe or a "
                                 "device: put a file there, or remove it")
            if files.setdefault(name, path) != path:
                raise ValueError(f"{data} holds {name} twice: {files[name].name} and {path.name}")
    return files, folders, others


def read_splits(task: Path, columns: Columns, bad: BadLines,
                ) -> tuple[dict[str, list[list[Message]]], list[str]]:
    """The conversations of each split that a task's folder or file holds, and what to say of them.
    Lines that are none are added to `bad`."""
    files, folders, others = scan(task)
    files = files if task.is_dir() else {"train": task}
    contents = Counter[str]()
    splits = {split: read_lines(files[split], bad, contents, columns)
              for split in WORDS if split in files}
    if not splits["train"] and not any(files["train"] == file for file, _ in bad):
        bad[files["train"], "it holds no example"].append(0)
    notes = [f"{count:,} {what}" for what, count in contents.most_common(10)]
    if columns and not any(TABLE.search(file.name) for file in files.values()):
        notes.append(f"--columns is for tables (.csv, .tsv), and {files['train'].name} is none")
    unread = [files[name] for name in files.keys() - WORDS.keys()] + folders
    if task.is_dir() and unread:
        names = ", ".join(sorted(path.name for path in unread))
        notes.append(f"{names} not read: a split is train, valid or test.jsonl")
    return splits, notes + others


def read_lines(file: Path, bad: BadLines, contents: Counter[str], columns: Columns = (),
               ) -> list[list[Message]]:
    """The conversations of a file. `contents` counts what they hold. Lines that are none are added
    to `bad`; number 0 stands for a table that cannot be read."""
    conversations, lines = list[list[Message]](), list[tuple[int, Any]]()
    try:
        lines += table_rows(file, columns) if TABLE.search(file.name) else json_lines(file)
    except ValueError as e:
        bad[file, f"it cannot be read: {e}"].append(0)
    for number, line in lines:
        try:
            value = parsed(line) if isinstance(line, bytes) else line
            messages = to_messages(value)
            json.dumps(messages, ensure_ascii=False).encode()        # fails on half an emoji
            contents.update(notable(value, messages))
            conversations.append(messages)
        except (ValueError, RecursionError) as e:
            bad[file, str(e)].append(number)
    return conversations


def json_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, by number from 1. They end at "\n" only: splitlines
    would also split at U+0085 and U+2028 inside strings."""
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, line


def parsed(line: bytes) -> Any:
    """The value of a line of JSON; ValueError if there is none."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"the line has {len(line):,} bytes; at most {LONGEST_LINE:,}")
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"no JSON: {e.msg}, column {e.colno}") from None


def table_rows(file: Path, columns: Columns = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table that are not blank, by the number of the line where each ends. Its first
    row names the columns; of `columns`, two names, only these are read, as prompt and completion.

    ValueError, with the line, if the table cannot be read.
    """
    rows = csv_rows(file)
    _, names = next(rows, (1, ["prompt", "completion"]))
    names = [name.strip() for name in names]
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"it has no column {', '.join(missing)}; it has {', '.join(names)}")
    if not columns and not form_of(names):
        raise ValueError(f"its columns are {', '.join(names)}: name the prompt's and the answer's, "
                         "such as --columns question,answer, or move the table elsewhere")
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(f"line {number} has {len(row)} fields where the first row names "
                             f"{len(names)}; a text that holds a separator stands in quotes")
        fields = dict(zip(names, row))
        if columns:
            prompt, completion = columns
            fields = {"prompt": fields[prompt], "completion": fields[completion]}
        yield number, fields


def csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row that is not blank, by the number of the line where it ends.

    What the first line has most of separates them: commas, semicolons (which Excel writes where a
    comma is the decimal point) or tabs. ValueError with the first line of a row that cannot be
    read.
    """
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ValueError(f"line {line} is not UTF-8: save the table as CSV UTF-8") from None
    first_line = text.partition("\n")[0]
    separator = max(",;\t", key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    first = 1
    try:
        for row in reader:
            if any(map(str.strip, row)):
                yield reader.line_num, row
            first = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"line {first}: {e}") from None


def refuse_lines(bad: BadLines) -> None:
    """Raise ValueError if there are bad lines: how many, the first ten reasons, and their places.

    A file is followed by its first three lines; number 0 stands for the file as a whole.
    """
    reasons = []
    for (file, reason), numbers in bad.items():
        first = f":{', '.join(map(str, numbers[:3]))}" if any(numbers) else ""
        more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        reasons.append(f"{file}{first}{more}: {reason}")
    if bad:
        count = sum(map(len, bad.values()))
        more = f"; and {len(reasons) - 10} more reasons" if len(reasons) > 10 else ""
        raise ValueError(f"{count} bad line{'s' if count > 1 else ''}: "
                         + "; ".join(reasons[:10]) + more)
