"""What an exported folder says: export.json, checked before anything is opened, and its tasks."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data.tokenizer import Message
from ..io.files import inside, naming, read_json, sha256
from ..io.text import clean

FORMAT = "minismoe.export/1"
TASKS = "tasks.json"                         # {task: {"choices": answers, "instruction": text}}
FLOAT, FLOAT16, INT64 = 1, 10, 7             # onnx.TensorProto's numbers
CACHES = ("shared", "growing", "fixed", "slots")         # cache.py has one of each kind


def read_info(folder: Path, verify: bool = False) -> dict[str, Any]:
    """Read export.json, and compare the sizes of the files, with `verify` their hashes too.

    Raises FileNotFoundError for a missing file, ValueError for a broken or hostile one.
    """
    file = folder / "export.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no export.json; export.py --layout onnx writes one")
    info = read_json(file)
    try:
        for name, good in _checks(info):
            if not good:
                raise ValueError(f"{name} {info.get(name)!r}")
        for name in os.listdir(folder):      # files that export.json does not list are read too
            inside(folder, name)
        files = {plain_file(folder, name): (entry["bytes"], entry["sha256"])
                 for name, entry in info["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        layout = clean(info.get("layout", "onnx"))
        hint = "export again" if layout in ("onnx", "genai", "web") else (
            f"its layout is {layout}, and the runtime reads --layout onnx, genai and web")
        raise ValueError(f"{file} is not understood: {type(e).__name__} {e}; {hint}") from None
    for path, (size, digest) in files.items():
        _compare(path, size, digest if verify else None)
    return info


def _compare(path: Path, size: object, digest: object) -> None:
    """Raise ValueError if a file has another size or, unless it is None, another hash."""
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path} has {found} bytes instead of {size!r}: it was cut or changed; "
                         "export again")
    if digest is not None and sha256(path) != digest:
        raise ValueError(f"{path} is not what was exported: its hash differs")


def _checks(info: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Names of values in export.json, and whether each is of the right type and in range."""
    yield "format", info["format"] == FORMAT
    yield "target", info["target"] in ("ort", "portable", "npu")
    yield "contract", info["contract"]["cache"] in CACHES and (
        info["contract"]["cache"] == "slots") == (info["target"] == "npu")
    yield "soc", type(info.get("soc", 0)) is int
    static = info.get("static") or []
    yield "static", not static or (len(static) == 3 and static[0] == 1)
    for name, sizes in ("static", static), ("context", [info["context"]]):
        yield name, all(type(size) is int and 0 < size <= 1 << 24 for size in sizes)


def graph_of(info: dict[str, Any]) -> str:
    """The file of the decoder: that of layout web lies where transformers.js looks for it."""
    return str(info.get("contract", {}).get("graph", "model.onnx"))


def plain_file(folder: Path, name: object) -> Path:
    """folder / name; raises ValueError for a name or a link that leads out of the folder."""
    if not isinstance(name, str) or ".." in name.split("/") or name.startswith("/") or (
            set(name) & set("\\:\0")):
        raise ValueError(f"{folder / 'export.json'} names {name!r}, which is no plain file name")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} lacks {name}, which its export.json names: export again")
    return inside(folder, name)


def known_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """What tasks.json says of each task of the run: "choices", or [], and "instruction", or "".

    Raises ValueError if tasks.json is broken.
    """
    tasks = read_json(folder / TASKS) if (folder / TASKS).is_file() else {}
    with suppress(AttributeError, KeyError, TypeError):
        if all(isinstance(text, str) for task in tasks.values()
               for text in [*task["choices"], task["instruction"]]):
            return tasks
    raise ValueError(f"{folder / TASKS} does not hold what export.py writes: export again")


def instruction_of(folder: Path, task: str | None = None) -> str:
    """What training put before the questions of a task or, without a name, of the only task; ""
    if there is nothing, or one of several tasks is meant: then a line on stderr names them.

    Raises ValueError if the folder knows no such task.
    """
    tasks = known_tasks(folder)
    if task is not None and task not in tasks:
        raise ValueError(f"{folder} has no task {task!r}; present: {', '.join(tasks) or 'none'}")
    if task is None and len(tasks) > 1 and any(entry["instruction"] for entry in tasks.values()):
        print(clean(f"[asked without an instruction; --task NAME puts that of a task before the "
                    f"question: {', '.join(tasks)}]"), file=sys.stderr)
    if task is None and len(tasks) == 1:
        task, = tasks
    return str(tasks[task]["instruction"]) if task is not None else ""


def instructed(instruction: str, question: str) -> str:
    """A question behind its task's instruction, with which it may begin already."""
    return question if question.startswith(instruction) else instruction + question


def read_choices(folder: Path, name: str) -> list[str]:
    """The answers that an exported folder knows of a task, or those of a file, one a line.

    Raises ValueError for a name that is neither, text that is not UTF-8, and an empty line.
    """
    known = {task: entry["choices"] for task, entry in known_tasks(folder).items()
             if entry["choices"]}
    if name in known:                        # a task's name may be no file name
        return known[name]
    if not Path(name).exists():
        raise ValueError(f"{name} is no file, and none of the tasks whose answers {folder} knows: "
                         f"{', '.join(known) or 'none'}")
    with naming(f"{name} is not UTF-8 text", ValueError):
        text = Path(name).read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{name}, line {lines.index('') + 1} is empty: write one answer a line")
    return lines


def trained_system(folder: Path) -> list[Message]:
    """The system prompt that training added to lines (train.py --system), as messages."""
    system = read_json(folder / "export.json").get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) else []
