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
from .choices import as_json
from .folder import instructed, known_tasks, read_info, trained_system
from .grammar import CALLS, json_grammar
from .sampling import Sampling

if TYPE_CHECKING:
    from .generator import Generator

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
# What a request may name with these values alone, which change nothing.
FIXED: Json = {"n": 1, "logit_bias": {}}
REASONS = {"stop": "stop", "max_tokens": "length", "context": "length", "": "stop"}    # at a text
MOST_LIKELIEST = 20                          # whose log-probabilities a request may want


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
    except (RecursionError, ValueError) as e:            # JSON of hundreds of levels
        line = error_line(e)
        code = "context_length_exceeded" if "leaves no room" in line else None
        raise RequestError(line, 400, code) from None


@dataclass
class Call:
    """A request that was understood, and how many tokens it took."""

    model: str
    chat: list[Message]                      # with its tools
    prompt: list[int]
    choices: list[str]                       # the set of answers; empty: any text
    options: Json                            # of `Generator.generate`
    stop: list[str]
    likeliest: int | None    # how many tokens get log-probabilities; None: not even the chosen one
    stream: bool
    wants_usage: bool
    cached: int = 0
    written: int = 0

    @property
    def usage(self) -> Json:
        length = len(self.prompt)
        return {"prompt_tokens": length, "completion_tokens": self.written,
                "total_tokens": length + self.written,
                "prompt_tokens_details": {"cached_tokens": self.cached}}


