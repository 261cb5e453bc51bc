"""What fewer tokens cost and gain: a run's base with N tokens, chosen in three ways.

    python tests/benchmarks/vocabulary.py RUN --out FOLDER --tokens 8192 16384 32768
    python tests/benchmarks/vocabulary.py RUN --out FOLDER --tokens 16384 --orders expected --export

RUN was trained on all tokens. For each number and each order in which tokens fill it up (what the
model expects; ids, the order of merges; at random), the trimmed base takes the run's adapter:
exact match, the log-probability of right answers, the share of test lines that have a token which
is gone, and how many more tokens they take. With --export the default export of each, and of all
tokens: megabytes, then tokens a second, memory and seconds to the first token, in turn.
A record of each line is added to FOLDER/vocabulary.jsonl.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import decode_speed

import export
from minismoe.cli import runs, trimming
from minismoe.cli.inputs import Inputs, load_inputs, resolve_auto
from minismoe.data.tasks import probe_batches
from minismoe.export.trim import write_trimmed
from minismoe.io.files import read_json
from minismoe.io.text import table
from minismoe.method.vocabulary import BPE, expected, tokens_to_keep
from minismoe.model.checkpoint import load_adapter
from minismoe.training.evaluate import evaluate

ORDERS = ("expected", "id", "random")


def orders(inputs: Inputs, total: int, texts: int) -> dict[str, list[int]]:
    """Orders in which tokens may fill up a vocabulary, the first token first."""
    batches = (batch for examples in inputs.encoded.values() for batch in probe_batches(
        examples, texts, trimming.BATCH, inputs.tokenizer.pad_id))
    likely = expected(inputs.model, batches).argsort(descending=True).tolist()
    return {"expected": likely, "id": [*range(total)],
            "random": random.Random(0).sample(range(total), total)}


def measured(inputs: Inputs) -> dict[str, float]:
    """Means over tasks, of test lines: exact match, and the log-probability of right answers."""
    shares = [evaluate(inputs.model, inputs.tokenizer, asked).share
              for asked in inputs.asked.values()]
    return {"exact": statistics.mean(shares),
            "logprob": statistics.mean(trimming.logprobs(inputs).values())}


def texts_of(inputs: Inputs, tokenizer: Any) -> list[list[int]]:
    """Where the tokens of each test line begin."""
    return [tokenizer.encode(inputs.tokenizer.render(messages))[1]
            for task in inputs.tasks for messages in task.test]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of train.py")
    parser.add_argument("--out", type=Path, required=True, help="for bases, exports and the record")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--texts", type=int, default=trimming.TEXTS,
                        help="lines a task on which the model's expectation is measured")
    parser.add_argument("--limit-test", type=int, help="test lines a task (default: the run's)")
    parser.add_argument("--export", action="store_true", help="export and decode, too")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding (default: 3)")
    args = parser.parse_args(argv)
    settings = resolve_auto(runs.read_run(args.run))
    settings = replace(settings, limit_test=args.limit_test or settings.limit_test)
    whole = load_inputs(settings)
    load_adapter(whole.model, args.run / "adapter")
    bpe = BPE(read_json(whole.folder / "tokenizer.json"))
    total, before = len(bpe.vocab | bpe.added), texts_of(whole, whole.tokenizer)
    needed = trimming.needed_tokens(whole.tokenizer, whole.tasks, {
        name: [*whole.encoded[name], *whole.valid[name]] for name in whole.encoded})
    records = [{"tokens": total, "order": "all", **measured(whole)}]
    folders = {(total, "all"): export_of(args, total, "all", [])} if args.export else {}
    for order, ids in orders(whole, total, args.texts).items():
        for count in args.tokens if order in args.orders else ():
            base = args.out / f"{args.run.name}-{order}-{count}"
            if not base.exists():
                write_trimmed(whole.folder, base, tokens_to_keep(bpe, needed, ids, count))
            inputs = load_inputs(replace(settings, model=str(base)), quiet=True)
            inputs.model.fingerprint = whole.model.fingerprint
            load_adapter(inputs.model, args.run / "adapter")
            after = texts_of(whole, inputs.tokenizer)
            records.append({
                "tokens": count, "order": order, **measured(inputs),
                "changed": statistics.mean(a != b for a, b in zip(before, after)),
                "longer": sum(map(len, after)) / sum(map(len, before)) - 1})
            if args.export and order == "expected":
                folders[count, order] = export_of(args, count, order, ["--vocab", str(count)])
    for key, figures in decoded(folders, args.rounds).items():
        next(r for r in records if (r["tokens"], r["order"]) == key).update(figures)
    with (args.out / "vocabulary.jsonl").open("a") as file:
        for record in records:
            file.write(json.dumps({"run": args.run.name, **record}) + "\n")
    columns = [*dict.fromkeys(name for record in records for name in record)]
    print(table(columns, [[shown(record.get(name, "")) for name in columns]
                          for record in records]))


def export_of(args: argparse.Namespace, count: int, order: str, flags: list[str]) -> Path:
    """The folder of the default export of a run with so many tokens."""
    folder: Path = args.out / f"{args.run.name}-{order}-{count}-onnx"
    if not folder.exists():
        export.main([str(args.run), "--out", str(folder), *flags])
    return folder


def decoded(folders: dict[Any, Path], rounds: int) -> dict[Any, dict[str, float]]:
    """Medians of what decode_speed.py measures of each folder, in turn."""
    seen: dict[Any, list[dict[str, float]]] = {key: [] for key in folders}
    for _ in range(rounds):
        for key, folder in folders.items():
            done = subprocess.run(
                [sys.executable, decode_speed.__file__, "--model", "", "--side", "int4",
                 "--child", str(folder)], stdout=subprocess.PIPE, check=True,
                env={**os.environ, "STARTED": str(time.time())})
            seen[key].append(json.loads(done.stdout.splitlines()[-1]))
    return {key: {"MB": sum(f.stat().st_size for f in folders[key].rglob("*") if f.is_file()) / 1e6,
                  **{name: statistics.median(row[name] for row in rows) for name in (
                      "rate", "peak", "first")}} for key, rows in seen.items()}


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
