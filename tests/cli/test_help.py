"""What --help prints, word for word; `python -m pytest tests/cli/test_help.py` says what differs.

After a change that is meant, `python tests/cli/test_help.py` in the folder of the project, with
PYTHONPATH=. before it, writes help.txt anew.
"""

import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

import export
import probe
import train
from minismoe.runtime import __main__ as runtime

HELP = Path(__file__).with_name("help.txt")
WIDTH = {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}


def shown() -> str:
    """The help of all commands, without their usage, which differs between versions of Python."""
    texts = []
    for name, script in ("train", train), ("probe", probe), ("export", export), ("chat", runtime):
        with redirect_stdout(io.StringIO()) as out, suppress(SystemExit):
            script.main(["--help"])
        texts.append(f"minismoe {name}\n\n" + out.getvalue().partition("\n\n")[2])
    return "\n".join(texts)


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WIDTH.items():
        monkeypatch.setenv(name, value)
    assert shown() == HELP.read_text(encoding="utf-8")


if __name__ == "__main__":
    os.environ.update(WIDTH)
    HELP.write_text(shown(), encoding="utf-8")
