"""Two thousand steps and two thousand generations: memory stays flat, and no file is left."""

import json
import sys
from pathlib import Path

import pytest
from tiny import python

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")]

WATCH = """
import json, sys
from pathlib import Path
seen, folder = [], Path(sys.argv[1])

def watch():
    seen.append(int(Path("/proc/self/statm").read_text().split()[1]))
"""

TRAIN = """
import minismoe.training.loop as training
from minismoe.training.plan import TrainConfig
from minismoe.io.process import bound_memory
from tiny import examples, tiny
bound_memory()
step = training.Trainer.gradients
training.Trainer.gradients = lambda *args: (watch(), step(*args))[1]
cfg = TrainConfig(epochs=334, batch_size=4, micro_batch_size=2, checkpoint_every=100)
training.train(tiny(), examples(), cfg, folder, 0)
"""

GENERATE = """
import torch
from exported import CONFIG, export
from minismoe.model.decoder import CausalLM, Config
from minismoe.runtime import Generator
torch.manual_seed(0)
export(CausalLM(Config.from_dict(CONFIG)).eval(), folder / "model")
generator = Generator(folder / "model", threads=1)
for n in range(2000):
    list(generator.generate([1 + (n + i) % 40 for i in range(1 + n % 30)], 1 + n % 16,
                            temperature=n % 2 * 0.8, seed=n))
    watch()
"""


@pytest.mark.parametrize("work", [TRAIN, GENERATE], ids=["train", "generate"])
def test_memory_stays_flat_in_2000_turns(tmp_path: Path, work: str) -> None:
    """Within 2 % of what it was after a fifth of the way."""
    (temporary := tmp_path / "tmp").mkdir()
    done = python("-c", f"{WATCH}{work}\nprint(json.dumps(seen))", tmp_path, timeout=3600,
                  TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    pages = json.loads(done.stdout.splitlines()[-1])
    warm = len(pages) // 5
    assert len(pages) >= 2000 and max(pages[warm:]) <= 1.02 * pages[warm], pages[::100]
    assert not [*temporary.iterdir()] and not [*tmp_path.rglob("*.tmp")]
