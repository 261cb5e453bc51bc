"""The bits of each weight matrix of an export: method/bits.py on the texts that it is made with."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..io.drawing import terminal_heatmap
from ..io.process import give_back_memory
from ..io.progress import progress_bar
from ..method.bits import harms, spend, total
from ..model.decoder import CausalLM
from ..model.quantize import Blocks, WideWeight, dequantize
from .calibration import Batches
from .leaves import matrix
from .weights import Storage

TOKENS = 6144                    # of the texts, on which harm is measured: 1460 chose worse
AT_ONCE = 640                    # of them: 1 MB of activations each (SmolLM2-135M)


def choose_bits(storages: Mapping[str, Sequence[Storage]],
                in_4_bits: Mapping[str, Sequence[Blocks]], tree: CausalLM, model: CausalLM,
                batches: Batches, size: float) -> dict[str, int]:
    """How each module is stored: an index of its `storages`, of which those in 4 bits come first.
    size: megabytes for all of them. The rest is as for `harm_of`."""
    give_back_memory()                       # of freezing and rounding: measuring takes the most
    leaves: Any = {name: tree.get_submodule(name) for name in storages}
    shapes: dict[str, torch.Size] = {name: leaf.weight.shape for name, leaf in leaves.items()}
    cost = {name: [way.nbytes(shapes[name]) for way in ways] for name, ways in storages.items()}
    harm = harm_of(in_4_bits, tree, model, batches)
    # 8 bits do a fiftieth of the harm of 4: none is counted.
    harm = {name: harm.get(name, []) + [0.0] * (len(ways) - len(harm.get(name, [])))
            for name, ways in storages.items()}
    chosen = spend(harm, cost, int(size * 1e6))
    print(terminal_heatmap("bits a weight, with its share of a scale", {
        name: 8 * cost[name][n] / shapes[name].numel() for name, n in chosen.items()}, digits=True))
    print(f"{total(cost, chosen) / 1e6:.1f} MB of weights")
    return chosen


def harm_of(in_4_bits: Mapping[str, Sequence[Blocks]], tree: CausalLM, model: CausalLM,
            batches: Batches) -> dict[str, list[float]]:
    """{module: the harm of each of its ways in 4 bits}. tree: holds the weights in floats. model:
    has the same modules, and reads the batches."""
    changes = {name: [partial(change, tree.get_submodule(name), blocks) for blocks in ways]
               for name, ways in in_4_bits.items()}
    return harms(model, changes, progress_bar([*few(batches)], "harm", unit="batch"))


def change(leaf: Any, blocks: Blocks) -> Tensor:
    """dW (out, in)."""
    stored = isinstance(leaf.weight, WideWeight)         # subtracted without a copy in float32
    return dequantize(blocks).sub_(leaf.weight.stored if stored else matrix(leaf))


def few(batches: Batches) -> Iterator[Sequence[Tensor]]:
    """Batches of all tasks in turn, in parts of at most AT_ONCE tokens if possible, until they have
    TOKENS."""
    left = TOKENS
    for batch in (b for in_turn in zip_longest(*batches.values()) for b in in_turn if b):
        lines = max(1, AT_ONCE // batch[1].shape[1])
        for part in zip(*(tensor.split(lines) for tensor in batch)):
            if left > 0:
                left -= int(part[1].sum())
                yield part
