"""Task lines as chat messages that are checked. A line has one of these forms:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}          ("input" may be absent or empty)
    {"question": ..., "answer": ...}   {"text": ..., "label": ...}

In each may stand "tools", which messages call (tools.py), and "system", a text.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .tools import Function, Message, calls_of, functions, with_tools

# Form -> its keys; a line of the form has at least the first and the last.
FORMS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"),
         "instruction and output": ("instruction", "input", "output"),
         "question and answer": ("question", "answer"), "text and label": ("text", "label")}
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_call_id", "tool_calls", "weight")
WEIGHTS = ("weight", "train")    # 0 or false: a message that is not trained on


class Conversation(list[Message]):
    """The messages of a line."""

    @cached_property
    def key(self) -> bytes:
        """The same of two conversations that differ in white space around their texts alone."""
        stripped = [{**m, "content": m.get("content", "").strip()} for m in self]
        return hashlib.blake2b(json.dumps(stripped).encode(), digest_size=16).digest()


@dataclass
class Contents:
    """How many lines have each form, a system prompt, keys that are ignored, unusual roles."""

    forms: Counter[str] = field(default_factory=Counter)
    systems: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)

    def summary(self) -> list[str]:
        """What there is to say about the lines before a model is trained on them."""
        forms = ", ".join(f"{count:,} lines of {form}" for form, count in self.forms.items())
        ignored = ", ".join(f"{key} ({count:,})" for key, count in self.ignored.most_common(10))
        roles = ", ".join(f"{role} ({count:,})" for role, count in self.roles.most_common(10))
        return [forms] + [f"{text}: {listing}" for text, listing in (
            ("system prompts", f"{self.systems:,}" if self.systems else ""),
            ("keys that are ignored", ignored),
            (f"roles beside {', '.join(ROLES)}", roles)) if listing]


def to_messages(line: Any, contents: Contents | None = None) -> list[Message]:
    """One parsed line as messages, counted in `contents`; ValueError says what is wrong with it."""
    contents = contents or Contents()
    if not isinstance(line, dict):
        raise ValueError(f"not a JSON object but {type(line).__name__}")
    form = form_of(line)
    refuse_reasoning(line, "the line")
    tools = functions(line.get("tools"), "tools")
    messages = checked_messages(messages_of(line, form), tools, contents)
    contents.forms[form] += 1
    contents.systems += messages[0]["role"] == "system" or bool(line.get("system"))
    taken = (*FORMS[form], "system", "tools")
    contents.ignored.update(key for key in line if key not in taken)
    return with_tools(with_system(messages, text_of(line, "system")), tools)


def form_of(line: Mapping[str, Any]) -> str:
    """The name of a line's form; ValueError if it is none of FORMS."""
    for form, keys in FORMS.items():
        if {keys[0], keys[-1]} <= line.keys():
            return form
    raise ValueError(f"needs {', or '.join(FORMS)}; it has "
                     f"{', '.join(map(str, line)) or 'nothing'}")


def messages_of(line: Mapping[str, Any], form: str) -> list[Any]:
    """The messages of a line, those of "messages" as they stand there. ValueError if there is none,
    or if a text is missing."""
    if form == "messages":
        if not isinstance(line[form], list) or not line[form]:
            raise ValueError("messages is no list, or empty")
        return line[form]
    *texts, answer = (text_of(line, key) for key in FORMS[form])
    question = "\n".join(filter(None, texts))
    if not question.strip() or not answer.strip():
        raise ValueError("the prompt or the answer is empty")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def text_of(line: Mapping[str, Any], key: str) -> str:
    """The text of a key; "" if the key is one that may be absent, and is; a label may be a number.
    ValueError for others."""
    text = line.get(key)
    if key == "label" and type(text) is int:
        return str(text)
    if text is None and key in ("input", "system"):
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a string, and is {type(text).__name__}")
    return text


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The messages with a system prompt at their beginning, unless they have one or it is ""."""
    first, *others = messages
    if not system or first["role"] == "system":
        return [*messages]
    plain = {key: value for key, value in first.items() if key != "tools"}
    return with_tools([{"role": "system", "content": system}, plain, *others],
                      first.get("tools", ()))


def refuse_reasoning(fields: Mapping[str, Any], place: str) -> None:
    """Raise ValueError if a line or a message holds reasoning apart from its text."""
    if refused := [key for key in ("reasoning_content", "thinking") if fields.get(key)]:
        raise ValueError(f"{place} has {refused[0]}, which is not supported: write it into the "
                         "answer, or remove it")


def checked_messages(messages: Sequence[Any], tools: Sequence[Function],
                     contents: Contents) -> list[Message]:
    """Messages with the keys that templates read. ValueError says what is wrong with them."""
    checked: list[Message] = []
    for m in messages:
        checked.append(checked_message(m, tools, checked[-1] if checked else {}))
    if (last := checked[-1])["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    if not (last.get("content", "").strip() or "tool_calls" in last):
        raise ValueError("the last answer is empty")
    if "weight" in last:
        raise ValueError("the last answer has weight 0: end the line with one that is trained on")
    if len(checked) == 1:
        raise ValueError("nothing comes before the answer")
    contents.ignored.update(dict.fromkeys(
        f"{key} of a message" for m in messages for key in m
        if key not in (*MESSAGE_KEYS, *WEIGHTS) and m[key] is not None).keys())
    contents.roles.update({m["role"] for m in messages} - {*ROLES})
    return checked


def checked_message(m: Any, tools: Sequence[Function], before: Message) -> Message:
    """A message that follows `before`; one that is not trained on has weight 0."""
    if not isinstance(m, dict) or not isinstance(m.get("role"), str):
        raise ValueError("each message needs a string role and a string content")
    calls, answers = calls_of(m.get("tool_calls"), tools), m["role"] == "assistant"
    if not isinstance(m.get("content"), str | None if calls and before else str):
        raise ValueError("each message needs a string role and a string content")
    refuse_reasoning(m, "a message")
    if m.get("tool_calls") and not answers:
        raise ValueError("a message has tool_calls, which is not the assistant's")
    if m["role"] == "tool" and not ("tool_calls" in before or before.get("role") == "tool"):
        raise ValueError("a tool turn follows no call: put an assistant's tool_calls before it")
    weights = [m[key] for key in WEIGHTS if m.get(key) is not None]
    if not all(weight in (0, 1) for weight in weights):
        raise ValueError(f"a message has weight {weights[0]!r}: give 0 or 1")
    m = {**m, "tool_calls": calls or None, "weight": 0 if 0 in weights else None}
    return {key: m[key] for key in MESSAGE_KEYS if m.get(key) is not None}
