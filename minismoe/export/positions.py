"""What depends on the positions of tokens: masks, rotary angles, and the pads of static graphs.

A graph reads one prompt. Only static graphs have pads: places of the cache that are free, and those
on the left of the first chunk of a prompt.

Letters: T new tokens, P past tokens, S = P + T, H query heads, K key/value heads, C head size, L
taps of a convolution.
"""

import torch
from onnx import TensorProto
from torch import Tensor

from ..model.attention import rope_frequencies
from ..model.config import Config
from .nodes import Graph
from .weights import GraphFormat

END = 1 << 62                   # the end of any axis


class Positions:
    """Adds the nodes that all layers of a graph share: they depend on positions alone.

    rotary: the outputs cos and sin, by kind of rotary angles; "" stands for layers without.
    lengths: for `ort`, the last position (1,), and S, as GroupQueryAttention takes them.
    """

    def __init__(self, graph: Graph, config: Config, form: GraphFormat):
        self.graph, self.config, self.form, self.static = graph, config, form, form.static
        self.node, self.tensor = graph.node, graph.tensor
        self.masks: dict[int | None, str] = {}           # by window
        self.rotary = {"": ["", ""]}
        for kind in sorted({*config.ropes} - {""}):
            angles = torch.arange(form.context).float()[:, None] * rope_frequencies(config, kind)
            self.rotary[kind] = [
                self.angles(f"rotary.{kind}.cos", angles.cos(), False),
                self.angles(f"rotary.{kind}.sin", angles.sin(), True)]
        if form.ort:
            total = self.length("total", "attention_mask")
            self.lengths = [self.node("Cast", name, x, to=TensorProto.INT32) for name, x in (
                ("last", self.node("Sub", "last", total, 1)),
                ("total", self.node("Squeeze", "total", total)))]
        if config.convolutions and self.static:
            self.conv_inputs = self.gathered(self.static[1])

    def length(self, name: str, x: str) -> str:
        """The length (1,) of an input x (1, length)."""
        return self.node("Shape", name, x, start=1, end=2)

    def angles(self, name: str, values: Tensor, negate: bool) -> str:
        """cos or sin (context, C / 2) of all positions; for `portable`, (1, 1, T, C) of each
        token's position, of which `negate` negates the first half."""
        table = self.tensor(name, values.to(self.graph.dtype))
        if self.form.ort:
            return table
        half = self.node("Gather", name, table, "position_ids")
        first = self.node("Neg", name, half) if negate else half
        whole = self.node("Concat", name, first, half, axis=-1)
        return self.node("Unsqueeze", name, whole, [1])                 # (1, 1, T, C)

    def mask(self, window: int | None) -> str:
        """The mask (1, 1, H/K * T, S) to add to scores: 0, or a large negative number. A pad sees
        no key: -inf would make its output NaN, and in the next layer that of all tokens, as 0 * NaN
        is NaN."""
        npu, c, dtype = self.form.target == "npu", self.config, self.graph.dtype
        window = None if npu else window         # `refuse` lets no window end within its cache
        if window not in self.masks:
            name = f"mask.{window or 'full'}"
            visible = self.visible_in_slots(name, window, *self.static[1:]) if self.static else (
                self.visible(name, window))
            none = -1e4 if npu or dtype == torch.float16 else -1e9       # NPUs compute in float16
            y = self.node("Where", name, visible, self.graph.constant(0.0, dtype),
                          self.graph.constant(none, dtype))
            heads = c.num_attention_heads // c.num_key_value_heads
            self.masks[window] = self.node("Tile", name, y, [1, 1, heads, 1])
        return self.masks[window]

    def visible(self, name: str, window: int | None) -> str:
        """Whether query t sees key j, (1, 1, T, S): not after it, and within the window."""
        total = self.length(f"{name}.total", "attention_mask")
        past = self.node("Sub", f"{name}.past", total, self.length(f"{name}.new", "input_ids"))
        first, end = (self.node("Squeeze", f"{name}.{n}", x) for n, x in (
            ("past", past), ("total", total)))
        key = self.node("Range", f"{name}.key", 0, end, 1)                               # (S,)
        query = self.node("Unsqueeze", f"{name}.query", self.node(
            "Range", f"{name}.query", first, end, 1), [0, 1, 3])                   # (1, 1, T, 1)
        visible = self.node("LessOrEqual", name, key, query)
        if window is None:
            return visible
        oldest = self.node("Sub", f"{name}.oldest", query, window)
        return self.node("And", name, visible, self.node("Greater", name, key, oldest))

    def visible_in_slots(self, name: str, window: int | None, T: int, P: int) -> str:
        """The same of a static graph: keys are in P slots of the past, of which the first ones may
        be free, and behind them. attention_mask tells pads, and windows count real tokens."""
        real = self.node("Unsqueeze", name, self.node(
            "Cast", name, "attention_mask", to=TensorProto.BOOL), [1, 2])
        visible = self.node("And", name, self.tensor(f"{name}.past", causal(T, P)), real)
        if window is None:
            return visible
        count = self.node("CumSum", name, "attention_mask", 1)                           # (1, S)
        first = self.node("Slice", f"{name}.first", count, [P], [END], [1])              # (1, T)
        oldest = self.node("Sub", f"{name}.oldest", first, window)
        near = self.node("Greater", name, self.node("Unsqueeze", f"{name}.keys", count, [1, 2]),
                         self.node("Unsqueeze", f"{name}.oldest", oldest, [1, 3]))
        return self.node("And", f"{name}.near", visible, near)

    def gathered(self, T: int) -> str:
        """The order (1, L - 1 + T, 1) in which a convolution of a static graph reads its L - 1 past
        and T new inputs: the pads that begin the new ones move before the past."""
        name, past = "conv", self.config.conv_size - 1
        new = self.node("Slice", name, "attention_mask", [-T], [END], [1])
        pads = self.node("Sub", name, T, self.node("ReduceSum", name, new))              # (1, 1)
        at = self.node("Range", name, 0, T + past, 1)
        moved = self.node("Max", name, self.node("Sub", f"{name}.moved", at, pads), 0)
        real = self.node("GreaterOrEqual", name, at, self.node("Add", name, pads, past))
        return self.node("Unsqueeze", name, self.node("Where", name, real, at, moved), [2])


def causal(T: int, P: int) -> Tensor:
    """Whether query t comes at or after key j, (T, P + T)."""
    return torch.arange(P + T) <= torch.arange(P, P + T)[:, None]
