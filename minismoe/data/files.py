"""Which files hold task lines, and these lines, not parsed yet.

A file is NAME.jsonl, with a JSON object a line, or NAME.json, with such lines or a list of them, or
either as NAME.jsonl.gz; in UTF-8, or in UTF-16 with a byte order mark.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path

WORDS = {"train": "training", "valid": "validation", "test": "test"}     # of splits
ENDING = re.compile(r"\.jsonl?(\.gz)?$", re.IGNORECASE)
READERS = {".csv": "read_csv('{}', dtype=str)", ".tsv": "read_table('{}', dtype=str)",
           ".parquet": "read_parquet('{}')"}                     # of pandas, for tables


def task_places(data: Path) -> tuple[dict[str, Path], list[str]]:
    """{task: its folder or file}, and what to say of files beside them. A sub-folder with a
    train.jsonl, or a file of lines, is a task; so is `data`, if it is a file or holds train.jsonl.
    """
    if not data.exists():
        raise FileNotFoundError(f"no such data folder: {data}")
    (files, folders, others), places = scan(data), dict[str, Path]()
    for folder in folders:
        own, _, tables = scan(folder)
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


def scan(data: Path) -> tuple[dict[str, Path], list[Path], list[str]]:
    """Files of task lines, by name without ending; folders; and what to say of other files that may
    hold lines: in a folder, or of one file. Hidden folders are left out, and what macOS (._*) and
    Emacs (.#*) put beside files. FileNotFoundError for a link that leads nowhere, ValueError for
    two files of a name.
    """
    files, folders, others = dict[str, Path](), list[Path](), list[str]()
    for path in sorted(data.iterdir()) if data.is_dir() else [data]:
        name, read = ENDING.sub("", path.name), READERS.get(path.suffix.lower())
        if path.name.startswith(("._", ".#")) or path.is_dir() and path.name[0] == ".":
            continue
        if not path.exists():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not "
                                    "exist: mend or remove it")
        if path.is_dir():
            folders.append(path)
        elif read:
            others.append(f'{path.name} not read: with pandas, python -c "import pandas; pandas.'
                          f"{read.format(path)}.to_json('{path.with_suffix('.jsonl')}', "
                          "orient='records', lines=True)\" writes its lines into a .jsonl file")
        elif name != path.name and not holds_lines(path):
            others.append(f"{path.name} not read: it holds no task lines")
        elif name != path.name and files.setdefault(name, path) != path:
            raise ValueError(f"{data} holds {name} twice: {files[name].name} and {path.name}")
    return files, folders, others


def holds_lines(file: Path) -> bool:
    """Whether a file holds task lines, good or bad, as each .jsonl does; many a .json does not."""
    with suppress(ValueError, RecursionError):
        return ".jsonl" in file.name.lower() or isinstance(
            json.loads(next(filter(bytes.strip, raw_lines(file)), b"")), dict)
    return False


def raw_lines(file: Path) -> list[bytes]:
    """The lines of a file, in UTF-8; of a JSON list its items. ValueError if it cannot be read.

    Lines end at "\\n" only: str.splitlines would also split at U+0085 and U+2028 inside strings.
    """
    content = file.read_bytes()
    try:
        if file.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            content = content.decode("utf-16").encode()
        content = content.removeprefix(codecs.BOM_UTF8)
        if content.lstrip()[:1] == b"[":
            return [json.dumps(item).encode() for item in json.loads(content)]
    except (EOFError, OSError, RecursionError, ValueError, zlib.error) as e:
        raise ValueError(f"it cannot be read: {e}") from None
    return content.split(b"\n")
