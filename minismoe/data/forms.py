"""The forms in which people have task lines, as chat messages under OpenAI's keys.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}                 two texts, or two lists of messages (TRL)
    {"instruction": ..., "input": ..., "output": ...}          ("input" may be absent or empty)
    {"question": ..., "answer": ...}   {"text": ..., "label": ...}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}   (ShareGPT)
"""

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
# Form -> its keys; a line of the form has at least the first and the last.
FORMS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"),
         "instruction and output": ("instruction", "input", "output"),
         "question and answer": ("question", "answer"), "text and label": ("text", "label"),
         "conversations": ("conversations",)}
KEYS: Any = {"from": "role", "value": "content"}         # of a message
ROLES = {"human": "user", "gpt": "assistant"}


def form_of(line: Json) -> str:
    """The name of a line's form; ValueError if it is none of FORMS."""
    for form, keys in FORMS.items():
        if {keys[0], keys[-1]} <= line.keys():
            return form
    raise ValueError(f"needs {', or '.join(FORMS)}; it has "
                     f"{', '.join(map(str, line)) or 'nothing'}")


def messages_of(line: Json, form: str) -> Sequence[Json]:
    """The messages of a line, each with a role; answers of a prompt have weight 0, as TRL does not
    train on them. ValueError if a text or a list is missing."""
    keys = FORMS[form]
    if len(keys) == 1 or isinstance(line[keys[0]], list):
        lists: list[Any] = [line[key] for key in keys]
        if not all(isinstance(part, list) and part for part in lists):
            raise ValueError(f"{' or '.join(keys)} is no list, or empty")
        *prompt, completion = ([*map(as_message, part)] for part in lists)
        return [m | {"weight": 0} if m["role"] == "assistant" else m
                for part in prompt for m in part] + completion
    *texts, answer = (text_of(line, key) for key in keys)
    question = "\n".join(filter(None, texts))
    if not question.strip() or not answer.strip():
        raise ValueError("the prompt or the answer is empty")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def as_message(message: Any) -> dict[str, Any]:
    """A message under OpenAI's keys and roles, its content one text. ValueError if it has
    no role, or parts that are no text."""
    m: dict[str, Any] = {}
    if isinstance(message, dict):
        m = {KEYS.get(key, key): value for key, value in message.items()}
    if not isinstance(role := m.get("role"), str):
        raise ValueError("each message needs a string role and a string content")
    if isinstance(parts := m.get("content"), list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise ValueError("a content has parts that are no text")
        m["content"] = "".join(part["text"] for part in parts)
    return m | {"role": ROLES.get(role, role)}


def text_of(line: Json, key: str) -> str:
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
