"""A thousand cases of fuzz.py, which has more by its own command."""

import subprocess
import sys
from pathlib import Path

import pytest


def cases(count: int) -> None:
    """In a process of its own: the audit hook cannot be taken away again."""
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "tools" / "fuzz.py"),
                           "--cases", str(count)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{count} cases, 0 failed" in done.stdout


def test_1000_damaged_inputs_are_read_or_refused() -> None:
    cases(1000)


@pytest.mark.slow
def test_20000_damaged_inputs_are_read_or_refused() -> None:
    cases(20_000)
