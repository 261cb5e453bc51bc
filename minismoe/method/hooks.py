"""Watching the layers of a model while it runs: hooks, and what linear layers read.

Mixtures are frozen, and weights rounded, by what layers read of calibration tokens. Layers that
read the same x (q, k, v; gate, up) form a group, which shares it. Every HOLD-th sample is held out:
it judges what was fitted to the others.
Letters: T tokens, D inputs of a layer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOLD = 4                                     # one sample of so many is held out


@contextmanager
def hooked(layers: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Meanwhile each of the layers calls hook(layer, inputs, output)."""
    with ExitStack() as afterwards:
        for layer in layers:
            afterwards.enter_context(layer.register_forward_hook(hook))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode, and no parameter asks for a gradient."""
    with ExitStack() as afterwards:
        for parameter in model.parameters():
            afterwards.callback(parameter.requires_grad_, parameter.requires_grad)
        for module in model.modules():
            afterwards.callback(setattr, module, "training", module.training)
        model.eval().requires_grad_(False)
        yield


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
