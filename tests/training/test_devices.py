"""One code path for all devices: what the CPU gives, on a device that refuses the CPU's tensors.

What that device is asked for, CUDA and MPS have kernels of, by torch's own list.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
from safetensors.torch import load_file
from tiny import ROOT, needs_other_device, python
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey, NativeFunction

import train
from minismoe.io.files import read_json

REAL = [name for name, there in (("cuda", torch.cuda.is_available()),
                                 ("mps", torch.backends.mps.is_available())) if there]
pytestmark = needs_other_device
PLAIN = "--batch-size 4"


@cache
def operators() -> tuple[dict[str, NativeFunction], list[dict]]:
    """PyTorch's operators by name, and the kernels that run on CUDA and those that do on MPS."""
    native = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(native / "native_functions.yaml"), str(native / "tags.yaml"))
    composite = [key for key in parsed.backend_indices if key.name.startswith("Composite")]
    return ({f"aten::{f.func.name}": f for f in parsed.native_functions},
            [[parsed.backend_indices[key] for key in (*composite, device)]
             for device in (DispatchKey.CUDA, DispatchKey.MPS)])


def everywhere(name: str) -> bool:
    """Whether both CUDA and MPS can run an operator."""
    found, devices = operators()
    function = found[name]
    if function.structured_delegate is not None:
        function = found[f"aten::{function.structured_delegate}"]
    return all(any(kernels.has_kernel(function) for kernels in device) for device in devices)


def script(name: str, *args: object) -> str:
    """What a script prints on the other device, which is asked only for what all devices have."""
    run = python(ROOT / "tests" / "tools" / "other_device.py", ROOT / name, *args, timeout=300,
                 OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr[-2000:]
    asked = run.stderr.splitlines()[-1].split()
    assert len(asked) > 5, "it ran on the CPU"
    assert [x for x in asked if not everywhere(x)] == []
    return run.stdout


def test_the_device_refuses_what_real_ones_refuse(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("""
import torch
x = torch.ones(2, 2, device="other", requires_grad=True)
(x @ x).relu().sum().backward()
print(x.grad.device, x.grad.tolist(), (x + torch.tensor(1.0)).cpu().device)
for y in (torch.ones(2, 2), torch.tensor([0])):
    for mixed in (lambda: x + y, lambda: x[y.long()]):
        try:
            mixed()
            print("mixed")
        except RuntimeError as e:
            print(e)
""")
    said = script(str(tmp_path / "x.py")).splitlines()
    assert said[0] == "other:0 [[4.0, 4.0], [4.0, 4.0]] cpu"
    assert said[1:] == [f"aten::{name} is given tensors of other and of cpu"
                        for name in ("add", "index")] * 2
    assert not any(map(everywhere, ("aten::linalg_eig", "aten::_weight_int4pack_mm_for_cpu")))


@pytest.fixture(scope="module")
def trained(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """flags -> a folder with a run of train.py on the CPU, "cpu", and one on the other, "other".

    AdamW moves an entry whose gradient is rounding noise by up to the rate, so the rate is low.
    """
    @cache
    def make(flags: str) -> Path:
        folder = tmp_path_factory.mktemp("devices")
        known = [*inputs, "--epochs", "1", "--lr", "1e-3",
                 *flags.split(), "--dtype", "float32"]
        train.main([*known, "--device", "cpu", "--out", str(folder / "cpu")])
        script("train.py", *known, "--device", "other", "--out", folder / "other")
        return folder

    return make


@pytest.mark.parametrize("flags", [
    PLAIN, pytest.param("--base-bits 8 --recompute", marks=pytest.mark.slow)])
def test_a_run_on_another_device_equals_that_on_the_cpu(trained: Callable[[str], Path],
                                                        flags: str) -> None:
    folder = trained(flags)
    cpu, other = (load_file(folder / d / "adapter" / "adapter.safetensors")
                  for d in ("cpu", "other"))
    assert cpu.keys() == other.keys() and all(
        v.abs().max() > 1e-3 for name, v in cpu.items() if name.endswith("lora_B"))
    for name, value in cpu.items():
        # Mixtures are fitted in float32.
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4, msg=name)
    cpu, other = (read_json(folder / d / "sensitivity.json")["tasks"] for d in ("cpu", "other"))
    for task, found in cpu.items():
        assert other[task]["scores"] == pytest.approx(found["scores"], rel=1e-5)


def test_freezing_and_rounding_stay_on_the_device(trained: Callable[[str], Path], tmp_path: Path
                                                  ) -> None:
    run = shutil.copytree(trained(PLAIN) / "other", tmp_path / "run")
    ways = ("--precision fp32 --target portable", "--precision int4 --target portable",
            "--routing freeze --precision int8 --target portable", "--target npu")
    (tmp_path / "x.py").write_text(f"""
import export
for n, flags in enumerate({ways}):
    export.main([{str(run)!r}, "--device", "other", "--limit-test", "2", *flags.split(),
                 "--out", f"{tmp_path}/{{n}}"])
""")
    script(str(tmp_path / "x.py"))
    assert len([*tmp_path.glob("*/model.onnx")]) == len(ways)


def test_which_tokens_a_model_expects_is_found_on_the_device(inputs: list[str],
                                                             tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(f"""
import torch
from minismoe import load_model
from minismoe.method.vocabulary import expected
ids = torch.tensor([[5, 60, 256, 7], [80, 3, 0, 0]])
for device in "cpu", "other":
    found = expected(load_model({inputs[1]!r}, device=device), [(ids, (ids > 0).long())])
    print(*found.cpu().tolist())
""")
    cpu, other = (map(float, line.split()) for line in script(str(tmp_path / "x.py")).splitlines())
    assert [*other] == pytest.approx([*cpu], rel=1e-5)


@pytest.mark.skipif(not REAL, reason="there is neither CUDA nor MPS here")
@pytest.mark.parametrize("flags, near", [
    ("--dtype float32", 1e-3), ("--dtype bfloat16 --recompute", 0.2), ("--base-bits 4", 1e-3)])
def test_a_real_device_learns(inputs: list[str], tmp_path: Path, flags: str, near: float) -> None:
    """It draws other numbers than a CPU, so what both measure of the base is compared."""
    for device in (REAL[0], "cpu"):
        done = python("train.py", *inputs, *flags.split(), "--epochs", 6,
                      "--batch-size", 4, "--device", device, "--out", tmp_path / device,
                      timeout=300)
        assert done.returncode == 0, done.stderr
    ours, cpu = (read_json(tmp_path / d / "sensitivity.json")["tasks"] for d in (REAL[0], "cpu"))
    for task, found in cpu.items():
        assert ours[task]["scores"] == pytest.approx(found["scores"], rel=near)
    steps = [json.loads(line) for line in
             (tmp_path / REAL[0] / "metrics.jsonl").read_text().splitlines()]
    assert sum(s["loss"] for s in steps[-5:]) < 0.7 * sum(s["loss"] for s in steps[:5])
