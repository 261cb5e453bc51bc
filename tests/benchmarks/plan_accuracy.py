"""Compare train.py --plan with the measured peak memory of real training steps.

    python tests/benchmarks/plan_accuracy.py
    python tests/benchmarks/plan_accuracy.py --model SMOLLM2_135M --data FOLDER --limit-train 64

Takes the flags of train.py. The steps run in a process of their own, on the batch that the plan
says is the largest and on its neighbours in the schedule. On CUDA both sides leave out the memory
of the libraries.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import train
from minismoe.cli import plan as limits
from minismoe.cli import probing
from minismoe.cli.flags import RunConfig
from minismoe.cli.inputs import load_base, model_folder, read_data, settled
from minismoe.io import process as memory
from minismoe.method.experts import add_experts
from minismoe.method.sensitivity import shapes_of
from minismoe.training import memory as plan
from minismoe.training.loop import TrainConfig, schedule, train_step

AROUND = 2                       # steps before the largest, and after it


def asked(argv: list[str]) -> tuple[limits.Prospect, RunConfig]:
    """What train.py's flags ask for."""
    config = train.parse(argv)
    config = replace(config, inputs=settled(config.inputs))
    return limits.Prospect(config), config


def planned(argv: list[str]) -> dict[str, int]:
    """Bytes by part."""
    p, config = asked(argv)
    micro = config.training.micro_batch_size
    if config.auto:
        micro = limits.fitting(p)
    return {"runtime": p.runtime, **p.fixed, "micro_batch_size": micro,
            "activations": p.training_peak(micro) - p.fixed_total}


def measured(argv: list[str], micro: int) -> int:
    """Bytes at the peak of some steps."""
    config = train.parse(argv)
    config = replace(config, inputs=settled(config.inputs))
    folder = model_folder(config.inputs)
    examples = [e for x in read_data(config.inputs, folder)[2].values() for e in x]
    batches = schedule(examples, config.training)
    place = batches.index(plan.largest(batches, config.training.batch_size))
    model = load_base(config.inputs, folder)
    add_experts(model, probing.guess(config.allocating, shapes_of(model),
                                     sorted({e.task for e in examples})))
    model.model.recompute = config.training.recompute
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], fused=True)
    for step, batch in enumerate(batches[max(0, place - AROUND):place + AROUND + 1]):
        train_step(model, batch, TrainConfig(micro_batch_size=micro), 0, step)
        optimizer.step()
        optimizer.zero_grad()
    if config.inputs.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return memory.peak_resident()


def main() -> None:
    flags = sys.argv[1:]
    if flags and flags[0] in ("planned", "measured"):
        memory.bound_memory()                          # as the scripts do
        found = planned(flags[1:]) if flags[0] == "planned" else measured(flags[2:], int(flags[1]))
        print(json.dumps(found))
        return

    def child(*argv: str) -> dict | int:
        run = subprocess.run([sys.executable, __file__, *argv, *flags], check=True,
                             stdout=subprocess.PIPE)
        return json.loads(run.stdout.splitlines()[-1])

    parts = child("planned")
    micro = parts.pop("micro_batch_size")
    if torch.cuda.is_available():
        del parts["runtime"]
    peak, wanted = child("measured", str(micro)), sum(parts.values())
    print(" ".join(flags), f"micro-batch {micro}")
    print(", ".join(f"{part} {size / plan.MIB:,.0f}" for part, size in parts.items()))
    print(f"planned {wanted / plan.MIB:,.0f} MiB, measured {peak / plan.MIB:,.0f} MiB: "
          f"{100 * (wanted / peak - 1):+.1f} %", flush=True)


if __name__ == "__main__":
    main()
