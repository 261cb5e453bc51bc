"""What depends on the positions of tokens: masks, rotary angles, and the pads of a batch.

Letters: B batch, T new tokens, P past tokens, S = P + T, H query heads, K key/value heads, C head
size, L taps of a convolution.
"""

from functools import cached_property
from typing import Any

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
    lengths: for `ort`, the outputs of `row_lengths`. conv_inputs, closed: those of `gathered` and
    `pads`, if convolutions or delta nets need them.
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
        self.lengths = self.row_lengths() if form.ort else []
        self.conv_inputs = self.gathered() if config.convolutions else ""
        self.closed = self.pads() if config.delta_layers else ""

    def angles(self, name: str, values: Tensor, negate: bool) -> str:
        """cos or sin (context, C / 2) of all positions; for `portable`, (B, 1, T, C) of each
        token's position, of which `negate` negates the first half."""
        table = self.tensor(name, values.to(self.graph.dtype))
        if self.form.ort:
            return table
        half = self.node("Gather", name, table, "position_ids")
        first = self.node("Neg", name, half) if negate else half
        whole = self.node("Concat", name, first, half, axis=-1)
        return self.node("Unsqueeze", name, whole, [1])                 # (B, 1, T, C)

    def row_lengths(self) -> list[str]:
        """The last position (B,) of each row, and S, as GroupQueryAttention takes them."""
        count = self.node("ReduceSum", "lengths", "attention_mask", [1], keepdims=0)
        last = self.node("Cast", "lengths", self.node("Sub", "lengths", count, 1),
                         to=TensorProto.INT32)
        total = self.node("Cast", "total", self.node("Squeeze", "total", self.node(
            "Shape", "total", "attention_mask", start=1, end=2)), to=TensorProto.INT32)
        return [last, total]

    def mask(self, window: int | None) -> str:
        """The mask (B, 1, H/K * T, S) to add to scores: 0, or a large negative number.

        Query t, the (P + t)-th token, sees key j if j <= P + t, j is within the window, and
        attention_mask is 1 at j. A pad sees no key: -inf would make its output NaN, and in the next
        layer that of all tokens, as 0 * NaN is NaN.
        """
        npu, c, dtype = self.form.target == "npu", self.config, self.graph.dtype
        window = None if npu else window         # `refuse` lets no window end within its cache
        if window in self.masks:
            return self.masks[window]
        name = f"mask.{window or 'full'}"
        visible = self.visible(name, window)
        real = self.node("Unsqueeze", name, self.node(
            "Cast", name, "attention_mask", to=TensorProto.BOOL), [1, 2])
        none = -1e4 if npu or dtype == torch.float16 else -1e9       # NPUs compute in float16
        y = self.node("Where", name, self.node("And", name, visible, real),
                      self.graph.constant(0.0, dtype), self.graph.constant(none, dtype))
        heads = c.num_attention_heads // c.num_key_value_heads
        self.masks[window] = self.node("Tile", name, y, [1, 1, heads, 1])
        return self.masks[window]

    def visible(self, name: str, window: int | None) -> str:
        """Whether query t sees key j, apart from pads: (T, S), with a window (B, 1, T, S).

        Chunks may be padded, so the distance counts real tokens, not positions of the cache.
        """
        if self.static:
            _, T, P = self.static
            past: Any = [P]
            visible = self.tensor(f"{name}.past", causal(T, P))
        else:
            total, new = (self.node("Shape", f"{name}.{n}", n, start=1, end=2)
                          for n in ("attention_mask", "input_ids"))
            past = self.node("Sub", name, total, new)                                    # (1,)
            first, end = (self.node("Squeeze", f"{name}.{n}", x)
                          for n, x in (("past", past), ("total", total)))
            key = self.node("Range", f"{name}.key", 0, end, 1)
            query = self.node("Range", f"{name}.query", first, end, 1)
            visible = self.node("LessOrEqual", name, key, self.node(
                "Unsqueeze", f"{name}.query", query, [1]))
        if window is None:
            return visible
        count = self.node("CumSum", name, "attention_mask", 1)                           # (B, S)
        first = self.node("Slice", f"{name}.first", count, past, [END], [1])             # (B, T)
        first = self.node("Sub", f"{name}.first", first, window)
        near = self.node("Greater", f"{name}.recent",
                         self.node("Unsqueeze", f"{name}.keys", count, [1, 2]),
                         self.node("Unsqueeze", f"{name}.first", first, [1, 3]))
        return self.node("And", f"{name}.near", visible, near)

    def gathered(self) -> str:
        """Which of its L - 1 past and T new inputs a convolution gathers, (B, ., 1): for `ort` the
        last L - 1 before the pads, otherwise all, with the pads moved before the past."""
        name, past = "conv", self.config.conv_size - 1
        T, new = self.new_tokens
        if self.form.ort:
            at = self.node("Add", name, self.node("Max", name, new, 1),
                           self.tensor(name, torch.arange(past)))
        else:
            size = self.static[1] + past if self.static else self.node(
                "Squeeze", name, self.node("Add", f"{name}.size", T, past))
            at, pads = self.node("Range", name, 0, size, 1), self.node("Sub", name, T, new)
            moved = self.node("Max", name, self.node("Sub", f"{name}.moved", at, pads), 0)
            real = self.node("GreaterOrEqual", name, at, self.node("Add", name, pads, past))
            at = self.node("Where", name, real, at, moved)
        return self.node("Unsqueeze", name, at, [2])

    def pads(self) -> str:
        """What is added to the gates' logits of delta nets, (B, T, 1), to close them at pads, which
        are on the right: 0, or a large negative number."""
        T, new = self.new_tokens
        at = self.node("Range", "pads", 0, self.node("Squeeze", "pads", T), 1)           # (T,)
        real = self.node("Less", "pads", at, self.node("Max", "pads", new, 1))           # (B, T)
        y = self.node("Where", "pads", real, self.graph.constant(0.0, torch.float32),
                      self.graph.constant(-1e9, torch.float32))
        return self.node("Unsqueeze", "pads", y, [2])

    @cached_property
    def new_tokens(self) -> tuple[Any, str]:
        """T (1,), and how many of the T new tokens of each row are no pads, (B, 1)."""
        T: Any = [self.static[1]] if self.static else self.node(
            "Shape", "new", "input_ids", start=1, end=2)
        start = [-self.static[1]] if self.static else self.node("Neg", "new", T)
        new = self.node("Slice", "new", "attention_mask", start, [END], [1])     # (B, T)
        return T, self.node("ReduceSum", "new", new, [1])


def causal(T: int, P: int) -> Tensor:
    """Whether query t comes at or after key j, (T, P + T)."""
    return torch.arange(P + T) <= torch.arange(P, P + T)[:, None]
