"""Is there a better recipe? Change one thing of the training at a time, for LoRA and the mixture.

    python tests/benchmarks/recipe.py --plan                the runs of the search
    python tests/benchmarks/recipe.py                       the embedded default: some hours
    python tests/benchmarks/recipe.py --name recipe-smollm2 --model SMOLLM2 --data DATA \\
        --tasks trec,clinc,banking77 --limit-train 200 --limit-test 150 --epochs 2 \\
        --batch-size 8 --variants "batches of 8,16 / sqrt(rank),LoRA+ x 4,linear decay,no decay"

1. Search: train each variant at every rate on 80 % of the training lines, and choose its rate by
   exact match on the other 20 %.
2. Final: train the first recipe and the variants with the best --finalists searches at their rates
   on all training lines, with seeds that the search did not see. Only this reads the test lines.

What only this comparison needs (other schedules, dropout, ...) stands here and replaces a function
of the training loop. The record goes to tests/benchmarks/results. After a kill, the same command
continues.
"""

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
from compare_cells import SEARCH, case, split
from compare_report import RESULTS, intervals, machine, table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from minismoe.cli import flags, script
from minismoe.cli.inputs import Inputs, load_inputs, resolve_auto
from minismoe.data.tasks import encode_all
from minismoe.io.files import read_json, write_json
from minismoe.io.flags import from_flags, new_parser
from minismoe.method import experts
from minismoe.method.allocate import Allocation
from minismoe.method.experts import ExpertLinear, add_experts, expert_layers, linear_layers
from minismoe.model.checkpoint import versions
from minismoe.training import loop
from minismoe.training.evaluate import evaluate
from minismoe.training.loop import TrainConfig, train

KINDS = {"lora": (1, 4), "mixture": (4, 1)}  # experts a matrix, and their rank in times of --rank


@dataclass(frozen=True)
class Variant:
    """One recipe; the defaults are what the others change one thing of."""

    scaling: float = 2.0                     # alpha / rank
    root: bool = False                       # 16 / sqrt(rank) (rsLoRA, arXiv 2312.03732)
    b_rate: float = 1.0                      # rate of B over that of A (LoRA+, arXiv 2402.12354)
    warmup: float = 0.05
    shape: str = "cosine"                    # of the rate after the warm-up
    weight_decay: float = 0.0
    batch_size: int = 0                      # that of --batch-size
    dropout: float = 0.0                     # of the adapters' input
    best: bool = False                       # train on 90 %, keep the epoch that is best on 10 %


VARIANTS = {
    "batches of 16": Variant(batch_size=16),
    "16 / sqrt(rank)": Variant(root=True), "half the scaling": Variant(scaling=1.0),
    "LoRA+ x 4": Variant(b_rate=4), "LoRA+ x 16": Variant(b_rate=16),
    "no warm-up": Variant(warmup=0.0), "warm-up 20 %": Variant(warmup=0.2),
    "linear decay": Variant(shape="linear"), "no decay": Variant(shape="constant"),
    "weight decay 0.1": Variant(weight_decay=0.1),
    "batches of 8": Variant(batch_size=8), "batches of 32": Variant(batch_size=32),
    "dropout 0.05": Variant(dropout=0.05), "dropout 0.1": Variant(dropout=0.1),
    "best epoch": Variant(best=True),
}


