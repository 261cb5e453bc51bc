"""Files appear whole or not at all, with the permissions of any other file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from minismoe.io.files import locked, read_json, replacing, write_json


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
        raise error("the reason")
    assert [p.read_text() for p in file.parent.iterdir()] == ([f'"{before}"\n'] if before else [])


def test_a_folder_appears_whole_and_takes_no_others_place(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "x", folder=True) as tmp:
        (tmp / "file").write_text("half")
        raise RuntimeError
    assert not [*tmp_path.iterdir()]
    with replacing(tmp_path / "x", folder=True) as tmp:
        (tmp / "file").write_text("whole")
    assert [(p.name, (p / "file").read_text()) for p in tmp_path.iterdir()] == [("x", "whole")]
    with pytest.raises(FileExistsError, match="exists already"), \
            replacing(tmp_path / "x", folder=True):
        pytest.fail("it was begun")


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    """A power cut after the renaming must not find a file of zeros under the new name."""
    flushed, fsync = list[bool](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (
        flushed.append((tmp_path / "x.json").exists()), fsync(fd)))
    write_json(tmp_path / "x.json", {})
    assert flushed == [False]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError) as found, replacing(tmp_path / "x") as tmp:
        tmp.write_text("x")
    assert found.value.filename == str(tmp_path / "x")


@pytest.mark.skipif(sys.platform == "win32", reason="no umask there")
def test_permissions_honour_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", {})
        with replacing(tmp_path / "folder", folder=True):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("x.json", "folder")] == [
        0o640, 0o750]


def test_a_second_process_is_refused_and_a_dead_one_leaves_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path; from minismoe.io.files import locked
with locked(Path({str(tmp_path)!r})): print("held", flush=True); time.sleep(60)"""],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="is in use by another process"), locked(tmp_path):
        pytest.fail("two hold it")
    holder.kill()
    holder.wait()
    for left in (".config.json.x.tmp", ".tmpZ0aZ9b"):     # the latter is as safetensors writes
        (tmp_path / left).touch()
    with locked(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"größe": [1, 2.5, None, "\u2028"], "b": {"c": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "größe" in (tmp_path / "x.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"bad": object()})
    assert read_json(tmp_path / "x.json") == value
