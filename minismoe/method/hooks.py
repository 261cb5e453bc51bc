"""Watching the layers of a model while it runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def hooked(layers: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Meanwhile each of the layers calls hook(layer, inputs, output)."""
    with ExitStack() as afterwards:
        for layer in layers:
            afterwards.enter_context(layer.register_forward_hook(hook))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode, without gradients."""
    with ExitStack() as afterwards, torch.no_grad():
        afterwards.callback(model.train, model.training)
        model.eval()
        yield
