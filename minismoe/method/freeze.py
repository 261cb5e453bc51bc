"""Freeze: the mixture of one matrix as one linear map of rank R = E*r, which is a plain LoRA.

The fits are those of `reference.fits`, to calibration tokens x (T, D). With h = x A^T of the
stacked experts, gh each expert's r entries of h times its gate, and A_g the fit by constant gates,

    linear = A_g + d^T x (x^T x + ridge I)^-1 = A_g + d^T (x x^T + ridge I)^-1 x

where d = gh - x A_g^T is what A_g misses; B does not matter. The smaller of the two systems is
solved. Tokens that are held out choose the ridge (or A_g, if no ridge does better), and give the
residual, the share of the mixture's output energy that the fit misses. An export goes through the
decoder layer by layer, and calls `solve` for each group of matrices that read the same x.
Letters: T tokens, E experts of a matrix, r rank of each, R = E*r, D inputs of the matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .experts import ExpertLinear, top_k_gates
from .hooks import gram

RIDGES = (1e-2, 1e-1)    # times trace(x^T x) / D; 1e-3 or 1 won 3 of 54 on SmolLM2


@dataclass
class Fit:
    """A mixture as one linear map: y = W x + lora_B lora_A x, scaling folded into lora_B."""

    lora_A: Tensor               # (R, D), float32 or better
    lora_B: Tensor               # (out, R)
    kind: str = "exact"          # gates or linear; exact for one expert
    residual: float = 0.0        # share of the mixture's output energy that it misses, held out


# {task: {module: Fit}}; under None those of all tasks together.
TaskFits = dict[str | None, dict[str, Fit]]


def no_fits(layers: Mapping[str, ExpertLinear], tasks: Mapping[str, Sequence[Sequence[Tensor]]],
            wanted: Sequence[str | None]) -> TaskFits:
    """The exact maps of single experts for each task that is wanted (None: for all of them
    together); those of mixtures are to be replaced by `solve`. Raises ValueError for a task of
    fewer than two samples, if there is a mixture."""
    few = [t for t, batches in tasks.items() if sum(len(b[0]) for b in batches) < 2]
    if few and any(layer.router is not None for layer in layers.values()):
        raise ValueError(f"{', '.join(few)}: two calibration samples or more are needed, give more")
    return {task: {name: exact(layer) for name, layer in layers.items()} for task in wanted}


@torch.no_grad()
def solve(layers: Mapping[str, ExpertLinear], x: Tensor, held: Tensor, times: Tensor,
          ) -> dict[str, Fit]:
    """{module: fit} of mixtures that read x (T, D).

    held (T,): tokens that judge, and are not fitted. times (T,): how often each token counts.
    Raises ValueError with the modules whose inputs or experts are not finite.
    """
    # Squares of what is multiplied by it count a token `times` times.
    root_times = times.to(x).sqrt()[:, None]
    weighted = x * root_times
    fitted, unseen = weighted[~held], weighted[held]
    best, targets, wrong = dict[str, Fit](), dict[str, Tensor](), list[str]()
    for name, layer in layers.items():
        (E, r, _), A, router = layer.lora_A.shape, layer.lora_A.flatten(0, 1).to(x), layer.router
        assert router is not None
        gates = top_k_gates(x @ router.to(x).T, layer.top_k)                             # (T, E)
        h = weighted @ A.T
        gh = targets[name] = (h.unflatten(1, (E, r)) * gates[..., None]).flatten(1)      # (T, R)
        if not all(t.isfinite().all() for t in (weighted, gh, layer.lora_B)):
            wrong.append(name)
            continue
        c = constant_gates(layer, h[~held], gh[~held])
        A = A * c.to(A).repeat_interleave(r)[:, None]
        best[name] = judged(layer, A, "gates", unseen, gh[held])
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: what the mixture reads or writes on the calibration "
                         "samples is not finite: freeze with --dtype float32, or train again with "
                         "a lower --lr")
    starts = [start.lora_A.to(x) for start in best.values()]
    for As in linear(starts, fitted, [gh[~held] for gh in targets.values()]):
        for (name, layer), A in zip(layers.items(), As):
            found = judged(layer, A, "linear", unseen, targets[name][held])
            if found.residual < best[name].residual:
                best[name] = found
    return best


def constant_gates(layer: ExpertLinear, h: Tensor, gh: Tensor) -> Tensor:
    """The gates (E,) of least squares; of all that are as good, as with two equal experts, the
    smallest. A dead expert, whose output is 0, gets 0."""
    E, r, _ = layer.lora_A.shape
    # Inner products of outputs, summed over the r x r block of each two experts, (E, E).
    Q, b = ((_outputs(layer) * (to_float64(y).T @ to_float64(h))).view(E, r, E, r).sum((1, 3))
            for y in (h, gh))
    energy = Q.diagonal()                # experts differ in size, not in meaning: each is scaled
    scale = torch.where(energy > 0, energy, torch.inf).rsqrt()
    scaled = (Q * scale * scale[:, None]).cpu()          # CUDA has no driver for a singular system
    gates = torch.linalg.lstsq(scaled, (scale * b.sum(0)).cpu()[:, None], rcond=1e-9,
                               driver="gelsd").solution[:, 0]
    return scale * gates.to(scale)


def linear(starts: Sequence[Tensor], x: Tensor, targets: Sequence[Tensor]) -> Iterator[
        list[Tensor]]:
    """For each ridge, A' (R, D) of each start, shrunk towards it, for targets gh (T, R); none where
    the system is singular."""
    missed = torch.cat([gh - x @ A.T for A, gh in zip(starts, targets)], 1)
    few = len(x) < x.shape[1]                            # fewer tokens than inputs
    system, right = gram(x.T if few else x), missed if few else x.T @ missed
    for ridge in RIDGES:
        shift = ridge * x.square().sum() / x.shape[1]
        factor, failed = torch.linalg.cholesky_ex(
            system.diagonal_scatter(system.diagonal() + shift))
        if not failed:
            step = torch.cholesky_solve(right, factor)
            changes = (x.T @ step if few else step).T.split([len(A) for A in starts])
            yield [A + change for A, change in zip(starts, changes)]


def judged(layer: ExpertLinear, A: Tensor, kind: str, x: Tensor, gh: Tensor) -> Fit:
    """The fit A (R, D), with its residual on tokens x (T, D) whose gated h are gh (T, R)."""
    K, wanted, missed = _outputs(layer), to_float64(gh), to_float64(gh - x @ A.T)
    energy = (wanted @ K * wanted).sum()
    lost = (missed @ K * missed).sum() / energy if energy > 0 else energy
    return Fit(A.to(layer.lora_A), exact(layer).lora_B, kind, lost.item())


def _outputs(layer: ExpertLinear) -> Tensor:
    """B B^T (R, R), which gives inner products of outputs: <B^T u, B^T v> = u^T (B B^T) v."""
    B = to_float64(layer.lora_B.flatten(0, 1))
    return B @ B.T


def to_float64(x: Tensor) -> Tensor:
    """x in float64: on CUDA, or else on the CPU, since other devices may lack float64."""
    return x.double() if x.device.type == "cuda" else x.cpu().double()


@torch.no_grad()
def exact(layer: ExpertLinear) -> Fit:
    """The linear map of all experts with every gate 1; for one expert, this is what it does."""
    return Fit(layer.lora_A.flatten(0, 1).clone(), layer.scaling * layer.lora_B.flatten(0, 1).T)


def merged(weight: Tensor, fit: Fit) -> Tensor:
    """weight + lora_B lora_A, summed in float32 or better and rounded once to weight's dtype."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = (part.to(weight.device, dtype) for part in (fit.lora_A, fit.lora_B))
    return torch.addmm(weight.to(dtype), B, A).to(weight.dtype)


@torch.no_grad()
def frozen_layer(layer: nn.Linear, fit: Fit) -> ExpertLinear:
    """The layer with one expert of rank R, the fit, without a router."""
    new = ExpertLinear(layer, experts=1, rank=len(fit.lora_A), alpha=len(fit.lora_A), top_k=1)
    new.lora_A.copy_(fit.lora_A[None])
    new.lora_B.copy_(fit.lora_B.T[None])
    return new
