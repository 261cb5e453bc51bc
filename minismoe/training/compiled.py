"""Decoder layers compiled by torch.compile, where that pays.

A layer is compiled for any number of tokens, so that a run compiles two graphs forward and two
backward: of the first layer, whose input needs no gradient, and of all others.
"""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch

from ..io.text import error_line, out_of_memory
from ..model.decoder import CausalLM

SECONDS = 60             # to compile; 48 to 90 were seen on two CPU cores
SAVED = 1.5e-3           # seconds a layer and step that go without: kernels to start


def compile_layers(model: CausalLM, asked: str, steps: int, step: Callable[[], object]) -> None:
    """Compile the decoder layers if `asked` is "on", or "auto" and a CUDA device takes many steps.

    `step` is run once, which compiles them; its gradients are for the caller to drop. If compiling
    fails, training goes on without it.
    """
    device, pays = model.lm_head.weight.device, round(SECONDS / SAVED / len(model.model.layers))
    if asked == "off" or asked == "auto" and device.type != "cuda":
        return
    hint = f"it takes about {SECONDS} s, and pays from about {pays:,} steps on"
    if asked == "auto" and (steps < pays or find_spec("triton") is None):
        lack = "" if find_spec("triton") else "triton is not installed; "
        print(f"the layers are not compiled ({lack}{hint}): --compile on does it")
        return
    print(f"compiling the layers: {hint} (--compile off leaves it out)")
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    start = time.perf_counter()
    try:
        step()
        print(f"compiled in {time.perf_counter() - start:.0f} s")
    except Exception as e:               # a compiler raises all kinds of exceptions
        if out_of_memory(e):
            raise
        torch.compiler.set_stance("force_eager")
        print(f"the layers cannot be compiled, so training goes on without: {error_line(e)[:300]}",
              file=sys.stderr)


def uncompiled() -> AbstractContextManager[object]:
    """Layers run as they are written meanwhile: for a few batches, graphs would not pay."""
    # Importing torch's compiler takes a second.
    return (torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else
            nullcontext())
