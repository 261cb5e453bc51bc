"""What the texts of a task's lines have in common: whether its answers are a small set, how much of
them is free text, and which lines begin all prompts."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence

from .tools import Message

MOST_CHOICES = 300               # answers of a task that are still a small set
KNOWN = 6                        # words that each line counts more, none of them new
WORD = re.compile(r"\w+")
# A word, or a character that no word holds. Of scripts without spaces between words (Thai to Khmer,
# Chinese and Japanese), each character is a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
PIECE = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’-][^\W{UNSPACED}]+)*|[^\w\s]")
Words = tuple[str, ...]          # up to three that stand side by side
Chat = Sequence[Message]


def closed_answers(train: Sequence[Chat], held_out: Sequence[Chat] = ()) -> list[str]:
    """The answers of training lines, sorted, if they are a small closed set; else none.

    The share of lines whose answer is unique estimates how often a new line has an unseen answer
    (Good 1953): a set is closed if that is at most one line in a hundred, and if no line that is
    held out has another answer. Prompts of the same words count once.
    """
    if any("tool_calls" in messages[-1] for messages in (*train, *held_out)):
        return []
    lines = {(*(" ".join(WORD.findall(m.get("content", "").lower())) for m in messages[:-1]),
              messages[-1]["content"].strip()) for messages in train}
    counts = Counter(line[-1] for line in lines)
    once = sum(number == 1 for number in counts.values())
    closed = len(counts) <= MOST_CHOICES and 100 * once <= len(lines) and all(
        messages[-1]["content"].strip() in counts for messages in held_out)
    return sorted(counts) if closed else []


def shared_instruction(conversations: Sequence[Chat]) -> str:
    """The whole lines that all prompts begin with, if each is one user's message; else ""."""
    if not all([m["role"] for m in messages[:-1]] == ["user"] for messages in conversations):
        return ""
    text = os.path.commonprefix([messages[0]["content"] for messages in conversations])
    return text[:text.rfind("\n") + 1]


def new_words(conversations: Sequence[Chat]) -> float:
    """The share of words in the answers that follow neither from their prompts nor from other
    lines, 0 to 1.

    A word is new if it ends three words, or as many as there are since the last punctuation, that
    neither the line's prompt nor another line's answer holds. So keywords, slots and JSON that copy
    words from the prompt have no new words (0 to 0.1), and corrected sentences have some (0.2); a
    summary has the prompt's words in another order, and they are new (0.5 to 0.7). All numbers are
    one word. Each line counts KNOWN words more: an answer of one or two words, such as a name or a
    translated word, is no free text (0.2 to 0.3).
    """
    if not conversations:
        return 0.0
    texts = [prompt_and_answer(messages) for messages in conversations]
    answers = [phrases(answer) for _, answer in texts]
    holding = Counter(words for answer in answers for words in {*answer})
    new = 0
    for (prompt, _), answer in zip(texts, answers):
        unshared = {words for words in answer if holding[words] == 1 and words != ("0",)}
        if unshared:
            known = side_by_side(prompt)
            new += sum(words in unshared and words not in known for words in answer)
    return new / sum(len(answer) + KNOWN for answer in answers)


def prompt_and_answer(messages: Chat) -> tuple[str, str]:
    """What a line gives, and what is learnt of it, each as one text."""
    given, learnt = list[str](), list[str]()
    for i, message in enumerate(messages):
        is_learnt = i > 0 and message["role"] == "assistant" and message.get("weight") != 0
        calls = [call["function"] for call in message.get("tool_calls", ())]
        text = message.get("content", "") + (json.dumps(calls, ensure_ascii=False) if calls else "")
        (learnt if is_learnt else given).append(text)
    if tools := messages[0].get("tools"):
        given.append(json.dumps(tools, ensure_ascii=False))
    return "\n".join(given), ".\n".join(learnt)


def pieces(text: str) -> list[str]:
    """Words, in small letters and all numbers as 0, and punctuation."""
    return PIECE.findall(re.sub(r"\d+", "0", text.lower()))


def phrases(text: str) -> list[Words]:
    """Each word with up to two words before it since the last punctuation."""
    found, phrase = list[Words](), Words()
    for piece in pieces(text):
        phrase = (*phrase[-2:], piece) if WORD.match(piece) else ()
        if phrase:
            found.append(phrase)
    return found


def side_by_side(text: str) -> set[Words]:
    """Each one, two and three words that stand side by side, whatever punctuation is between."""
    words = [piece for piece in pieces(text) if WORD.match(piece)]
    return {*zip(words), *zip(words, words[1:]), *zip(words, words[1:], words[2:])}
