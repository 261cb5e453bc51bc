"""The names that a notebook uses, and what importing them costs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import minismoe

ROOT = Path(__file__).resolve().parents[1]


def test_every_name_resolves_to_what_it_says() -> None:
    import_module("minismoe.cli.inputs")            # imports every module, `minismoe.allocate` too
    for name in minismoe.__all__:
        assert getattr(minismoe, name).__name__ == name


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, minismoe; print({'torch', 'numpy', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_numpy_is_never_imported_and_nothing_unpickled() -> None:
    for file in [*(ROOT / "minismoe").rglob("*.py"), *ROOT.glob("*.py")]:
        found = re.findall(r"^\s*(?:import|from)\s+(?:numpy|pickle)|\.numpy\(|torch\.load\(",
                           file.read_text(), re.MULTILINE)
        assert not found, file
