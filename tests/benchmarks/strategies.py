"""Does the probe earn its place? Strategies of train.py at equal parameters, over seeds.

    python tests/benchmarks/strategies.py --model SMOLLM2 --budget 7776000 --out FOLDER --seeds 3 \
        -- --data DATA --only-tasks trec,clinc,banking77 --limit-train 400

What follows -- goes to every run of train.py. Runs that --out holds already are not run again. An
allocation.json at --out gives each matrix one expert of as large a rank as fits (lora), or as many
experts of rank 8 (uniform).
"""

import argparse
import subprocess
import sys
from itertools import count, takewhile
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tqdm import tqdm

from minismoe.io.files import read_json, write_json
from minismoe.io.hub import resolve
from minismoe.io.text import table
from minismoe.method.allocate import Allocation
from minismoe.method.sensitivity import shapes_of
from minismoe.model.checkpoint import read_config
from minismoe.model.decoder import meta_model


def equal_size(strategy: str, model: str, budget: int) -> Allocation:
    """The largest allocation of a strategy with at most `budget` trainable parameters."""
    shapes = shapes_of(meta_model(read_config(resolve(model))[0]))
    options = (Allocation(dict.fromkeys(shapes, 1), rank=n, alpha=2 * n, strategy="lora")
               if strategy == "lora" else Allocation(dict.fromkeys(shapes, n), strategy="uniform")
               for n in count(1))
    return [*takewhile(lambda option: option.trainable(shapes) <= budget, options)][-1]


def exact_match(strategy: str, seed: int, args: argparse.Namespace) -> float:
    """Mean over tasks, of a run that is made if it is missing."""
    run, file = args.out / f"{strategy}-{seed}", args.out / f"{strategy}.json"
    if not (run / "results.json").exists():
        how = ["--budget-params", str(args.budget)]
        if strategy != "votes":
            write_json(file, equal_size(strategy, args.model, args.budget).to_json())
            how = ["--allocation", str(file)]
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--model", args.model, "--seed",
                        str(seed), "--out", str(run), *how, *args.flags], check=True)
    return float(read_json(run / "results.json")["mean"]["after"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--budget", type=int, required=True, help="trainable parameters")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--strategies", default="lora,uniform,votes", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args(argv)
    names = args.strategies.split(",")
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in tqdm(range(args.seeds), unit="seed"):       # a fair comparison before its end
        for name in names:
            found[name].append(100 * exact_match(name, seed, args))
    rows = []
    for name, values in found.items():
        gaps = [a - b for a, b in zip(values, found[names[0]])]
        error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        rows.append([name, f"{fmean(values):.1f}", f"{fmean(gaps):+.1f}", f"{error:.1f}"])
    print(table(["strategy", "exact match", f"minus {names[0]}", "standard error"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
