"""Watching the layers of a model while it runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


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
