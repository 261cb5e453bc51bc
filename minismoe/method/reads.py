"""What linear layers read of calibration tokens: mixtures are frozen and weights rounded by it.

Layers that read the same x (q, k, v; gate, up) form a group, which shares it. Every HOLD-th sample
is held out: it judges what was fitted to the others.
Letters: T tokens, D inputs of a layer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import hooked

HOLD = 4                                     # one sample of so many is held out


@torch.no_grad()
def reads(layers: Mapping[str, nn.Module], runs: Iterable[Callable[[], Any]],
          ) -> dict[tuple[str, ...], Tensor]:
    """What the layers read, x (T, D) in float32 or better, by the names of those that read the
    same. Each of `runs` runs the layers on a batch."""
    names = {layer: name for name, layer in layers.items()}
    seen: list[tuple[Tensor, list[str]]] = []        # in one call: an input, and who reads it
    parts = defaultdict[tuple[str, ...], list[Tensor]](list)         # of all calls, by group

    def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not seen or seen[-1][0] is not args[0]:
            seen.append((args[0], []))
        seen[-1][1].append(names[layer])

    with hooked(names, hook):
        for run in runs:
            run()
            for x, group in seen:
                parts[tuple(group)].append(x.reshape(-1, x.shape[-1]).to(
                    torch.promote_types(x.dtype, torch.float32)))
            seen.clear()
    return {group: torch.cat(parts.pop(group)) for group in [*parts]}


def gram(x: Tensor) -> Tensor:
    """x^T x (K, K) of x (T, K); what lies below the diagonal is copied from above it."""
    K = x.shape[1]
    product = x.new_empty(K, K)
    for start in range(0, K, step := max(256, -(-K // 4))):
        end = min(start + step, K)
        torch.mm(x[:, start:end].T, x[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
    return product

