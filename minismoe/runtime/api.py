"""OpenAI's protocol: a request's JSON to a generator's arguments, and its answer to JSON."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ..data.tools import Function, Message, calls_of, functions, with_tools
from ..io.text import error_line
from .folder import trained_system
from .grammar import CALLS, json_grammar
from .sampling import Sampling

if TYPE_CHECKING:
    from .generator import Generator

Json = dict[str, Any]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What a request may name with these values alone, which change nothing.
FIXED: Json = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {},
               "frequency_penalty": 0, "presence_penalty": 0}
REASONS = {"stop": "stop", "max_tokens": "length", "context": "length", "": "stop"}    # at a text
TEXT_TOKENS = 16                             # of TEXT, unless the request says so: OpenAI's default
MOST_LIKELIEST = 20                          # whose log-probabilities a request may want


class RequestError(Exception):
    """A request that is not answered, with the status and the body that say so."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.body = status, {"error": {
            "message": message, "type": kind, "param": None, "code": code}}


def request_error(e: Exception) -> RequestError:
    """What to answer after an exception: of these kinds, the request is to blame."""
    if isinstance(e, ModuleNotFoundError):   # llguidance is not installed
        return RequestError(error_line(e), 501)
    if isinstance(e, MemoryError):
        return RequestError("out of memory: export again, with a smaller --context", 500)
    if not isinstance(e, (AttributeError, LookupError, TypeError, ValueError)):
        return e if isinstance(e, RequestError) else RequestError(error_line(e), 500)
    line = error_line(e) if type(e) is ValueError else f"it is not understood: {e!r}"
    return RequestError(line, 400, "context_length_exceeded" if "leaves no room" in line else None)


