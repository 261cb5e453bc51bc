"""OpenAI's protocol: a question, as JSON, to a generator's arguments, and its answer to JSON."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..data.tools import Function, Message, calls_of, functions, with_tools
from ..io.text import error_line
from .grammar import CALLS, json_grammar

if TYPE_CHECKING:
    from .generator import Generator

Json = dict[str, Any]
NUMBERS = {"max_tokens": int, "max_completion_tokens": int, "temperature": float, "top_p": float,
           "top_k": int, "min_p": float, "repetition_penalty": float, "seed": int}
# What cannot be asked for, but by these values, which change nothing. The log-probability of one
# token takes as long as the token: a sum over the vocabulary.
FIXED: Json = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {},
               "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False}
REASONS = {"stop": "stop", "max_tokens": "length", "context": "length"}


class Unanswered(Exception):
    """A request that is not answered, with the status and the body that say so."""

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
            raise Unanswered(f"there is no {path}", 404)
        return {"object": "list", "data": [model]} if path == "/v1/models" else model

    def answer(self, path: str, question: Json, check: Callable[[], None]) -> Iterator[Json]:
        """Yield the answer as one object or, with "stream", as chunks.

        check: is called before the prompt and at each token, and raises what ends the answer.
        Raises Unanswered.
        """
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise Unanswered(f"there is no {path}", 404)
        check()
        try:
            for name, value in FIXED.items():
                if question.get(name) not in (value, None):
                    raise ValueError(f"{name} {question[name]!r} is not supported")
            if "chat" in path:
                yield from self._chat(question, check)
            else:
                yield from self._text(question, check)
        except ModuleNotFoundError as e:     # llguidance is not installed
            raise Unanswered(error_line(e), 501) from None
        except (AttributeError, LookupError, TypeError, ValueError) as e:
            code = "context_length_exceeded" if "leaves no room" in str(e) else None
            line = error_line(e) if type(e) is ValueError else f"it is not understood: {e!r}"
            raise Unanswered(line, 400, code) from None

    def _chat(self, question: Json, check: Callable[[], None]) -> Iterator[Json]:
        """Yield the next message of a chat; calls come as a whole, in one part."""
        tools, must = _tools(question)
        chat, stream = with_tools(_messages(question["messages"]), tools), question.get("stream")
        run = _Run(self, question, check, "chat.completion" + ".chunk" * bool(stream))
        pieces = run.pieces(self.generator.tokenizer.render(chat, True), None,
                            self._grammar(question, tools, must), strip=True)
        piece = next(pieces, "")             # before anything is sent, as it may raise
        while stream and not tools and piece:
            yield run.part({"delta": {"role": "assistant", "content": piece}})
            piece = next(pieces, "")
        message = {**self.generator.tokenizer.parse(chat, piece + "".join(pieces))}
        for number, call in enumerate(message.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            call |= {"index": number, "id": f"call_{uuid.uuid4().hex}"}
        reason = "tool_calls" if "tool_calls" in message else None
        yield from run.end({"delta" if stream else "message": message}, reason)

    def _text(self, question: Json, check: Callable[[], None]) -> Iterator[Json]:
        """Yield the text that follows a prompt: 16 tokens unless more are asked for."""
        prompt, stream = question["prompt"], question.get("stream")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt, = prompt                 # a list of one prompt
        run = _Run(self, question, check, "text_completion")
        pieces = run.pieces(prompt, 16, self._grammar(question, [], False))
        piece = next(pieces, "")
        while stream and piece:
            yield run.part({"text": piece})
            piece = next(pieces, "")
        yield from run.end({"text": piece + "".join(pieces)})

    def _grammar(self, question: Json, tools: Sequence[Function], must: bool) -> str:
        """The grammar of the answer; "" if any text may be."""
        form = question.get("response_format") or {"type": "text"}
        if form["type"] == "text":
            most = 1 if question.get("parallel_tool_calls") is False else CALLS
            return self.generator.call_grammar(tools, must, most) if tools else ""
        if tools or form["type"] not in ("json_object", "json_schema"):
            raise ValueError(f"response_format {form['type']!r} is not supported"
                             f"{' beside tools' * bool(tools)}")
        return json_grammar({"type": "object"} if form["type"] == "json_object" else
                            form["json_schema"]["schema"])


class _Run:
    """One answer: its pieces as they come, and the parts that carry them."""

    def __init__(self, api: Api, question: Json, check: Callable[[], None], kind: str):
        self.generator, self.question, self.check, self.count = api.generator, question, check, 0
        self.head = {"id": uuid.uuid4().hex, "object": kind, "created": int(time.time()),
                     "model": api.name}

    def pieces(self, prompt: Any, limit: int | None, grammar: str, strip: bool = False,
               ) -> Iterator[str]:
        """The answer's text; limit: how many tokens, unless the question says so."""
        question, stop = self.question, self.question.get("stop") or []
        options = {name: question[name] for name in NUMBERS if question.get(name) is not None}
        for name, value in options.items():
            if type(value) not in (int, NUMBERS[name]):
                raise ValueError(f"{name} {value!r} is no {NUMBERS[name].__name__}")
        limit = options.pop("max_tokens", limit)
        limit = options.pop("max_completion_tokens", limit)
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop {stop!r}: expected texts")
        tokens = self.generator.generate(prompt, limit, grammar, **options)
        return self.generator.text(self._counted(tokens), stop, strip)

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.check()
            self.count += 1
            yield token

    def part(self, content: Json, reason: str | None = None) -> Json:
        """An object with this content; the last one has a reason."""
        return {**self.head, "choices": [
            {"index": 0, **content, "logprobs": None, "finish_reason": reason}]}

    def end(self, content: Json, reason: str | None = None) -> Iterator[Json]:
        """The last part, and how many tokens were read and written."""
        cached, last = self.generator.cached_tokens, self.part(
            content, reason or REASONS[self.generator.ended])
        read = self.generator.prompt_tokens + cached
        usage = {"usage": {"prompt_tokens": read, "completion_tokens": self.count,
                           "total_tokens": read + self.count,
                           "prompt_tokens_details": {"cached_tokens": cached}}}
        if not self.question.get("stream"):
            yield last | usage
            return
        yield last
        if (self.question.get("stream_options") or {}).get("include_usage"):
            yield {**last, "choices": [], **usage}


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
