"""Decoder layers compiled by torch.compile, where that pays.

A layer is compiled for any number of tokens, so that a run compiles two graphs forward and two
backward for each kind of layers: of the first, whose input needs no gradient, and of all others.
Layers are of one kind if the same matrices have experts, however many: see `Copies`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch

from ..io.text import error_line, out_of_memory
from ..model.decoder import CausalLM
from .distributed import print0

# Compiling took 48 to 118 s on two CPU cores, and saves 1.5 ms a layer and step that a small model
# waits for kernels to start: with 30 layers, so many steps.
STEPS = 1500


def wanted(model: CausalLM, choice: str, steps: int) -> bool:
    """Whether to compile the decoder layers for so many steps; prints what it takes. `choice` is
    "on", "off" or "auto": on a CUDA device, if it takes STEPS or more."""
    if choice == "off" or not steps or choice == "auto" and (
            model.lm_head.weight.device.type != "cuda" or steps < STEPS):
        return False
    if choice == "auto" and find_spec("triton") is None:
        print0("the layers are not compiled, as triton is not installed: --compile on tries it")
        return False
    print0("compiling the layers, which takes a minute or two (--compile off leaves it out)")
    return True


@contextmanager
def compiled_layers(model: CausalLM, step: Callable[[], object], backend: str = "inductor",
                    ) -> Iterator[None]:
    """Meanwhile the decoder layers run compiled. They are compiled by running `step` once, whose
    gradients are for the caller to drop. If that fails, the layers run as they are written."""
    from torch._dynamo import config  # takes a second
    from torch.fx.experimental import _config
    shapes: Any = _config                    # its patch() is made at run time

    def as_written() -> None:
        for layer in model.model.layers:
            layer._compiled_call_impl = None

    with (shapes.patch(use_duck_shape=False),                # sizes may be equal by chance
          # Dynamo gives up after 8 graphs of a function.
          config.patch(recompile_limit=4 * len(model.model.layers)),
          ExitStack() as afterwards):
        afterwards.callback(as_written)
        for layer in model.model.layers:
            layer.compile(dynamic=True, backend=backend)
        start = time.perf_counter()
        try:
            step()
            print0(f"compiled in {time.perf_counter() - start:.0f} s")
        except Exception as e:           # a compiler raises all kinds of exceptions
            if out_of_memory(e):
                raise
            as_written()
            print(f"the layers cannot be compiled, and run without: {error_line(e)[:300]}",
                  file=sys.stderr)
        yield


def uncompiled() -> AbstractContextManager[object]:
    """Layers run as they are written meanwhile: for a few batches, graphs would not pay."""
    # Importing torch's compiler takes a second.
    return (torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else
            nullcontext())
