"""Some hundred cases of fuzz.py, which has more by its own command."""

import pytest
from tiny import ROOT, python


def cases(count: int) -> None:
    """In a process of its own, whose memory is measured."""
    done = python(ROOT / "tests" / "tools" / "fuzz.py", "--cases", count, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{count} cases, 0 failed" in done.stdout


def test_400_damaged_inputs_are_read_or_refused() -> None:
    cases(400)


@pytest.mark.slow
def test_20000_damaged_inputs_are_read_or_refused() -> None:
    cases(20_000)
