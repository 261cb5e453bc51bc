"""The runtime on 64-bit ARM, emulated. MINISMOE_ARM64 names a system that arm64.py made before."""

import os
import subprocess
from pathlib import Path

import arm64
import pytest


@pytest.mark.slow
@pytest.mark.skipif(bool(arm64.lacking()), reason=f"not here: {arm64.lacking()}")
def test_exports_say_on_arm_what_they_say_here(tmp_path: Path) -> None:
    root = Path(os.environ.get("MINISMOE_ARM64", tmp_path / "root"))
    try:
        if not root.exists():
            arm64.prepare(root)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"an ARM system cannot be made here: {e}")
    folders = arm64.write_exports(tmp_path)
    assert arm64.compare(root, folders)["fp32"] > 0          # another processor rounds differently
    done = arm64.run(root, "-m", "minismoe.runtime", tmp_path / "int4", "hello", "--max-tokens", 4,
                     "--stats", "--threads", 1)
    assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr
