"""Can the probe be trusted? Four questions, on the embedded default or a real model.

    python tests/benchmarks/probe_worth.py
    python tests/benchmarks/probe_worth.py --name smollm2 --model SMOLLM2 --data DATA --tasks trec

1. Stability: do disjoint samples of a task select the same matrices?
2. Variants: what do the group, the normalisation and the loss change?
3. Mid-training: does the ranking hold after a mixture is trained?
4. Truth: if one matrix, one kind or one layer is trained alone, does the score predict the gain?

The record, worth-NAME.json, goes to tests/benchmarks/results. After a kill, the same command
continues.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
from compare_cells import model_folder
from compare_report import RESULTS, machine, table
from torch import Tensor
from tqdm import tqdm

from minismoe.cli import flags, probing, script
from minismoe.cli.inputs import Inputs, load_inputs, resolve_auto
from minismoe.data.tasks import probe_batches
from minismoe.io.files import read_json, write_json
from minismoe.io.flags import from_flags, new_parser
from minismoe.method.allocate import GROUPS, allocate
from minismoe.method.experts import add_experts
from minismoe.method.loss import IGNORE
from minismoe.method.sensitivity import Scores, probe
from minismoe.model.checkpoint import load_model, versions
from minismoe.training.evaluate import evaluate
from minismoe.training.loop import TrainConfig, train

SIZES, PAIRS = (8, 16, 32, 64, 128), 10      # samples a task; disjoint pairs of each size
KEEP, SEED = 0.6, 1000                       # a seed that no comparison uses
TRUTH_SEEDS, TRUTH_RANK = 3, 8
Values = Mapping[str, float]                 # {module: score}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser(__doc__, {"model and data": flags.InputConfig})
    parser.add_argument("--name", default="default", help="of the record in results/")
    parser.set_defaults(seed=SEED)
    return parser.parse_args(argv)


def samples_of(inputs: Inputs, args: argparse.Namespace, count: int) -> tuple[Scores, dict]:
    """The probe of `count` random samples a task, and the supervised tokens of each sample."""
    pools = {t: random.Random(args.seed).sample(e, len(e))
             for t, e in inputs.encoded.items()}
    scores = probe(inputs.model, {
        t: tqdm(probe_batches(pool, count, probing.PROBE_BATCH, inputs.tokenizer.pad_id,
                              args.device), f"probe {t}", unit="batch")
        for t, pool in pools.items()})
    tokens = {t: torch.tensor([sum(label != IGNORE for label in e.labels)
                               for e in pool[:count]], dtype=torch.float64)
              for t, pool in pools.items()}
    return scores, tokens


def voted(values: Values, group: str = "attention_mlp") -> set[str]:
    return set(allocate({"": dict(values)}, group=group, keep=KEEP).experts)


def shared(first: set[str], second: set[str]) -> float:
    return len(first & second) / max(len(first), len(second), 1)


def spearman(first: Iterable[float], second: Iterable[float]) -> float:
    """Rank correlation of two rows (Spearman 1904); ties get their mean rank."""
    ranks = []
    for row in (first, second):
        values = torch.tensor(list(row), dtype=torch.float64)
        below = (values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)
        ranks.append(below.double())
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def stability(scores: Scores) -> dict[str, dict[str, list[float]]]:
    """{task: {size: [mean overlap, smallest]}} of the matrices selected by disjoint samples."""
    generator, names = torch.Generator().manual_seed(SEED), list(scores.shapes)
    found: dict[str, dict[str, list[float]]] = {}
    for task, norms in scores.samples.items():
        found[task] = {}
        for size in SIZES:
            if 2 * size > len(norms):
                break
            overlaps = []
            for _ in range(PAIRS):
                order = torch.randperm(len(norms), generator=generator)
                halves = [voted(dict(zip(names, norms[part].sum(0).tolist())))
                          for part in (order[:size], order[size:2 * size])]
                overlaps.append(shared(*halves))
            found[task][str(size)] = [sum(overlaps) / PAIRS, min(overlaps)]
    return found


def variants(scores: Scores, tokens: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """{variant: [rank correlation, votes shared]} with the unchanged probe, mean over tasks."""
    names, shapes = list(scores.shapes), scores.shapes
    as_is = dict.fromkeys(names, 1.0)
    weight = {m: float(out * in_) for m, (out, in_) in shapes.items()}
    expert = {m: float(sum(shape)) for m, shape in shapes.items()}
    rows: dict[str, tuple[str, Values, bool]] = {
        **{f"group {g}": (g, as_is, False) for g in GROUPS[1:]},
        "per parameter of the matrix": (GROUPS[0], weight, False),
        "per parameter of an expert": (GROUPS[0], expert, False),
        "loss summed over tokens": (GROUPS[0], as_is, True)}
    found = {}
    for label, (group, size, summed) in rows.items():
        correlations, overlaps = [], []
        for task, norms in scores.samples.items():
            # The gradient of a sum is that of the mean times the number of tokens; square both.
            times = tokens[task].square()[:, None] if summed else torch.ones(1)
            other = {m: v / size[m] for m, v in zip(names, (norms * times).sum(0).tolist())}
            correlations.append(spearman(scores[task].values(), other.values()))
            overlaps.append(shared(voted(scores[task]), voted(other, group)))
        found[label] = [sum(x) / len(x) for x in (correlations, overlaps)]
    return found


def train_and_score(inputs: Inputs, args: argparse.Namespace, experts: Any, cfg: TrainConfig,
                    folder: Path) -> tuple[Any, float]:
    """Train a new base with these experts. Returns the model and its mean exact match."""
    model = load_model(folder, getattr(torch, args.dtype), args.device)
    torch.manual_seed(cfg.seed)
    add_experts(model, experts, rank=TRUTH_RANK)
    with TemporaryDirectory() as run:
        train(model, inputs.examples, cfg, Path(run), inputs.tokenizer.pad_id)
    right = [evaluate(model, inputs.tokenizer, task).share for task in inputs.tasks]
    return model, sum(right) / len(right)


def during(inputs: Inputs, args: argparse.Namespace, scores: Scores, folder: Path,
           ) -> dict[str, list[float]]:
    """{task: [rank correlation, votes shared]} of the base's probe and a trained model's."""
    model, _ = train_and_score(inputs, args, dict.fromkeys(scores.shapes, 2),
                               TrainConfig(epochs=1, batch_size=16, seed=args.seed), folder)
    later, _ = samples_of(replace(inputs, model=model), args, 32)
    names = list(scores.shapes)
    first = {t: dict(zip(names, norms[:32].sum(0).tolist())) for t, norms in scores.samples.items()}
    return {t: [spearman(first[t].values(), later[t].values()), shared(voted(first[t]),
                                                                       voted(later[t]))]
            for t in later}


def parts(names: Sequence[str]) -> dict[str, list[str]]:
    """{name: modules} of the parts that are trained alone: each matrix, kind and layer."""
    found = {name: [name] for name in names}
    for name in names:
        found.setdefault("kind " + name.split(".")[-1], []).append(name)
        found.setdefault("layer " + name.split(".")[2], []).append(name)
    return found


def truth(inputs: Inputs, args: argparse.Namespace, names: Sequence[str], folder: Path,
          known: dict[str, list[float]], save: Callable[[], None]) -> None:
    """Fill `known` with the mean exact match of each part trained alone, seed by seed."""
    todo = [(seed, part) for seed in range(TRUTH_SEEDS) for part in parts(names)
            if len(known.get(part, ())) <= seed]
    for seed, part in tqdm(todo, "truth", unit="run"):
        cfg = TrainConfig(batch_size=16, seed=args.seed + seed)
        _, right = train_and_score(inputs, args, dict.fromkeys(parts(names)[part], 1), cfg, folder)
        known.setdefault(part, []).append(right)
        save()


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    file = RESULTS / f"worth-{args.name}.json"
    record: dict[str, Any] = read_json(file) if file.exists() else {}
    config = resolve_auto(from_flags(flags.InputConfig, vars(args)))
    inputs = load_inputs(config)
    args.device, args.dtype = config.device, config.dtype
    folder = model_folder(args)
    settings = {k: Path(str(v)).name for k, v in vars(args).items()}
    if record.setdefault("settings", settings) != settings:
        raise ValueError(f"{file} holds another run, {record['settings']}: choose another --name")
    record |= {"format": "minismoe.worth/1", "machine": machine(), "versions": versions()}

    def save() -> None:
        write_json(file, record)

    scores, tokens = samples_of(inputs, args, 2 * SIZES[-1])
    record["stability"], record["variants"] = stability(scores), variants(scores, tokens)
    save()
    if "during" not in record:
        record["during"] = during(inputs, args, scores, folder)
        save()
    record["scores"] = {t: {m: v / len(scores.samples[t]) for m, v in scores[t].items()}
                        for t in scores}
    record["shapes"] = {m: list(shape) for m, shape in scores.shapes.items()}
    truth(inputs, args, list(scores.shapes), folder, record.setdefault("truth", {}), save)
    print(markdown(record))


def worths(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{score: {where: rank correlation with the gain of training that part alone}}."""
    scores, shapes = record["scores"], record["shapes"]
    gained = {part: sum(found) / len(found) for part, found in record["truth"].items()}
    share = {m: sum(values[m] / sum(values.values()) for values in scores.values()) for m in shapes}
    entries = {m: math.prod(shape) for m, shape in shapes.items()}
    trained = {m: TRUTH_RANK * sum(shape) for m, shape in shapes.items()}
    candidates: dict[str, Values] = {
        "the probe's": share,
        "per parameter of the matrix": {m: share[m] / entries[m] for m in shapes},
        "per parameter of an expert": {m: share[m] / trained[m] for m in shapes},
        "times entries of the matrix": {m: share[m] * entries[m] for m in shapes},
        "no probe: parameters of an expert": trained,
        "no probe: the lower layers": {m: -float(m.split(".")[2]) for m in shapes}}
    kinds = sorted({m.split(".")[-1] for m in shapes})
    found = {}
    for label, values in candidates.items():
        groups: dict[str, list[str]] = {"all matrices": list(shapes)}
        groups |= {k: [m for m in shapes if m.endswith(k)] for k in kinds}
        by = {where: spearman((values[m] for m in members), (gained[m] for m in members))
              for where, members in groups.items()}
        within = [x for k in kinds if (x := by.pop(k)) == x]
        by["within a kind"] = sum(within) / len(within) if within else math.nan
        for what in ("kind", "layer"):
            at = {p: [m for m in shapes if p.split()[1] in m.split(".")] for p in gained
                  if p.startswith(what)}
            by[f"{what}s"] = spearman((sum(values[m] for m in members) for members in at.values()),
                                      (gained[p] for p in at))
        found[label] = by
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """The answers as tables."""
    sizes = [str(n) for n in SIZES]
    parts = ["Overlap of the matrices that disjoint samples of a task select (mean of "
             f"{PAIRS} pairs, and the smallest):",
             table(["task", *sizes], [[task, *(
                 "{:.2f} ({:.2f})".format(*row[n]) if n in row else "" for n in sizes)]
                 for task, row in record["stability"].items()])]
    means = [[row[n][0] for row in record["stability"].values() if n in row] for n in sizes]
    parts[-1] += "\n" + table(["mean", *(f"{sum(m) / len(m):.3f}" if m else "" for m in means)],
                              []).split("\n")[0]
    parts += ["What changes the ranking (mean over tasks, against the probe as it is):",
              table(["variant", "rank correlation", "votes shared"],
                    [[label, *(f"{x:.2f}" for x in row)]
                     for label, row in record["variants"].items()])]
    parts += ["At the start against a trained model:",
              table(["task", "rank correlation", "votes shared"],
                    [[task, *(f"{x:.2f}" for x in row)] for task, row in record["during"].items()])]
    found = worths(record)
    parts += ["Rank correlation of a score with the exact match that training one part alone "
              "reaches:",
              table(["score", *next(iter(found.values()))],
                    [[label, *(f"{x:.2f}" for x in row.values())] for label, row in found.items()]),
              "That exact match in %, of kinds and layers:",
              table(["part", "exact match"], [
                  [part, f"{100 * sum(found) / len(found):.1f}"]
                  for part, found in record["truth"].items() if " " in part])]
    return "\n\n".join(parts)


if __name__ == "__main__":
    script.run_script(main)
