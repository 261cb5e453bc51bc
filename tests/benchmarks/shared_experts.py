"""Do shared experts with one gate a sequence beat LoRA and the mixture at equal parameters?

    python tests/benchmarks/shared_experts.py --plan        parameters of the kinds, and the runs
    python tests/benchmarks/shared_experts.py               the embedded default: 40 minutes
    python tests/benchmarks/shared_experts.py --name shared-experts-smollm2 --model SMOLLM2 \\
        --data DATA --tasks trec,clinc,banking77 --limit-train 400 --limit-test 150 --epochs 2 \\
        --experts 3 --stride 4 --num-b 8 --kinds lora,lily --lrs 1e-3,2e-3 --search-seeds 1 \\
        --seeds 3
    python tests/benchmarks/shared_experts.py --readme tests/benchmarks/results/shared-experts.json

A gate that is constant over a sequence makes the experts of a matrix one low-rank matrix, which
merges exactly. Two published forms of such experts share what they can: `Lily` and `Core`. Both are
compared with LoRA and the uniform mixture at the parameters of the mixture, within 2 %.

1. Search: train each kind at every scale and rate on 80 % of the training lines, and choose both by
   exact match on the other 20 %. All kinds have the same choice.
2. Final: train on all training lines, with seeds that the search did not see. Only this reads the
   test lines.

The record goes to tests/benchmarks/results. After a kill, the same command continues.
Letters: B sequences, T time, N packed tokens, E experts, r rank.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
from compare_report import RESULTS, machine, table
from recipe import difference, grid_flags, load, numbers, run_cells, search_seeds, share
from torch import Tensor, nn

from minismoe.cli import flags, script
from minismoe.cli.inputs import Inputs
from minismoe.io.files import read_json
from minismoe.method import allocate
from minismoe.method.allocate import Allocation
from minismoe.method.experts import add_experts, linear_layers
from minismoe.model.checkpoint import versions
from minismoe.model.decoder import Decoder
from minismoe.training.evaluate import evaluate
from minismoe.training.loop import TrainConfig, train

KINDS = ("lora", "mixture", "lily", "core")
TOLERANCE = 0.02                             # of the parameters of a kind


class Prompts:
    """Where the prompts of the running forward are; all shared experts of a model read it.

    A sequence's gate is an average over its prompt: its real tokens up to and including the first
    position that is read (`needed`), which predicts the first token of the answer. An average that
    included the answer would tell a training step what it has to predict. Generation needs the same
    positions of a prompt, and its later steps keep the gates of the prompt.

    rows (N,): the sequence of each packed token. mean (B, N): mean @ x are the sequences' averages
    of x (N, ...) over their prompts; None while a cache holds the prompts already.
    """

    def __init__(self) -> None:
        self.rows = torch.zeros(0, dtype=torch.long)
        self.mean: Tensor | None = None

    def watch(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
              ) -> tuple[tuple[()], dict[str, Any]]:
        """A forward pre-hook of the decoder. It takes `needed` away from the decoder, which would
        else compute shared prefixes once, and the last MLP without the prompts' tokens."""
        given = inspect.signature(Decoder.forward).bind(decoder, *args, **kwargs).arguments
        del given["self"]
        needed, cache, mask = (given.pop("needed", None), given.get("cache"),
                               given.get("attention_mask"))
        real = (torch.ones_like(given["input_ids"]) if mask is None else mask).bool()     # (B, T)
        self.rows, self.mean = real.nonzero()[:, 0], None
        if cache is None or not cache.used:
            after = 0 if needed is None else needed.cumsum(1) - needed.long()
            prompt = (real & (after == 0)).float()
            weights = prompt / prompt.sum(1, keepdim=True)
            self.mean = weights.new_zeros(len(real), len(self.rows))
            self.mean[self.rows, torch.arange(len(self.rows), device=real.device)] = weights[real]
        return (), given


