"""What depends on the places of tokens: masks, rotary angles, and where the pads of a batch are.

Letters: B batch, T new tokens, P past tokens, S = P + T, H query heads, K key/value heads, C head
size, L taps of a convolution.
"""

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from ..model.decoder import rope_frequencies
from .mixture import MixtureGraph

END = 1 << 62                   # the end of any axis


class PlacesGraph(MixtureGraph):
    """A graph that knows which token sees which; what all layers share of that is made once."""

    masked = -1e9               # added to the scores of keys that a query does not see

    def mask(self, window: int | None) -> str:
        """The mask (B, 1, H/K * T, S) to add to scores: 0, or a large negative number.

        Query t, the (P + t)-th token, sees key j if j <= P + t, j is within the window, and
        attention_mask is 1 at j. A pad sees no key: -inf would make its output NaN, and in the next
        layer that of all tokens, as 0 * NaN is NaN.
        """
        name, c = f"mask.{window or 'full'}", self.config
        if name in self.shared:
            return self.shared[name]
        seen = self.seen(name, window)
        real = self.node("Unsqueeze", name, self.node(
            "Cast", name, "attention_mask", to=TensorProto.BOOL), [1, 2])
        none = -1e4 if self.dtype == torch.float16 else self.masked
        y = self.node("Where", name, self.node("And", name, seen, real),
                      self.constant(0.0, self.dtype), self.constant(none, self.dtype))
        heads = c.num_attention_heads // c.num_key_value_heads
        self.shared[name] = self.node("Tile", name, y, [1, 1, heads, 1])
        return self.shared[name]

    def seen(self, name: str, window: int | None) -> str:
        """Whether query t sees key j, apart from pads: (T, S), with a window (B, 1, T, S).

        Chunks may be padded, so the distance counts real tokens, not positions of the cache.
        """
        if self.static:
            _, T, P = self.static
            past: Any = [P]
            seen = self.tensor(f"{name}.past",
                               torch.arange(P + T) <= torch.arange(P, P + T)[:, None])
        else:
            total, new = (self.node("Shape", f"{name}.{n}", n, start=1, end=2)
                          for n in ("attention_mask", "input_ids"))
            past = self.node("Sub", name, total, new)                                    # (1,)
            first, end = (self.node("Squeeze", f"{name}.{n}", x)
                          for n, x in (("past", past), ("total", total)))
            key = self.node("Range", f"{name}.key", 0, end, 1)
            query = self.node("Range", f"{name}.query", first, end, 1)
            seen = self.node("LessOrEqual", name, key, self.node(
                "Unsqueeze", f"{name}.query", query, [1]))
        if window is None:
            return seen
        count = self.node("CumSum", name, "attention_mask", 1)                           # (B, S)
        first = self.node("Slice", f"{name}.first", count, past, [END], [1])             # (B, T)
        first = self.node("Sub", f"{name}.first", first, window)
        near = self.node("Greater", f"{name}.recent",
                         self.node("Unsqueeze", f"{name}.keys", count, [1, 2]),
                         self.node("Unsqueeze", f"{name}.first", first, [1, 3]))
        return self.node("And", f"{name}.near", seen, near)

    def positions(self, context: int) -> None:
        """cos and sin of the rotary angles, and for `ort` the length of each row of a batch."""
        s = self.shared
        s[""] = "", ""                           # layers that do not rotate
        for kind in sorted({*self.config.ropes} - {""}):
            angles = torch.arange(context).float()[:, None] * rope_frequencies(self.config, kind)
            s[kind] = [self.angles(f"rotary.{kind}.{n}", t.to(self.dtype)) for n, t in (
                ("cos", angles.cos()), ("sin", angles.sin()))]          # (context, C / 2)
        if self.ort:
            count = self.node("ReduceSum", "lengths", "attention_mask", [1], keepdims=0)
            s["seqlens"] = self.node("Cast", "lengths", self.node("Sub", "lengths", count, 1),
                                     to=TensorProto.INT32)
            s["total"] = self.node("Cast", "total", self.node("Squeeze", "total", self.node(
                "Shape", "total", "attention_mask", start=1, end=2)), to=TensorProto.INT32)

    def angles(self, name: str, values: Tensor) -> str:
        """A table; for `portable`, cos, or sin with its first half negated, of each position."""
        table = self.tensor(name, values)
        if self.ort:
            return table
        half = self.node("Gather", name, table, "position_ids")
        first = half if name.endswith("cos") else self.node("Neg", name, half)
        whole = self.node("Concat", name, first, half, axis=-1)
        return self.node("Unsqueeze", name, whole, [1])                 # (B, 1, T, C)

    def conv_places(self) -> str:
        """Which of its L - 1 past and T new inputs a convolution gathers, (B, ., 1): for `ort` the
        last L - 1 before the pads, otherwise all, with the pads moved before the past."""
        name, past = "conv", self.config.conv_size - 1
        T, new = self.new()
        if self.ort:
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

    def new(self) -> tuple[Any, str]:
        """T (1,), and how many of the T new tokens of each row are no pads, (B, 1)."""
        if "new" not in self.shared:
            T: Any = [self.static[1]] if self.static else self.node(
                "Shape", "new", "input_ids", start=1, end=2)
            start = [-self.static[1]] if self.static else self.node("Neg", "new", T)
            new = self.node("Slice", "new", "attention_mask", start, [END], [1])     # (B, T)
            self.shared["new"] = T, self.node("ReduceSum", "new", new, [1])
        return self.shared["new"]
