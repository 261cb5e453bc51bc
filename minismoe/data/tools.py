"""Functions that a model may call: their schemas, calls of them, and how templates write calls.

Both have OpenAI's form, in which transformers gives them to templates:

    {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}
    {"type": "function", "function": {"name": ..., "arguments": {...}}}
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..io.files import naming

Message = Mapping[str, Any]      # role, content, tool_calls; the first of a chat also has its tools
Function = Mapping[str, Any]     # a schema, or a call
# A chat that every template can write: some want a description, or an id of nine characters.
SHOWN: list[Message] = [
    {"role": "user", "content": "question", "tools": [{"type": "function", "function": {
        "name": "shown", "description": "x", "parameters": {"type": "object", "properties": {}}}}]},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "123456789",
        "function": {"name": "shown", "arguments": {"key": "value"}}}]}]
# How a template writes its call: as JSON, alone or in a list, perhaps between two words, as in
#     <tool_call>\n{"name": "shown", "arguments": {"key": "value"}}\n</tool_call>
WRITTEN = re.compile(r'''
    (?P<mark>\S*?)  (?P<opening>\s*\[?\s*)                 # <tool_call>, and \n
    (?P<head>{[^{}]*"(?P<name>\w+)":\ *)  "shown"          # {"name":_
    (?P<middle>[^{}]*"(?P<arguments>\w+)":\ *)  {"key":\ *"value"}          # , "arguments":_
    (?P<tail>[^{}]*})                                      # }, which an id may precede
    (?P<closing>\s*]?\s*(?P<after>\S*))                    # \n</tool_call>
    ''', re.VERBOSE)


def with_tools(messages: Sequence[Message], tools: Sequence[Function]) -> list[Message]:
    """A chat that offers tools: its first message has them, so that its beginnings do, too."""
    first, *others = messages
    return [{**first, "tools": [*tools]} if tools else first, *others]


def functions(items: Any, name: str) -> list[Function]:
    """The schemas or calls in a field, [] for null; ValueError if it is no list of them."""
    with naming(name, ValueError):
        items = json.loads(items or "null") if isinstance(items, str) else items    # as in tables
    with suppress(KeyError, TypeError):
        if all(isinstance(item["function"]["name"], str) for item in items or []):
            return items or []
    raise ValueError(f'{name} is no list of {{"type": "function", "function": {{"name": ...}}}}')


def calls_of(items: Any, tools: Sequence[Function]) -> list[Function]:
    """The calls in a field, arguments as objects; ValueError for one that `tools` do not offer."""
    offered, calls = [tool["function"]["name"] for tool in tools], list[Function]()
    for call in functions(items, "tool_calls"):
        function = dict(call["function"])
        if function["name"] not in offered:
            raise ValueError(f"a call of {function['name']!r}, which is not among tools: "
                             f"{', '.join(offered) or 'none'}")
        if isinstance(written := function.get("arguments"), str):            # as JSON, or as ""
            with suppress(RecursionError, ValueError):
                function["arguments"] = json.loads(written or "{}")
        if not isinstance(function.get("arguments"), dict):
            raise ValueError(f"the arguments of {function['name']!r} are no JSON object, as {{}}")
        calls.append({**call, "function": function})
    return calls


def read_answer(answer: str, shown: str, tools: Sequence[Function]) -> Message:
    """An answer as a message, with tool_calls if it has any, written as in `shown`: the text of the
    last message of SHOWN. Its content is the text around them.

    An answer is text alone where the template writes calls otherwise than as JSON, and if a call
    is none of `tools`, or its arguments are no object.
    """
    message = {"role": "assistant", "content": answer.strip()}
    if not (form := WRITTEN.search(shown)):
        return message
    before, name, arguments, after = form.group("mark", "name", "arguments", "after")
    text, *written = answer.split(before) if before else ("", answer)
    texts, calls = [text.strip()], list[Function]()
    with suppress(LookupError, RecursionError, TypeError, ValueError):   # text that looks like JSON
        for call in map(str.strip, written):
            value, end = json.JSONDecoder().raw_decode(call)
            rest = call[end:].strip()
            if not rest.startswith(after) or rest and not (before or after):
                return message
            texts.append(rest.removeprefix(after).strip())
            calls += [{"type": "function", "function": {"name": c[name], "arguments": c[arguments]}}
                      for c in (value if isinstance(value, list) else [value])]
        if calls:
            content = "\n".join(filter(None, texts))
            return {**message, "content": content, "tool_calls": calls_of(calls, tools)}
    return message