class Shared(nn.Module):
    """A frozen linear layer plus scale * A x through a matrix that the gates of x's sequence make.

    Subclasses have `route` and `expand`. Parameters are float32, whatever the dtype of x.
    """

    def __init__(self, linear: nn.Linear, scale: float, prompts: Prompts, A: nn.Parameter,
                 experts: int):
        super().__init__()
        self.linear, self.scale, self.prompts, self.A = linear, scale, prompts, A
        self.router = uniform(experts, len(A))
        self.gates = A.new_zeros(0, experts)                 # (B, E) of the last prompts

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        h = x @ self.A.to(x.dtype).T
        if self.prompts.mean is not None:
            self.gates = self.route(h.float(), self.prompts.mean)
        gates = self.gates.to(x.dtype)[self.prompts.rows]                        # (N, E)
        return self.linear(x) + self.scale * self.expand(h, gates)

    def merged(self, gates: Tensor) -> Tensor:
        """The weight (out, in) that does the same for a sequence with these gates (E,)."""
        h = torch.eye(len(self.A))                                               # (r, r)
        return self.linear.weight + self.scale * (
            self.A.T @ self.expand(h, gates.expand(len(h), -1))).T

    def route(self, h: Tensor, mean: Tensor) -> Tensor:
        """Gates (B, E) of h = A x (N, r)."""
        raise NotImplementedError

    def expand(self, h: Tensor, gates: Tensor) -> Tensor:
        """h (N, r) with the gates (N, E) of each token -> (N, out)."""
        raise NotImplementedError


class Lily(Shared):
    """y = W x + scale * (sum_e g_e B_e) A x (Lily, arXiv 2407.09946).

    A (r, in) is shared by neighbouring layers and B (E, r, out) by all layers of a projection kind;
    each layer has a router (E, r) of its own. As in PEFT, gates are the softmax of router(A x) of
    each token, averaged. PEFT averages over all tokens of a batch, padding and answers included, so
    that a line's output depends on its neighbours; here each sequence averages over its own prompt.
    """

    def __init__(self, linear: nn.Linear, scale: float, prompts: Prompts, A: nn.Parameter,
                 B: nn.Parameter):
        super().__init__(linear, scale, prompts, A, len(B))
        self.B = B

    def route(self, h: Tensor, mean: Tensor) -> Tensor:
        return mean @ (h @ self.router.T).softmax(-1)

    def expand(self, h: Tensor, gates: Tensor) -> Tensor:
        return spread(h, gates) @ self.B.flatten(0, 1).to(h.dtype)


class Core(Shared):
    """y = W x + scale * B (M_0 + sum_e g_e M_e) A x: an expert costs r^2 numbers.

    As in CoMoL (arXiv 2603.00573), the experts are small matrices between the A and B of a layer,
    and the router reads A x. CoMoL routes each token; here gates are the softmax of router(A x) of
    the mean token of the prompt. M (1 + E, r, r) and B (r, out) multiply rows from the right. M_0
    starts at 1 and the M_e at random, so that experts differ; B starts at 0, as in LoRA.
    """

    def __init__(self, linear: nn.Linear, scale: float, prompts: Prompts, rank: int, experts: int):
        super().__init__(linear, scale, prompts, uniform(rank, linear.in_features), experts)
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features))
        self.M = nn.Parameter(torch.cat([torch.eye(rank)[None], uniform(experts, rank, rank)]))

    def route(self, h: Tensor, mean: Tensor) -> Tensor:
        return (mean @ h @ self.router.T).softmax(-1)

    def expand(self, h: Tensor, gates: Tensor) -> Tensor:
        gates = torch.cat([gates.new_ones(len(gates), 1), gates], 1)             # M_0 is always on
        return spread(h, gates) @ self.M.flatten(0, 1).to(h.dtype) @ self.B.to(h.dtype)


