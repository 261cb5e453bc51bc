"""OpenAI's protocol without HTTP: the JSON of a request to a generator's arguments, and back."""

import json
import time
import uuid
from collections import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tools import Function, Message, before_call, functions, message_of, with_tools
from ..io.files import naming
from ..io.flags import as_flags
from ..io.text import error_line
from .folder import read_info, trained_system
from .grammar import CALLS, json_grammar
from .sampling import Sampling

if TYPE_CHECKING:
    from .generator import Generator

Json = dict[str, Any]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What a request may name with these values alone, which change nothing.
FIXED: Json = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}}
REASONS = {"stop": "stop", "max_tokens": "length", "context": "length", "": "stop"}    # at a text
TEXT_TOKENS = 16                             # of TEXT, unless the request says so: OpenAI's default
MOST_LIKELIEST = 20                          # whose log-probabilities a request may want
MOST_PROMPTS = 64                            # of one request, which others wait for


class RequestError(Exception):
    """A request that is not answered, with the status and the body that say so."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.body = status, {"error": {
            "message": message, "type": kind, "param": None, "code": code}}


@contextmanager
def blaming_requests() -> Iterator[None]:
    """Raise the errors that a request is to blame for as RequestError."""
    try:
        yield
    except ModuleNotFoundError as e:         # llguidance is not installed
        raise RequestError(error_line(e), 501) from None
    except ValueError as e:
        line = error_line(e)
        code = "context_length_exceeded" if "leaves no room" in line else None
        raise RequestError(line, 400, code) from None


@dataclass
class Call:
    """A request that was understood, and how many tokens it took."""

    is_chat: bool
    task: str | None                         # whose adapter answers
    chat: list[Message]                      # with its tools; empty for plain prompts
    prompts: list[list[int]]
    options: Json                            # of `Generator.generate`
    stop: list[str]
    likeliest: int | None    # how many tokens get log-probabilities; None: not even the chosen one
    stream: bool
    wants_usage: bool
    cached: int = 0
    written: int = 0

    @property
    def usage(self) -> Json:
        length = sum(map(len, self.prompts))
        return {"prompt_tokens": length, "completion_tokens": self.written,
                "total_tokens": length + self.written,
                "prompt_tokens_details": {"cached_tokens": self.cached}}


class Api:
    """A folder's generator, which answers requests, one at a time. `open_generator` is called once
    it is needed: a page may be all that is wanted of the folder.

    defaults: of what requests leave out; no answer is longer than their max_tokens; task: whose
    adapter answers unless a request names another.
    """

    def __init__(self, folder: Path, open_generator: Callable[[], "Generator"],
                 defaults: Sampling | None = None, task: str | None = None):
        self.folder, self.open_generator = folder, open_generator
        self.defaults, self.system = defaults or Sampling(), trained_system(folder)
        self.name, self.has_page = folder.resolve().name, (folder / "index.html").is_file()
        adapters = read_info(folder).get("adapters") or {}
        # {name of a model: task whose adapter it has}
        self.tasks = {self.name: task} | {f"{self.name}:{name}": name for name in adapters}

    @cached_property
    def generator(self) -> "Generator":
        try:
            return self.open_generator()
        except (LookupError, TypeError, ValueError) as e:        # no request is to blame
            raise RequestError(error_line(e), 500) from None

    def models(self, name: str = "") -> Json:
        """The list of models, or one: the folder, and NAME:TASK for each of its adapters."""
        models = {model: {"id": model, "object": "model", "created": 0, "owned_by": "minismoe"}
                  for model in self.tasks}
        if name and name not in models:
            raise RequestError(f"there is no model {name}; there are {', '.join(models)}", 404,
                               "model_not_found")
        return models[name] if name else {"object": "list", "data": [*models.values()]}

    def read(self, path: str, body: bytes) -> Call:
        """Understand a request. Raises RequestError if something is wrong with it."""
        with blaming_requests():
            with naming("the request is no JSON", ValueError, RecursionError):
                request = json.loads(body)
            if not isinstance(request, dict):
                raise ValueError("the request is no JSON object")
            return self._read(path == CHAT, request)

    def _read(self, is_chat: bool, request: Json) -> Call:
        generator, model = self.generator, _field(request, "model", str, self.name)
        if len(self.tasks) > 1:              # where there is one model, any name means it
            self.models(model)               # raises if there is none
        for name, value in FIXED.items():
            if request.get(name) not in (value, None):
                raise ValueError(f"{name} {request[name]!r} is not supported")
        (tools, must), likeliest = _tools(request), _likeliest(is_chat, request)
        chat = with_tools(self._messages(request), tools) if is_chat else []
        prompts = [generator.tokenizer.prompt(chat)] if is_chat else _prompts(request)
        options = self._sampling(is_chat, request) | {
            "grammar": self._grammar(request, tools, must), "fast_forward": likeliest is None}
        stop = _field(request, "stop", str | list, [])
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop {stop!r}: expected texts")
        usage = _field(request, "stream_options", dict, {}).get("include_usage")
        return Call(is_chat, self.tasks.get(model, self.tasks[self.name]), chat,
                    generator.encoded(prompts), options, stop, likeliest,
                    _field(request, "stream", bool, False), bool(usage))

    def _messages(self, request: Json) -> list[Message]:
        """A chat, which begins with the system prompt of the training unless it has another."""
        messages = [*map(message_of, _field(request, "messages", list, []))]
        if not messages:
            raise ValueError("messages is empty: give at least one")
        return messages if messages[0]["role"] == "system" else [*self.system, *messages]

    def _sampling(self, is_chat: bool, request: Json) -> Json:
        """Fields of Sampling: the request's, or else the defaults. Clients write "any" as -1, whole
        numbers as 5.0, and "the likeliest alone" as a top_p of 0."""
        limit = request.get("max_completion_tokens")
        limit = request.get("max_tokens") if limit is None else limit
        limit = TEXT_TOKENS if limit is None and not is_chat else limit
        given = {f.name: request.get(f.name) for f in fields(Sampling)} | {"max_tokens": limit}
        given = {name: int(value) if isinstance(value, float) and value.is_integer() else value
                 for name, value in given.items() if value is not None and not (
                     value == -1 and name in ("max_tokens", "top_k", "seed"))}
        if given.get("top_p") == 0:
            given |= {"top_p": 1, "temperature": 0}
        sampling = as_flags(Sampling(**as_flags(self.defaults) | given))     # refuses wrong ones
        limits = [n for n in (sampling["max_tokens"], self.defaults.max_tokens) if n is not None]
        return sampling | {"max_tokens": min(limits, default=None),
                           "top_k": min(sampling["top_k"], self.generator.candidates)}

    def _grammar(self, request: Json, tools: Sequence[Function], must: bool) -> str:
        """The grammar of the answer; "" if any text may be."""
        form: Json = _field(request, "response_format", dict, {"type": "text"})
        if (kind := form.get("type")) == "text":
            most = 1 if request.get("parallel_tool_calls") is False else CALLS
            grammar = self.generator.call_grammar(tools, must, most) if tools else ""
        elif tools or kind not in ("json_object", "json_schema"):
            raise ValueError(f"response_format {kind!r} is not supported"
                             f"{' beside tools' if tools else ''}")
        else:                                # the schema's place is OpenAI's, or llama.cpp's
            schema = _field(form, "json_schema", dict, form).get("schema")
            any_object = {"type": "object"} if kind == "json_object" else None
            grammar = json_grammar(any_object if schema is None else schema)
        if grammar:
            self.generator.matcher(grammar)  # raises if it cannot be compiled
        return grammar

    def answer(self, call: Call, check: Callable[[], None]) -> abc.Generator[Json, None, None]:
        """Yield the answer as one object or, for a stream, as chunks. check is called before each
        step of the generator, and raises what ends the answer."""
        kind = "chat.completion" + ".chunk" * call.stream if call.is_chat else "text_completion"
        model = next(name for name, task in self.tasks.items() if task == call.task)
        head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": model, "object": kind}
        choices = list[Json]()
        self.generator.use(call.task)
        self.generator.check = check         # type: ignore[method-assign]
        try:
            for index, prompt in enumerate(call.prompts):
                with blaming_requests():     # a schema can be too complex for some texts only
                    for part in self._parts(call, prompt):
                        choices.append({"index": index, **part})
                        if call.stream:
                            yield {**head, "choices": [choices.pop()]}
        finally:
            del self.generator.check
        if call.wants_usage or not call.stream:
            yield {**head, "choices": choices, "usage": call.usage}

    def _parts(self, call: Call, prompt: Sequence[int]) -> Iterator[Json]:
        """Yield the answer to a prompt; of a stream in parts, the last of which has the calls."""
        generator, probabilities, text, sent = self.generator, list[Json](), "", 0
        offers_tools = bool(call.chat) and "tools" in call.chat[0]
        shown = generator.tokenizer.shown_call() if offers_tools else ""
        answer = generator.generate(prompt, **call.options)

        def read() -> Iterator[int]:
            for token in answer:
                call.written += 1
                if call.likeliest is not None:
                    probabilities.append(_probability(
                        generator.logprobs(answer.logits, token, call.likeliest)))
                yield token

        def part(content: Any, reason: str | None = None) -> Json:
            logprobs = None if call.likeliest is None else _logprobs(call.is_chat, probabilities)
            probabilities.clear()            # the next part has those of its own tokens
            key = "text" if not call.is_chat else "delta" if call.stream else "message"
            return {key: content, "logprobs": logprobs, "finish_reason": reason}

        for piece in generator.text(read(), call.stop, strip=call.is_chat):
            text += piece
            end = before_call(text, shown)
            if call.stream and end > sent:
                new, sent = text[sent:end], end
                yield part({"role": "assistant", "content": new} if call.is_chat else new)
        call.cached += answer.cached_tokens
        content: Any = text[sent:]
        reason = REASONS[answer.ended]
        if call.is_chat:
            message = {**generator.tokenizer.parse(call.chat, text)}
            calls = message.get("tool_calls", [])
            for number, made in enumerate(calls):                # with what clients want
                made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
                made |= {"index": number, "id": f"call_{uuid.uuid4().hex}"}
            if call.stream:                  # what was sent is not sent again
                message["content"] = message["content"][len(text[:sent].strip()):] if (
                    calls) else content
            content, reason = message, "tool_calls" if calls else reason
        yield part(content, reason)


def _field(part: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    """A field of an object, the default if it is null or missing; ValueError for another type."""
    value = part.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} {value!r} is not understood")
    return default if value is None else value


def _tools(request: Json) -> tuple[list[Function], bool]:
    """The functions that may be called, and whether one must be."""
    tools = functions(request.get("tools"), "tools")
    for tool in tools:
        _field(tool["function"], "parameters", dict, {})
    choice = _field(request, "tool_choice", str | dict, "auto")
    if isinstance(choice, dict):
        name = _field(choice, "function", dict, {}).get("name")
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    elif choice not in ("none", "auto", "required"):
        raise ValueError(f"tool_choice {choice!r}: expected none, auto, required or a function")
    if choice not in ("none", "auto") and not tools:
        raise ValueError("tool_choice wants a function that tools do not offer")
    return [] if choice == "none" else tools, choice != "auto"


def _prompts(request: Json) -> list[Any]:
    """Prompts as texts or token ids: one, or a list of some."""
    def is_one(prompt: Any) -> bool:
        return isinstance(prompt, str) or isinstance(prompt, list) and all(
            type(token) is int for token in prompt)

    prompt = request.get("prompt")
    prompts = [prompt] if is_one(prompt) else prompt
    if not isinstance(prompts, list) or not all(map(is_one, prompts)):
        raise ValueError("prompt is neither text nor token ids, nor a list of these")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"prompt holds {len(prompts)} prompts: at most {MOST_PROMPTS} a request")
    return prompts


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


def _probability(given: Sequence[tuple[str, float]]) -> Json:
    """Texts and log-probabilities of a token and of the likeliest in its place, as in a chat."""
    own, *others = ({"token": text, "logprob": logprob, "bytes":         # of a part of a character
                     None if "\ufffd" in text else [*text.encode()]}               # not known
                    for text, logprob in given)
    return {**own, "top_logprobs": others}


def _logprobs(is_chat: bool, probabilities: Sequence[Json]) -> Json:
    """Log-probabilities of some tokens, in the form of a chat or of a text."""
    if is_chat:
        return {"content": [*probabilities], "refusal": None}
    return {"tokens": [p["token"] for p in probabilities],
            "token_logprobs": [p["logprob"] for p in probabilities],
            "top_logprobs": [{other["token"]: other["logprob"]       # of equal texts the likeliest
                              for other in reversed(p["top_logprobs"])} for p in probabilities]}