class Api:
    """A folder's generator, which answers requests, one at a time. `open_generator` is called once
    it is needed: a page may be all that is wanted of the folder."""

    def __init__(self, folder: Path, open_generator: Callable[[], "Generator"]):
        self.folder, self.name, self.open_generator = folder, folder.resolve().name, open_generator
        self.system = trained_system(folder)

    @cached_property
    def generator(self) -> "Generator":
        try:
            return self.open_generator()
        except (LookupError, TypeError, ValueError) as e:        # no request is to blame
            raise RequestError(error_line(e), 500) from None

    def models(self, path: str) -> Json:
        """The list of the one model, or this model."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "minismoe"}
        if (path := unquote(path)) not in ("/v1/models", f"/v1/models/{self.name}"):
            raise RequestError(f"there is no {path}", 404)
        return {"object": "list", "data": [model]} if path == "/v1/models" else model

    def answer(self, path: str, request: Json, check: Callable[[], None]) -> Iterator[Json]:
        """Yield the answer as one object or, with "stream", as chunks.

        Calls come as a whole, in one part. check: is called before the prompt and at each token,
        and raises what ends the answer. What is raised, `request_error` turns into an answer.
        """
        if path not in (CHAT, TEXT):
            raise RequestError(f"there is no {path}", 404)
        check()
        generator, stream, count = self.generator, request.get("stream"), 0
        (tools, must), (sampling, stop), is_chat = _tools(request), _options(request), path == CHAT
        chat = with_tools(self._messages(request["messages"]), tools) if is_chat else []
        prompt = generator.tokenizer.render(chat, True) if is_chat else _prompt(request)
        options = {"max_tokens": None if is_chat else TEXT_TOKENS, **sampling,
                   "grammar": self._grammar(request, tools, must)}
        likeliest, probabilities = _likeliest(is_chat, request), list[Json]()

        def read() -> Iterator[int]:
            nonlocal count
            for token in generator.generate(prompt, **options):
                check()
                count += 1
                if likeliest is not None:
                    probabilities.append(self._probability(token, likeliest))
                yield token

        head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": self.name, "object": (
            f"chat.completion{'.chunk' if stream else ''}" if is_chat else "text_completion")}

        def part(content: Json, reason: str | None = None) -> Json:
            logprobs = None if likeliest is None else _logprobs(is_chat, probabilities)
            probabilities.clear()            # the next part has those of its own tokens
            return {**head, "choices": [
                {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}]}

        pieces = generator.text(read(), stop, strip=is_chat)
        piece = next(pieces, "")             # before anything is sent, as it may raise
        while stream and not tools and piece:
            yield part({"delta": {"role": "assistant", "content": piece}} if is_chat else
                       {"text": piece})
            piece = next(pieces, "")
        text, reason = piece + "".join(pieces), REASONS[generator.ended]
        content: Json = {"text": text}
        if is_chat:
            message = _with_ids(generator.tokenizer.parse(chat, text))
            content = {"delta" if stream else "message": message}
            reason = "tool_calls" if "tool_calls" in message else reason
        yield part(content, reason) | ({} if stream else self._usage(count))
        if stream and (request.get("stream_options") or {}).get("include_usage"):
            yield {**head, "choices": [], **self._usage(count)}

    def _usage(self, written: int) -> Json:
        """How many tokens the last answer read and wrote."""
        cached = self.generator.cached_tokens
        length = self.generator.prompt_tokens + cached
        return {"usage": {"prompt_tokens": length, "completion_tokens": written,
                          "total_tokens": length + written,
                          "prompt_tokens_details": {"cached_tokens": cached}}}

    def _messages(self, items: Any) -> list[Message]:
        """A chat as templates take it: contents as text, arguments of calls as objects. Without a
        system prompt, it begins with that of the training."""
        messages = list[Message]()
        for item in items:
            content = item.get("content") or ""
            if not isinstance(content, str):
                if not all(isinstance(part, dict) and "text" in part for part in content):
                    raise ValueError("a content may have parts of text only")
                content = "".join(part["text"] for part in content)
            role = "system" if item["role"] == "developer" else item["role"]
            message: Json = {"role": role, "content": content} | {
                key: item[key] for key in ("name", "tool_call_id") if key in item}
            if calls := functions(item.get("tool_calls"), "tool_calls"):
                message["tool_calls"] = calls_of(calls, calls)
            messages.append(message)
        if not messages:
            raise ValueError("messages is empty: give at least one")
        return messages if messages[0]["role"] == "system" else [*self.system, *messages]

    def _grammar(self, request: Json, tools: Sequence[Function], must: bool) -> str:
        """The grammar of the answer; "" if any text may be."""
        form = request.get("response_format") or {"type": "text"}
        if form["type"] == "text":
            most = 1 if request.get("parallel_tool_calls") is False else CALLS
            return self.generator.call_grammar(tools, must, most) if tools else ""
        if tools or form["type"] not in ("json_object", "json_schema"):
            raise ValueError(f"response_format {form['type']!r} is not supported"
                             f"{' beside tools' if tools else ''}")
        return json_grammar({"type": "object"} if form["type"] == "json_object" else
                            form["json_schema"]["schema"])

    def _probability(self, token: int, likeliest: int) -> Json:
        """The log-probability of the last token, and those of the likeliest in its place."""
        own, *others = ({"token": text, "logprob": logprob, "bytes":     # of a part of a character
                         None if "\ufffd" in text else [*text.encode()]}           # not known
                        for text, logprob in self.generator.logprobs(token, likeliest))
        return {**own, "top_logprobs": others}


def _tools(request: Json) -> tuple[list[Function], bool]:
    """The functions that may be called, and whether one must be."""
    tools, choice = functions(request.get("tools"), "tools"), request.get("tool_choice") or "auto"
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    elif choice not in ("none", "auto", "required"):
        raise ValueError(f"tool_choice {choice!r}: expected none, auto, required or a function")
    if choice not in ("none", "auto") and not tools:
        raise ValueError("tool_choice wants a function that tools do not offer")
    return [] if choice == "none" else tools, choice != "auto"


def _prompt(request: Json) -> Any:
    """Text, or token ids; a list of one prompt is that prompt."""
    prompt = request["prompt"]
    is_list = isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int)
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise ValueError("a request may have one prompt")
    return prompt[0] if is_list else prompt


def _options(request: Json) -> tuple[Json, list[str]]:
    """The fields of Sampling that a request has, and the texts before which the answer ends."""
    for name, value in FIXED.items():
        if request.get(name) not in (value, None):
            raise ValueError(f"{name} {request[name]!r} is not supported")
    limit, stop = request.get("max_completion_tokens"), request.get("stop") or []
    given = {**request, "max_tokens": request.get("max_tokens") if limit is None else limit}
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop {stop!r}: expected texts")
    return {f.name: value for f in fields(Sampling)
            if (value := given.get(f.name)) is not None}, stop


def _with_ids(message: Message) -> Message:
    """A message whose calls have what clients want: numbers, ids, and arguments as text."""
    for number, call in enumerate(message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        call |= {"index": number, "id": f"call_{uuid.uuid4().hex}"}
    return message


def _likeliest(is_chat: bool, request: Json) -> int | None:
    """How many of the likeliest tokens get log-probabilities; None: not even the chosen one."""
    wanted = request.get("logprobs")         # of a chat: true or false; else a number
    if wanted is None or wanted is False:
        return None
    count = (request.get("top_logprobs") or 0) if is_chat else wanted
    if type(count) is not int or not 0 <= count <= MOST_LIKELIEST:
        name = "top_logprobs" if is_chat else "logprobs"
        raise ValueError(f"{name} {count!r}: expected 0 to {MOST_LIKELIEST}")
    return count


def _logprobs(is_chat: bool, probabilities: Sequence[Json]) -> Json:
    """Log-probabilities of some tokens, in the form of a chat or of a text."""
    if is_chat:
        return {"content": [*probabilities], "refusal": None}
    return {"tokens": [p["token"] for p in probabilities],
            "token_logprobs": [p["logprob"] for p in probabilities],
            "top_logprobs": [{other["token"]: other["logprob"]       # of equal texts the likeliest
                              for other in reversed(p["top_logprobs"])} for p in probabilities]}
