"""Files and folders that appear whole or not at all, and locks; JSON, links, hashes of files."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """A name beside `path` for a new file, or a new folder, which is renamed to `path` once it is
    written without error.

    A folder takes no other's place: FileExistsError if `path` exists. A process that is killed
    leaves a hidden folder, .NAME.*.tmp, which may be deleted.
    """
    if folder:
        must_be_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    if folder:
        tmp.mkdir()
    try:
        with _named(path, tmp):
            yield tmp
            for file in tmp.rglob("*") if folder else [tmp]:
                if file.is_file():
                    _flush(file)                     # a power cut must not leave a file of zeros
            os.replace(tmp, path)
    finally:                                         # after the renaming, it is gone
        shutil.rmtree(tmp, ignore_errors=True) if folder else tmp.unlink(missing_ok=True)


@contextmanager
def _named(path: Path, tmp: Path) -> Iterator[None]:
    """Name `path` in an error of writing `tmp`, or of safetensors, which names no file."""
    try:
        yield
    except OSError as e:
        if e.errno and str(e.filename or tmp) == str(tmp):
            e.filename = str(path)
        raise
    except Exception as e:
        # safetensors has its own type for a full disk. The runtime works without safetensors.
        if type(e).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path} cannot be written: {e}") from None


def _flush(file: Path) -> None:
    with file.open("r+b") as f:                      # Windows flushes no file that is read alone
        os.fsync(f.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder`, hold it for this process alone, and remove files that a killed one left.

    The lock is the system's, on an open file, so it ends with the process. Raises BlockingIOError
    if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            if sys.platform == "win32":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockingIOError(f"{folder} is in use by another process: wait for its end, or "
                                  "choose another --out") from None
        for left in (*folder.rglob(".*.tmp"), *folder.rglob(".tmp??????")):  # ours, safetensors'
            if left.is_file():
                left.unlink()
        yield


def last_part(path: str | None) -> str | None:
    """The last part of a path, since an export may be published; a name of the hub as it is."""
    if path is None or not (Path(path).exists() or Path(path).is_absolute()):
        return path
    return Path(path).resolve().name


def must_be_new(path: Path) -> None:
    """Raise FileExistsError if the path exists, PermissionError if it cannot be made."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already: choose another name, or remove it")
    must_be_writable(path)


def must_be_writable(path: Path) -> None:
    """Raise PermissionError if no file can be made in `path`, a folder that may not exist yet."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    try:
        tempfile.TemporaryFile(dir=nearest).close()      # os.access says yes of /proc, too
    except OSError:
        raise PermissionError(f"{path} cannot be written: {nearest} is no folder that can be "
                              "written") from None


@contextmanager
def naming(place: object, *kinds: type[Exception]) -> Iterator[None]:
    """Raise exceptions of these kinds in the block as ValueErrors that begin with `place`."""
    try:
        yield
    except kinds as e:
        raise ValueError(f"{place}: {e}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; the file appears whole or not at all."""
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file; ValueError names the file and the place of an error."""
    with naming(f"{path} is not valid JSON", ValueError, RecursionError):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def inside(folder: Path, name: str) -> Path:
    """folder / name; ValueError if it is a link that leads out of the folder.

    The hub's cache links to a neighbouring folder, blobs: those links are allowed.
    """
    home, path = folder.resolve(), (folder / name).resolve()
    if not (path.is_relative_to(home) or path.parent == home.parent.parent / "blobs"):
        raise ValueError(f"{folder / name} is a link that leads out of its folder")
    return folder / name


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