def uniform(*shape: int) -> nn.Parameter:
    """Random numbers within 1 / sqrt(inputs), the rule of nn.Linear and of PEFT."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def spread(h: Tensor, gates: Tensor) -> Tensor:
    """(N, r) and (N, E) -> (N, E*r): h once for each expert, times its gate."""
    return (gates[:, :, None] * h[:, None]).flatten(1)


def add_shared(model: Any, make: Callable[[str, int, nn.Linear, Prompts], Shared]) -> None:
    """Freeze a CausalLM, and make(kind, layer, linear, prompts) each of its linear layers anew."""
    model.requires_grad_(False)
    prompts = Prompts()
    model.model.register_forward_pre_hook(prompts.watch, with_kwargs=True)
    for kind, names in by_kind(linear_layers(model)).items():
        for layer, name in enumerate(names):
            model.set_submodule(name, make(kind, layer, model.get_submodule(name), prompts))
    model.to(model.model.norm.weight.device)


def add_lily(model: Any, rank: int, stride: int, count: int, scale: float) -> None:
    """Lily on all linear layers: an A for each `stride` layers, `count` B's for all layers."""
    A: dict[tuple[str, int], nn.Parameter] = {}
    B: dict[str, nn.Parameter] = {}

    def make(kind: str, layer: int, linear: nn.Linear, prompts: Prompts) -> Lily:
        if (kind, layer // stride) not in A:
            A[kind, layer // stride] = uniform(rank, linear.in_features)
        if kind not in B:
            B[kind] = nn.Parameter(torch.zeros(count, rank, linear.out_features))
        return Lily(linear, scale, prompts, A[kind, layer // stride], B[kind])
    add_shared(model, make)


def add_core(model: Any, rank: int, experts: int, scale: float) -> None:
    """Core-space experts on all linear layers."""
    add_shared(model, lambda kind, layer, linear, prompts: Core(
        linear, scale, prompts, rank, experts))


def by_kind(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """{projection kind: names of its layers, in order}."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split(".")[-1], []).append(name)
    return kinds


def parameters(args: argparse.Namespace, kind: str, rank: int,
               shapes: Mapping[str, tuple[int, int]]) -> int:
    """Trainable parameters of a kind with this rank, on weights of these shapes (out, in)."""
    E, L = args.experts, args.stride
    if kind == "lily":
        found = 0
        for names in by_kind(shapes).values():
            d_out, d_in = shapes[names[0]]
            found += rank * (math.ceil(len(names) / L) * d_in
                             + args.num_b * (d_out + len(names)))
        return found
    cores = (E + 1) * rank ** 2 + E * rank if kind == "core" else 0
    experts = E if kind == "mixture" else 1
    return sum(cores + allocate.parameters(shape, experts, rank) for shape in shapes.values())


def forms(args: argparse.Namespace, model: nn.Module) -> dict[str, dict[str, int]]:
    """{kind: its rank and parameters}: of the mixture's --rank, of the others the nearest rank.

    Raises ValueError for kinds that differ from the mixture by more than 2 %.
    """
    shapes = {name: tuple(m.weight.shape) for name, m in linear_layers(model).items()}
    target = parameters(args, "mixture", args.rank, shapes)
    found = {}
    for kind in KINDS:
        rank = args.rank if kind == "mixture" else min(range(1, 1000), key=lambda r: abs(
            parameters(args, kind, r, shapes) - target))
        found[kind] = {"rank": rank, "parameters": parameters(args, kind, rank, shapes)}
    if wrong := [k for k, f in found.items() if abs(f["parameters"] / target - 1) > TOLERANCE]:
        raise ValueError(f"no rank gives {', '.join(wrong)} the mixture's {target:,} parameters "
                         "within 2 %: change --experts, --stride or --num-b")
    return found


def adapt(args: argparse.Namespace, model: nn.Module, kind: str, scale: float) -> None:
    """Put a kind's adapters on all linear layers."""
    rank, E = forms(args, model)[kind]["rank"], args.experts
    if kind == "lily":
        add_lily(model, rank, args.stride, args.num_b, scale)
    elif kind == "core":
        add_core(model, rank, E, scale)
    else:
        counts = dict.fromkeys(linear_layers(model), E if kind == "mixture" else 1)
        add_experts(model, Allocation(counts, rank, scale * rank))


def run(args: argparse.Namespace, kind: str, scale: float, lr: float, inputs: Inputs, seed: int,
        ) -> dict[str, str]:
    """{task: 1 or 0 for each test line, as text} of a kind trained with a seed.

    Zeros if it diverged.
    """
    torch.manual_seed(seed)
    adapt(args, inputs.model, kind, scale)
    cfg = TrainConfig(epochs=args.epochs, lr=lr, seed=seed)
    with TemporaryDirectory() as folder:
        try:
            train(inputs.model, inputs.examples, cfg, Path(folder), inputs.tokenizer.pad_id)
        except ArithmeticError:
            return {task.name: "0" * len(task.test) for task in inputs.tasks}
    return {t.name: "".join(map(str, evaluate(inputs.model, inputs.tokenizer, t).right))
            for t in inputs.tasks}


def searches(record: Mapping[str, Any], kind: str) -> dict[tuple[float, float], float]:
    """{(scale, rate): mean exact match} of a kind's search; one that is not finished is absent."""
    found, runs = {}, record["runs"]
    for scale, lr in points(record):
        keys = [f"search {kind} {scale:g} {lr:g} {seed}" for seed in record["settings"]["search"]]
        if all(key in runs for key in keys):
            found[scale, lr] = sum(share(runs[key]) for key in keys) / len(keys)
    return found


def points(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The scales and rates to search. A single one is taken without a search."""
    return [(scale, lr) for scale in record["settings"]["scales"]
            for lr in record["settings"]["lrs"]]


def chosen(record: Mapping[str, Any], kind: str) -> tuple[float, float] | None:
    """The best scale and rate of a kind's search, of equal ones the smallest; None before it."""
    if len(only := points(record)) == 1:
        return only[0]
    found = searches(record, kind)
    return max(found, key=lambda p: (found[p], -p[0] * p[1])) if found else None


def cells(args: argparse.Namespace, record: Mapping[str, Any],
          ) -> Iterator[tuple[str, str, float, float, int]]:
    """(phase, kind, scale, rate, seed): the search, then the finals that it asks for."""
    if len(points(record)) > 1:
        for seed in search_seeds(args):
            for kind in args.kinds:
                for scale, lr in points(record):
                    yield "search", kind, scale, lr, seed
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for kind in args.kinds:
            if point := chosen(record, kind):
                yield "final", kind, *point, seed


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = grid_flags(__doc__, "shared-experts", KINDS)
    parser.add_argument("--experts", type=flags.positive, default=4, help="of mixture and core")
    parser.add_argument("--stride", type=flags.positive, default=2, help="layers for an A of Lily")
    parser.add_argument("--num-b", type=flags.positive, default=2, help="B's of a kind in Lily")
    parser.add_argument("--scales", type=numbers, default="1,2,4",
                        help="of the update; comma list to search (default: %(default)s)")
    args = parser.parse_args(argv)
    if wrong := {*args.kinds} - {*KINDS}:
        parser.error(f"{', '.join(sorted(wrong))}: kinds are {', '.join(KINDS)}")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.readme:
        print(markdown(read_json(args.readme)))
        return
    file = RESULTS / f"{args.name}.json"
    record: dict[str, Any] = read_json(file) if file.exists() else {"runs": {}}
    form = {"forms": forms(args, load(args, "final", args.first_seed).model), **{
        n: getattr(args, n) for n in ("model", "tasks", "limit_train", "limit_test", "epochs",
                                      "experts", "stride", "num_b")}}
    if (held := record.setdefault("form", form)) != form:
        raise ValueError(f"{file} was begun with {held}: give another --name, or these settings")
    record |= {"format": "minismoe.shared_experts/1", "machine": machine(), "versions": versions(),
               "settings": {"lrs": args.lrs, "scales": args.scales, "kinds": args.kinds,
                            "search": list(search_seeds(args))}}
    print(", ".join(f"{kind}: rank {f['rank']}, {f['parameters']:,} parameters"
                    for kind, f in form["forms"].items()))
    searched = len(points(record)) if len(points(record)) > 1 else 0
    total = len(args.kinds) * (args.search_seeds * searched + args.seeds)
    if args.plan:
        print(f"{total} runs, {len(record['runs'])} of them done")
        return
    run_cells(args, file, record, total, cells(args, record), partial(run, args))
    print(markdown(record))


def finals(record: Mapping[str, Any], kind: str) -> dict[int, Any]:
    """{seed: answers} of a kind's final runs at the scale and rate of its search."""
    if (point := chosen(record, kind)) is None:
        return {}
    start = f"final {kind} {point[0]:g} {point[1]:g} "
    return {int(key.removeprefix(start)): answers for key, answers in record["runs"].items()
            if key.startswith(start)}


def markdown(record: Mapping[str, Any]) -> str:
    """The kinds at their best with paired differences, and the whole search, its best in bold."""
    found, rows, searched = record["form"]["forms"], [], []
    lrs, scales = record["settings"]["lrs"], record["settings"]["scales"]
    results = {kind: finals(record, kind) for kind in KINDS}
    for kind in record["settings"]["kinds"]:
        if (best := chosen(record, kind)) is None:
            continue
        values, runs = searches(record, kind), results[kind]
        mean = f"{100 * sum(map(share, runs.values())) / len(runs):.1f}" if runs else ""
        search = f"{100 * values[best]:.1f}" if best in values else ""
        rows.append([kind, found[kind]["rank"], f"{found[kind]['parameters']:,}", f"{best[0]:g}",
                     f"{best[1]:g}", search, mean] + [
            difference(runs, results[other]) if kind != other and runs and results[other] else ""
            for other in ("lora", "mixture")])
        for scale in scales:
            cells = [f"{100 * values[scale, lr]:.1f}" if (scale, lr) in values else ""
                     for lr in lrs]
            searched.append([kind, f"{scale:g}", *(
                f"**{cell}**" if (scale, lr) == best else cell for cell, lr in zip(cells, lrs))])
    return table(["kind", "rank", "parameters", "scale", "rate", "search", "final", "over lora",
                  "over mixture"], rows) + "\n\n" + table(
        ["search", "scale", *(f"{lr:g}" for lr in lrs)], searched)


if __name__ == "__main__":
    script.run_script(main)
