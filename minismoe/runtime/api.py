"""OpenAI's protocol: a question, as JSON, to a generator's arguments, and its answer to JSON."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..data.tools import Function, Message, calls_of, functions, with_tools
from ..io.text import error_line
from .grammar import json_grammar

if TYPE_CHECKING:
    from .generator import Generator

Json = dict[str, Any]
NUMBERS = {"max_tokens": int, "max_completion_tokens": int, "temperature": float, "top_p": float,
           "top_k": int, "min_p": float, "repetition_penalty": float, "seed": int}
# What cannot be asked for, but by these values, which change nothing.
FIXED: Json = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {},
               "frequency_penalty": 0, "presence_penalty": 0}
REASONS = {"stop": "stop", "max_tokens": "length", "context": "length"}


class Refused(Exception):
    """A question that is not answered, with the status and the body that say so."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.body = status, {"error": {
            "message": message, "type": kind, "param": None, "code": code}}


class Api:
    """A generator that answers questions, one at a time."""

    def __init__(self, generator: "Generator"):
        self.generator, self.name = generator, generator.folder.resolve().name

    def models(self, path: str) -> Json:
        """The list of the one model, or this model."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "minismoe"}
        if path not in ("/v1/models", f"/v1/models/{self.name}"):
            raise Refused(f"there is no {path}", 404)
        return {"object": "list", "data": [model]} if path == "/v1/models" else model

    def answer(self, path: str, question: Json, check: Callable[[], None]) -> Iterator[Json]:
        """Yield the answer as one object or, with "stream", as chunks.

        check: is called at each token, and raises what ends the answer. Raises Refused.
        """
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise Refused(f"there is no {path}", 404)
        try:
            for name, value in FIXED.items():
                if question.get(name) not in (value, None):
                    raise ValueError(f"{name} {question[name]!r} is not supported")
            yield from self._parts(question, check, "chat" in path)
        except ModuleNotFoundError as e:     # llguidance is not installed
            raise Refused(error_line(e), 501) from None
        except (AttributeError, LookupError, TypeError, ValueError) as e:
            code = "context_length_exceeded" if "leaves no room" in str(e) else None
            line = error_line(e) if type(e) is ValueError else f"it is not understood: {e!r}"
            raise Refused(line, 400, code) from None

    def _parts(self, question: Json, check: Callable[[], None], chat: bool) -> Iterator[Json]:
        """Yield the answer in parts, in a chat or, if not, as text that follows a prompt."""
        check()                              # it may have left while it waited
        generator, stream = self.generator, bool(question.get("stream"))
        tools, must = _tools(question) if chat else ([], False)
        asked = with_tools(_messages(question["messages"]), tools) if chat else []
        prompt = generator.tokenizer.render(asked, True) if chat else question["prompt"]
        best = (question.get("top_logprobs") or 0) if question.get("logprobs") else None
        if best is not None and not (chat and best in range(21)):
            raise ValueError("logprobs are given in chats, with top_logprobs from 0 to 20")
        count, log = 0, list[Json]()

        def watched(tokens: Iterator[int]) -> Iterator[int]:
            nonlocal count
            for token in tokens:
                check()
                count += 1
                if best is not None:
                    log.append(self._logprobs(token, best))
                yield token

        def part(content: Json, ended: bool = False) -> Json:
            key = "text" if not chat else "delta" if stream else "message"
            kind = f"chat.completion{'.chunk' * stream}" if chat else "text_completion"
            choice = {"index": 0, key: content if chat else content["content"],
                      "logprobs": None if best is None else {"content": log[:]},
                      "finish_reason": reason if ended else None}
            del log[:]
            return {**head, "object": kind, "choices": [choice]}

        head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": self.name}
        pieces = generator.text(watched(generator.generate(
            prompt, grammar=self._grammar(question, tools, must), **_options(question, chat))),
            _texts(question.get("stop")), strip=chat)
        text = next(pieces, "")
        while stream and not tools and text:
            yield part({"role": "assistant", "content": text})
            text = next(pieces, "")
        text += "".join(pieces)
        message = generator.tokenizer.parse(asked, text) if chat else {"content": text}
        calls = [{"index": n, "id": f"call_{uuid.uuid4().hex}", **call, "function": {
            **call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for n, call in enumerate(message.get("tool_calls", ()))]
        reason = "tool_calls" if calls else REASONS[generator.ended]
        usage = {"usage": self._usage(count)}
        last = part({**message, "tool_calls": calls} if calls else {**message}, ended=True)
        yield last if stream else last | usage
        if stream and (question.get("stream_options") or {}).get("include_usage"):
            yield {**last, "choices": [], **usage}

    def _grammar(self, question: Json, tools: Sequence[Function], must: bool) -> str:
        """The grammar of the answer; "" if any text may be."""
        form = question.get("response_format") or {"type": "text"}
        if form["type"] == "text":
            return self.generator.call_grammar(tools, must) if tools else ""
        if tools or form["type"] not in ("json_object", "json_schema"):
            raise ValueError(f"response_format {form['type']!r} is not supported"
                             f"{' beside tools' * bool(tools)}")
        return json_grammar({"type": "object"} if form["type"] == "json_object" else
                            form["json_schema"]["schema"])

    def _usage(self, count: int) -> Json:
        cached = self.generator.cached_tokens
        prompt = self.generator.prompt_tokens + cached
        return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def _logprobs(self, token: int, best: int) -> Json:
        """A token's log-probability, and those of the `best` likeliest at its place."""
        entries = []
        for other, logprob in self.generator.logprobs(token, best):
            text = self.generator.tokenizer.decode([other])
            entries.append({"token": text, "logprob": logprob, "bytes": [*text.encode()]})
        return {**entries[0], "top_logprobs": entries[1:]}


def _tools(question: Json) -> tuple[list[Function], bool]:
    """The functions that may be called, and whether one must be."""
    tools, choice = functions(question.get("tools"), "tools"), question.get("tool_choice", "auto")
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    elif choice not in ("none", "auto", "required"):
        raise ValueError(f"tool_choice {choice!r}: expected none, auto, required or a function")
    if choice not in ("none", "auto") and not tools:
        raise ValueError("tool_choice wants a function that tools do not offer")
    return [] if choice == "none" else tools, choice != "auto"


def _messages(items: Any) -> list[Message]:
    """A chat as templates take it: contents as text, arguments of calls as objects."""
    messages = list[Message]()
    for item in items:
        content = item.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        message: Json = {"content": content, "role": (
            "system" if item["role"] == "developer" else item["role"])}
        if calls := functions(item.get("tool_calls"), "tool_calls"):
            message["tool_calls"] = calls_of(calls, calls)
        messages.append(message | {key: item[key] for key in ("name", "tool_call_id")
                                   if key in item})
    if not messages:
        raise ValueError("messages is empty: give at least one")
    return messages


def _texts(stop: Any) -> list[str]:
    texts = [stop] if isinstance(stop, str) else [*(stop or [])]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop {stop!r}: expected texts")
    return texts


def _options(question: Json, chat: bool) -> Json:
    """Arguments of `generate`; 16 tokens follow a prompt by default, as with OpenAI."""
    found = {name: question[name] for name in NUMBERS if question.get(name) is not None}
    for name, value in found.items():
        if type(value) not in (int, NUMBERS[name]):
            raise ValueError(f"{name} {value!r} is no {NUMBERS[name].__name__}")
    limit = found.pop("max_tokens", None if chat else 16)
    return {"max_tokens": found.pop("max_completion_tokens", limit), **found}
