"""Does the probe earn its place? Strategies of train.py at equal parameters, over seeds.

    python tests/benchmarks/strategies.py --out FOLDER --seeds 3 -- --model SMOLLM2 --data DATA \
        --only-tasks trec,clinc,banking77 --limit-train 400 --budget-params 7776000

What follows -- goes to every run of train.py. Runs that --out holds already are not run again.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tqdm import tqdm

from minismoe.io.files import read_json
from minismoe.io.text import table


def exact_match(run: Path, strategy: str, seed: int, flags: list[str]) -> float:
    """Mean over tasks, of a run that is made if it is missing."""
    if not (run / "results.json").exists():
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--strategy", strategy, "--seed",
                        str(seed), "--out", str(run), *flags], check=True)
    return float(read_json(run / "results.json")["mean"]["after"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--strategies", default="lora,uniform,votes", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args(argv)
    names = args.strategies.split(",")
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in tqdm(range(args.seeds), unit="seed"):       # a fair comparison before its end
        for name in names:
            run = args.out / f"{name}-{seed}"
            found[name].append(100 * exact_match(run, name, seed, args.flags))
    rows = []
    for name, values in found.items():
        gaps = [a - b for a, b in zip(values, found[names[0]])]
        error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        rows.append([name, f"{fmean(values):.1f}", f"{fmean(gaps):+.1f}", f"{error:.1f}"])
    print(table(["strategy", "exact match", f"minus {names[0]}", "standard error"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
