"""The cache: the tokens that a graph has read, and their keys and values.

Keys and values are never copied: they stay on the session's device, in OrtValues that are bound to
the session. Each kind of graph has its own cache, which reads as the graph wants it:

    SharedCache    "shared", target ort: one buffer for the whole context is the past and the
                   present: attention writes into it. Its memory is taken as it is written, and
                   then stays.
    GraphCache     "growing", target portable: the present of a step is the past of the next step.
    FixedCache     "fixed", target portable, static: the same in fixed sizes. A step reads T
                   tokens, the first of which may be padding; the past is the last P positions.
    SlotCache      "slots", target npu (npu.py): P slots, into which new keys and values are copied.

export.json names the kind under contract, cache.

The last inputs of convolutions and the memory of delta nets go from step to step as in
GraphCache, whatever the target.

Letters: T new tokens, P past positions, K key/value heads, C head size, V vocabulary, N last
tokens that have logits.
"""

import ctypes
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnxruntime as ort

from .folder import FLOAT, FLOAT16, INT64

ZERO, ONE = array("q", [0]), array("q", [1])
TYPES = {"tensor(float)": FLOAT, "tensor(float16)": FLOAT16}


class GraphCache:
    """The tokens that were read, and the values that a step reads and gives: keys and values grow
    by those of each step.

    info: export.json; memory: kind and number of the device where keys and values stay; T: tokens
    that a step reads at most; P: positions of the past at first; in_place: whether a step writes
    keys and values into those of the past.
    """

    def __init__(self, session: ort.InferenceSession, info: Mapping[str, Any],
                 memory: tuple[str, int], T: int, *, P: int = 0, in_place: bool = False):
        self.session, self.memory, self.T, self.P = session, memory, T, P
        self.tokens: list[int] = []
        inputs = {i.name: i for i in session.get_inputs()}
        self._has_positions = "position_ids" in inputs
        # {input of a past: output of its present}
        presents = {name: name.replace("past_key_values.", "present.").replace("past_", "present_")
                    for name in inputs if name.startswith("past_")}
        keys = {past for past in presents if past.startswith("past_key_values.")}
        # The pasts that a step gives back as new values, for the next step.
        self._fed_back = {past: present for past, present in presents.items()
                          if not (in_place and past in keys)}
        self._io = io = session.io_binding()
        for name in ("logits", *self._fed_back.values()):
            io.bind_output(name)             # every step binds them again; here they become first
        self.past: dict[str, ort.OrtValue] = {}
        for past, present in presents.items():
            shape, kind = inputs[past].shape, TYPES[inputs[past].type]
            if past in keys:
                shape[2] = P
            fed_back = past in self._fed_back
            value = self.past[past] = ort.OrtValue.ortvalue_from_shape_and_type(
                [1, *shape[1:]], kind, *(("cpu", 0) if fed_back else memory))
            if fed_back:                     # old memory: 0 * nan is nan
                ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
            else:
                io.bind_ortvalue_input(past, value)
                io.bind_ortvalue_output(present, value)

    def cut(self, n: int) -> bool:
        """Keep the first n tokens alone; False, and no change, if that is impossible.

        Values that are fed back hold all tokens, and none of these can be taken out: only a cut
        that removes nothing succeeds.
        """
        return len(self.tokens) <= n

    def step(self, tokens: Sequence[int]) -> ort.OrtValue:
        """Read 1 to T more tokens; returns the logits (1, N, V) after them."""
        first, end = len(self.tokens), len(self.tokens) + len(tokens)
        logits = self._run(tokens, ONE * end, range(first, end))
        self.tokens += tokens
        return logits

    def _run(self, ids: Iterable[int], mask: Iterable[int], positions: Iterable[int],
             ) -> ort.OrtValue:
        """Run the graph once; returns its logits (1, N, V)."""
        inputs = {"input_ids": ids, "attention_mask": mask} | (
            {"position_ids": positions} if self._has_positions else {})
        arrays = {name: array("q", values) for name, values in inputs.items()}
        for name, values in arrays.items():                  # `arrays` must outlive the run
            self._io.bind_input(name, "cpu", 0, INT64, [1, len(values)], values.buffer_info()[0])
        self._io.bind_output("logits")
        for past, present in self._fed_back.items():
            self._io.bind_ortvalue_input(past, self.past[past])
            self._io.bind_output(present, *self.memory)
        self.session.run_with_iobinding(self._io)
        logits, *outputs = self._io.get_outputs_as_ortvaluevector()      # in the order of binding
        self.past |= zip(self._fed_back, map(ort.OrtValue, outputs))
        return ort.OrtValue(logits)


class SharedCache(GraphCache):
    """A buffer for the whole context, of which attention reads as many tokens as the mask has."""

    def __init__(self, session: ort.InferenceSession, info: Mapping[str, Any], *others: Any):
        super().__init__(session, info, *others, P=info["context"], in_place=True)

    def cut(self, n: int) -> bool:
        if self._fed_back:                   # of convolutions, or of delta nets
            return super().cut(n)
        del self.tokens[n:]
        return True


class FixedCache(GraphCache):
    """The last P positions, where padding takes places that are never free again."""

    def __init__(self, session: ort.InferenceSession, info: Mapping[str, Any], *others: Any):
        super().__init__(session, info, *others, P=info["static"][2])
        self._mask = deque(ZERO * (self.P + self.T), self.P + self.T)    # 1 for a token

    def cut(self, n: int) -> bool:
        return self.T == 1 and super().cut(n)            # else there is padding

    def step(self, tokens: Sequence[int]) -> ort.OrtValue:
        padding, first = ZERO * (self.T - len(tokens)), len(self.tokens)
        self._mask.extend(padding + ONE * len(tokens))
        positions = range(first, first + len(tokens))
        logits = self._run([*padding, *tokens], self._mask, [*padding, *positions])
        self.tokens += tokens
        return logits