class Api:
    """A folder's generator, which answers requests, one at a time. `open_generator` is called once
    it is needed: a page may be all that is wanted of the folder.

    defaults: of what requests leave out; no answer is longer than their max_tokens; task: whose
    adapter answers unless a request names another. The folder is a model, and so is NAME:TASK for
    each of its tasks, with the task's adapter, and its instruction before a chat's first question.
    """

    def __init__(self, folder: Path, open_generator: Callable[[], "Generator"],
                 defaults: Sampling | None = None, task: str | None = None):
        self.folder, self.open_generator = folder, open_generator
        self.defaults, self.system = defaults or Sampling(), trained_system(folder)
        self.name, self.has_page = folder.resolve().name, (folder / "index.html").is_file()
        self.adapters, self.known = read_info(folder).get("adapters") or {}, known_tasks(folder)
        # {name of a model: its task}
        self.tasks = {self.name: task} | {
            f"{self.name}:{name}": name for name in {**self.known, **self.adapters}}

    @cached_property
    def generator(self) -> "Generator":
        try:
            return self.open_generator()
        except (LookupError, TypeError, ValueError) as e:        # no request is to blame
            raise RequestError(error_line(e), 500) from None

    def models(self, name: str = "") -> Json:
        """The list of models, or one: the folder, and NAME:TASK for each of its tasks."""
        models = {model: {"id": model, "object": "model", "created": 0, "owned_by": "minismoe"}
                  for model in self.tasks}
        if name and name not in models:
            raise RequestError(f"there is no model {name}; there are {', '.join(models)}", 404,
                               "model_not_found")
        return models[name] if name else {"object": "list", "data": [*models.values()]}

    def read(self, body: bytes) -> Call:
        """Understand a request. Raises RequestError if something is wrong with it."""
        with blaming_requests():
            with naming("the request is no JSON", ValueError, RecursionError):
                request = json.loads(body)
            if not isinstance(request, dict):
                raise ValueError("the request is no JSON object")
            return self._read(request)

    def _read(self, request: Json) -> Call:
        generator, model = self.generator, _field(request, "model", str, self.name)
        if self.adapters or model.startswith(f"{self.name}:"):   # else any name means the folder
            self.models(model)               # raises if there is none
        model = model if model in self.tasks else self.name
        for name, value in FIXED.items():
            if request.get(name) not in (value, None):
                raise ValueError(f"{name} {request[name]!r} is not supported")
        (tools, must), likeliest = _tools(request), _likeliest(request)
        chat = with_tools(self._messages(request, model), tools)
        prompt, = generator.encoded([chat])
        options = self._sampling(request) | {
            "grammar": self._grammar(request, tools, must), "fast_forward": likeliest is None}
        choices = self._choices(request, model)
        if choices and (tools or options["grammar"]):
            raise ValueError("structured_outputs cannot be beside tools or response_format")
        stop = _field(request, "stop", str | list, [])
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop {stop!r}: expected texts")
        usage = _field(request, "stream_options", dict, {}).get("include_usage")
        return Call(model, chat, prompt, choices, options, stop, likeliest,
                    _field(request, "stream", bool, False), bool(usage))

    def _messages(self, request: Json, model: str) -> list[Message]:
        """A chat, which begins with the system prompt of the training unless it has another, and
        whose first question has the instruction of the task that the model's name has."""
        messages = [*map(message_of, _field(request, "messages", list, []))]
        if not messages:
            raise ValueError("messages is empty: give at least one")
        asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if model != self.name and asked is not None:
            entry = self.known.get(model.removeprefix(f"{self.name}:"), {"instruction": ""})
            messages[asked] = {**messages[asked], "content": instructed(
                entry["instruction"], messages[asked]["content"])}
        return messages if messages[0]["role"] == "system" else [*self.system, *messages]

    def _choices(self, request: Json, model: str) -> list[str]:
        """The set of answers that `structured_outputs` wants: a list, or true: the model's own."""
        choice = _field(request, "structured_outputs", dict, {}).get("choice")
        if choice is True:
            known = self.known.get(model.removeprefix(f"{self.name}:"), {"choices": []})["choices"]
            if not known:
                raise ValueError(f"the model {model} has no set of answers: name FOLDER:TASK, with "
                                 "a task that has one, or give a list")
            return [*known]
        if choice is not None and not (isinstance(choice, list) and choice and all(
                isinstance(text, str) for text in choice)):
            raise ValueError("choice is neither true nor a list of texts")
        return choice or []

    def _sampling(self, request: Json) -> Json:
        """Fields of Sampling: the request's, or else the defaults. Clients write "any" as -1, whole
        numbers as 5.0, and "the likeliest alone" as a top_p of 0."""
        limit = request.get("max_completion_tokens")
        limit = request.get("max_tokens") if limit is None else limit
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

    def _grammar(self, request: Json, tools: Sequence[Function], must: bool) -> Any:
        """The matcher of the answer's grammar; "" if any text may be."""
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
        return self.generator.matcher(grammar) if grammar else ""

    def answer(self, call: Call, check: Callable[[], None]) -> abc.Generator[Json, None, None]:
        """Yield the answer as one object or, for a stream, as chunks. check is called before each
        step of the generator, and raises what ends the answer."""
        head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": call.model,
                "object": "chat.completion" + ".chunk" * call.stream}
        choices, task = list[Json](), self.tasks[call.model]
        self.generator.use(task if task in self.adapters else None)
        with blaming_requests():             # a schema can be too complex for some texts only
            for part in (self._chosen if call.choices else self._parts)(call, check):
                choices.append({"index": 0, **part})
                if call.stream:
                    yield {**head, "choices": [choices.pop()]}
        if call.wants_usage or not call.stream:
            yield {**head, "choices": choices, "usage": call.usage}

    def _chosen(self, call: Call, check: Callable[[], None]) -> Iterator[Json]:
        """Yield the likeliest of a set of answers and, beside it, as many as `top_logprobs` says,
        with their probabilities."""
        found = self.generator.choose(call.prompt, call.choices, max(1, call.likeliest or 1), check)
        call.written = len(self.generator.tokenizer.encode(found[0].text)[0])
        yield {"delta" if call.stream else "message": {
            "role": "assistant", "content": found[0].text}, "logprobs": None,
            "finish_reason": "stop", "likeliest": as_json(found)}

    def _parts(self, call: Call, check: Callable[[], None]) -> Iterator[Json]:
        """Yield the answer; of a stream in parts, the last of which has the calls."""
        generator, probabilities, text, sent = self.generator, list[Json](), "", 0
        shown = generator.tokenizer.shown_call() if "tools" in call.chat[0] else ""
        answer = generator.generate(call.prompt, check=check, **call.options)

        def read() -> Iterator[int]:
            for token in answer:
                call.written += 1
                if call.likeliest is not None:
                    probabilities.append(_probability(
                        generator.logprobs(answer.logits, token, call.likeliest)))
                yield token

        def part(content: Json, reason: str | None = None) -> Json:
            logprobs = None if call.likeliest is None else {
                "content": [*probabilities], "refusal": None}
            probabilities.clear()            # the next part has those of its own tokens
            return {"delta" if call.stream else "message": content, "logprobs": logprobs,
                    "finish_reason": reason}

        for piece in generator.text(read(), call.stop, strip=True):
            text += piece
            end = before_call(text, shown)
            if call.stream and end > sent:
                new, sent = text[sent:end], end
                yield part({"role": "assistant", "content": new})
        call.cached = answer.cached_tokens
        message = {**generator.tokenizer.parse(call.chat, text)}
        calls = message.get("tool_calls", [])
        for number, made in enumerate(calls):                    # with what clients want
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
            made |= {"index": number, "id": f"call_{uuid.uuid4().hex}"}
        if call.stream:                      # what was sent is not sent again
            message["content"] = message["content"][len(text[:sent].strip()):] if (
                calls) else text[sent:]
        yield part(message, "tool_calls" if calls else REASONS[answer.ended])


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


def _likeliest(request: Json) -> int | None:
    """How many of the likeliest tokens get log-probabilities; None: not even the chosen one."""
    count = request.get("top_logprobs") or 0
    if type(count) is not int or not 0 <= count <= MOST_LIKELIEST:
        raise ValueError(f"top_logprobs {count!r}: expected 0 to {MOST_LIKELIEST}")
    return count if _field(request, "logprobs", bool, False) else None


def _probability(given: Sequence[tuple[str, float]]) -> Json:
    """Texts and log-probabilities of a token and of the likeliest in its place, as in a chat."""
    own, *others = ({"token": text, "logprob": logprob, "bytes":         # of a part of a character
                     None if "\ufffd" in text else [*text.encode()]}               # not known
                    for text, logprob in given)
    return {**own, "top_logprobs": others}
