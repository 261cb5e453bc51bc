"""Freeze: the mixture of one matrix as one linear map of rank R = E*r, which is a plain LoRA.

With h = A x of the stacked experts, and g*h each expert's r entries of it times its gate, a mixture
adds scaling * B^T (g*h) to W x. A fit (`reference.fits`) is a map A' that comes near it,

    A' = argmin  sum over tokens of  || B^T (g*h - A' x) ||^2

    mean    A' = c A, each expert's rows times one number: its mean gate
    gates   A' = c A, c by least squares: an E x E system
    linear  any A', whatever B is:  A' = A_g + (P - A_g M) (M + ridge I)^-1, A_g that of `gates`

from sums over tokens, M = sum x x^T, P = sum (g*h) x^T, G = sum (g*h) (g*h)^T. Every HOLD-th sample
is held out: it chooses the ridge (or `gates`, if no ridge does better), and gives the residual, the
share of the mixture's output energy that the fit misses.

Memory does not grow with samples or tasks. The largest sum is M, (D, D), one for all matrices that
read the same x (q, k, v; gate, up). Matrices are taken in groups whose sums fit a budget, with one
pass over the samples a group. The least is one M: D = 11,008 takes 4 sums of 485 MB in float32 (to
fit and held out, of a task and of all), and 4 of 970 MB while solving.
Letters: N tokens, E experts of a matrix, r rank of each, R = E*r, D inputs of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .experts import ExpertLinear, expert_layers, top_k_gates, without_pads

KINDS = ("mean", "gates", "linear")
HOLD = 4                                     # one sample of so many is held out
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)             # times the mean of M's diagonal
Readers = Mapping[str, ExpertLinear]         # the mixtures that read the same x, by module


@dataclass
class Fit:
    """A mixture as one linear map: y = W x + lora_B lora_A x, scaling folded into lora_B."""

    lora_A: Tensor               # (R, D), float32 or better
    lora_B: Tensor               # (out, R)
    kind: str = "exact"          # mean, gates or linear; exact for one expert
    residual: float = 0.0        # share of the mixture's output energy that it misses, held out
    energy: float = 0.0          # the mixture's output energy, as a share of all that is written


@dataclass
class TaskFits:
    """{module: Fit} of all tasks together, and of each task by itself."""

    together: dict[str, Fit]
    by_task: dict[str, dict[str, Fit]]

    def of(self, task: str | None) -> dict[str, Fit]:
        """The fits of a task; of all together for None."""
        return self.together if task is None else self.by_task[task]


@dataclass
class Moments:
    """Sums over tokens x for the mixtures that read it, which follow one another in P to written.
    """

    M: Tensor                    # (D, D)
    P: Tensor                    # (sum of R, D)
    G: Tensor                    # (sum of R, sum of R), of which blocks of one mixture are filled
    gates: Tensor                # (sum of E,)
    written: Tensor              # (mixtures,) sum of ||y||^2 of all that the matrix writes
    tokens: Tensor               # () how many

    def add(self, other: Moments) -> None:
        for ours, theirs in zip(vars(self).values(), vars(other).values()):
            ours += theirs

    def split(self, readers: Readers) -> dict[str, Moments]:
        """The sums of each mixture, as views."""
        counts = [len(layer.lora_A) for layer in readers.values()]
        ranks = [len(layer.lora_A.flatten(0, 1)) for layer in readers.values()]
        rows = self.G.split(ranks)
        return {name: Moments(self.M, P, rows[i].split(ranks, 1)[i], gates, written, self.tokens)
                for i, (name, P, gates, written) in enumerate(zip(
                    readers, self.P.split(ranks), self.gates.split(counts), self.written))}


def zeros(readers: Readers) -> Moments:
    """Empty sums."""
    A = torch.cat([layer.lora_A.detach().flatten(0, 1) for layer in readers.values()])
    (R, D), E, new = A.shape, sum(len(layer.lora_A) for layer in readers.values()), A.new_zeros
    return Moments(new(D, D), new(R, D), new(R, R), new(E), new(len(readers)), new(()))


def fit(model: nn.Module, tasks: Mapping[str, Sequence[Sequence[Tensor]]], memory: int = 1 << 30,
        progress: Callable[[int], Any] = lambda samples: None) -> dict[str, TaskFits]:
    """Fits of all mixtures of `model`, by kind.

    tasks: batches of (input_ids, attention_mask, ...), each (B, T), that can be read again and
    again. memory: bytes of sums held at a time. Kind "linear" holds gates if the held-out samples
    say so, and "gates" the mean if its system is singular; Fit.kind tells. Raises ValueError for a
    task of fewer than two samples.
    """
    layers = expert_layers(model)
    few = [t for t, batches in tasks.items() if sum(len(b[0]) for b in batches) < 2]
    if few and any(layer.router is not None for layer in layers.values()):
        raise ValueError(f"needs two calibration samples or more of {', '.join(few)}")

    def exacts() -> dict[str, Fit]:          # those of mixtures are replaced below
        return {name: exact(layer) for name, layer in layers.items()}

    found = {kind: TaskFits(exacts(), {task: exacts() for task in tasks}) for kind in KINDS}
    first = [t[:1] for t in next(iter(tasks.values()))[0]]
    for group in _groups(_inputs(model, first), memory):
        total = [(zeros(readers), zeros(readers)) for readers in group]
        for task in (*tasks, None):
            sums = total if task is None else moments_of(model, group, tasks[task], progress)
            for readers, parts, totals in zip(group, sums, total):
                if task is not None:
                    totals[0].add(parts[0])
                    totals[1].add(parts[1])
                for kind, fits in solve(readers, *parts).items():
                    found[kind].of(task).update(fits)
    return found


@torch.no_grad()
def _inputs(model: nn.Module, batch: Sequence[Tensor]) -> list[Readers]:
    """The routed layers in the order of a forward pass, those together that read the same x."""
    names = {layer: n for n, layer in expert_layers(model).items() if layer.router is not None}
    found: list[tuple[Tensor, dict[str, ExpertLinear]]] = []

    def hook(layer: ExpertLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not found or found[-1][0] is not args[0]:
            found.append((args[0], {}))
        found[-1][1][names[layer]] = layer

    _run(model, batch, names, hook)
    return [readers for _, readers in found]


def _groups(inputs: Iterable[Readers], memory: int) -> list[list[Readers]]:
    """Inputs in order, in groups whose sums fit `memory` bytes; a group has at least one input."""
    groups: list[list[Readers]] = []
    used = 0
    for readers in inputs:
        like = [layer.lora_A for layer in readers.values()]
        R, D = sum(len(A.flatten(0, 1)) for A in like), like[0].shape[-1]
        # To fit and held out, of a task and of all tasks together.
        size = 4 * (D * D + R * D + R * R) * like[0].itemsize
        if not groups or used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(readers)
        used += size
    return groups


def _run(model: nn.Module, batch: Sequence[Tensor], layers: Iterable[ExpertLinear],
         hook: Callable[..., None]) -> None:
    """Run a model on a batch, without its head, and call a forward hook for some layers."""
    was = model.training
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        getattr(model.eval(), "model", model)(input_ids=batch[0], attention_mask=batch[1])
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def moments_of(model: nn.Module, group: Sequence[Readers], batches: Iterable[Sequence[Tensor]],
           progress: Callable[[int], Any] = lambda samples: None,
           ) -> list[tuple[Moments, Moments]]:
    """Sums over the real tokens of the samples to fit and of those held out, for each input of
    `group`, in float32 or better."""
    found = [(zeros(readers), zeros(readers)) for readers in group]
    sums_of = {layer: [part.split(readers)[name] for part in parts]
               for readers, parts in zip(group, found) for name, layer in readers.items()}
    adds_M = {next(iter(readers.values())) for readers in group}         # one of each input
    mask = torch.empty(0)                    # of the batch, (B, T)
    token_numbers: list[Tensor] = []         # of its real tokens to fit, and of those held out

    def hook(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        """Add the tokens of one batch, x (..., D) and y (..., out)."""
        x, y, logits = (without_pads(t.reshape(-1, t.shape[-1]), mask).to(layer.lora_A.dtype)
                        for t in (args[0], y, layer.router_logits))
        gates = top_k_gates(logits, layer.top_k)                         # (N, E)
        h = (x @ layer.lora_A.flatten(0, 1).T).unflatten(1, layer.lora_A.shape[:2])
        gated = (h * gates[..., None]).flatten(1)                        # (N, R)
        for sums, rows in zip(sums_of[layer], token_numbers):
            x_part, gated_part = x[rows], gated[rows]
            if layer in adds_M:
                sums.M.addmm_(x_part.T, x_part)
                sums.tokens += len(rows)
            sums.P.addmm_(gated_part.T, x_part)
            sums.G.addmm_(gated_part.T, gated_part)
            sums.gates += gates[rows].sum(0)
            sums.written += y[rows].square().sum()

    seen = 0
    for batch in batches:
        mask = batch[1]
        held = (seen + mask.nonzero()[:, 0]) % HOLD == 1                 # (N,), of the real tokens
        token_numbers = [part.nonzero()[:, 0] for part in (~held, held)]
        _run(model, batch, sums_of, hook)
        seen += len(mask)
        progress(len(mask))
    return found


@torch.no_grad()
def solve(readers: Readers, fitting: Moments, held: Moments) -> dict[str, dict[str, Fit]]:
    """{kind: {module: Fit}} of the mixtures that read one x, from its sums."""
    fitting, held = (Moments(*map(_wide, vars(sums).values())) for sums in (fitting, held))
    to_fit, held_out = fitting.split(readers), held.split(readers)
    found: dict[str, dict[str, Fit]] = {kind: {} for kind in KINDS}
    starts = []

    def made(name: str, A: Tensor, kind: str) -> Fit:
        layer, sums = readers[name], held_out[name]
        energy = layer.scaling ** 2 * (_gram(layer) * sums.G).sum() / sums.written.clamp(min=1e-30)
        return replace(exact(layer), lora_A=A.to(layer.lora_A), kind=kind,
                       residual=residual(layer, A, sums), energy=energy.item())

    for name, layer in readers.items():
        mean, gates = constant_gates(layer, to_fit[name])
        A_mean, A_gates = ((_wide(layer.lora_A) * c[:, None, None]).flatten(0, 1)
                           for c in (mean, mean if gates is None else gates))
        found["mean"][name] = made(name, A_mean, "mean")
        found["gates"][name] = made(name, A_gates, "mean" if gates is None else "gates")
        found["linear"][name] = found["gates"][name]
        starts.append(A_gates)
    for ridge in RIDGES:
        A = linear(torch.cat(starts), fitting, ridge)
        parts = () if A is None else A.split([len(start) for start in starts])
        for name, part in zip(readers, parts):
            new = made(name, part, "linear")
            if new.residual < found["linear"][name].residual:
                found["linear"][name] = new
    return found


def constant_gates(layer: ExpertLinear, sums: Moments) -> tuple[Tensor, Tensor | None]:
    """Mean gates (E,) and those of least squares (E,), None if their system is singular."""
    E, r, _ = layer.lora_A.shape
    A, K = _wide(layer.lora_A.flatten(0, 1)), _gram(layer)

    def blocks(x: Tensor) -> Tensor:
        return x.view(E, r, E, r).sum((1, 3))                            # (E, E)

    # sum h h^T = A M A^T and sum (g*h) h^T = P A^T
    Q, b = blocks(K * (A @ sums.M @ A.T)), blocks(K * (sums.P @ A.T)).sum(0)
    scale = Q.diagonal().rsqrt()                         # experts differ in size, not in meaning
    scaled = Q * scale * scale[:, None]
    mean = sums.gates / sums.tokens
    if not scaled.isfinite().all() or torch.linalg.eigvalsh(scaled)[0] < 1e-9:
        return mean, None
    return mean, scale * torch.linalg.solve(scaled, scale * b)


def linear(start: Tensor, sums: Moments, ridge: float) -> Tensor | None:
    """A' (R, D) shrunk towards `start`; ridge is relative to M's diagonal. None if M is singular.
    """
    damped = sums.M.clone()
    damped.diagonal().add_(ridge * sums.M.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    missing = sums.P - start @ sums.M
    return None if failed else start + torch.cholesky_solve(missing.T, factor).T


def residual(layer: ExpertLinear, A: Tensor, sums: Moments) -> float:
    """Share of the mixture's output energy that A (R, D) misses on the tokens of `sums`."""
    K, cross = _gram(layer), A @ sums.P.T
    missed = (K * (sums.G - cross - cross.T + A @ sums.M @ A.T)).sum()
    energy = (K * sums.G).sum()
    return max(0.0, (missed / energy).item()) if energy > 0 else 0.0


