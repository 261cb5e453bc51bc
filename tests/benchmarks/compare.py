"""Compare allocation rules at equal parameters: strategies x seeds x learning rates x budgets.

    python tests/benchmarks/compare.py --plan                   the cells
    python tests/benchmarks/compare.py --seeds 5                the built-in toy
    python tests/benchmarks/compare.py --name smollm2 --out runs/smollm2 --model SMOLLM2 \\
        --data DATA --tasks trec,clinc,banking77 --limit-train 400 --epochs 2 -- --batch-size 8
    python tests/benchmarks/compare.py --readme tests/benchmarks/results/smollm2.json

A cell is one run of train.py, in its own folder under --out. After a kill, the same command runs
the cells that are not finished. More seeds, rates, budgets or strategies add cells.

1. Search: train each strategy at every rate on 80 % of the training lines, with a few seeds. Choose
   the rate with the best mean exact match on the other 20 % (the lowest of equal ones).
2. Final: train at that rate on all training lines, with every seed. Only this phase reads the test
   lines.

A budget of N is the size of a uniform mixture with N experts a matrix. The budget "paper" is the
paper's own comparison: votes at keep 0.6 against one expert for each matrix and task, at their own
sizes. LoRA is as large as the latter. The record, NAME.json, goes to tests/benchmarks/results.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import compare_report
from compare_cells import (
    FIXED,
    PAPER,
    SEARCH,
    STRATEGIES,
    Cell,
    all_cells,
    allocation_of,
    data_folder,
    finished,
    model_folder,
    rows,
    seconds_of,
    tasks,
)
from tqdm import tqdm

from minismoe.cli import flags, script
from minismoe.io.files import read_json, write_json


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; what follows "--" goes to every train.py."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"),
                        help="folder of the cells (default: %(default)s)")
    parser.add_argument("--name", default="default", help="of the record in results/")
    parser.add_argument("--model", help="checkpoint folder; default: the built-in toy")
    parser.add_argument("--data", help="folder of tasks, as for train.py")
    parser.add_argument("--tasks", help="comma list; default: all")
    parser.add_argument("--limit-train", type=flags.positive, metavar="N", help="lines a task")
    parser.add_argument("--limit-test", type=flags.positive, metavar="N", help="lines a task")
    parser.add_argument("--epochs", type=flags.positive, default=3)
    parser.add_argument("--samples", default="32", help="of the probe, for each task")
    parser.add_argument("--rank", type=flags.positive, default=8, help="of an expert")
    parser.add_argument("--top-k", type=flags.positive, default=2)
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="comma list")
    parser.add_argument("--budgets", default="paper,2", help="comma list: paper, or experts a "
                        "matrix (2 and 4 are near a whole rank of LoRA, 3 is not)")
    parser.add_argument("--seeds", type=flags.positive, default=5, metavar="N", help="how many")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N",
                        help="first of the final seeds (default: %(default)s)")
    parser.add_argument("--search-seeds", type=flags.positive, default=3, metavar="N",
                        help="seeds of the search, apart from the final ones (default: "
                        "%(default)s)")
    parser.add_argument("--lrs", default="2e-3,4e-3,8e-3", help="comma list to search")
    parser.add_argument("--plan", action="store_true", help="print the cells, and run nothing")
    parser.add_argument("--report", action="store_true", help="record what is finished, "
                        "and run nothing")
    parser.add_argument("--readme", metavar="JSON", help="print a record's tables, and stop")
    parser.add_argument("--debug", action="store_true", help="show a traceback on failure")
    own = list(argv)
    rest = own[own.index("--") + 1:] if "--" in own else []
    args = parser.parse_args(own[:len(own) - len(rest) - ("--" in own)])
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    if not 0 <= args.first_seed <= SEARCH - args.seeds:
        parser.error(f"final seeds are from 0 to {SEARCH - 1}; the search has those from {SEARCH}")
    args.lrs = sorted({float(lr) for lr in args.lrs.split(",")})
    args.strategies, args.budgets = args.strategies.split(","), args.budgets.split(",")
    if wrong := [s for s in args.strategies if s not in STRATEGIES] + [
            b for b in args.budgets if b != "paper" and not (b.isdecimal() and int(b))]:
        parser.error(f"{', '.join(wrong)}: strategies are {', '.join(STRATEGIES)}; budgets are "
                     "whole numbers or paper")
    # The default's weights stay float32, as in train.py without --model.
    args.flags = (["--dtype", "float32"] if args.model is None else []) + rest
    return args


def command(args: argparse.Namespace, cell: Cell, folder: Path) -> list[str]:
    """The command line of a cell. Writes the cell's allocation to --out/allocations."""
    if (folder / "config.json").exists():
        return [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(folder)]
    common = ["--out", str(folder), "--model", str(model_folder(args)), "--seed", str(cell.seed),
              "--data", str(data_folder(args, cell.seed))]
    if cell.phase == "probe":
        shared = argparse.ArgumentParser(allow_abbrev=False)     # flags that the probe has too
        for flag in ("--dtype", "--device", "--max-length", "--base-bits"):
            shared.add_argument(flag)
        given = vars(shared.parse_known_args(args.flags)[0])
        same = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value]
        return [sys.executable, str(ROOT / "probe.py"), *common, "--samples", args.samples, *same]
    file = args.out / "allocations" / f"{cell.name}.json"
    write_json(file, allocation_of(args, cell).to_json())
    return [sys.executable, str(ROOT / "train.py"), *common, "--allocation", str(file),
            "--lr", str(cell.lr), "--epochs", str(args.epochs), *args.flags]


