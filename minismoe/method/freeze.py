"""Formula 4: the mixture of one matrix as one linear map of rank R = E*r, which is a plain LoRA.

With h = A x the stacked experts' A, and g*h each expert's r entries of it times its gate, a mixture
adds scaling * B^T (g*h) to W x. The map A' that comes nearest to it over the calibration tokens,

    A' = argmin  sum over tokens of  || B^T (g*h - A' x) ||^2

is sought in three families, each of which holds the one before:

    mean    A' = c A, each expert's rows times one number: c is the gates' average over the tokens
    gates   A' = c A, c by least squares: an E x E system
    linear  any A': routing depends on x, and much of that dependence is linear, so that
            A' = A_g + (P - A_g M) (M + ridge I)^-1, with A_g that of `gates`. B drops out.

All follows from sums over tokens: M = sum x x^T, P = sum (g*h) x^T, G = sum (g*h) (g*h)^T. The
others are products of these, sum h h^T = A M A^T and sum (g*h) h^T = P A^T. Every HOLD-th sample is
held out: on those the ridge is chosen, and `gates` where it does better than each ridge. What a fit
misses of the mixture's output energy on them, its residual, says what freezing loses in a matrix.

Memory does not depend on the number of samples or tasks. What counts is M, (in, in), once for the
matrices that read the same x (q, k, v; gate, up): matrices are gathered in groups, in a pass over
the samples for each, so that the sums held at a time fit a budget. One M is the least: 11,008
inputs take 4 sums of 485 MB in float32 (fitting and held-out samples, of a task and of all), and
solving, in float64, four times 970 MB for a while.

Letters: N tokens, E experts of a matrix, r rank of each, R = E*r, D inputs of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts import ExpertLinear, expert_layers, top_k_gates, without_pads

KINDS = ("mean", "gates", "linear")
HOLD = 4                                     # one sample of so many is held out
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)             # times the mean of M's diagonal
Batch = Sequence[Tensor]                     # input_ids, attention_mask, and what else, (B, T)
Moments = dict[tuple[str, str], Tensor]      # (module, letter) -> a sum; ("", "M") is shared


@dataclass
class Fit:
    """A mixture as one linear map: y = W x + lora_B lora_A x, scaling folded into lora_B."""

    lora_A: Tensor               # (R, D), float32 or better
    lora_B: Tensor               # (out, R)
    kind: str = "exact"          # mean, gates or linear; exact where there was one expert
    residual: float = 0.0        # share of the mixture's output energy that it misses, held out
    energy: float = 0.0          # the mixture's output energy, as a share of all that is written


def fit(model: nn.Module, tasks: Mapping[str, Sequence[Batch]], memory: int = 1 << 30,
        progress: Callable[[int], Any] = lambda samples: None,
        ) -> dict[str, dict[str, dict[str, Fit]]]:
    """Fits of all mixtures of `model`, {kind: {task: {module: Fit}}}; task "" is all together.

    tasks: batches of (input_ids, attention_mask, ...), each (B, T), that can be gone through again
    and again. memory: bytes of sums held at a time. Kind "linear" holds gates where the held-out
    samples say so, and "gates" the mean where its system is singular; Fit.kind tells. Raises
    ValueError for a task of fewer than two samples.
    """
    layers = expert_layers(model)
    few = [t for t, batches in tasks.items() if sum(len(b[0]) for b in batches) < 2]
    if few and any(layer.router is not None for layer in layers.values()):
        raise ValueError(f"needs two calibration samples or more of {', '.join(few)}")
    found: dict[str, dict[str, dict[str, Fit]]] = {kind: {task: {
        name: exact(layer) for name, layer in layers.items() if layer.router is None}
        for task in ("", *tasks)} for kind in KINDS}

    first = [t[:1] for t in next(iter(tasks.values()))[0]]
    for group in _groups(_inputs(model, layers, first), memory):
        total = [[zeros(readers) for readers in group] for _ in range(2)]
        for task in (*tasks, ""):
            sums = total
            if task in tasks:
                sums = [gather(model, group, _samples(tasks[task], held), progress)
                        for held in (False, True)]
                for all_, part in zip(sum(total, []), sum(sums, [])):
                    for key, value in part.items():
                        all_[key] += value
            for readers, fitting, held_out in zip(group, *sums):
                for kind, fits in solve(readers, fitting, held_out).items():
                    found[kind][task].update(fits)
    return {kind: {task: {name: fits[name] for name in layers} for task, fits in by_task.items()}
            for kind, by_task in found.items()}


def _samples(batches: Iterable[Batch], held: bool) -> Iterator[Batch]:
    """The held-out rows of batches, or the others."""
    seen = 0
    for batch in batches:
        rows = torch.arange(seen, seen + len(batch[0]), device=batch[0].device)
        seen += len(rows)
        rows = (rows % HOLD == 1) == held
        if rows.any():
            yield [t[rows] for t in batch]


@contextmanager
def _hooks(pairs: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Forward hooks, for a while."""
    handles = [layer.register_forward_hook(hook) for layer, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, batch: Batch) -> None:
    """The decoder's forward pass; the head, where there is one above it, holds no mixture."""
    getattr(model, "model", model)(input_ids=batch[0], attention_mask=batch[1])


