"""Two thousand steps and two thousand generations: memory stays flat, and no file is left."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from tiny import python

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")]

RESIDENT = """
import resource

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
"""

TRAIN = RESIDENT + """
import json, sys
from pathlib import Path
import minismoe.training.loop as training
from minismoe.training.plan import TrainConfig
from minismoe.io.process import bound_memory
from tiny import examples, python, tiny
bound_memory()
seen, step = [], training.Trainer.gradients

def watched(*args):
    seen.append(resident())
    return step(*args)

training.Trainer.gradients = watched
cfg = TrainConfig(epochs=334, batch_size=4, micro_batch_size=2, checkpoint_every=100)
training.train(tiny(), examples(), cfg, Path(sys.argv[1]), 0)
print(json.dumps(seen))
"""

GENERATE = RESIDENT + """
import json, sys
from pathlib import Path
import torch
from exported import CONFIG, export
from minismoe.model.decoder import CausalLM, Config
from minismoe.runtime import Generator
torch.manual_seed(0)
folder = export(CausalLM(Config.from_dict(CONFIG)).eval(), Path(sys.argv[1]) / "model")
generator, seen = Generator(folder, threads=1), []
for n in range(2000):
    list(generator.generate([1 + (n + i) % 40 for i in range(1 + n % 30)], 1 + n % 16,
                            temperature=n % 2 * 0.8, seed=n))
    seen.append(resident())
print(json.dumps(seen))
"""


def watch(code: str, folder: Path) -> list[int]:
    """Resident bytes, step by step, of a process that works in `folder`."""
    run = python("-c", code, folder, timeout=3600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def flat(seen: list[int]) -> bool:
    """Within 2 % of what it was after a fifth of the way."""
    warm = len(seen) // 5
    return len(seen) >= 2000 and max(seen[warm:]) <= 1.02 * seen[warm]


def test_memory_stays_flat_in_2000_training_steps(tmp_path: Path) -> None:
    seen = watch(TRAIN, tmp_path)
    assert flat(seen), [b >> 20 for b in seen[::100]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors",
                                                          "metrics.jsonl"]


def test_memory_stays_flat_in_2000_generations(tmp_path: Path) -> None:
    shared = Path(tempfile.gettempdir())
    before = {p.name for p in shared.iterdir() if p.name.startswith("tmp")}
    seen = watch(GENERATE, tmp_path)
    assert flat(seen), [b >> 20 for b in seen[::100]]
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".tmp"]
    assert {p.name for p in shared.iterdir() if p.name.startswith("tmp")} <= before
