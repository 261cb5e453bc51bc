"""The lines of a task file as chat messages.

A line is a JSON object in one of three forms:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}          ("input" may be absent or empty)

Beside "messages" may stand "tools", which they call (tools.py), and in each form "system", a text.
"""

import codecs
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tokenizer import Message
from .tools import Function, calls_of, functions, with_tools

LONGEST_LINE = 1 << 20           # bytes: about 250,000 tokens, more than any model reads
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_call_id", "tool_calls")
WEIGHTS = ("weight", "train")    # keys of messages that say whether an answer is trained on
# Form -> its keys; a line of the form has at least the first and the last.
FORMS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"),
         "instruction and output": ("instruction", "input", "output")}
BadLines = defaultdict[tuple[Path, str], list[int]]      # (file, reason) -> numbers of lines


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


def refuse_lines(bad: BadLines) -> None:
    """Raise ValueError if there are bad lines: how many, the first ten reasons, and their places.

    A file is followed by its first three lines; number 0 stands for the file as a whole.
    """
    reasons = []
    for (file, reason), numbers in bad.items():
        first = f":{', '.join(map(str, numbers[:3]))}" if any(numbers) else ""
        more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        reasons.append(f"{file}{first}{more}: {reason}")
    if bad:
        count = sum(map(len, bad.values()))
        more = f"; and {len(reasons) - 10} more reasons" if len(reasons) > 10 else ""
        raise ValueError(f"{count} bad line{'s' if count > 1 else ''}: "
                         + "; ".join(reasons[:10]) + more)


def read_lines(file: Path, bad: BadLines, contents: Contents) -> list[list[Message]]:
    """The conversations of a .jsonl file; lines that are none are added to `bad`.

    Lines end at "\\n" only: str.splitlines would also split at U+0085 and U+2028 inside strings.
    """
    conversations, content = [], file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if content.lstrip()[:1] == b"[":
        bad[file, "it begins with [: write one JSON object a line, without a list around"].append(0)
        return []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            if len(line) > LONGEST_LINE:
                raise ValueError(f"the line has {len(line):,} bytes; at most {LONGEST_LINE:,}")
            messages = to_messages(json.loads(line.decode("utf-8")), contents)
            json.dumps(messages, ensure_ascii=False).encode()        # fails on half an emoji
            conversations.append(messages)
        except UnicodeDecodeError:
            bad[file, "it is not UTF-8: save the file as UTF-8"].append(number)
        except json.JSONDecodeError as e:
            bad[file, f"no JSON: {e.msg}, column {e.colno}"].append(number)
        except (ValueError, RecursionError) as e:
            bad[file, str(e)].append(number)
    return conversations


def to_messages(line: Any, contents: Contents | None = None) -> list[Message]:
    """One parsed line as messages, counted in `contents`; ValueError says what is wrong with it."""
    contents = contents or Contents()
    if not isinstance(line, dict):
        raise ValueError(f"not a JSON object but {type(line).__name__}")
    form = next((form for form, keys in FORMS.items() if {keys[0], keys[-1]} <= line.keys()), "")
    if not form:
        raise ValueError("needs messages, or prompt and completion, or instruction and output; "
                         f"it has {', '.join(map(str, line)) or 'nothing'}")
    refuse_reasoning(line, "the line")
    tools: Sequence[Function] = []
    if form == "messages":
        tools = functions(line.get("tools"), "tools")
        messages = checked_messages(line["messages"], tools, contents)
    else:
        *questions, answer = (text_of(line, key) for key in FORMS[form])
        prompt = "\n".join(text for text in questions if text)
        if not prompt.strip() or not answer.strip():
            raise ValueError("the prompt or the answer is empty")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    contents.forms[form] += 1
    contents.systems += messages[0]["role"] == "system" or bool(line.get("system"))
    taken = (*FORMS[form], "system", *["tools"] * (form == "messages"))
    contents.ignored.update(key for key in line if key not in taken)
    return with_tools(with_system(messages, text_of(line, "system")), tools)


def text_of(line: dict[str, Any], key: str) -> str:
    """The text of a key; "" if the key is one that may be absent, and is. ValueError for others."""
    text = line.get(key)
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


def refuse_reasoning(fields: dict[str, Any], place: str) -> None:
    """Raise ValueError if a line or a message holds reasoning apart from its text."""
    if refused := [key for key in ("reasoning_content", "thinking") if fields.get(key)]:
        raise ValueError(f"{place} has {refused[0]}, which is not supported: write it into the "
                         "answer, or remove it")


def checked_messages(messages: Any, tools: Sequence[Function],
                     contents: Contents) -> list[Message]:
    """Messages with the keys that templates read. ValueError says what is wrong with them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list, or empty")
    checked: list[Message] = []
    for m in messages:
        calls = calls_of(m.get("tool_calls"), tools) if isinstance(m, dict) else []
        if not (isinstance(m, dict) and isinstance(m.get("role"), str)
                and isinstance(m.get("content"), str | None if calls and checked else str)):
            raise ValueError("each message needs a string role and a string content")
        refuse_reasoning(m, "a message")
        if m.get("tool_calls") and m["role"] != "assistant":
            raise ValueError("a message has tool_calls, which is not the assistant's")
        if m["role"] == "assistant" and (left_out := [key for key in WEIGHTS if m.get(key) not in (
                None, 1)]):
            raise ValueError(f"a message has {left_out[0]} {m[left_out[0]]!r}: every answer is "
                             "trained on")
        if m["role"] == "tool" and not any(
                "tool_calls" in before or before["role"] == "tool" for before in checked[-1:]):
            raise ValueError("a tool turn follows no call: put an assistant's tool_calls before it")
        m = {**m, "tool_calls": calls or None}
        checked.append({key: m[key] for key in MESSAGE_KEYS if m.get(key) is not None})
    if checked[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    if not (checked[-1].get("content", "").strip() or "tool_calls" in checked[-1]):
        raise ValueError("the last answer is empty")
    if len(checked) == 1:
        raise ValueError("nothing comes before the answer")
    contents.ignored.update(dict.fromkeys(
        f"{key} of a message" for m in messages for key in m
        if key not in (*MESSAGE_KEYS, *WEIGHTS) and m[key] is not None).keys())
    contents.roles.update({m["role"] for m in messages} - {*ROLES})
    return checked
