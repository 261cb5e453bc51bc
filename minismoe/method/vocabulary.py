"""Vocabulary: which tokens a task needs, of all that its base knows.

A token is a row of the embedding, and of the head: 63 % of the weights of Gemma 3 270M. Of the V
tokens of a byte-pair encoding (BPE), these stay:

    (a) special tokens, but placeholders such as <unused7>
    (b) bytes, into which any text falls apart at worst
    (c) the tokens of the task's own texts
    (d) until there are N, those that the model itself expects in such texts: the largest
            p(v)  =  the largest, over the positions t of the texts, of  softmax(logits_t)_v

and with each of them all tokens that the encoding makes on the way from its characters. Merges
stay where both parts and the result do, in their order.

A text whose tokens all stay is encoded as before. The encoding always applies the merge of the
lowest rank. Each merge of the old derivation leads to a token that stays, so it is still there,
and no merge is new: at each step the old choice is still the lowest. Merges inside a token never
cross its ends, so a token is made in the same way wherever it stands. Other texts fall into smaller
tokens.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hooks import frozen
from .loss import CHUNK

PLACEHOLDER = re.compile(r"unused|reserved")
BYTE = "<0x{:02X}>".format
# The characters that stand for the 256 bytes, in their order, in encodings as GPT-2's.
_PRINTABLE, _OTHERS = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
BYTES = [chr(b if b in _PRINTABLE else next(_OTHERS)) for b in range(256)]


class BPE:
    """The encoding of a tokenizer.json. Raises ValueError for one that is not byte-pair, or knows
    no bytes."""

    def __init__(self, content: Mapping[str, Any]):
        """content: of tokenizer.json."""
        model = content["model"]
        if (kind := model.get("type", "BPE")) != "BPE":
            raise ValueError(f"the tokenizer is {kind}, and only BPE can have fewer tokens")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise ValueError("the tokenizer marks the ends of words, which is not implemented")
        self.vocab: dict[str, int] = model["vocab"]
        self.ranks = {tuple(pair.split(" ") if isinstance(pair, str) else pair): rank
                      for rank, pair in enumerate(model["merges"])}
        # Bytes of ▁, which stands for a space, would be decoded as ▁.
        every = [*map(BYTE, range(256)), "▁"] if model.get("byte_fallback") else BYTES
        self.bytes = [text for text in every if text in self.vocab]      # no text has 0xFF
        if len(self.bytes) < 128:
            raise ValueError("the tokenizer has no tokens of bytes, into which texts of other "
                             "tokens would fall")
        self.added: dict[str, int] = {t["content"]: t["id"] for t in content["added_tokens"]}
        named = {t["content"] for t in content["added_tokens"] if t["special"]}
        self.special = {text for text in named if not PLACEHOLDER.search(text)}

    def way(self, token: str) -> list[str]:
        """All tokens that the encoding makes from the characters of `token`, in their order; the
        last one is the token itself, unless no text can hold it."""
        if token in self.added:
            return [token]
        parts = [part for c in token for part in (
            [c] if c in self.vocab else map(BYTE, c.encode("utf-8", "replace")))]
        made = [*parts]
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, math.inf), i)
                          for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == math.inf:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
            made.append(parts[i])
        return made


def tokens_to_keep(bpe: BPE, needed: Iterable[int], order: Iterable[int], count: int) -> list[int]:
    """The ids of `count` tokens, sorted: of special tokens, of bytes, `needed` ones, and as many of
    `order`, the likeliest first, as there is room for. Raises ValueError, with the least possible,
    for a count that is too small."""
    ids = bpe.vocab | bpe.added
    texts = {i: text for text, i in ids.items()}
    kept = {ids[text] for text in (*bpe.special, *bpe.bytes)}
    for token in {*needed} - kept:
        # Encodings with ignore_merges take a whole word as it is, if no merges lead to it, too.
        kept.update([token, *(ids[text] for text in bpe.way(texts[token]))])
    if len(kept) > count:
        raise ValueError(f"{count} tokens are too few: special tokens, bytes and the texts take "
                         f"{len(kept)}")
    for token in order:
        if len(kept) == count:
            break
        if token not in kept and token in texts:         # there may be more rows than tokens
            way = bpe.way(texts[token])
            new = {ids[text] for text in way} - kept
            if way[-1] == texts[token] and len(kept) + len(new) <= count:
                kept |= new
    return sorted(kept)


@torch.no_grad()
def expected(model: Any, batches: Iterable[Sequence[Tensor]]) -> Tensor:
    """p (V,): the largest probability of the next token that the model gives it anywhere in texts.

    The mean over positions would rank the tokens of a likely place above those of many places: on
    unseen lines it let up to a third more tokens fall apart. batches: tuples that begin with
    input_ids and attention_mask, each (B, T). `model` has a decoder `.model` under a linear
    `.lm_head`, and is left as it was.
    """
    head = model.lm_head.weight
    highest = torch.zeros(len(head), device=head.device)
    with frozen(model):
        for ids, mask, *_ in batches:
            output = model.model(input_ids=ids.to(head.device), attention_mask=mask)
            hidden = getattr(output, "last_hidden_state", output)[mask.to(head.device).bool()]
            for rows in hidden.split(max(1, CHUNK // len(head))):
                p = F.linear(rows, head).float().softmax(-1)
                highest = torch.maximum(highest, p.amax(0))
    return highest
