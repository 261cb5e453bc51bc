"""Which files hold task lines, and these lines, not parsed yet.

A file is NAME.jsonl, with a JSON object a line, or NAME.json, with such lines or a list of them, or
a table NAME.csv or NAME.tsv, whose first row names its columns. The text is UTF-8, UTF-16 or
UTF-32.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .forms import form_of

WORDS = {"train": "training", "valid": "validation", "test": "test"}     # of splits
ENDING = re.compile(r"\.(jsonl?|csv|tsv)$", re.IGNORECASE)
TABLE = re.compile(r"\.[ct]sv$", re.IGNORECASE)
# A field that begins with a quote and does not end with one, as '"No", he said' in a table that
# knows no quotes. A quote in a quoted field is written twice.
LOOSE_QUOTE = re.compile(r'(?:^|\t)"(?!(?:[^"]|"")*"(?:\t|\r?$))', re.MULTILINE)
Columns = Sequence[str]          # those of prompt and answer in tables; () if a form names them


def task_places(data: Path, columns: Columns = ()) -> tuple[dict[str, Path], list[str]]:
    """{task: its folder or file}, and what to say of files beside them. A sub-folder with a
    train.jsonl, or a file of lines, is a task; so is `data`, if it is a file or holds train.jsonl.
    """
    if not data.exists():
        raise FileNotFoundError(f"no such data folder: {data}")
    (files, folders, others), places = scan(data, columns), dict[str, Path]()
    for folder in folders:
        own, _, tables = scan(folder, columns)
        if "train" in own:
            places[folder.name] = folder
        elif not own:
            others += tables
        elif "train" not in files:
            raise ValueError(f"{folder} holds .jsonl files, and no train.jsonl: give the file of "
                             "its training lines that name, or move the folder elsewhere")
    if twice := places.keys() & files.keys():
        raise ValueError(f"{data} holds {min(twice)} twice, as a folder and as a file")
    places |= files
    if data.is_file() or not (splits := [files[name].name for name in WORDS if name in files]):
        return places, others
    if "train" not in files:
        raise ValueError(f"{data} holds {splits[0]}, and no train.jsonl beside it: give the file "
                         "of its training lines that name")
    if more := places.keys() - WORDS.keys():
        todo = ("Rename it to valid.jsonl" if more < {"validation", "val", "dev", "eval"} else
                "Move the files of each task into a folder of its own")
        raise ValueError(f"{data} is a task itself, as it holds {splits[0]}, and holds others: "
                         f"{', '.join(sorted(more))}. {todo}")
    return {data.resolve().name: data}, []


def scan(data: Path, columns: Columns = ()) -> tuple[dict[str, Path], list[Path], list[str]]:
    """Files of task lines, by name without ending; folders; and what to say of other files that may
    hold lines: in a folder, or of one file. Hidden folders are left out, and what macOS (._*) and
    Emacs (.#*) put beside files. FileNotFoundError for a link that leads nowhere, ValueError for
    two files of a name, and for a pipe or a device, which cannot be read twice.
    """
    files, folders, others = dict[str, Path](), list[Path](), list[str]()
    for path in sorted(data.iterdir()) if data.is_dir() else [data]:
        name = ENDING.sub("", path.name)
        if path.name.startswith(("._", ".#")) or path.is_dir() and path.name[0] == ".":
            continue
        if not path.exists():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not "
                                    "exist: mend or remove it")
        if path.is_dir():
            folders.append(path)
        elif not path.is_file() and (name != path.name or path == data):
            raise ValueError(f"{path} is a pipe or a device: write its lines into a .jsonl file")
        elif path.suffix.lower() == ".parquet":
            others.append(f"{path.name} not read: write its lines into a .jsonl or .csv file")
        elif name != path.name and (reason := holds_no_lines(path, columns)):
            others.append(f"{path.name} not read: {reason}")
        elif name != path.name and files.setdefault(name, path) != path:
            raise ValueError(f"{data} holds {name} twice: {files[name].name} and {path.name}")
    return files, folders, others


def holds_no_lines(file: Path, columns: Columns) -> str:
    """Why a file is none of task lines, good or bad; "" if it is one, as each .jsonl is. Many a
    .json or .csv is not."""
    if file.suffix.lower() == ".jsonl":
        return ""
    with suppress(ValueError, RecursionError):
        first = json.loads(next(filter(bytes.strip, raw_lines(file, columns)), b""))
        if TABLE.search(file.name):
            try:
                form_of(first)
            except ValueError:
                return (f"its columns are {', '.join(map(str, first))}: name the prompt's and the "
                        "answer's, such as --columns question,answer")
        return "" if isinstance(first, dict) else "it holds no task lines"
    return "" if TABLE.search(file.name) else "it holds no task lines"


def raw_lines(file: Path, columns: Columns = ()) -> list[bytes]:
    """The lines of a file, in UTF-8; of a JSON list its items, of a table its rows as JSON objects,
    in the place of the line where each ends. ValueError if it cannot be read.

    Lines end at "\n" only: str.splitlines would also split at U+0085 and U+2028 inside strings.
    """
    content = file.read_bytes()
    try:
        if not (encoding := json.detect_encoding(content)).startswith("utf-8"):
            content = content.decode(encoding).encode()
        content = content.removeprefix(codecs.BOM_UTF8)
        if TABLE.search(file.name):
            return table_rows(content, file.suffix.lower() == ".tsv", columns)
        if content.lstrip()[:1] == b"[":
            return [json.dumps(item).encode() for item in json.loads(content)]
    except (RecursionError, ValueError) as e:
        raise ValueError(f"it cannot be read: {e}") from None
    return content.split(b"\n")


def table_rows(content: bytes, tabs: bool, columns: Columns) -> list[bytes]:
    """The rows of a table as JSON objects, at the number of the line where each ends. Its first row
    names the columns; of `columns`, two names, only these are read, as prompt and completion.

    Columns are separated by tabs, or by what the first row has more of, commas or semicolons (which
    Excel writes where a comma is the decimal point). Quotes enclose fields, but with LOOSE_QUOTE in
    a table with tabs they are text.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        line = content[:e.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8: save the table as CSV UTF-8") from None
    first = text.partition("\n")[0]
    between = "\t" if tabs else max(",;", key=first.count)
    loose = tabs and LOOSE_QUOTE.search(text)
    rows = read_rows(csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True,
                                quoting=csv.QUOTE_NONE if loose else csv.QUOTE_MINIMAL))
    names, lines = [name.strip() for name in next(rows, (0, []))[1]], [b""]
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"it has no column {', '.join(missing)}; it has {', '.join(names)}")
    if len({*names}) < len(names):
        raise ValueError(f"two of its columns have one name: {', '.join(names)}")
    for number, row in rows:
        lines += [b""] * (number - 1 - len(lines))
        if any(map(str.strip, row)) and len(row) != len(names):
            raise ValueError(f"line {number} has {len(row)} fields where the first row "
                             f"names {len(names)}; a text with {between!r} stands in quotes")
        fields = dict(zip(names, row))
        if columns:
            fields = {key: fields.get(name, "") for key, name in
                      zip(("prompt", "completion"), columns)}
        lines.append(json.dumps(fields).encode() if any(map(str.strip, row)) else b"")
    return lines


def read_rows(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Each row of a csv.reader, with the number of its last line. ValueError with the first line of
    a row that cannot be read."""
    first = 1
    try:
        for row in reader:
            yield reader.line_num, row
            first = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"line {first}: {e}") from None
