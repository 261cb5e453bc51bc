"""Files that appear whole or not at all, and hold what they should."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there replaces `path`, or nothing does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        _sync(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        _sync(path.parent)
    except OSError as e:                             # a failed write does not say of which file
        e.filename = e.filename or str(path)
        raise
    except Exception as e:                           # safetensors has its own for a full disk, and
        if type(e).__name__ != "SafetensorError":    # the runtime does without safetensors
            raise
        raise OSError(f"{path} cannot be written: {e}") from None
    finally:
        Path(name).unlink(missing_ok=True)           # nothing, once it was renamed


def must_be_new(path: Path) -> None:
    """FileExistsError where there is something of that name."""
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name, or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which is not there yet: it becomes `path`, or is gone."""
    must_be_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield tmp
        for part in (*tmp.rglob("*"), tmp):
            _sync(part)
        os.chmod(tmp, 0o777 & ~_umask())
        os.replace(tmp, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)       # nothing, once it was renamed


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    windows = os.name == "nt"                        # it syncs what can be written, and no folder
    if windows and path.is_dir():
        return
    fd = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read JSON; ValueError names the file and the place where it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None


def inside(folder: Path, name: str) -> Path:
    """folder / name; ValueError where it is a link that leads out, and not to the hub's blobs."""
    home, path = folder.resolve(), (folder / name).resolve()
    if not (path.is_relative_to(home) or path.parent == home.parent.parent / "blobs"):
        raise ValueError(f"{folder / name} is a link that leads out of its folder")
    return folder / name


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, read 1 MiB at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
