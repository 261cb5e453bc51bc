"""mutants.py says by its exit code that too few mutants are killed."""

import sys
import tempfile

import mutants
import pytest


def test_too_few_killed_mutants_are_a_failure(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))          # where it keeps what it knows
    monkeypatch.setattr(mutants, "survives", lambda file, *_: file.endswith("allocate.py"))
    monkeypatch.setattr(mutants.signal, "signal", lambda *_: None)
    for share in ("0.1", "0.99"):
        monkeypatch.setattr(sys, "argv", ["mutants.py", "--room", "method", "--count", "30",
                                          "--at-least", share])
        if share == "0.1":
            mutants.main()
        else:
            with pytest.raises(SystemExit, match="fewer than 99% were killed"):
                mutants.main()
    assert "survived   minismoe/method/allocate.py" in capsys.readouterr().out