def _gram(layer: ExpertLinear) -> Tensor:
    """B B^T (R, R): with it, products of what B maps are sums over what it reads."""
    B = _wide(layer.lora_B.flatten(0, 1))
    return B @ B.T


def _wide(x: Tensor) -> Tensor:
    """x in float64: on CUDA, or else on the CPU, since other devices may lack float64."""
    return x.double() if x.device.type == "cuda" else x.cpu().double()


@torch.no_grad()
def exact(layer: ExpertLinear) -> Fit:
    """The linear map of all experts with every gate 1; for one expert, this is what it does."""
    return Fit(layer.lora_A.flatten(0, 1).clone(), layer.scaling * layer.lora_B.flatten(0, 1).T)


def merged(weight: Tensor, fit: Fit) -> Tensor:
    """weight + lora_B lora_A, summed in float32 or better and rounded once to weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = (part.to(weight.device, wide) for part in (fit.lora_A, fit.lora_B))
    return torch.addmm(weight.to(wide), B, A).to(weight.dtype)


@torch.no_grad()
def freeze(model: nn.Module, fits: Mapping[str, Fit], keep: Collection[str] = ()) -> None:
    """Replace each mixture but those in `keep` by one expert of rank R without a router, in place.

    Raises ValueError, before anything is changed, with the names that have no fit.
    """
    for name, layer in _replaced(model, fits, keep).items():
        A, B = fits[name].lora_A, fits[name].lora_B
        new = ExpertLinear(layer, 1, len(A), len(A), 1)
        new.lora_A.copy_(A[None])
        new.lora_B.copy_(B.T[None])
        model.set_submodule(name, new)


@torch.no_grad()
def merge(model: nn.Module, fits: Mapping[str, Fit], keep: Collection[str] = ()) -> None:
    """Replace each adapted layer but those in `keep` by an nn.Linear of merged weights, in place.

    A merged layer has no experts, so a second call changes nothing. Raises ValueError as `freeze`.
    """
    for name, layer in _replaced(model, fits, keep).items():
        new = nn.Linear(layer.in_features, layer.out_features, device="meta")
        new.weight = nn.Parameter(merged(layer.dense(), fits[name]), requires_grad=False)
        new.bias = layer.bias
        model.set_submodule(name, new)


def _replaced(model: nn.Module, fits: Mapping[str, Fit], keep: Collection[str],
              ) -> dict[str, ExpertLinear]:
    layers = {n: layer for n, layer in expert_layers(model).items() if n not in set(keep)}
    if missing := [n for n in layers if n not in fits]:
        raise ValueError(f"no fit for {', '.join(missing)}: freeze the adapter again")
    return layers
