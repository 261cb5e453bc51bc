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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .lines import Contents, Conversation, form_of, to_messages
from .tools import Message

WORDS = {"train": "training", "valid": "validation", "test": "test"}     # of splits
ENDING = re.compile(r"\.(jsonl|csv|tsv)$", re.IGNORECASE)
TABLE = re.compile(r"\.[ct]sv$", re.IGNORECASE)
UNREAD = (".json", ".parquet")           # endings of files that may hold lines in another format
LONGEST_LINE = 1 << 20           # bytes: about 250,000 tokens, more than any model reads
Columns = Sequence[str]          # those of prompt and answer in tables; () if a form names them
BadLines = defaultdict[tuple[Path, str], list[int]]      # (file, reason) -> numbers of lines


def task_places(data: Path, columns: Columns = ()) -> tuple[dict[str, Path], list[str]]:
    """{task: its folder or file}, and what to say of files beside them. A sub-folder with a
    train.jsonl, or a file of lines, is a task; so is `data`, if it is a file or holds train.jsonl.
    """
    if not data.exists():
        raise FileNotFoundError(f"no such data folder: {data}")
    files, folders, others = scan(data, columns)
    if data.is_dir() and files.keys() & WORDS.keys():
        refuse_beside_splits(data, files, folders)
        return {data.resolve().name: data}, []
    places = dict(files)
    for folder in folders:
        own, _, notes = scan(folder, columns)
        if own and "train" not in own:
            raise ValueError(f"{folder} holds .jsonl files, and no train.jsonl: give the file of "
                             "its training lines that name, or move the folder elsewhere")
        if own and folder.name in files:
            raise ValueError(f"{data} holds {folder.name} twice, as a folder and as a file")
        if own:
            places[folder.name] = folder
        else:
            others += notes
    return places, others


def refuse_beside_splits(data: Path, files: Mapping[str, Path], folders: Sequence[Path]) -> None:
    """Raise ValueError if a folder that holds a task's splits has no train.jsonl, or holds other
    tasks as well."""
    split = next(files[name].name for name in WORDS if name in files)
    if "train" not in files:
        raise ValueError(f"{data} holds {split}, and no train.jsonl beside it: give the file "
                         "of its training lines that name")
    more = files.keys() - WORDS.keys() | {f.name for f in folders if "train" in scan(f)[0]}
    if more:
        todo = ("Rename it to valid.jsonl" if more < {"validation", "val", "dev", "eval"} else
                "Move the files of each task into a folder of its own")
        raise ValueError(f"{data} is a task itself, as it holds {split}, and holds others: "
                         f"{', '.join(sorted(more))}. {todo}")


def scan(data: Path, columns: Columns = ()) -> tuple[dict[str, Path], list[Path], list[str]]:
    """Files of task lines, by name without ending; folders; and what to say of other files that may
    hold lines: in a folder, or of one file.

    ValueError for two files of a name, and for what is no file: a link that leads nowhere, a pipe
    or a device.
    """
    files, folders, others = dict[str, Path](), list[Path](), list[str]()
    for path in filter(is_visible, sorted(data.iterdir())) if data.is_dir() else [data]:
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
            if names := other_columns(path, columns):
                others.append(f"{path.name} not read: its columns are {names}: name the prompt's "
                              "and the answer's, such as --columns question,answer")
            elif files.setdefault(name, path) != path:
                raise ValueError(f"{data} holds {name} twice: {files[name].name} and {path.name}")
    return files, folders, others


def is_visible(path: Path) -> bool:
    """No hidden folder, and nothing that macOS (._*) and Emacs (.#*) put beside files."""
    return not (path.name.startswith(("._", ".#")) or path.name[0] == "." and path.is_dir())


def other_columns(file: Path, columns: Columns) -> str:
    """The names of a table's columns, if they are those of no form of lines; else ""."""
    row = dict[str, str]()
    try:
        if TABLE.search(file.name) and not columns:
            _, row = next(table_rows(file), (0, row))
            form_of(row)
    except ValueError:               # a table that cannot be read has no row: it is a bad file
        return ", ".join(row)
    return ""


def read_lines(file: Path, bad: BadLines, contents: Contents, columns: Columns = (),
               ) -> list[list[Message]]:
    """The conversations of a file. Lines that are none are added to `bad`; number 0 stands for a
    table that cannot be read."""
    conversations, lines = list[list[Message]](), list[tuple[int, Any]]()
    try:
        lines += table_rows(file, columns) if TABLE.search(file.name) else json_lines(file)
    except ValueError as e:
        bad[file, f"it cannot be read: {e}"].append(0)
    for number, line in lines:
        try:
            messages = to_messages(parsed(line) if isinstance(line, bytes) else line, contents)
            json.dumps(messages, ensure_ascii=False).encode()        # fails on half an emoji
            conversations.append(Conversation(messages))
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
    _, names = next(rows, (1, []))
    names = [name.strip() for name in names]
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"it has no column {', '.join(missing)}; it has {', '.join(names)}")
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
