"""Freeze: the mixture of one matrix as one linear map of rank R = E*r, which is a plain LoRA.

The fits are those of `reference.fits`. Here they come from the sums M, P and G of moments.py:

    linear = A_g + (P - A_g M) (M + ridge I)^-1,  whatever B is; A_g is the fit "gates"

Samples that are held out choose the ridge (or `gates`, if no ridge does better), and give the
residual, the share of the mixture's output energy that the fit misses. `fit` holds the sums of a
whole model, of any kind; an export goes through our decoder layer by layer, and calls `fit_group`
for each.
Letters: E experts of a matrix, r rank of each, R = E*r, D inputs of the matrix.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .experts import ExpertLinear, expert_layers, packs
from .hooks import measuring
from .moments import HELD_OUT, TO_FIT, Input, Run, Sums, add_moments, wide

KINDS = ("mean", "gates", "linear")
RIDGES = (1e-2, 1e-1)        # times the mean diagonal of M; 1e-3 or 1 won 3 of 54 fits on SmolLM2


@dataclass
class Fit:
    """A mixture as one linear map: y = W x + lora_B lora_A x, scaling folded into lora_B."""

    lora_A: Tensor               # (R, D), float32 or better
    lora_B: Tensor               # (out, R)
    kind: str = "exact"          # mean, gates or linear; exact for one expert
    residual: float = 0.0        # share of the mixture's output energy that it misses, held out


# {task: {module: Fit}}; under None those of all tasks together.
TaskFits = dict[str | None, dict[str, Fit]]


@torch.no_grad()
def fit(model: nn.Module, tasks: Mapping[str, Iterable[Sequence[Tensor]]], kind: str = "linear",
        ) -> TaskFits:
    """Fits of all mixtures of `model`, one of KINDS.

    tasks: batches of (input_ids, attention_mask, ...), each (B, T). With "linear", a matrix keeps
    its fit "gates" if no ridge does better on held-out samples. Fit.kind tells.
    Raises ValueError as `no_fits` and `solve` do, and without a sample.
    """
    batches = {task: [*of_task] for task, of_task in tasks.items()}
    if not batches:
        raise ValueError("calibration takes samples of one task or more")
    fits = no_fits(expert_layers(model), batches, (None, *tasks))
    decoder = getattr(model, "model", model)
    runs = {task: [(batch[1], partial(decoder, input_ids=batch[0], attention_mask=batch[1]))
                   for batch in of_task] for task, of_task in batches.items()}
    mixtures = {name: m for name, m in expert_layers(model).items() if m.router is not None}
    with measuring(model):
        fit_group(mixtures, runs, fits, packs(model), kind)
    return fits


def no_fits(layers: Mapping[str, ExpertLinear], tasks: Mapping[str, Sequence[Sequence[Tensor]]],
            wanted: Sequence[str | None]) -> TaskFits:
    """The exact maps of single experts for each task that is wanted (None: for all of them
    together); those of mixtures are to be replaced by `fit_group`. Raises ValueError for a task of
    fewer than two samples, if there is a mixture."""
    few = [t for t, batches in tasks.items() if sum(len(b[0]) for b in batches) < 2]
    if few and any(layer.router is not None for layer in layers.values()):
        raise ValueError(f"{', '.join(few)}: two calibration samples or more are needed, give more")
    return {task: {name: exact(layer) for name, layer in layers.items()} for task in wanted}


def fit_group(layers: Mapping[str, nn.Module], tasks: Mapping[str, Iterable[Run]], fits: TaskFits,
              packed: bool, kind: str = "linear") -> dict[str, Tensor]:
    """Fit the mixtures among linear layers that `fits` has, for the tasks that it has, from one run
    of each batch. packed: whether the layers see rows of real tokens alone.

    Returns M (D, D) over all tokens by module; layers that read the same x have one tensor.
    """
    mixtures: dict[str, ExpertLinear] = {
        name: layer for name, layer in layers.items() if isinstance(layer, ExpertLinear)
        and layer.router is not None and any(name in of_task for of_task in fits.values())}

    def put(task: str | None, inputs: Mapping[str, Input]) -> None:
        for each in inputs.values():
            if any(each.readers.values()):
                fits[task].update(solve(mixtures, each, kind))

    together: dict[str, Input] = {}
    for task, runs in tasks.items():
        if task not in fits:
            add_moments(together, layers, mixtures, runs, packed)
            continue
        alone: dict[str, Input] = {}
        add_moments(alone, layers, mixtures, runs, packed)
        put(task, alone)
        for name, each in alone.items():
            if name in together:
                together[name].add(each)
            else:
                together[name] = each
    if None in fits:
        put(None, together)
    moments: dict[str, Tensor] = {}
    for each in together.values():
        moments |= dict.fromkeys(each.readers, each.M.sum(0))
    return moments


@torch.no_grad()
def solve(mixtures: Mapping[str, ExpertLinear], x: Input, kind: str) -> dict[str, Fit]:
    """{module: fit} of the mixtures that read x.

    Raises ValueError with the modules whose sums or experts are not finite.
    """
    to_fit, held_out = x.sums(TO_FIT), x.sums(HELD_OUT)
    readers = {name: mixtures[name] for name in to_fit}
    wrong = [name for name, layer in readers.items() if not all(t.isfinite().all() for t in (
        *to_fit[name], *held_out[name], layer.lora_A, layer.lora_B))]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: what the mixture reads or writes on the calibration "
                         "samples is not finite: freeze with --dtype float32, or train again with "
                         "a lower --lr")
    best: dict[str, Fit] = {}
    starts: list[Tensor] = []                # (R, D), the A of each expert times its constant gate
    for name, layer in readers.items():
        sums, start = to_fit[name], "mean" if kind == "mean" else "gates"
        c = sums.gates / sums.gates.sum() if kind == "mean" else constant_gates(layer, sums)
        starts.append((wide(layer.lora_A) * c[:, None, None]).flatten(0, 1))
        best[name] = measured(layer, starts[-1], start, held_out[name])
    for ridge in RIDGES if kind == "linear" else ():
        for (name, layer), A in zip(readers.items(), linear(starts, [*to_fit.values()], ridge)):
            fitted = measured(layer, A, "linear", held_out[name])
            if fitted.residual < best[name].residual:
                best[name] = fitted
    return best


def constant_gates(layer: ExpertLinear, sums: Sums) -> Tensor:
    """The gates (E,) of least squares; of all that are as good, as with two equal experts, the
    smallest. A dead expert, whose output is 0, gets 0."""
    E, r, _ = layer.lora_A.shape
    A, K = wide(layer.lora_A.flatten(0, 1)), _gram(layer)
    # sum h h^T = A M A^T, sum (g*h) h^T = P A^T; the r x r block of two experts sums to one entry
    Q, b = ((K * x).view(E, r, E, r).sum((1, 3))                         # (E, E)
            for x in (_product(A, sums.M) @ A.T, sums.P @ A.T))
    energy = Q.diagonal()                # experts differ in size, not in meaning: each is scaled
    scale = torch.where(energy > 0, energy, torch.inf).rsqrt()
    scaled = (Q * scale * scale[:, None]).cpu()          # CUDA has no driver for a singular system
    gates = torch.linalg.lstsq(scaled, (scale * b.sum(0)).cpu()[:, None], rcond=1e-9,
                               driver="gelsd").solution[:, 0]
    return scale * gates.to(scale)


def linear(starts: Sequence[Tensor], sums: Sequence[Sums], ridge: float) -> list[Tensor]:
    """A' (R, D) of each start, shrunk towards it; none if M is singular. All share M."""
    M, diagonal = sums[0].M, sums[0].M.diagonal()
    factor, failed = torch.linalg.cholesky_ex(wide(M.diagonal_scatter(
        diagonal + ridge * diagonal.mean())))
    return [] if failed else [A + torch.cholesky_solve((s.P - _product(A, M)).T, factor).T
                              for A, s in zip(starts, sums)]


