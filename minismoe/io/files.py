"""Files and folders that appear whole or not at all, and locks; JSON, links, hashes of files."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".minismoe.tmp"             # the end of a folder's name before the renaming
# Temporary files that a killed process leaves in a run, safetensors' own (.tmpXXXXXX) among them.
LEFTOVERS = (".*.json.*.tmp", ".*.svg.*.tmp", "adapter/.*.tmp", ".checkpoint.*.tmp",
             ".tmp??????", "adapter/.tmp??????")


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """A temporary file or folder beside `path`, renamed to `path` once it is written without error.

    A folder takes no other's place: FileExistsError if `path` exists. Its process holds it by a
    lock, which ends with the process: folders beside it that killed processes left are removed.
    """
    if folder:
        must_be_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp, lock = _temporary_folder(path) if folder else (_temporary_file(path), None)
    try:
        yield tmp
        for written in (*tmp.rglob("*"), tmp):
            _sync(written)
        umask = os.umask(0)                          # temporary files are the user's alone
        os.umask(umask)
        os.chmod(tmp, (0o777 if folder else 0o666) & ~umask)
        os.replace(tmp, path)
        _sync(path.parent)
    except OSError as e:                             # a failed write does not name its file
        if e.errno and str(e.filename or tmp) == str(tmp):
            e.filename = str(path)
        raise
    except Exception as e:
        # safetensors has its own type for a full disk. The runtime works without safetensors.
        if type(e).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path} cannot be written: {e}") from None
    finally:                                         # after the renaming, it is gone
        shutil.rmtree(tmp, ignore_errors=True) if folder else tmp.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _temporary_file(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    return Path(name)


def _temporary_folder(path: Path) -> tuple[Path, int | None]:
    """A folder beside `path`, and its lock, if there is one; those that killed processes left are
    removed."""
    for left in path.parent.glob(f".*{UNFINISHED}"):
        with suppress(OSError):
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    new, lock = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)), None
    with suppress(OSError):
        lock = _lock(new)                            # before it has a name that others look for
    return new.rename(f"{new}{UNFINISHED}"), lock


def _lock(path: Path) -> int | None:
    """Lock a folder, or a file, which is made, until the number that is returned is closed; None if
    another process holds it. Raises OSError where it cannot be locked, as a folder on Windows."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(number)
        if e.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        return None
    return number


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder`, hold it for this process alone, and remove temporary files of killed ones.

    The lock is the system's, on an open file, so it ends with the process. Raises BlockingIOError
    if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder / ".lock")
    if lock is None:
        raise BlockingIOError(f"{folder} is in use by another process: wait for its end, or choose "
                              "another --out")
    try:
        for pattern in LEFTOVERS:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    """Flush a file to disk, or the names in a folder, if its file system can do that."""
    windows = os.name == "nt"                        # it cannot flush folders or read-only handles
    if windows and path.is_dir():
        return
    fd = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(fd)


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


def sha256_of_parts(file: Path, size: int) -> list[str]:
    """SHA-256 of each `size` bytes of a file, in order."""
    with file.open("rb") as f:
        return [hashlib.sha256(part).hexdigest() for part in iter(lambda: f.read(size), b"")]
