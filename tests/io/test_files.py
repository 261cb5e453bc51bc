"""Files appear whole or not at all, with the permissions of any other file."""

import errno
import os
import signal
import stat
import sys
from pathlib import Path

import pytest
from tiny import python

from minismoe.io import files
from minismoe.io.files import read_json, replacing, write_json


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, before: str | None,
                                            error: type[BaseException]) -> None:
    file = tmp_path / "new" / "folder" / "x.json"
    if before:
        write_json(file, before)
    with pytest.raises(error, match="the reason"), replacing(file) as tmp:
        tmp.write_text("half")
        assert tmp.parent == file.parent, "another file system could not be renamed from"
        if error is RuntimeError:
            tmp.unlink()
        raise error("the reason")
    assert [p.read_text() for p in file.parent.iterdir()] == ([f'"{before}"\n'] if before else [])


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be locked there")
def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch) -> None:
    """Of any name beside the new one; those of a living process stay, in another container too."""
    code = ("import os, signal, sys; from pathlib import Path; "
            "from minismoe.io.files import replacing\n"
            "with replacing(Path(sys.argv[1]), folder=True) as tmp:\n"
            "    (tmp / 'x').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)")
    assert python("-c", code, tmp_path / "first").returncode == -signal.SIGKILL
    assert len(left := [*tmp_path.iterdir()]) == 1 and (left[0] / "x").exists()
    (tmp_path / ".notes.tmp").mkdir()                    # not ours
    monkeypatch.setattr(os, "getpid", lambda: 99_999_999)       # no process of this container
    with (replacing(tmp_path / "alive", folder=True) as alive,
          replacing(tmp_path / "second", folder=True)):
        assert alive.exists() and not left[0].exists()
    assert {p.name for p in tmp_path.iterdir()} == {".notes.tmp", "alive", "second"}


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   ) -> None:
    """A power cut after the renaming must not find a file of zeros under the new name."""
    said: list[tuple[str, str]] = []
    sync, replace = files._sync, os.replace
    monkeypatch.setattr(files, "_sync", lambda p: (said.append(("sync", p.name)), sync(p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (
        said.append(("name", Path(b).name)), replace(a, b)))
    write_json(tmp_path / "x.json", {})
    (first, synced), *after = said
    assert first == "sync" and synced.startswith(".x.json.")
    assert after == [("name", "x.json"), ("sync", tmp_path.name)]


@pytest.mark.skipif(os.name == "nt", reason="folders are not flushed there")
def test_a_file_system_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 ) -> None:
    """Some shared folders refuse it. What is written there must not be lost at the last step."""
    flush, error = os.fsync, errno.EINVAL

    def refuse(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error, os.strerror(error))
        flush(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    with replacing(tmp_path / "export", folder=True) as folder:
        write_json(folder / "x.json", {"a": 1})
    assert read_json(tmp_path / "export" / "x.json") == {"a": 1}
    error = errno.EIO                        # a disk that fails is no such file system
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_json(tmp_path / "x.json", {})


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError) as found, replacing(tmp_path / "x"):
        pass
    assert found.value.filename == str(tmp_path / "x")


@pytest.mark.skipif(sys.platform == "win32", reason="no umask there")
def test_permissions_honour_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for mask in 0o022, 0o077, 0o002:
            os.umask(mask)
            write_json(tmp_path / "x.json", {})
            assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o666 & ~mask
            with replacing(tmp_path / f"{mask}", folder=True) as folder:
                pass
            assert (tmp_path / f"{mask}").stat().st_mode & 0o777 == 0o777 & ~mask
            assert not folder.exists() and os.umask(mask) == mask, "the umask was left changed"
    finally:
        os.umask(before)


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"größe": [1, 2.5, None, "\u2028"], "b": {"c": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "größe" in (tmp_path / "x.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"bad": object()})
    assert read_json(tmp_path / "x.json") == value