@torch.no_grad()
def _inputs(model: nn.Module, layers: Mapping[str, ExpertLinear], batch: Batch,
            ) -> list[dict[str, ExpertLinear]]:
    """The routed layers, those together that read the same tensor, as they come in a forward."""
    found: list[tuple[Tensor, dict[str, ExpertLinear]]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: ExpertLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
            if not found or found[-1][0] is not args[0]:
                found.append((args[0], {}))
            found[-1][1][name] = layer
        return hook

    with _hooks((layer, watch(name)) for name, layer in layers.items() if layer.router is not None):
        _run(model, batch)
    return [readers for _, readers in found]


def _groups(inputs: list[dict[str, ExpertLinear]], memory: int,
            ) -> Iterator[list[dict[str, ExpertLinear]]]:
    """Inputs in groups, in order, the sums of each of which fit `memory`."""
    group: list[dict[str, ExpertLinear]] = []
    used = 0
    for readers in inputs:
        size = 4 * sum(s.nbytes for s in zeros(readers, "meta").values())
        if group and used + size > memory:
            yield group
            group, used = [], 0
        group.append(readers)
        used += size
    if group:
        yield group


def zeros(readers: Mapping[str, ExpertLinear], device: str | torch.device | None = None) -> Moments:
    """Empty sums of an input and of the matrices that read it."""
    sums: Moments = {}
    for name, layer in readers.items():
        (E, r, D), like = layer.lora_A.shape, layer.lora_A
        for key, shape in {("", "M"): (D, D), ("", "N"): (), (name, "P"): (E * r, D),
                           (name, "G"): (E * r, E * r), (name, "g"): (E,), (name, "y"): ()}.items():
            sums.setdefault(key, like.new_zeros(shape, device=device or like.device))
    return sums


@torch.no_grad()
def gather(model: nn.Module, group: Sequence[Mapping[str, ExpertLinear]], batches: Iterable[Batch],
           progress: Callable[[int], Any] = lambda samples: None) -> list[Moments]:
    """Sums over the real tokens of `batches` for each input of `group`, in float32 or better."""
    found = [zeros(readers) for readers in group]

    def watch(sums: Moments, name: str, first: bool) -> Callable[..., None]:
        """A forward hook that adds a layer's tokens; the first of those that share x adds M."""
        def hook(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            """Add one batch of x (.., in) and y (.., out), without its pads."""
            (E, r, _), dtype = layer.lora_A.shape, layer.lora_A.dtype
            x, y, logits = (without_pads(t.reshape(-1, t.shape[-1]), mask).to(dtype)
                            for t in (args[0], y, layer.router_logits))
            gates = top_k_gates(logits, layer.top_k)                     # (N, E)
            h = x @ layer.lora_A.flatten(0, 1).T                         # (N, R)
            gated = (h.unflatten(1, (E, r)) * gates[..., None]).flatten(1)
            sums[name, "P"].addmm_(gated.T, x)
            sums[name, "G"].addmm_(gated.T, gated)
            sums[name, "g"] += gates.sum(0)
            sums[name, "y"] += y.square().sum()
            if first:
                sums["", "M"].addmm_(x.T, x)
                sums["", "N"] += len(x)
        return hook

    was, mask = model.training, torch.empty(0)
    with _hooks((layer, watch(sums, name, i == 0)) for sums, readers in zip(found, group)
                for i, (name, layer) in enumerate(readers.items())):
        try:
            for batch in batches:
                mask = batch[1]
                _run(model.eval(), batch)
                progress(len(mask))
        finally:
            model.train(was)
    return found


@torch.no_grad()
def solve(readers: Mapping[str, ExpertLinear], fitting: Moments, held: Moments,
          ) -> dict[str, dict[str, Fit]]:
    """{kind: {module: Fit}} of the matrices that read one input, from its sums."""
    fitting, held = ({key: _wide(s) for key, s in sums.items()} for sums in (fitting, held))
    best = {}
    for name, layer in readers.items():
        mean, gates = constant_gates(layer, name, fitting)
        A = _wide(layer.lora_A)
        best[name] = {kind: ((A * c[:, None, None]).flatten(0, 1), kind)
                      for kind, c in (("mean", mean), ("gates", gates)) if c is not None}
        best[name].setdefault("gates", best[name]["mean"])
        best[name]["linear"] = best[name]["gates"]
    losses = {name: {kind: residual(layer, name, A, held) for kind, (A, _) in best[name].items()}
              for name, layer in readers.items()}
    for ridge in RIDGES:
        maps = linear({name: best[name]["gates"][0] for name in readers}, fitting, ridge)
        for name, A in maps.items():
            if (loss := residual(readers[name], name, A, held)) < losses[name]["linear"]:
                best[name]["linear"], losses[name]["linear"] = (A, "linear"), loss
    found: dict[str, dict[str, Fit]] = {kind: {} for kind in KINDS}
    for name, layer in readers.items():
        plain, added = exact(layer), (_gram(layer) * held[name, "G"]).sum()
        share = (layer.scaling ** 2 * added / held[name, "y"].clamp(min=1e-30)).item()
        for kind, (A, used) in best[name].items():
            found[kind][name] = Fit(A.to(plain.lora_A), plain.lora_B, used,
                                    losses[name][kind], share)
    return found


def constant_gates(layer: ExpertLinear, name: str, sums: Moments) -> tuple[Tensor, Tensor | None]:
    """Mean gates (E,) and those of least squares (E,), None where their system is singular."""
    E, r, _ = layer.lora_A.shape
    A, K = _wide(layer.lora_A.flatten(0, 1)), _gram(layer)
    M, P = sums["", "M"], sums[name, "P"]

    def blocks(x: Tensor) -> Tensor:
        return x.view(E, r, E, r).sum((1, 3))                            # (E, E)

    Q, b = blocks(K * (A @ M @ A.T)), blocks(K * (P @ A.T)).sum(0)
    scale = Q.diagonal().rsqrt()                         # experts differ in size, not in meaning
    scaled = Q * scale * scale[:, None]
    mean = sums[name, "g"] / sums["", "N"]
    if not scaled.isfinite().all() or torch.linalg.eigvalsh(scaled)[0] < 1e-9:
        return mean, None
    return mean, scale * torch.linalg.solve(scaled, scale * b)


def linear(starts: Mapping[str, Tensor], sums: Moments, ridge: float) -> dict[str, Tensor]:
    """A' (R, D) of each module, shrunk towards `starts`; ridge is relative to M's diagonal."""
    M = sums["", "M"]
    missing = torch.cat([sums[n, "P"] - A @ M for n, A in starts.items()])       # (sum of R, D)
    damped = M.clone()
    damped.diagonal().add_(ridge * M.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:                                           # not positive, to rounding
        return {}
    steps = torch.cholesky_solve(missing.T, factor).T
    return {n: A + step for (n, A), step in zip(
        starts.items(), steps.split([len(A) for A in starts.values()]))}


def _gram(layer: ExpertLinear) -> Tensor:
    """B B^T (R, R): with it, products of what B maps are sums over what it reads."""
    B = _wide(layer.lora_B.flatten(0, 1))
    return B @ B.T


def _wide(x: Tensor) -> Tensor:
    """x as float64; but for CUDA on the CPU, as not every device has that."""
    return x.double() if x.device.type == "cuda" else x.cpu().double()


def residual(layer: ExpertLinear, name: str, A: Tensor, sums: Moments) -> float:
    """Share of the mixture's output energy that A (R, D) misses on the tokens of `sums`."""
    M, P, G = sums["", "M"], sums[name, "P"], sums[name, "G"]
    K, cross = _gram(layer), A @ P.T
    missed, all_ = (K * (G - cross - cross.T + A @ M @ A.T)).sum(), (K * G).sum()
    return max(0.0, (missed / all_).item()) if all_ > 0 else 0.0


@torch.no_grad()
def exact(layer: ExpertLinear) -> Fit:
    """The linear map of all experts with every gate 1: that of a layer with one expert."""
    return Fit(layer.lora_A.flatten(0, 1).clone(), layer.scaling * layer.lora_B.flatten(0, 1).T)


def merged(weight: Tensor, fit: Fit) -> Tensor:
    """weight + lora_B lora_A, summed in float32 or better and rounded once to weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = (part.to(weight.device, wide) for part in (fit.lora_A, fit.lora_B))
    return torch.addmm(weight.to(wide), B, A).to(weight.dtype)


@torch.no_grad()
def freeze(model: nn.Module, fits: Mapping[str, Fit], keep: Collection[str] = ()) -> None:
    """Put one expert of rank R, with no router, for each mixture but those in `keep`; in place.

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
    """Put a plain nn.Linear of merged weights for each adapted layer but those in `keep`; in place.

    What is merged already has no experts left, so a second call changes nothing. Raises ValueError
    as `freeze` does.
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
