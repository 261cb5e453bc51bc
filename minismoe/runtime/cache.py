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
    """The cache of B rows with room for P tokens each; P is 0 where new values replace old ones.

    info: export.json; memory: kind and number of the device where keys and values stay; adapter:
    {input of the graph: value}.
    """

    shares = False                           # whether attention writes into keys and values

    def __init__(self, session: ort.InferenceSession, info: Mapping[str, Any],
                 memory: tuple[str, int], adapter: Mapping[str, Any], B: int, P: int):
        self.size, self.memory, self.session, self.info = (B, P), memory, session, info
        self.tokens = [list[Any]() for _ in range(B)]            # read so far; None is padding
        self._inputs = {i.name: i for i in session.get_inputs()}
        # {input of a past: output of its present}
        presents = self._presents = {
            name: name.replace("past_key_values.", "present.").replace("past_", "present_")
            for name in self._inputs if name.startswith("past_")}
        # The pasts that a step gives back as new values, for the next step.
        self._fed_back = [past for past in presents
                          if not (self.shares and past.startswith("past_key_values."))]
        self._io = io = session.io_binding()
        for name, value in adapter.items():
            io.bind_ortvalue_input(name, value)
        for name in ("logits", *(presents[past] for past in self._fed_back)):
            io.bind_output(name)             # every step binds them again; here they become first
        self.past: dict[str, ort.OrtValue] = {}
        for past, present in presents.items():
            keys, fed_back = past.startswith("past_key_values."), past in self._fed_back
            shape = [info["kv_heads"], P, info["head_dim"]] if keys else (
                self._inputs[past].shape[1:])
            value = self.past[past] = ort.OrtValue.ortvalue_from_shape_and_type(
                [B, *shape], FLOAT if past.startswith("past_recurrent.") else
                CACHE_TYPES[info["cache_type"]], *(("cpu", 0) if fed_back else memory))
            if fed_back:                     # old memory: 0 * nan is nan
                ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
            else:
                io.bind_ortvalue_input(past, value)
                io.bind_ortvalue_output(present, value)

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
            read += [token for token in row if token is not None] if self.shares else row
        inputs = {"input_ids": array("q", [t or 0 for row in rows for t in row]),
                  "attention_mask": self._mask(max(map(len, self.tokens)))}
        return inputs | {"position_ids": positions} if "position_ids" in self._inputs else inputs

    def _mask(self, S: int) -> "array[int]":
        """(B, S): 1 for a token, 0 for padding."""
        mask = array("q")
        for read in self.tokens:
            mask += array("q", [0]) * (S - len(read))
            mask += array("q", [token is not None for token in read[-S:]])
        return mask


class FixedCache(GrowingCache):
    """A cache whose graph has fixed sizes; a place that padding took is never free again."""

    def cut(self, n: int) -> bool:
        return not any(self.tokens)

    def _mask(self, S: int) -> "array[int]":
        return super()._mask(sum(self.info["static"][1:]))


class SharedCache(GrowingCache):
    """A cache that attention writes into, and of which it reads only what the mask says."""

    shares = True                            # and padding, on the right, takes no place

    def cut(self, n: int) -> bool:
        if self._fed_back:                   # of convolutions, or of delta nets
            return super().cut(n)
        for read in self.tokens:
            del read[n:]
        return True

    def _mask(self, S: int) -> "array[int]":
        zero, one, mask = array("q", [0]), array("q", [1]), array("q")
        for read in self.tokens:
            mask += one * len(read) + zero * (S - len(read))
        return mask