def rate_at(shape: str, step: int, steps: int, cfg: TrainConfig) -> float:
    """learning_rate of the loop, with another shape after the warm-up."""
    warm = max(1, round(cfg.warmup * steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return cfg.lr * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done,
                     "constant": 1.0}[shape]


class TwoRates(torch.optim.AdamW):
    """AdamW with `times` the rate of A for B, whose geometric mean is the rate of the schedule."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], times: float, **settings: Any):
        super().__init__([{"params": group} for group in groups], **settings)
        self.root = math.sqrt(times)

    def step(self, closure: Any = None) -> Any:
        lr = self.param_groups[0]["lr"]
        self.param_groups[1]["lr"], self.param_groups[2]["lr"] = lr / self.root, lr * self.root
        return super().step(closure)


def apply_dropped(x: Tensor, layers: Sequence[ExpertLinear], *, share: float) -> list[Tensor]:
    """experts._apply in plain autograd, with dropout of the adapters' input while training."""
    outputs = []
    for layer in layers:
        dropped = nn.functional.dropout(x, share, torch.is_grad_enabled())
        h = dropped @ layer.lora_A.flatten(0, 1).to(x.dtype).T
        if layer.router is not None:
            layer.router_logits = (x.to(layer.router.dtype) @ layer.router.T).flatten(0, -2)
            gates = experts.top_k_gates(layer.router_logits, layer.top_k)
            h = experts.gated(h.flatten(0, -2), gates).view_as(h)
        outputs.append(nn.functional.linear(x, layer.dense(), layer.bias)
                       + layer.scaling * (h @ layer.lora_B.flatten(0, 1).to(x.dtype)))
    return outputs


@contextlib.contextmanager
def recipe(variant: Variant, model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """The training loop with a variant's parts. Yields the parameters after each checkpoint."""
    layers = expert_layers(model).values()
    groups = [[m.router for m in layers if m.router is not None],
              [m.lora_A for m in layers], [m.lora_B for m in layers]]
    kept: list[dict[str, Tensor]] = []

    def keep(run: Path, trained: Mapping[str, Tensor], *_: Any) -> None:
        kept.append({name: p.detach().clone() for name, p in trained.items()})

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(loop, "save_checkpoint", keep))
        if variant.shape != "cosine":
            stack.enter_context(patch.object(loop, "learning_rate", lambda *given: rate_at(
                variant.shape, *given)))
        if variant.b_rate != 1:
            stack.enter_context(patch.object(torch.optim, "AdamW", lambda _, **s: TwoRates(
                groups, variant.b_rate, **s)))
        if variant.dropout:
            stack.enter_context(patch.object(experts, "_apply", lambda x, layers: apply_dropped(
                x, layers, share=variant.dropout)))
        yield kept


def run(args: argparse.Namespace, kind: str, name: str, lr: float, inputs: Inputs,
        seed: int) -> dict[str, str]:
    """{task: 1 or 0 for each test line, as text} of a variant trained with a seed."""
    variant, model, (count, times) = VARIANTS[name], inputs.model, KINDS[kind]
    rank = times * args.rank
    torch.manual_seed(seed)
    scaling = 16 / math.sqrt(rank) if variant.root else variant.scaling
    add_experts(model, Allocation(dict.fromkeys(linear_layers(model), count), rank, scaling * rank))
    examples = inputs.examples
    held = list(inputs.tasks) if not variant.best else [
        replace(t, train=[m for i, m in enumerate(t.train) if i % 10],
                test=t.train[::10]) for t in inputs.tasks]
    if variant.best:
        length = model.config.max_position_embeddings
        examples = [e for t in held for e in encode_all(t, inputs.tokenizer, length)]
    batch = variant.batch_size or args.batch_size
    steps = math.ceil(len(examples) / batch)
    cfg = TrainConfig(epochs=args.epochs, batch_size=batch, micro_batch_size=batch, lr=lr,
                      warmup=variant.warmup,
                      weight_decay=variant.weight_decay, seed=seed, checkpoint_every=steps)
    with TemporaryDirectory() as folder, recipe(variant, model) as kept:
        try:
            train(model, examples, cfg, Path(folder), inputs.tokenizer.pad_id)
        except ArithmeticError:
            return {task.name: "0" * len(task.test) for task in inputs.tasks}
    if variant.best:                         # the latest of equal epochs
        def score(state: Mapping[str, Tensor]) -> float:
            model.load_state_dict(state, strict=False)
            return sum(evaluate(model, inputs.tokenizer, task).share for task in held)

        best = max(range(len(kept)), key=lambda i: (score(kept[i]), i))
        model.load_state_dict(kept[best], strict=False)
    return {t.name: "".join(map(str, evaluate(model, inputs.tokenizer, t).right))
            for t in inputs.tasks}


def load(args: argparse.Namespace, phase: str, seed: int) -> Inputs:
    """The model, and the data of a phase: all of it, or its training lines alone, divided."""
    config = resolve_auto(from_flags(flags.InputConfig, vars(args), seed=seed))
    with contextlib.redirect_stdout(io.StringIO()):
        inputs = load_inputs(config)
    if phase == "search":
        taken = {case(m) for t in inputs.tasks for m in t.test}
        inputs.tasks[:] = [split(task, taken) for task in inputs.tasks]
        for task in inputs.tasks:
            inputs.encoded[task.name] = encode_all(task, inputs.tokenizer, 1024)
    return inputs


def chosen(args: argparse.Namespace, runs: Mapping[str, Any], kind: str, name: str,
           ) -> tuple[float, float]:
    """The best mean exact match of a variant's search, and its rate."""
    def mean(lr: float) -> float:
        found = [runs[f"search {kind} {name} {lr:g} {seed}"] for seed in search_seeds(args)]
        return sum(share(answers) for answers in found) / len(found)
    return max((mean(lr), -lr) for lr in args.lrs)


def share(answers: Mapping[str, str]) -> float:
    """Exact match, the mean of tasks."""
    return sum(a.count("1") / len(a) for a in answers.values()) / len(answers)


def points(answers: str) -> Tensor:
    return torch.tensor([100.0 * int(c) for c in answers], dtype=torch.float64)


def search_seeds(args: argparse.Namespace) -> range:
    return range(SEARCH, SEARCH + args.search_seeds)


def cells(args: argparse.Namespace, runs: Mapping[str, Any],
          ) -> Iterator[tuple[str, str, str, float, int]]:
    """(phase, kind, variant, rate, seed): the search, then the finals that it asks for."""
    names = args.variants
    for seed in search_seeds(args):
        for kind in args.kinds:
            for name in names:
                for lr in args.lrs:
                    yield "search", kind, name, lr, seed
    for kind in args.kinds:
        found = {name: chosen(args, runs, kind, name) for name in names}
        first, *others = sorted(found, key=lambda n: (n == names[0], found[n]), reverse=True)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in [first, *others[:args.finalists]]:
                yield "final", kind, name, -found[name][1], seed


def numbers(text: str) -> list[float]:
    """An argparse type: a comma list of numbers, sorted."""
    return sorted(float(part) for part in text.split(","))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser(__doc__, {"model and data": flags.InputConfig})
    parser.add_argument("--name", default="recipe", help="of the record in results/")
    parser.add_argument("--rank", type=flags.positive, default=8, help="of a mixture's expert")
    parser.add_argument("--epochs", type=flags.positive, default=3)
    parser.add_argument("--lrs", type=numbers, default="1e-3,2e-3,4e-3,8e-3",
                        help="comma list to search (default: %(default)s)")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=",".join(KINDS),
                        help="comma list (default: %(default)s)")
    parser.add_argument("--search-seeds", type=flags.positive, default=2, help="how many")
    parser.add_argument("--first-seed", type=int, default=300, help="of the final runs")
    parser.add_argument("--seeds", type=flags.positive, default=10, help="of the final runs")
    parser.add_argument("--plan", action="store_true", help="count the runs, and stop")
    parser.add_argument("--variants", help="comma list, the present one first; default: all")
    parser.add_argument("--batch-size", type=flags.positive, default=16,
                        help="of variants that do not change it (default: 16)")
    parser.add_argument("--finalists", type=int, default=4, help="beside the first recipe")
    parser.set_defaults(limit_train=200)
    args = parser.parse_args(argv)
    args.variants = args.variants.split(",") if args.variants else list(VARIANTS)
    if wrong := {*args.kinds, *args.variants} - {*KINDS, *VARIANTS}:
        parser.error(f"{', '.join(sorted(wrong))}: kinds are {', '.join(KINDS)}; variants are "
                     f"{', '.join(VARIANTS)}")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    file = RESULTS / f"{args.name}.json"
    record: dict[str, Any] = read_json(file) if file.exists() else {"runs": {}}
    record |= {"format": "minismoe.recipe/1", "machine": machine(), "versions": versions(),
               "settings": {n: getattr(args, n) for n in (
                   "model", "tasks", "limit_train", "limit_test", "epochs", "rank", "batch_size",
                   "variants", "lrs", "search_seeds", "first_seed", "seeds")}}
    total = len(args.kinds) * (args.search_seeds * len(args.lrs) * len(args.variants)
                               + args.seeds * min(len(args.variants), 1 + args.finalists))
    if args.plan:
        print(f"{total} runs, {len(record['runs'])} of them done")
        return
    with tqdm(total=total, unit="run") as bar:
        for phase, kind, name, lr, seed in cells(args, record["runs"]):
            key = f"{phase} {kind} {name} {lr:g} {seed}"
            if key not in record["runs"]:
                record["runs"][key] = run(args, kind, name, lr, load(args, phase, seed), seed)
                write_json(file, record)
            bar.set_postfix_str(f"{key}: {share(record['runs'][key]):.3f}")
            bar.update()
    print(markdown(record))


