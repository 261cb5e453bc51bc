"""A line of data as tokens, and which of them are learnt:

    role        from                                 to                       supervised
    assistant   where its generation prompt ends     the token that ends it   yes
    user        where its text begins                where its text ends      no

Other messages have no row in this table, nor has one of weight 0, nor an answer to nothing.

The conversation is rendered up to the beginning of each answer, as at inference, and up to its end.
Each of these texts begins with the one before it, and the last is the whole: so their lengths say
where answers stand in it. Where users' texts stand, which have a small loss of their own, a further
rendering tells.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

from .templates import Refused
from .tokenizer import Encoded, Tokenizer, unmark
from .tools import Message

BORDER = "\ufdd1"        # where a user's text begins and ends; by Unicode no character of a text
Answers = Mapping[int, tuple[str, str]]      # number of a message -> the text before and with it


class Turn(NamedTuple):
    """A row of the table."""

    role: str
    tokens: range
    supervised: bool


class Line(NamedTuple):
    """A conversation that ends with an answer, encoded once."""

    messages: Sequence[Message]
    whole: Encoded
    turns: list[Turn]        # the assistant's, and then the user's
    prompt: list[int]        # tokens of what stands before the last answer, as inference reads it
    answer: list[int]        # tokens of the last answer, without the one that ends it


def encode_line(messages: Sequence[Message], tokenizer: Tokenizer) -> Line:
    """The tokens of a conversation, and what is learnt of them. Raises ValueError for an answer
    that cannot be learnt, and what `rendered_answers` raises."""
    marked = tokenizer.mark(messages)
    answers = rendered_answers(marked, tokenizer)
    refuse_ends([messages[i].get("content", "") for i in answers], tokenizer)
    before, text = answers[len(messages) - 1]
    whole, turns = tokenizer.encode_marked(text), list[Turn]()

    def token_at(characters: str) -> int:
        """The first token that begins where the beginning `characters` of the text ends."""
        return bisect_left(whole.starts, len(unmark(characters)))

    for start, end in answers.values():
        first, last = token_at(start), token_at(end)
        # Of what the template writes after an answer, such as a line end, only the first is learnt.
        last = next((n + 1 for n in range(first, last) if whole.ids[n] in tokenizer.stop_ids), last)
        turns.append(Turn("assistant", range(first, last), True))
    answer = [whole.ids[n] for n in turns[-1].tokens if whole.ids[n] not in tokenizer.stop_ids]
    for said in users_texts(marked, tokenizer, text):
        start, end = text[:said.start], text[:said.stop]
        first, last = token_at(start), token_at(end)
        if first < last and whole.starts[first] > len(unmark(start)):
            first -= 1                   # the text begins amid a token, as in " yes"
        turns.append(Turn("user", range(first, last), False))
    return Line(messages, whole, turns, tokenizer.encode_marked(before).ids, answer)


def rendered_answers(marked: Sequence[Message], tokenizer: Tokenizer) -> Answers:
    """The texts before and with each answer that is learnt. Raises ValueError if one of them does
    not begin with the one before it, and what `Tokenizer.render` raises."""
    answers, known, number = dict[int, tuple[str, str]](), "", 0
    for i, message in enumerate(marked):
        if not i or message["role"] != "assistant" or message.get("weight") == 0:
            continue
        before, after = tokenizer.render(marked[:i], True), tokenizer.render(marked[:i + 1])
        if not before.startswith(known):
            raise ValueError(f"the chat template renders turn {number} of {len(marked)} "
                             "differently when more follows: give a template whose output only "
                             "grows, or data with one answer a line")
        if not after.startswith(before):
            raise ValueError("the chat template does not begin an answer as its generation "
                             f"prompt, which ends in {before[-20:]!r}: give a template that does")
        answers[i], known, number = (before, after), after, i + 1
    return answers


def users_texts(marked: Sequence[Message], tokenizer: Tokenizer, text: str) -> list[range]:
    """The characters of the rendered conversation `text` that users wrote: what stands between
    borders if these are put around their texts. None, if that changes anything else, as when the
    template refuses borders, repeats a text or leaves one out."""
    bordered, users = [*marked], 0
    for i, message in enumerate(marked):
        body = message["content"].strip() if message["role"] == "user" else ""
        if body and message.get("weight") != 0:
            said = message["content"].replace(body, BORDER + body + BORDER, 1)
            bordered[i] = {**message, "content": said}
            users += 1
    pieces = list[str]()
    with suppress(Refused):
        pieces = tokenizer.render(bordered).split(BORDER)
    if len(pieces) != 2 * users + 1 or "".join(pieces) != text:
        return []
    ends = [*accumulate(map(len, pieces))]
    return [range(first, last) for first, last in zip(ends[::2], ends[1::2])]


def refuse_ends(answers: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raise ValueError if an answer holds a token that ends a turn: the model would stop there."""
    for text, number in tokenizer.special.items():
        if number in tokenizer.stop_ids and any(text in answer for answer in answers):
            raise ValueError(f"the answer holds {text}, which ends a turn: remove it")


def check_template(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """Raise ValueError if the template cannot write a conversation such that it is learnt: it opens
    an answer by what inference does not write before it, or leaves calls out."""
    marked = tokenizer.mark(messages)
    for i, (before, after) in rendered_answers(marked, tokenizer).items():
        turn, content = after[len(before):], marked[i].get("content", "").strip()
        opening = turn[:turn.find(content)] if content in turn else ""
        if opens := [t for t in tokenizer.special if t in opening and t in before]:
            raise ValueError(f"the chat template opens an answer by {opens[0]}, which its "
                             "generation prompt leaves out: give a template that heeds "
                             "add_generation_prompt")
        if not all(c["function"]["name"] in turn for c in marked[i].get("tool_calls", ())):
            raise ValueError("the chat template leaves out tool_calls: give a template that writes "
                             "them, or write the calls as the turn's content")
