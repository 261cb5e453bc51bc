"""Which parts of the mixture matter? Change one thing at a time, on the embedded default.

    python tests/benchmarks/ablations.py                         a quarter of an hour on one core

For each seed, all variants are trained on the same lines in the same order. The table shows exact
match, and how far the routers tell the tasks apart (routers.py), averaged over matrices.
The record goes to tests/benchmarks/results. After a kill, the same command continues.
"""

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
from compare_report import RESULTS, machine, table
from routers import separation, shares_of_gates
from tqdm import tqdm

from minismoe.cli import flags, script
from minismoe.cli.inputs import Inputs, load_inputs, resolve_auto
from minismoe.data import toy
from minismoe.data.tasks import probe_batches
from minismoe.io.files import read_json, write_json
from minismoe.io.flags import from_flags, new_parser
from minismoe.method.experts import add_experts, expert_layers, linear_layers
from minismoe.model.checkpoint import load_model, versions
from minismoe.training.evaluate import evaluate
from minismoe.training.loop import TrainConfig, train

FIRST_SEED, LR = 1000, 8e-3                  # seeds that no comparison reports


@dataclass(frozen=True)
class Variant:
    """Settings of one variant; the defaults are four experts of rank 8, two of them active."""

    experts: int = 4
    rank: int = 8
    top_k: int = 2
    balance: float = 0.01
    trained: bool = True                     # whether the routers are trained


VARIANTS = {
    "4 experts of rank 8, top 2": Variant(),
    "top 1": Variant(top_k=1), "all 4 active": Variant(top_k=4),
    "no balance loss": Variant(balance=0.0), "balance loss x 10": Variant(balance=0.1),
    "routers not trained": Variant(trained=False),
    "8 experts of rank 4, top 2": Variant(experts=8, rank=4),
    "8 experts of rank 4, top 4": Variant(experts=8, rank=4, top_k=4),
    "one expert of rank 32": Variant(experts=1, rank=32),
}


def run(variant: Variant, inputs: Inputs, seed: int) -> dict[str, float]:
    """Exact match and separation, from 0 to 1, of a variant trained with a seed."""
    model = load_model(toy.checkpoint_folder())
    torch.manual_seed(seed)
    add_experts(model, dict.fromkeys(linear_layers(model), variant.experts), rank=variant.rank,
                top_k=variant.top_k)
    for layer in expert_layers(model).values():
        if layer.router is not None:
            layer.router.requires_grad_(variant.trained)
    cfg = TrainConfig(batch_size=16, micro_batch_size=16, lr=LR, seed=seed,
                      router_aux_loss_coef=variant.balance)
    with TemporaryDirectory() as folder:
        train(model, inputs.examples, cfg, Path(folder), inputs.tokenizer.pad_id)
    shares = shares_of_gates(model, {
        name: probe_batches(e, 32, 8, inputs.tokenizer.pad_id, "cpu")
        for name, e in inputs.encoded.items()})
    right = [evaluate(model, inputs.tokenizer, task).share for task in inputs.tasks]
    return {"exact_match": sum(right) / len(right),
            "separation": sum(map(separation, shares.values())) / max(1, len(shares))}


def main(argv: Sequence[str]) -> None:
    parser = new_parser(__doc__, {"model and data": flags.InputConfig})
    parser.add_argument("--seeds", type=flags.positive, default=5, help="(default: %(default)s)")
    parser.set_defaults(limit_train=200)
    args = parser.parse_args(argv)
    file = RESULTS / "ablations.json"
    record: dict[str, Any] = read_json(file) if file.exists() else {"runs": {}}
    record |= {"format": "minismoe.ablations/1", "machine": machine(), "versions": versions(),
               "limit_train": args.limit_train, "lr": LR}
    todo = [(seed, name) for seed in range(args.seeds) for name in VARIANTS
            if len(record["runs"].get(name, ())) <= seed]
    for seed, name in tqdm(todo, "ablations", unit="run"):
        config = from_flags(flags.InputConfig, vars(args), seed=FIRST_SEED + seed)
        with contextlib.redirect_stdout(io.StringIO()):
            inputs = load_inputs(resolve_auto(config))
        record["runs"].setdefault(name, []).append(run(VARIANTS[name], inputs, config.seed))
        write_json(file, record)
    print(markdown(record))


def markdown(record: Mapping[str, Any]) -> str:
    """Exact match in %, and its difference to the first variant, paired by seed, +- 2 standard
    errors."""
    first = torch.tensor([r["exact_match"] for r in next(iter(record["runs"].values()))])
    rows = []
    for name, runs in record["runs"].items():
        right = 100 * torch.tensor([r["exact_match"] for r in runs])
        gap = right - 100 * first[:len(right)]
        error = 2 * gap.std().item() / len(gap) ** 0.5 if len(gap) > 1 else float("nan")
        separation = sum(r["separation"] for r in runs) / len(runs)
        rows.append([name, f"{right.mean():.1f}",
                     f"{gap.mean():+.1f} ± {error:.1f}" if rows else "", f"{separation:.3f}"])
    return table(["variant", "exact match", "difference", "tasks told apart"], rows)


if __name__ == "__main__":
    script.run_script(main)