def markdown(record: Mapping[str, Any]) -> str:
    """For each kind: the searches of all variants, and the finals with their paired differences."""
    runs: dict[tuple[str, str, str], dict[int, dict[float, Any]]] = {}
    for key, answers in record["runs"].items():
        phase, kind, *words, lr, seed = key.split(" ")
        runs.setdefault((phase, kind, " ".join(words)), {}).setdefault(int(seed), {})[float(
            lr)] = answers
    names = record["settings"].get("variants", VARIANTS)
    blocks = []
    for kind in KINDS:
        rows: list[list[Any]] = []
        first: dict[int, Any] = {}
        for name in [n for n in names if ("search", kind, n) in runs]:
            by_rate: dict[float, list[float]] = {}
            for rates in runs["search", kind, name].values():
                for lr, answers in rates.items():
                    by_rate.setdefault(lr, []).append(100 * share(answers))
            lr = max(by_rate, key=lambda r: (sum(by_rate[r]) / len(by_rate[r]), -r))
            finals = {seed: next(iter(rates.values()))
                      for seed, rates in runs.get(("final", kind, name), {}).items()}
            first = first or finals
            row = [name, f"{lr:g}", f"{sum(by_rate[lr]) / len(by_rate[lr]):.1f}", "", ""]
            if finals:
                row[3] = f"{100 * sum(map(share, finals.values())) / len(finals):.1f}"
                row[4] = difference(finals, first) if finals is not first else ""
            rows.append(row)
        if rows:
            blocks.append(f"**{kind}**\n\n" + table(
                ["recipe", "rate", "search", "final", "difference"], rows))
    return "\n\n".join(blocks)


def difference(runs: Mapping[int, Any], first: Mapping[int, Any]) -> str:
    """Points of exact match gained, with a 95 % interval over seeds and lines, paired."""
    seeds = sorted({*runs} & {*first})
    if len(seeds) < 2:
        return ""
    gains = {task: pad_sequence(        # seeds of the default differ in their numbers of lines
        [points(runs[s][task]) - points(first[s][task]) for s in seeds],
        batch_first=True, padding_value=math.nan) for task in first[seeds[0]]}
    mean, low, high = intervals(gains, new_lines=True)["mean"]
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


if __name__ == "__main__":
    script.run_script(main)
