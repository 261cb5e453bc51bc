"""Sums over the tokens that linear layers read, from which mixtures are frozen and weights rounded.

    M = sum x x^T     and of a mixture, with h = A x of its stacked experts, and g*h each expert's r
    P = sum (g*h) x^T     G = sum (g*h) (g*h)^T                    entries of h times its gate

Every HOLD-th sample is held out: it judges what was fitted to the others. The memory of sums does
not grow with samples. M is the largest; all layers that read the same x (q, k, v; gate, up) share
it. With D = 11,008, the two M (to fit, and held out) take 970 MB in float32.
Letters: N tokens, E experts of a matrix, r rank of each, R = E*r, D inputs of the matrix.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .experts import top_k_gates
from .hooks import hooked

HOLD = 4                                     # one sample of so many is held out
TO_FIT, HELD_OUT = 0, 1
# A batch: its attention mask (B, T), and a function that runs the layers on it.
Run = tuple[Tensor, Callable[[], Any]]


class Sums(NamedTuple):
    """Sums over some of the tokens for one mixture, in float64, but for M."""

    M: Tensor                    # (D, D), in float32 or better: the largest by far
    P: Tensor                    # (R, D)
    G: Tensor                    # (R, R)
    gates: Tensor                # (E,) of each expert; all E add up to the number of tokens


@dataclass
class Input:
    """Sums over one x that some linear layers read. Each tensor holds two: TO_FIT, HELD_OUT."""

    M: Tensor                                # (2, D, D), in float32 or better
    # By module, of a mixture: P (2, R, D), G (2, R, R), gates (2, E); nothing of another layer.
    readers: dict[str, tuple[Tensor, ...]]

    def sums(self, part: int) -> dict[str, Sums]:
        """Those of each mixture."""
        return {name: Sums(self.M[part], *(wide(both[part]) for both in own))
                for name, own in self.readers.items() if own}

    def add(self, other: "Input") -> None:
        """Add the sums of other tokens."""
        self.M += other.M
        for name, own in self.readers.items():
            for ours, theirs in zip(own, other.readers[name]):
                ours += theirs


@torch.no_grad()
def add_moments(inputs: dict[str, Input], layers: Mapping[str, nn.Module],
                mixtures: Collection[str], runs: Iterable[Run], packed: bool) -> None:
    """Add the real tokens of the batches of a task to `inputs`, which are kept by the first layer
    that reads them.

    layers: linear layers by module, of which `mixtures` are routed ones whose P, G and gates are
    wanted. packed: whether the layers see rows of real tokens alone.
    """
    names = {layer: name for name, layer in layers.items()}
    token_numbers: list[Tensor] = []         # rows of the batch to fit, and those held out
    x: Any = None
    parts: list[Tensor] = []                 # these rows of x
    sums: Any = None                         # the Input of x

    def hook(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        """Add what a layer reads of one batch: M once for all that read the same x."""
        nonlocal x, parts, sums
        name = names[layer]
        if args[0] is not x:
            x, D = args[0], args[0].shape[-1]
            rows = x.reshape(-1, D).to(torch.promote_types(x.dtype, torch.float32))
            parts = [rows[numbers] for numbers in token_numbers]
            sums = inputs.setdefault(name, Input(rows.new_zeros(2, D, D), {}))
            for M, part in zip(sums.M, parts):
                M += gram(part)
        if name not in mixtures:
            sums.readers[name] = ()
            return
        (E, r, D), A = layer.lora_A.shape, layer.lora_A.flatten(0, 1).to(parts[0])
        gates = top_k_gates(layer.router_logits.flatten(0, -2).to(A), layer.top_k)       # (N, E)
        own = sums.readers.setdefault(name, tuple(
            A.new_zeros(2, *shape) for shape in ((E * r, D), (E * r, E * r), (E,))))
        for part, numbers, P, G, of_gates in zip(parts, token_numbers, *own):
            gh = ((part @ A.T).unflatten(1, (E, r)) * gates[numbers, :, None]).flatten(1)   # (N, R)
            P.addmm_(gh.T, part)
            G.addmm_(gh.T, gh)
            of_gates += gates[numbers].sum(0)

    samples = 0
    with hooked(names, hook):
        for attention_mask, run in runs:
            mask = attention_mask.bool()
            held = (samples + torch.arange(len(mask), device=mask.device)[:, None]) % HOLD == 1
            token_numbers[:] = [(part[mask] if packed else part.flatten()).nonzero()[:, 0]
                                for part in (mask & ~held, mask & held)]
            run()
            samples += len(mask)


def gram(x: Tensor) -> Tensor:
    """x^T x (K, K) of x (T, K); what lies below the diagonal is copied from above it."""
    K = x.shape[1]
    product = x.new_empty(K, K)
    for start in range(0, K, step := max(256, -(-K // 4))):
        end = min(start + step, K)
        torch.mm(x[:, start:end].T, x[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
    return product


def wide(x: Tensor) -> Tensor:
    """x in float64: on CUDA, or else on the CPU, since other devices may lack float64."""
    return x.double() if x.device.type == "cuda" else x.cpu().double()