def _product(A: Tensor, M: Tensor) -> Tensor:
    """A M (R, D) in float64, multiplied in M's dtype: M in float64 would take twice the memory."""
    return wide(A.to(M) @ M)


def measured(layer: ExpertLinear, A: Tensor, kind: str, sums: Sums) -> Fit:
    """The fit A (R, D), with its residual on the tokens of `sums`."""
    K, cross = _gram(layer), A @ sums.P.T
    energy = (K * sums.G).sum()
    missed = (K * (sums.G - cross - cross.T + _product(A, sums.M) @ A.T)).sum()
    return Fit(A.to(layer.lora_A), exact(layer).lora_B, kind,
               max(0.0, (missed / energy).item()) if energy > 0 else 0.0)


def _gram(layer: ExpertLinear) -> Tensor:
    """B B^T (R, R), which gives inner products of outputs: <B^T u, B^T v> = u^T (B B^T) v."""
    B = wide(layer.lora_B.flatten(0, 1))
    return B @ B.T


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
def frozen_layer(layer: nn.Linear, fit: Fit) -> ExpertLinear:
    """The layer with one expert of rank R, the fit, without a router."""
    new = ExpertLinear(layer, experts=1, rank=len(fit.lora_A), alpha=len(fit.lora_A), top_k=1)
    new.lora_A.copy_(fit.lora_A[None])
    new.lora_B.copy_(fit.lora_B.T[None])
    return new


@torch.no_grad()
def merged_layer(layer: ExpertLinear, fit: Fit) -> nn.Linear:
    """An nn.Linear of the layer's weight with the fit merged into it."""
    new = nn.Linear(layer.in_features, layer.out_features, device="meta")
    new.weight = nn.Parameter(merged(layer.dense(), fit), requires_grad=False)
    new.bias = layer.bias
    return new


def freeze(model: nn.Module, fits: Mapping[str, Fit]) -> None:
    """Replace each mixture by its `frozen_layer`, in place. Raises ValueError, before anything is
    changed, with the names that have no fit."""
    for name, layer in _replaced(model, fits).items():
        model.set_submodule(name, frozen_layer(layer, fits[name]))


def merge(model: nn.Module, fits: Mapping[str, Fit]) -> None:
    """Replace each adapted layer by its `merged_layer`, in place. A merged layer has no experts, so
    a second call changes nothing. Raises ValueError as `freeze` does."""
    for name, layer in _replaced(model, fits).items():
        model.set_submodule(name, merged_layer(layer, fits[name]))


def _replaced(model: nn.Module, fits: Mapping[str, Fit]) -> dict[str, ExpertLinear]:
    """The layers to replace, each of which has a fit."""
    layers = expert_layers(model)
    if missing := [n for n in layers if n not in fits]:
        raise ValueError(f"no fit for {', '.join(missing)}: freeze the adapter again")
    return layers
