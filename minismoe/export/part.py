"""One graph of an export, or its folder of weights: its settings, and the model that ships.

Each linear layer of the run becomes what the folder stores in its place:

    merge      a BlockLinear of merged weights; in layout peft as freeze
    freeze     an ExpertLinear of one expert, beside floats or blocks
    dynamic    the ExpertLinear as it was trained, beside floats or blocks
    adapters   an AdapterLinear, beside floats or blocks

The writer of graphs, the check and the ranges of NPUs take this model.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..method.experts import ExpertLinear, expert_layers
from ..method.freeze import TaskFits, frozen_layer
from ..model.decoder import CausalLM
from ..model.quantize import BlockLinear
from .layers import AdapterLinear, MergedWeight
from .ranges import Ranges
from .settings import ExportConfig


class Part:
    """The settings of a graph, or of a folder of weights, and the model that it stores.

    shipped: in float32, on the CPU. fits: of the mixtures; none if they go on routing. ranges: of
    activations, for an NPU.
    """

    def __init__(self, config: ExportConfig, reference_fp32: CausalLM, fits: TaskFits):
        """reference_fp32: the trained model in float32. fits: are there when `place` reads them."""
        self.config, self.reference_fp32, self.fits = config, reference_fp32, fits
        self.shipped = sharing_copy(reference_fp32)
        self.ranges: Ranges = {}

    def place(self, names: Sequence[str]) -> None:
        """Put into the shipped model, in place of some modules, what ships of their experts."""
        config = self.config
        for name in names:
            layer = self.shipped.get_submodule(name)
            if not isinstance(layer, ExpertLinear) or config.routing == "dynamic":
                continue
            of_tasks: Any = {task: of_task[name] for task, of_task in self.fits.items()}
            new: nn.Module
            if config.adapters:
                new = AdapterLinear(layer, of_tasks)
            elif config.routing == "merge" and config.layout != "peft":
                new = BlockLinear(MergedWeight(layer.weight, of_tasks[config.task]), layer.bias)
            else:
                new = frozen_layer(layer, of_tasks[config.task])
            self.shipped.set_submodule(name, new)

    def unrounded(self) -> CausalLM:
        """The shipped model as it would be if no weight were rounded."""
        part = Part(self.config, self.reference_fp32, self.fits)
        part.place([*expert_layers(self.reference_fp32)])
        return part.shipped


def sharing_copy(model: Any) -> Any:
    """A copy of the modules of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
