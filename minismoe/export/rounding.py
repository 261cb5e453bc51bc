"""The weights of a part (see part.py) in few bits: the same for all, or as --size chooses for each.

method/bits.py says how much harm a way to store a matrix does, and spends bytes where it is most.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..io.drawing import terminal_heatmap
from ..io.process import give_back_memory
from ..io.progress import progress_bar
from ..method.bits import few_tokens, harms, spend, total
from ..method.experts import linear_layers
from ..model.decoder import CausalLM
from ..model.quantize import Blocks, BlockWeight, WideWeight, dequantize, quantize
from .calibration import Batches
from .gptq import gptq
from .layers import matrix, put_weight, vocabularies
from .part import Part
from .weights import Storage


def round_all(part: Part, names: Sequence[str], R: Tensor | None) -> None:
    """Store matrices that read the same in few bits, for inputs whose `factor` is R. With --size,
    keep what each way in 4 bits makes of them: `round_chosen` takes one."""
    size, weights = part.config.size, [matrix(part.shipped.get_submodule(name)) for name in names]
    for way in part.config.form.options_of(names[0]) if names else ():
        if size and way.bits == 8:
            continue                         # rounded once it is chosen
        for name, blocks in zip(names, rounded(weights, way, part, R)):
            if size:
                part.in_4_bits[name].append(blocks)
            else:
                put_weight(part.shipped, name, BlockWeight(blocks, torch.float32))


def round_chosen(part: Part, model: CausalLM, batches: Batches) -> None:
    """Store each matrix in the bits that --size gives it, by the harm to what `model` says on
    batches of texts that it was not trained on, as it is not certain of them."""
    names = [*linear_layers(part.shipped), *vocabularies(part.shipped)]
    ways = {name: part.config.form.options_of(name) for name in names}
    for name, number in choose_bits(ways, part.in_4_bits, part.shipped, model, batches,
                                    part.config.size or 0).items():
        kept, way = part.in_4_bits.pop(name, []), ways[name][number]
        blocks = kept[number] if way.bits == 4 else rounded(     # 4 bits come first
            [matrix(part.shipped.get_submodule(name))], way, part)[0]
        put_weight(part.shipped, name, BlockWeight(blocks, torch.float32))


def rounded(weights: Sequence[Tensor], way: Storage, part: Part, R: Tensor | None = None,
            ) -> list[Blocks]:
    """Weights (out, in) in few bits: in 4, for what they read; in 8 bits, or where R is not known,
    each number is rounded to the nearest."""
    if way.bits == 4 and R is not None:
        return gptq(weights, R, *way)
    positive = part.config.target == "npu" and way.bits == 8
    return [quantize(weight, *way, positive=positive) for weight in weights]


def choose_bits(storages: Mapping[str, Sequence[Storage]],
                in_4_bits: Mapping[str, Sequence[Blocks]], shipped: CausalLM, model: CausalLM,
                batches: Batches, size: float) -> dict[str, int]:
    """How each module is stored: an index of its `storages`, of which those in 4 bits come first.
    size: megabytes for all of them. The rest is as for `harm_of`."""
    give_back_memory()                       # of freezing and rounding: measuring takes the most
    leaves: Any = {name: shipped.get_submodule(name) for name in storages}
    shapes: dict[str, torch.Size] = {name: leaf.weight.shape for name, leaf in leaves.items()}
    cost = {name: [way.nbytes(shapes[name]) for way in ways] for name, ways in storages.items()}
    harm = harm_of(in_4_bits, shipped, model, batches)
    # 8 bits do a fiftieth of the harm of 4: none is counted.
    harm = {name: harm.get(name, []) + [0.0] * (len(ways) - len(harm.get(name, [])))
            for name, ways in storages.items()}
    chosen = spend(harm, cost, int(size * 1e6))
    print(terminal_heatmap("bits a weight, with its share of a scale", {
        name: 8 * cost[name][n] / shapes[name].numel() for name, n in chosen.items()}, digits=True))
    print(f"{total(cost, chosen) / 1e6:.1f} MB of weights")
    return chosen


def harm_of(in_4_bits: Mapping[str, Sequence[Blocks]], shipped: CausalLM, model: CausalLM,
            batches: Batches) -> dict[str, list[float]]:
    """{module: the harm of each of its ways in 4 bits}. shipped: holds the weights in floats.
    model: has the same modules, and reads the batches."""
    changes = {name: [partial(change, shipped.get_submodule(name), blocks) for blocks in ways]
               for name, ways in in_4_bits.items()}
    return harms(model, changes, progress_bar([*few_tokens(batches)], "harm", unit="batch"))


def change(leaf: Any, blocks: Blocks) -> Tensor:
    """dW (out, in)."""
    stored = isinstance(leaf.weight, WideWeight)         # subtracted without a copy in float32
    return dequantize(blocks).sub_(leaf.weight.stored if stored else matrix(leaf))
