"""The runtime on 64-bit ARM, emulated: tiny exports must say there what they say here.

    python tests/tools/arm64.py ROOT

Makes ROOT, if it does not exist, an ARM system with Python and onnxruntime. Runs each of EXPORTS
there and here: greedy texts, their logits, and one of a set of answers. Prints how far the logits
are apart. Needs Linux, a network, root's rights, and apt's qemu-user-static and debootstrap.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = ("qemu-aarch64-static", "debootstrap", "dpkg")
ROOM = Path(__file__).resolve().parents[2]
SUITE = "trixie"                             # of Debian
PROMPTS = ("What is the capital of France?", "Which is smaller, 31 or 13?", "Hello!", "Count.")
CHOICES = ("yes", "no", "nobody")
# {name: how far logits may be apart, as a share of the largest}. In few bits, activations are
# rounded to 8 bits, and each kind of processor chooses the steps in its own way.
EXPORTS = {"fp32": 1e-5, "int8": 0.05, "int4": 0.05, "dynamic": 1e-5}


def lacking() -> str:
    """Which of the tools is not here; "" if none."""
    return ", ".join(tool for tool in TOOLS if not shutil.which(tool)) or (
        "" if hasattr(os, "getuid") and os.getuid() == 0 else "root's rights")


def prepare(root: Path) -> None:
    """Make `root` an ARM system; subprocess.CalledProcessError if a tool fails."""
    made = Path(tempfile.mkdtemp(dir=root.parent, prefix="arm64"))

    def call(*command: object) -> None:
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)

    call("debootstrap", "--foreign", "--variant=minbase", "--arch=arm64",
         "--include=python3,libgomp1,libstdc++6", SUITE, made)
    for package in (made / "var" / "cache" / "apt" / "archives").glob("*.deb"):
        call("dpkg", "-x", package, made)                # its second stage would need a chroot
    version = next((made / "usr" / "bin").glob("python3.*")).name.removeprefix("python")
    import onnxruntime
    call(sys.executable, "-m", "pip", "install", "--quiet", "--target", made / "packages",
         "--only-binary=:all:", "--platform", "manylinux_2_28_aarch64", "--platform",
         "manylinux2014_aarch64", "--python-version", version,
         f"onnxruntime=={onnxruntime.__version__}")
    made.rename(root)


def run(root: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Python in an ARM system, with these arguments."""
    return subprocess.run(
        ["qemu-aarch64-static", "-L", str(root), str(root / "usr" / "bin" / "python3"),
         *map(str, args)], cwd=ROOM, text=True, capture_output=True, timeout=600,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{root / 'packages'}:{ROOM}"})


def answers(folder: Path) -> dict[str, Any]:
    """What a folder says: texts, logits after each token of the last one, and likeliest choices."""
    from minismoe.runtime import Generator

    generator = Generator(folder, threads=1)
    prompts = [generator.tokenizer.render([{"role": "user", "content": text}], True)
               for text in PROMPTS]
    texts = [list(generator.generate(prompt, 12)) for prompt in prompts]
    batch = generator.batch(prompts, 12)
    logits = []
    for value in generator.forced(generator.encoded(prompts[-1:])[0], texts[-1]):
        count = value.shape()[-1]
        rows = value.shape()[1]
        floats = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_float))
        logits += floats[(rows - 1) * count:rows * count]
    return {"texts": texts, "batch": batch, "logits": logits,
            "choices": [a.text for a in generator.choose(prompts[1], CHOICES, 3)]}


def write_exports(folder: Path) -> list[Path]:
    """A folder of each of EXPORTS: of the built-in toy, and of a random model with experts."""
    import torch
    from exported import export, random_model

    from minismoe.method.experts import ExpertLinear

    for precision in ("fp32", "int8", "int4"):
        subprocess.run([sys.executable, str(ROOM / "export.py"), "--precision", precision, "--out",
                        precision], cwd=folder, check=True, capture_output=True)
    model, name = random_model(seed=3), "model.layers.0.mlp.up_proj"
    torch.manual_seed(0)
    mixture = ExpertLinear(model.get_submodule(name), 3, 4, 8.0, 2)
    torch.nn.init.normal_(mixture.lora_B, std=0.2)
    export(model, folder / "dynamic", context=512, **{name: mixture})
    return [folder / name for name in EXPORTS]


def compare(root: Path, folders: Sequence[Path]) -> dict[str, float]:
    """{export: the largest difference of logits, as a share of the largest}.

    Raises AssertionError if a text or a choice differs, or logits by more than EXPORTS says.
    """
    done = run(root, Path(__file__), "--answers", *folders)
    assert done.returncode == 0, done.stderr
    found = {}
    for folder, there in zip(folders, map(json.loads, done.stdout.splitlines())):
        here = answers(folder)
        wanted, seen = here.pop("logits"), there.pop("logits")
        assert there == here, folder.name
        apart = max(abs(a - b) for a, b in zip(wanted, seen, strict=True)) / max(map(abs, wanted))
        assert apart <= EXPORTS[folder.name], f"{folder.name}: {apart}"
        found[folder.name] = apart
    assert len(found) == len(EXPORTS)
    return found


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--answers"]:            # within the emulator
        for folder in argv[1:]:
            print(json.dumps(answers(Path(folder))), flush=True)
        return
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.exit(__doc__)
    root = Path(argv[0])
    if not root.exists():
        prepare(root)
    sys.path[:0] = [str(ROOM), str(ROOM / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        for name, apart in compare(root, write_exports(Path(folder))).items():
            print(f"{name}: texts and choices equal, logits within {apart:.1e} of the largest")


if __name__ == "__main__":
    main(sys.argv[1:])