def run_cell(args: argparse.Namespace, cell: Cell) -> None:
    """Run or resume a cell. RuntimeError if it fails for another reason than divergence."""
    folder, file = args.out / cell.name, args.out / f"{cell.name}.txt"
    args.out.mkdir(parents=True, exist_ok=True)
    spent, begun = seconds_of(folder) or 0.0, time.monotonic()
    with file.open("a+") as log:             # beside the folder, which must be new
        start = log.tell()
        failed = subprocess.run(command(args, cell, folder), stdout=log,
                                stderr=subprocess.STDOUT).returncode
        log.seek(start)
        said = (re.findall("error: .*", log.read()) or ["it does not say why"])[-1]
    if folder.exists():
        write_json(folder / "cell.json", {"seconds": round(spent + time.monotonic() - begun, 1)})
    if failed and not said.startswith("error: the loss is "):
        raise RuntimeError(f"{cell.name} ended with {failed}: {said} ({file})")
    if failed:
        write_json(folder / "diverged.json", said)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def run_grid(args: argparse.Namespace) -> None:
    """Run every cell that is not finished, with one progress bar."""
    cells = list(all_cells(args))
    done = sum(finished(args.out / cell.name) for cell in cells)
    with tqdm(total=len(cells), initial=done, unit="cell") as bar:
        for cell in all_cells(args):
            if not finished(args.out / cell.name):
                bar.set_postfix_str(cell.name)
                run_cell(args, cell)
                bar.update()


def plan(args: argparse.Namespace) -> None:
    cells = list(all_cells(args))
    for cell in cells:
        print(f"{'done' if finished(args.out / cell.name) else 'open'}  {cell.name}")
    left = sum(not finished(args.out / cell.name) for cell in cells)
    print(f"{left} of {len(cells)} cells to run")


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.readme:
        print(compare_report.markdown(read_json(args.readme)))
        return
    file, fixed = args.out / "compare.json", {name: getattr(args, name) for name in FIXED}
    if file.exists() and (saved := read_json(file)) != fixed:
        raise ValueError(f"{args.out} holds cells of other settings, {saved}: choose another --out")
    if not rows(args):
        raise ValueError(f"the budget paper compares only {', '.join(PAPER)}: add one of them to "
                         "--strategies")
    if args.plan:
        plan(args)
        return
    if not args.report:
        tasks(args, args.first_seed)         # a missing task raises before anything is written
        write_json(file, fixed)
        run_grid(args)
    compare_report.write(args)


if __name__ == "__main__":
    script.run_script(main)
