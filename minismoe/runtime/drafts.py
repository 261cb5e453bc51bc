"""Drafts: guesses of the next tokens, which one step reads together with the last token.

The model keeps those that it would have written itself, so that no text changes. A draft repeats
what followed the same tokens earlier in the prompt or the answer or, by a table that export.py
made, what mostly followed them in the answers of the training lines.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..io.files import read_json, replacing

DRAFTS, FORMAT = "drafts.json", "minismoe.drafts/2"
DRAFTED = 3                      # tokens a step at most: kernels mostly compute rows in pairs
SHORT = 8                        # tokens of a step at most that gives more than the last logits
LONGEST, WINDOW = 8, 1024        # tokens of a suffix that is searched, and among how many
SUFFIX = 4                       # tokens of a suffix in the table, at most
ENTRIES = 2000                   # of the table, at most: 50 kB

Drafts = dict[tuple[int, ...], int]          # {tokens: the token that follows them}


def make_drafts(texts: Iterable[tuple[Sequence[int], Sequence[int]]], most: int = ENTRIES,
                ) -> Drafts:
    """The table of some answers: up to `most` suffixes, the most frequent first.

    texts: the last tokens of a prompt, and the tokens of its answer with its stop token. A suffix
    is in the table if one token follows it more than half of the time and at least twice, and a
    shorter one does not say the same.
    """
    following: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for prompt, answer in texts:
        start, text = len(prompt), [*prompt, *answer]
        for end in range(start, len(text)):
            for length in range(1, min(SUFFIX, end) + 1):
                following[*text[end - length:end]][text[end]] += 1
    frequent: list[tuple[int, tuple[int, ...], int]] = []
    for suffix, tokens in following.items():
        token, count = tokens.most_common(1)[0]
        if count >= 2 and 2 * count > tokens.total():
            frequent.append((count, suffix, token))
    table: Drafts = {}
    for _, suffix, token in sorted(frequent, key=lambda e: (-e[0], len(e[1]), e[1])):
        if len(table) < most and _looked_up(suffix[1:], table) != token:
            table[suffix] = token
    return table


def write_drafts(folder: Path, table: Drafts) -> None:
    """Write the table into a folder, for `read_drafts`."""
    with replacing(folder / DRAFTS) as tmp:
        entries = sorted([*suffix, token] for suffix, token in table.items())
        tmp.write_text(json.dumps({"format": FORMAT, "next": entries}) + "\n", encoding="utf-8")


def read_drafts(folder: Path) -> Drafts | None:
    """The table of a folder, if it has one; ValueError if the file is broken."""
    file = folder / DRAFTS
    if not file.is_file():
        return None
    content = read_json(file)
    entries = content.get("next")
    if content.get("format") != FORMAT or not isinstance(entries, list) or not all(
            isinstance(entry, list) and 2 <= len(entry) <= SUFFIX + 1
            and all(type(token) is int and token >= 0 for token in entry) for entry in entries):
        raise ValueError(f"{file} does not hold what export.py writes: export again")
    return {(*suffix,): token for *suffix, token in entries}


def drafted(prompt: Sequence[int], written: Sequence[int], table: Mapping[tuple[int, ...], int],
            ) -> list[int]:
    """Up to DRAFTED tokens that may follow a prompt and what is written of its answer."""
    text = [*prompt[-WINDOW:], *written][-WINDOW - LONGEST:]
    drafts: list[int] = []
    while len(drafts) < DRAFTED:
        token = _repeated(text)
        token = _looked_up((*text[-SUFFIX:],), table) if token is None else token
        if token is None:
            break
        drafts.append(token)
        text.append(token)
    return drafts


def _repeated(text: list[int]) -> int | None:
    """What followed the longest suffix of at least 2 and at most LONGEST tokens that the last
    WINDOW tokens have before; of equally long ones, what followed the latest."""
    n, best, found = len(text), 1, None
    if n < 3:
        return None
    last, before = text[-1], text[-2]
    for end in range(n - 1, max(1, n - WINDOW - 1), -1):
        if text[end - 1] == last and text[end - 2] == before:
            length = 2
            while length < min(LONGEST, end) and text[end - 1 - length] == text[-1 - length]:
                length += 1
            if length > best:
                best, found = length, text[end]
    return found


def _looked_up(suffix: tuple[int, ...], table: Mapping[tuple[int, ...], int]) -> int | None:
    """What the table says of the longest end of `suffix`."""
    return next((table[suffix[i:]] for i in range(len(suffix)) if suffix[i:] in table), None)
