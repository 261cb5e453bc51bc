"""The bits of each weight matrix of an export: method/bits.py on the texts that it is made with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest

from torch import Tensor, nn

from ..data.tasks import Batch
from ..io.drawing import terminal_heatmap
from ..io.progress import progress_bar
from ..method.bits import harms, spend, total
from ..model.decoder import CausalLM
from ..model.quantize import Blocks, dequantize
from .leaves import matrix

TOKENS = 6144                    # of the texts, on which harm is measured: 1460 chose worse
AT_ONCE = 640                    # of them: 1 MB of activations each (SmolLM2-135M)
MORE = 1.02                      # times the bytes of 4 bits in blocks of 32: 1 lost more on answers
Batches = Mapping[str, Sequence[Batch]]                  # by task
Options = Mapping[str, Sequence[Blocks]]                 # by module


def choose_blocks(options: Options, tree: CausalLM, model: CausalLM, batches: Batches,
                  size: float | None) -> dict[str, Blocks]:
    """What each module stores, of its options. size: megabytes for all of them. The rest is as for
    `harm_of`. Raises ValueError for a size that is too small.

    By default, MORE times what the second options (4 bits in blocks of 32) take; or more, until the
    harm is no larger than theirs with the last options (8 bits) for embedding and head.
    """
    harm, cost = harm_of(options, tree, model, batches), {
        name: [nbytes(blocks) for blocks in ways] for name, ways in options.items()}
    try:
        chosen = spend(harm, cost, MORE * sum(costs[1] for costs in cost.values()) if size is None
                       else int(size * 1e6))
    except ValueError as e:
        raise ValueError(f"--size {size}, in MB: {e} bytes") from e
    enough = sum(values[1 if ".layers." in name else -1] for name, values in harm.items())
    if size is None and total(harm, chosen) > enough:
        chosen = spend(harm, cost, math.inf, enough)
    stored = {name: options[name][n] for name, n in chosen.items()}
    print(terminal_heatmap("bits a weight, with its share of a scale", {
        name: 8 * nbytes(blocks) / blocks.shape.numel() for name, blocks in stored.items()},
        digits=True))
    print(f"{total(cost, chosen) / 1e6:.1f} MB of weights; rounding is expected to cost "
          f"{total(harm, chosen):.3f} nats a token")
    return stored


def harm_of(options: Options, tree: CausalLM, model: CausalLM, batches: Batches,
            ) -> dict[str, list[float]]:
    """{module: the harm of each of its options}. tree: holds the weights in floats. model: has the
    same modules, and reads the batches. 8 bits do a fiftieth of the harm of 4: none is counted."""
    four = {name: [blocks for blocks in ways if blocks.bits == 4] for name, ways in options.items()}
    harm = harms(model, {name: [partial(change, tree.get_submodule(name), blocks)
                                for blocks in ways] for name, ways in four.items() if ways},
                 progress_bar([*few(batches)], "harm", unit="batch"))
    return {name: [*harm.get(name, []), *[0.0] * (len(ways) - len(four[name]))]
            for name, ways in options.items()}


def change(leaf: nn.Module, blocks: Blocks) -> Tensor:
    """dW (out, in)."""
    return dequantize(blocks).sub_(matrix(leaf))


def nbytes(blocks: Blocks) -> int:
    return blocks.data.nbytes + blocks.scales.nbytes


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
