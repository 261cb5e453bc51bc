"""What a graph has read: tokens, and their keys and values, which are never copied.

Keys and values stay on the session's device, in OrtValues that are bound to the session. There is
one class a kind of cache:

    SharedCache    target ort: one buffer for the whole context is the past and the present:
                   attention writes into it. Its memory is taken as it is written, and then stays.
    GrowingCache   target portable: the present of a step is the past of the next step.
    FixedCache     target portable, static: like GrowingCache, with fixed sizes: T tokens a step,
                   and a past of the last P positions.
    SlotCache      target npu (npu.py): one buffer of P slots, into which new keys are copied.

The last inputs of convolutions and the memory of delta nets go from step to step as in
GrowingCache, whatever the target.

Letters: B prompts, T new, P past tokens, S = P + T, K key/value heads, C head size, V vocabulary.
"""

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort

from .folder import CACHE_TYPES, FLOAT, INT64

Row = Sequence["int | None"]                 # new tokens of a prompt; None is padding


class GrowingCache:
    """The cache of B rows with room for P tokens each, or for any number if P is 0.

    info: export.json; memory: kind and number of the device where keys and values stay; adapter:
    {input of the graph: value}.
    """

    pads_left = True                         # where rows that are read together differ in length

    def __init__(self, session: ort.InferenceSession, info: Mapping[str, Any],
                 memory: tuple[str, int], adapter: Mapping[str, Any], rows: int, capacity: int):
        self.size, self.memory, self.session, self.info = (rows, capacity), memory, session, info
        self.tokens = [list[Any]() for _ in range(rows)]         # read so far; None is padding
        inputs = {i.name: i for i in session.get_inputs()}
        self._positions = "position_ids" in inputs
        # {input of a past: output of its present}
        self._presents = {
            name: name.replace("past_key_values.", "present.").replace("past_", "present_")
            for name in inputs if name.startswith("past_")}
        # The pasts that a step gives back as new values, for the next step.
        self._fed_back = [past for past in self._presents if not self._in_place(past)]
        self._io = io = session.io_binding()
        for name, value in adapter.items():
            io.bind_ortvalue_input(name, value)
        for name in ("logits", *(self._presents[past] for past in self._fed_back)):
            io.bind_output(name)             # every step binds them again; here they become first
        self.past = {past: self._first(past, inputs[past].shape) for past in self._presents}

    def _in_place(self, past: str) -> bool:
        """Whether new values are written into this past."""
        return False

    def _first(self, past: str, shape: Sequence[Any]) -> ort.OrtValue:
        """The value of a past before the first token: zeros, since 0 * nan is nan."""
        return self._zeros(past, shape)

    def _zeros(self, past: str, shape: Sequence[Any]) -> ort.OrtValue:
        """Zeros in the processor's memory, for a past with this shape in the graph."""
        (B, P), info = self.size, self.info
        if past.startswith("past_key_values."):
            shape = [B, info["kv_heads"], P, info["head_dim"]]
        value = ort.OrtValue.ortvalue_from_shape_and_type(
            [B, *shape[1:]], self._type(past), "cpu", 0)
        ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
        return value

    def _type(self, past: str) -> int:
        return FLOAT if past.startswith("past_recurrent.") else CACHE_TYPES[self.info["cache_type"]]

    def cut(self, n: int) -> bool:
        """Keep the first n tokens of each row alone; False, and no change, if that is impossible.

        Values that are fed back hold all tokens: none of these can be taken out.
        """
        return max(map(len, self.tokens)) <= n

    def step(self, rows: Sequence[Row]) -> ort.OrtValue:
        """Run the graph once, on rows (B, T); returns its logits (B, 1, V)."""
        io, inputs = self._io, self._token_inputs(rows)      # their memory must outlive the run
        for name, values in inputs.items():
            io.bind_input(name, "cpu", 0, INT64, [len(rows), len(values) // len(rows)],
                          values.buffer_info()[0])
        io.bind_output("logits")
        for past in self._fed_back:
            io.bind_ortvalue_input(past, self.past[past])
            io.bind_output(self._presents[past], *self.memory)
        self.session.run_with_iobinding(io)
        outputs = io.get_outputs_as_ortvaluevector()         # in the order of binding
        for n, past in enumerate(self._fed_back, start=1):
            self.past[past] = ort.OrtValue(outputs[n])
        return ort.OrtValue(outputs[0])

    def _token_inputs(self, rows: Sequence[Row]) -> "dict[str, array[int]]":
        """Add rows to `tokens`; returns ids (B, T), mask (B, S) and perhaps positions (B, T)."""
        positions = array("q")
        for read, row in zip(self.tokens, rows):
            at = len(read) - read.count(None) - 1
            positions.extend(max(0, at := at + (token is not None)) for token in row)
            read += self._kept(row)
        inputs = {"input_ids": array("q", [t or 0 for row in rows for t in row]),
                  "attention_mask": self._mask()}
        return inputs | {"position_ids": positions} if self._positions else inputs

    def _kept(self, row: Row) -> Row:
        """What of a row takes a place in the cache."""
        return row

    def _mask(self) -> "array[int]":
        """1 for the tokens, 0 for padding, which is on the left: (B, S)."""
        S, mask = self._mask_length(), array("q")
        for read in self.tokens:
            mask += array("q", [0]) * (S - len(read)) + array(
                "q", [t is not None for t in read[-S:]])
        return mask

    def _mask_length(self) -> int:
        return max(map(len, self.tokens))


class FixedCache(GrowingCache):
    """A cache whose graph has fixed sizes; a place that padding took is never free again."""

    def cut(self, n: int) -> bool:
        return not any(self.tokens)

    def _mask_length(self) -> int:
        return sum(self.info["static"][1:])


class SharedCache(GrowingCache):
    """A cache that attention writes into, and of which it reads only what the mask says."""

    pads_left = False

    def _in_place(self, past: str) -> bool:
        return past.startswith("past_key_values.")

    def _first(self, past: str, shape: Sequence[Any]) -> ort.OrtValue:
        if past in self._fed_back:
            return self._zeros(past, shape)
        (B, P), info = self.size, self.info
        value = ort.OrtValue.ortvalue_from_shape_and_type(
            [B, info["kv_heads"], P, info["head_dim"]], self._type(past), *self.memory)
        self._io.bind_ortvalue_input(past, value)
        self._io.bind_ortvalue_output(self._presents[past], value)
        return value

    def cut(self, n: int) -> bool:
        if self._fed_back:                   # of convolutions, or of delta nets
            return super().cut(n)
        for read in self.tokens:
            del read[n:]
        return True

    def _kept(self, row: Row) -> Row:
        return [token for token in row if token is not None]

    def _mask(self) -> "array[int]":
        S, zero, one, mask = self._mask_length(), array("q", [0]), array("q", [1]), array("q")
        for read in self.tokens:
            mask += one * len(read) + zero * (S - len(read))
        return mask
