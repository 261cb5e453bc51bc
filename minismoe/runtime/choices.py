"""Answers from a set: only these can come out, each with its log-probability among them.

The model writes an answer token by token, and may write what some answer of the set goes on with: a
probability is the product, over tokens, of a softmax over those that may stand there. It is not
P(answer) / sum of P, for which each token of each likely answer must be read: that takes two to six
times as many steps, and of models that are trained on the answers it differs by 0.0003 at most.

The tokens of all answers form a tree. Tokens that all answers share are read without a choice,
together with the token before them. An answer ends with the token that ends the assistant's turn,
so one answer may begin another.

    "card arrival"  --.                   .-- " arrival" <end>
    "card linking"  --+--  root: "card" --+-- " linking" <end>    once one answer is left, the
    "card"          --'                   '-- <end>               rest is not read at all
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..data.tokenizer import Tokenizer
from ..io.text import clean
from .sampling import floats_of, log_softmax

if TYPE_CHECKING:
    import onnxruntime as ort

Tokens = tuple[int, ...]                     # of an answer, with the token that ends it


class Answer(NamedTuple):
    """An answer of the set, and its log-probability if only answers of the set can be written."""

    text: str
    logprob: float


def as_json(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """Answers with their probabilities, as --json writes them."""
    return [{"text": answer.text, "probability": math.exp(answer.logprob)} for answer in answers]


def answer_tokens(tokenizer: Tokenizer, choices: tuple[str, ...]) -> dict[Tokens, str]:
    """The answers as the chat template writes them after a question, sorted by their tokens.

    Raises ValueError for an empty set, and for an answer that is empty, is there twice, or is not
    what its tokens say.
    """
    if not choices:
        raise ValueError("the set of answers is empty: give at least one answer")
    if tokenizer.end_id is None:
        raise ValueError("the tokenizer has no token that ends an answer")
    answers: dict[Tokens, str] = {}
    for text in choices:
        if not text.strip():
            raise ValueError("an answer of the set is empty")
        tokens = tokenizer.turn([{"role": "user", "content": "question"},
                                 {"role": "assistant", "content": text}])
        if not tokenizer.decode(tokens).rstrip().endswith(text.strip()):
            raise ValueError(f"the tokenizer cannot write the answer {clean(text[:80])!r}: it "
                             f"would read {clean(tokenizer.decode(tokens)[:80])!r}")
        ended = (*tokens, tokenizer.end_id)
        if ended in answers:
            raise ValueError(f"the answer {clean(text[:80])!r} is in the set twice")
        answers[ended] = text
    return dict(sorted(answers.items()))


def likeliest(read: Callable[[Sequence[int]], ort.OrtValue], answers: dict[Tokens, str],
              best: int) -> list[Answer]:
    """Best-first search: the likeliest beginning is read on, until `best` answers are whole.

    read: gives the logits (1, 1, V) after a prompt and these tokens. A longer beginning is never
    likelier, so the answers come in order.
    """
    likely: list[Answer] = []
    heap = [(0.0, [*answers])]               # groups of answers, and the loss of what they share
    while heap and len(likely) < best:
        loss, group = heapq.heappop(heap)    # equals come in the order of their tokens
        if len(group) == 1:
            likely.append(Answer(answers[group[0]], -loss))
            continue
        # What the first and the last share, all do: they are sorted.
        shared = os.path.commonprefix([group[0], group[-1]])
        by_token: dict[int, list[Tokens]] = {}
        for tokens in group:
            by_token.setdefault(tokens[len(shared)], []).append(tokens)
        floats = floats_of(read(shared))
        logprobs = log_softmax([floats[token] for token in by_token])        # of these tokens alone
        for logprob, part in zip(logprobs, by_token.values()):
            heapq.heappush(heap, (loss - logprob, part))
    return likely
