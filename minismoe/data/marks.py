"""Marks in a conversation while its template writes it: what is text and no control token, and
where users' texts stand."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

from .templates import Refused
from .tools import Message

# Unicode keeps these for a program's own use. MARK says that the next character is text, whatever
# it looks like; BORDER is where a user's text begins and ends. A marked TYPED is a border that a
# text holds itself.
MARK, BORDER, TYPED = "\ufdd0", "\ufdd1", "\ufdd2"


def mark(value: Any, special: re.Pattern[str]) -> Any:
    """A value of JSON with MARK before each character of what `special` matches in its texts, and
    before what looks like a mark."""
    if isinstance(value, str):
        value = value.replace(MARK, MARK + MARK).replace(BORDER, MARK + TYPED)
        return special.sub(lambda match: "".join(MARK + c for c in match[0]), value)
    if isinstance(value, Mapping):
        return {mark(key, special): mark(item, special) for key, item in value.items()}
    return [mark(item, special) for item in value] if isinstance(value, list | tuple) else value


def unmark(text: str) -> str:
    """A text without its marks."""
    if MARK not in text:
        return text
    return re.sub(f"(?s){MARK}(.)", lambda m: BORDER if m[1] == TYPED else m[1], text)


def framed(messages: Sequence[Message], render: Callable[[Sequence[Message]], str],
           ) -> tuple[str, list[range]]:
    """The messages, rendered with borders around users' texts, which are then taken out; and for
    each message the characters of a user's text. The text is "" if the template refuses borders,
    repeats a text or leaves one out."""
    spans, bordered, users, text = [range(0)] * len(messages), [*messages], list[int](), ""
    for i, message in enumerate(messages):
        if message["role"] == "user" and (body := message["content"].strip()):
            said = message["content"].replace(body, BORDER + body + BORDER, 1)
            bordered[i] = {**message, "content": said}
            users.append(i)
    with suppress(Refused):
        text = render(bordered)
    pieces = text.split(BORDER)
    if len(pieces) != 2 * len(users) + 1:
        return "", spans
    ends = [*accumulate(map(len, pieces))]
    for i, first, last in zip(users, ends[::2], ends[1::2]):
        spans[i] = range(first, last)
    return "".join(pieces), spans
