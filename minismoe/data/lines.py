"""Task lines as chat messages that are checked. A line has one of these forms:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}          ("input" may be absent or empty)
    {"question": ..., "answer": ...}   {"text": ..., "label": ...}

In each may stand "tools", which messages call (tools.py), and "system", a text.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .tools import Function, Message, calls_of, functions, with_tools

# Form -> its keys; a line of the form has at least the first and the last.
FORMS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"),
         "instruction and output": ("instruction", "input", "output"),
         "question and answer": ("question", "answer"), "text and label": ("text", "label")}
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_call_id", "tool_calls", "weight")
WEIGHTS = ("weight", "train")    # 0 or false: a message that is not trained on


def to_messages(line: Any) -> list[Message]:
    """One parsed line as messages; ValueError says what is wrong with it."""
    if not isinstance(line, dict):
        raise ValueError(f"not a JSON object but {type(line).__name__}")
    if not (form := form_of(line)):
        raise ValueError(f"needs {', or '.join(FORMS)}; it has "
                         f"{', '.join(map(str, line)) or 'nothing'}")
    refuse_reasoning(line, "the line")
    tools = functions(line.get("tools"), "tools")
    messages = checked_messages(messages_of(line, form), tools)
    return with_tools(with_system(messages, text_of(line, "system")), tools)


def form_of(keys: Collection[str]) -> str:
    """The name of the form that has these keys; "" if it is none of FORMS."""
    for form, needed in FORMS.items():
        if needed[0] in keys and needed[-1] in keys:
            return form
    return ""


def notable(line: Mapping[str, Any], messages: Sequence[Message]) -> list[str]:
    """What is to be said of a line before a model is trained on it: its form, and what is unusual
    in it."""
    form = form_of(line)
    unread = {*line} - {*FORMS[form], "system", "tools"}
    for m in line[form] if form == "messages" else ():
        unread |= {f"{key} of a message" for key in m
                   if key not in (*MESSAGE_KEYS, *WEIGHTS) and m[key] is not None}
    roles = {m["role"] for m in messages}
    return [f"lines of {form}", *["system prompts"] * ("system" in roles),
            *(f"lines with {key}, which is not read" for key in sorted(map(str, unread))),
            *(f"lines with the role {role}" for role in sorted(roles - {*ROLES}))]


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


def checked_messages(messages: Sequence[Any], tools: Sequence[Function]) -> list[Message]:
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
