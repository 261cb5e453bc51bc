"""Calibration samples on their way through a decoder, layer by layer.

Their hidden states are kept (8,000 tokens of 2,048 floats: 64 MB), so that each layer runs once on
each batch, however much its sums take: those of one layer alone are in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..data.tasks import Batch
from ..method.freeze import Run
from ..model.decoder import Decoder
from ..model.tokens import Tokens

Batches = Mapping[str, Sequence[Batch]]      # by task


class States:
    """The hidden states of one batch, before one layer after another."""

    def __init__(self, decoder: Decoder, batch: Batch):
        ids, self.mask, *_ = batch
        self.tokens = Tokens(ids, self.mask, decoder.config, decoder.norm.weight.device)
        self.x, self.ropes = decoder.enter(self.tokens)

    def run(self, layer: nn.Module, rope: str) -> None:
        """Go through a layer, whose rotary angles are of the kind `rope`."""
        self.x = layer(self.x, self.tokens, self.ropes[rope])


class Walk:
    """All batches of the tasks, before the first layer of a decoder."""

    def __init__(self, decoder: Decoder, batches: Batches):
        self.decoder = decoder
        self.states = {task: [States(decoder, b) for b in of_task]
                       for task, of_task in batches.items()}

    def layers(self) -> Iterator[tuple[str, nn.Module, dict[str, list[Run]]]]:
        """Name and module of each layer, and the runs through it by task: the caller is to run
        each of them once, before it takes the next layer."""
        for i, (layer, rope) in enumerate(zip(self.decoder.layers, self.decoder.config.ropes)):
            yield f"model.layers.{i}", layer, {
                task: [(state.mask, partial(state.run, layer, rope)) for state in of_task]
                for task, of_task in self.states.items()}

    def read_by_head(self) -> Iterator[Tensor]:
        """After the last layer: what the head reads, (N, D) of each batch."""
        for state in (state for of_task in self.states.values() for state in of_task):
            yield self.decoder.leave(state.x, state.tokens)
