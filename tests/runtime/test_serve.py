"""The server, asked by OpenAI's own client: answers, streams, tools, JSON, clients that leave."""

import http.client
import json
import math
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from exported import (
    answer_of,
    command,
    describe,
    export,
    export_adapters,
    random_model,
    scripted,
    started,
    user,
)
from tiny import python

from minismoe.runtime import Generator, worker
from minismoe.runtime import __main__ as program
from minismoe.runtime import serve as server
from minismoe.runtime.api import CHAT, Api, RequestError
from minismoe.runtime.grammar import CALLS
from minismoe.runtime.sampling import Sampling

openai = pytest.importorskip("openai")
ASK = user("hello")
LIGHT = {"type": "function", "function": {"name": "light", "parameters": {
    "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
    "additionalProperties": False}}}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json" \
       b"\r\nContent-Length: %d\r\n\r\n"
COLORS, OWN = ["red", "blue", "green"], {"structured_outputs": {"choice": True}}
GOOD = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}'
DOOR = {"type": "function", "function": {"name": "door"}}
TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}"
    "{{ m.role }}{{ m.tool_call_id }}: {{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ '<|end|>' if m.role == 'assistant' }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}")


@pytest.fixture(scope="module")
def model() -> "torch.nn.Module":
    """One whose answers do not end."""
    model = random_model(seed=3)
    model.model.embed_tokens.weight.data[256:] = 0           # tied to the head
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return export(model, tmp_path_factory.mktemp("serve") / "tiny", context=2048)


@pytest.fixture(scope="module")
def patient(model, tmp_path_factory) -> Generator:
    """A generator whose answers take seconds: its context is that long."""
    folder = export(model, tmp_path_factory.mktemp("serve") / "long", context=1 << 17)
    return Generator(folder, threads=1)


@contextmanager
def serving(generator: Generator | Callable[[], Generator], defaults: Sampling | None = None,
            folder: Path | None = None, **settings: object) -> Iterator["openai.OpenAI"]:
    """A client of a server of this generator, which another thread runs."""
    is_open = isinstance(generator, Generator)
    api = Api(folder or generator.folder, (lambda: generator) if is_open else generator, defaults)
    with server.listen(server.HOST, 0) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        running = server.make_server(api, **settings)
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        port = listening.getsockname()[1]
        try:
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=30,
                                api_key=settings.get("key") or "none")
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def generator(folder) -> Generator:
    return Generator(folder, threads=1, caches=4)


@pytest.fixture(scope="module")
def client(generator) -> Iterator["openai.OpenAI"]:
    with serving(generator) as client:
        yield client


def address(client: "openai.OpenAI") -> tuple[str, int]:
    return client.base_url.host, client.base_url.port


def ask(client: "openai.OpenAI", limit: int | None = 9, messages: list = ASK, **options: object,
        ) -> object:
    """What the server answers to a chat."""
    return client.chat.completions.create(**{"model": "x", "messages": messages,
                                             "max_tokens": limit} | options)


def text_of(client: "openai.OpenAI", *args: object, **options: object) -> str:
    return ask(client, *args, **options).choices[0].message.content


def completed(client: "openai.OpenAI", prompt: str, limit: int = 2, **options: object) -> object:
    """What the server answers to a question."""
    return ask(client, limit, user(prompt), **options)


def length_of(generator: Generator, messages: list) -> int:
    return len(generator.tokenizer.encode(generator.tokenizer.render(messages, True))[0])


def test_a_chat_a_stream_and_a_text(generator, client) -> None:
    expected, length = answer_of(generator, ASK, 20), length_of(generator, ASK)
    known = client.models.retrieve("tiny")
    assert (known.owned_by, known.created) == ("minismoe", 0)
    with pytest.raises(openai.NotFoundError, match="there is no model other; there are tiny"):
        client.models.retrieve("other")
    whole = ask(client, 20, model="tiny")
    assert 0 <= time.time() - whole.created < 60
    assert whole.choices[0].message.content == expected.strip() and whole.model == "tiny"
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (length, 20)
    assert whole.usage.total_tokens == length + 20
    chunks = [*ask(client, 20, stream=True, stream_options={"include_usage": True})]
    texts = [c.choices[0].delta.content for c in chunks[:-1]]
    assert "".join(texts) == expected and len(texts) > 5
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(texts) - 1) + [
        "length"]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == length - 1


def test_settings_reach_the_generator(generator, client) -> None:
    """Also as clients write them: numbers as 5.0, "any" as -1, "the likeliest" as a top_p of 0."""
    plain, hot = answer_of(generator, ASK).strip(), {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    first, again, other = (text_of(client, 20, **hot | {"seed": seed}) for seed in (7, 7, 8))
    assert first == again == answer_of(generator, ASK, 20, **hot).strip() != other
    text = answer_of(generator, ASK, 20)
    stopped = ask(client, 20, stop=text[4:6]).choices[0]
    assert stopped.message.content == text[:text.index(text[4:6])].strip()
    assert stopped.finish_reason == "stop"
    for extra in ({"repetition_penalty": 1.5, "min_p": 0.5, "top_k": 3},
                  {"frequency_penalty": 2.0, "presence_penalty": 1.5}):
        said = answer_of(generator, ASK, 60, **extra).strip()
        assert text_of(client, 60, extra_body=extra) == said
    assert text_of(client, 9.0, extra_body={"top_k": -1}) == plain
    assert text_of(client, top_p=0, temperature=2) == text_of(client, tool_choice=None) == plain
    assert text_of(client, extra_body={"top_k": 99}, **hot) == text_of(client, **hot) != plain
    assert len({text_of(client, 20, **hot | {"seed": -1}) for _ in range(3)}) > 1
    assert text_of(client, -1) == text_of(client, None) == answer_of(generator, ASK, None).strip()
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "},
                                               {"type": "text", "text": "brief"}]}, *ASK]
    brief = [{"role": "system", "content": "be brief"}, *ASK]
    assert text_of(client, messages=parts) == text_of(client, messages=brief) != plain


def test_a_chat_is_read_from_where_it_differs_also_after_another(generator, client) -> None:
    def cached(messages: list) -> int:
        return ask(client, 1, messages).usage.prompt_tokens_details.cached_tokens
    more = [*ASK, {"role": "assistant", "content": text_of(client)}, *user("and?")]
    title = user("Write a title for the chat, please.")
    before = length_of(generator, ASK)
    assert cached(more) >= before > cached(title)
    assert cached(more) == length_of(generator, more) - 1


def test_log_probabilities_are_those_of_torch(generator, model, client) -> None:
    """Of each token and of the likeliest in its place, in a whole answer and in a stream."""
    ids, = generator.encoded([ASK])
    answer, settings = [*generator.generate(ids, 8)], {"logprobs": True, "top_logprobs": 3}
    with torch.no_grad():
        rows = model(torch.tensor([[*ids, *answer]]))[0, len(ids) - 1:-1].log_softmax(-1)
    whole = ask(client, 8, **settings).choices[0].logprobs.content
    parts = [token for part in ask(client, 8, stream=True, **settings)
             for token in part.choices[0].logprobs.content]
    for found in whole, parts:
        for row, token, given in zip(rows, answer, found, strict=True):
            assert given.token == generator.tokenizer.decode([token])
            assert given.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [other.logprob for other in given.top_logprobs] == pytest.approx(
                row.topk(3).values.tolist(), abs=1e-4)
            assert given.bytes == (None if "\ufffd" in given.token else      # a part of a character
                                   [*given.token.encode()])


def test_a_chat_begins_with_the_system_prompt_of_the_training(model, tmp_path) -> None:
    describe(export(model, tmp_path / "trained", context=2048), system="be brief")
    generator, brief = Generator(tmp_path / "trained", threads=1), [
        {"role": "system", "content": "be brief"}, *ASK]
    with serving(generator) as client:
        assert text_of(client) == answer_of(generator, brief).strip()
        other = [{"role": "system", "content": "talk"}, *ASK]
        assert text_of(client, messages=other) == answer_of(generator, other).strip()


@pytest.mark.parametrize("wrong, message", [
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "user", "content": 7}]}, "parts of text only"),
    ({"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}, "parts of text only"),
    ({"messages": [{"content": "x"}]}, "no object with a role"), ({"n": 2}, "n 2 is not supported"),
    ({"logit_bias": {"1": 2}}, "logit_bias"), ({"temperature": -1}, "temperature -1 is no number"),
    ({"max_tokens": "many"}, "max_tokens 'many' is no int"), ({"stop": [""]}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs 21: expected 0 to 20"),
    ({"seed": True}, "seed True"), ({"stream": "yes"}, "stream 'yes' is not understood"),
    ({"response_format": {"type": "xml"}}, "'xml' is not supported"),
    ({"tools": [{"name": "f"}]}, "tools is no list"),
    ({"extra_body": {"structured_outputs": {"choice": True}}}, "has no set of answers"),
    ({"extra_body": {"structured_outputs": {"choice": [1]}}}, "neither true nor a list of texts"),
    ({"extra_body": {"structured_outputs": {"choice": ["a"]}},
      "response_format": {"type": "json_object"}}, "cannot be beside tools or response_format"),
    ({"tool_choice": "required"}, "does not offer|not offer"),
    ({"tools": [LIGHT], "tool_choice": "perhaps"}, "expected none, auto, required"),
    ({"extra_body": {"repetition_penalty": 1e-300}}, r"is not in \[0.01, 100\]"),
    ({"tools": [LIGHT]}, "the chat template knows no tools")])
def test_wrong_questions_are_refused_in_one_line(client, wrong, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        ask(client, **wrong)
    assert refused.value.body["type"] == "invalid_request_error"
    assert "\n" not in refused.value.body["message"]


def test_a_prompt_beyond_the_context(client) -> None:
    """A text that is far too long is refused by its characters, before it takes memory."""
    for length, said in (2048, "2,0.. tokens"), (20_000, "20,0.. characters"):
        for stream in False, True:
            with pytest.raises(openai.BadRequestError, match=f"{said}, which leaves no room") as no:
                ask(client, messages=user("x" * length), stream=stream)
            assert no.value.code == "context_length_exceeded"


def test_what_no_request_is_to_blame_for(folder, tmp_path, capfd) -> None:
    """It reaches the client, in the middle of a stream, too, and the log."""
    broken = Generator(scripted(tmp_path / "nan", "a", "b", "<nan>"), threads=1)
    with serving(broken) as client:
        said = []
        with pytest.raises(openai.APIError, match="not numbers"):
            said += ask(client, stream=True)
        with pytest.raises(openai.InternalServerError, match="not numbers"):
            ask(client)

    def fails() -> Generator:
        raise ZeroDivisionError("what nobody expects")
    capfd.readouterr()
    with serving(fails, folder=folder) as client, pytest.raises(
            openai.InternalServerError, match="what nobody expects"):
        ask(client)
    assert capfd.readouterr().err == "error (ZeroDivisionError): what nobody expects\n"


def test_a_model_has_a_name_for_each_adapter(model, tmp_path) -> None:
    """A chat with one keeps its cache while another one is asked."""
    export_adapters(model, tmp_path / "f", "one", "two")
    generator, answers = Generator(tmp_path / "f", threads=1, caches=4), {}
    for task in None, "one", "two":
        generator.use(task)
        answers[f"f:{task}" if task else "f"] = answer_of(generator, ASK).strip()
    generator.reset()
    with serving(generator) as client:
        assert [m.id for m in client.models.list()] == [*answers]
        for again in False, True:
            for name, text in answers.items():
                found = ask(client, model=name)
                assert (found.choices[0].message.content, found.model) == (text, name)
                cached = found.usage.prompt_tokens_details.cached_tokens
                assert cached == (found.usage.prompt_tokens - 1 if again else 0)
        for name in "f:three", "gpt-5":
            with pytest.raises(openai.NotFoundError,
                               match=f"there is no model {name}; there are f, f:one, f:two"):
                ask(client, model=name)
    assert len({*answers.values()}) == 3


@pytest.fixture(scope="module")
def task(model, tmp_path_factory) -> Path:
    """A folder of two tasks, of which one has an instruction and a set of answers."""
    return export(model, tmp_path_factory.mktemp("task") / "f", context=2048, files={
        "tasks.json": json.dumps({"color": {"choices": COLORS, "instruction": "Name it.\n"},
                                  "talk": {"choices": [], "instruction": ""}})})


def test_a_task_is_a_model_with_its_instruction_and_its_answers(task) -> None:
    generator, asked = Generator(task, threads=1), user("Name it.\nhello")
    best = generator.choose(asked, COLORS, 2)
    with serving(generator) as client:
        assert [m.id for m in client.models.list()] == ["f", "f:color", "f:talk"]
        assert text_of(client, messages=asked, model="f:color") == (     # it is not put twice
            answer_of(generator, asked).strip())
        said = answer_of(generator, ASK).strip()
        assert text_of(client) == text_of(client, model="f:talk") == said
        found = ask(client, model="f:color", extra_body=OWN, logprobs=True, top_logprobs=2)
        assert found.choices[0].message.content == best[0].text
        assert found.choices[0].likeliest == [
            {"text": a.text, "probability": pytest.approx(math.exp(a.logprob))} for a in best]
        named = {"structured_outputs": {"choice": ["yes", "no"]}}
        answer = generator.choose(ASK, ["yes", "no"])[0].text
        assert text_of(client, extra_body=named) == answer
        assert "".join(c.choices[0].delta.content for c in ask(
            client, extra_body=named, stream=True)) == answer
        with pytest.raises(openai.NotFoundError, match="there is no model f:x"):
            ask(client, model="f:x")


def test_defaults_and_a_limit_are_those_of_the_operator(generator) -> None:
    with serving(generator, Sampling(max_tokens=7, frequency_penalty=1.0)) as client:
        for asked, given in ((None, 7), (20, 7), (-1, 7), (3, 3)):
            assert ask(client, asked).usage.completion_tokens == given
        assert text_of(client) == answer_of(generator, ASK, 7, frequency_penalty=1.0).strip()


# Clients

def test_requests_wait_in_turn_and_none_is_lost(client) -> None:
    def asked(number: int) -> str:
        return completed(client, f"n {number}: ", 12).choices[0].message.content
    alone = [asked(number) for number in range(24)]
    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(asked, range(24))] == alone


@pytest.mark.slow
def test_two_thousand_requests_of_eight_clients_three_of_them_broken(client) -> None:
    """None is lost, and memory does not grow."""
    from minismoe.io.process import peak_resident

    def asked(number: int) -> object:
        prompt, kind = f"{number % 50}: ", number % 8
        if kind == 0:                        # leaves in the middle of a stream
            stream = completed(client, prompt, 100, stream=True)
            next(iter(stream))
            return stream.close()
        if kind == 1:                        # sends half a request, and hangs up
            with socket.create_connection(address(client)) as half:
                return half.sendall(HEAD % 99 + GOOD)
        if kind == 2:
            return post(client, b'{"messages": 7')[0]
        if kind == 3:
            return "".join(part.choices[0].delta.content for part in completed(
                client, prompt, 4, stream=True))
        return completed(client, prompt, 4).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        first = [*pool.map(asked, range(1000))]
        before = peak_resident()
        second = [*pool.map(asked, range(1000))]
    assert peak_resident() - before < 8 << 20, (before, peak_resident())
    assert first == second


def sent(client: "openai.OpenAI", prompt: str, **options: object) -> socket.socket:
    """The connection of a client that has asked for a long answer, and reads nothing."""
    body = json.dumps({"messages": user(prompt), "max_tokens": 100_000, **options}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address(client))
    connection.sendall(HEAD % len(body) + body)
    return connection


@pytest.mark.parametrize("leaves", ["stream", "whole", "prompt"])
def test_a_client_that_leaves_frees_the_generator(patient, capfd, leaves) -> None:
    """In the middle of a stream, of a whole answer, and of its prompt; others leave the queue. The
    answer would have taken longer than the next client waits."""
    with serving(patient) as client:
        start = time.monotonic()
        if leaves == "stream":
            stream = completed(client, "a", 100_000, stream=True)
            next(iter(stream))
            stream.close()
        else:
            prompt = "x" * (100_000 if leaves == "prompt" else 1)
            with sent(client, prompt), sent(client, "b"):
                time.sleep(0.2)
        assert completed(client, "c", timeout=5).choices[0].message.content
        assert time.monotonic() - start < 5
    assert not capfd.readouterr().err        # nobody is to blame


def test_a_client_that_reads_nothing_holds_nobody_up(patient) -> None:
    """Its answer ends once there is more of it than it may leave unread."""
    with serving(patient) as client, sent(client, "a", stream=True) as deaf:
        assert deaf.recv(99).startswith(b"HTTP/1.1 200 ")
        assert completed(client, "b").choices[0].message.content     # after some of 100,000 tokens
        end = b""
        while part := deaf.recv(1 << 20):
            end = (end + part)[-300:]
            if end.endswith(b"0\r\n\r\n"):
                break
        assert b"was not read as it came" in end


def test_so_many_may_wait_and_those_that_left_wait_no_more(patient, monkeypatch) -> None:
    assert worker.WAITING == 32
    monkeypatch.setattr(worker, "WAITING", 1)
    with serving(patient) as client, sent(client, "a"):
        time.sleep(1)                        # the worker takes it
        for _ in range(3):
            sent(client, "b").close()
            time.sleep(0.2)
        with sent(client, "c") as waiting:
            waiting.settimeout(0.5)
            with pytest.raises(TimeoutError):        # it waits, and is not refused
                waiting.recv(1)
            with pytest.raises(openai.InternalServerError, match="wait already: ask again") as no:
                completed(client, "d")
            assert no.value.status_code == 503


def test_the_end_of_the_server_ends_an_answer(patient) -> None:
    with serving(patient) as client:
        waiting = [sent(client, prompt) for prompt in "abc"]
        time.sleep(0.2)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    for connection in waiting:
        connection.close()


def test_a_worker_that_hangs_does_not_hold_the_server(folder, monkeypatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.2)
    done = threading.Event()

    def hangs() -> Generator:
        done.wait(30)
        raise ValueError("too late")
    with serving(hangs, folder=folder) as client, sent(client, "a"):
        time.sleep(0.5)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    done.set()


def test_answers_over_one_connection_come_at_once(client) -> None:
    """Nagle's algorithm would wait 40 ms for an acknowledgement within each."""
    connection, start = http.client.HTTPConnection(*address(client), timeout=30), time.monotonic()
    for _ in range(25):
        connection.request("POST", CHAT, GOOD, {"Content-Type": "application/json"})
        assert connection.getresponse().read()
    assert time.monotonic() - start < 0.8


def post(client: "openai.OpenAI", body: bytes, path: str = CHAT, method: str = "POST",
         **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(*address(client), timeout=30)
    connection.request(method, path, body, {"Content-Type": "application/json", **{
        name.replace("_", "-"): value for name, value in headers.items()}})
    response = connection.getresponse()
    assert "Access-Control-Allow-Origin" not in response.headers
    text = response.read()
    return response.status, json.loads(text) if text.startswith(b"{") else {}


def test_bodies_that_are_refused(client) -> None:
    for body, status, message in ((b"{", 400, "no JSON"), (b"[1]", 400, "no JSON object"),
                                  (b"[" * 100_000, 400, "no JSON"), (b"\xff", 400, "no JSON"),
                                  (b'{"tools": %s1%s}' % (b"[" * 900, b"]" * 900), 400, ""),
                                  (bytes(100 << 20), 413, "at most 4194304 are read")):
        found = post(client, body)
        assert found[0] == status and message in found[1]["error"]["message"]
    assert post(client, GOOD)[0] == 200
    assert post(client, GOOD, "/v1/nothing")[0] == post(client, b"", "/v1/x", "GET")[0] == 404
    assert post(client, GOOD, Content_Type="Application/JSON; charset=utf-8")[0] == 200
    for more in b"", b" " * (3 << 20):                   # is read before the refusal is sent
        assert post(client, GOOD + more, Content_Type="text/plain")[0] == 415


def test_other_sites_are_refused_unless_they_are_named(generator, client) -> None:
    host, port = address(client)
    for wrong in {"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}:
        assert post(client, GOOD, **wrong)[0] == 403
        assert post(client, b"", "/v1/models", "GET", **wrong)[0] == 403
    assert post(client, GOOD, Origin=f"http://{host}:{port}")[0] == 200
    assert post(client, GOOD, Host=f"LocalHost:{port}")[0] == 200
    assert post(client, b"", "/export.json", "GET")[0] == 404        # a folder without a page
    origin = {"Origin": "app://obsidian.md"}
    first = {"Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}
    second = {"Content-Type": "application/json", "Authorization": "Bearer schlüssel".encode()}
    for settings, allowed in (({"origins": ["app://obsidian.md"]}, "app://obsidian.md"),
                              ({"origins": ["*"]}, "*"), ({"key": "schlüssel"}, "*"), ({}, None)):
        with serving(generator, **settings) as other:
            connection = http.client.HTTPConnection(*address(other), timeout=30)
            for method, headers in ("OPTIONS", first), ("POST", second):
                connection.request(method, CHAT, GOOD, origin | headers)
                answer = connection.getresponse()
                assert answer.headers["Access-Control-Allow-Origin"] == allowed and answer.read()
                assert (answer.status == 200) == (allowed is not None)


def test_silent_and_slow_clients_delay_nobody_and_are_given_up(client, monkeypatch) -> None:
    assert server.PATIENCE == 10
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    with socket.create_connection(address(client)) as silent, socket.create_connection(
            address(client)) as slow, closing(
            http.client.HTTPConnection(*address(client))) as half:
        half.request("GET", "/v1/models")
        assert half.getresponse().read()
        half.sock.sendall(b"G")              # and nothing more of the next request
        slow.sendall(HEAD % 999 + b"{")
        assert completed(client, "b").choices[0].message.content
        slow.settimeout(0.1)
        with suppress(ConnectionError):
            for _ in range(100):             # a byte now and then
                with suppress(TimeoutError):
                    slow.sendall(b" ")
                    if not slow.recv(999):
                        break
            else:
                pytest.fail("the client was not given up")
        for given_up in silent, half.sock:
            given_up.settimeout(5)
            assert given_up.recv(1) == b""


def test_connections_are_bounded_and_a_body_is_not_awaited_without_the_key(generator, monkeypatch,
                                                                           ) -> None:
    monkeypatch.setattr(server, "CLIENTS", 2)
    with serving(generator, key="k") as client, socket.create_connection(address(client)) as half:
        half.sendall(HEAD % 999)
        assert half.recv(99).startswith(b"HTTP/1.1 401 ")
        with pytest.raises(openai.InternalServerError, match="503"):
            completed(client, "a")


# JSON and calls

SCHEMA = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 5}, "on": {"type": "boolean"},
    "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
    "required": ["name", "on", "tags"], "additionalProperties": False}


def test_json_by_a_schema(client) -> None:
    """Its place is OpenAI's, or llama.cpp's."""
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    choice = ask(client, 300, response_format=form).choices[0]
    text = choice.message.content
    jsonschema.validate(json.loads(text), SCHEMA)
    assert choice.finish_reason == "stop"
    assert text == "".join(c.choices[0].delta.content or "" for c in ask(
        client, 300, response_format=form, stream=True))
    for kind in "json_object", "json_schema":
        form = {"type": kind, "schema": SCHEMA}
        assert text_of(client, 300, extra_body={"response_format": form}) == text


def test_a_schema_that_no_value_ends_is_refused_when_the_answer_begins(client) -> None:
    pytest.importorskip("llguidance")
    endless = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {
        "name": "s", "schema": {"$defs": {"x": endless}, **endless}}}
    with pytest.raises(openai.BadRequestError, match="no value that ends matches"):
        ask(client, response_format=form)


def test_calls_are_of_offered_functions(tmp_path) -> None:
    pytest.importorskip("llguidance")
    generator = Generator(scripted(tmp_path / "f", "It is", " on.", template=TEMPLATE), threads=1)

    def called(choice: object, **more: object) -> object:
        return ask(client, 300, tools=[LIGHT, DOOR], tool_choice=choice, **more)

    def length(id: str) -> int:
        """Of a prompt whose template writes to which call a result belongs."""
        calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": ""}}]
        history = [*ASK, named.message, {"role": "assistant", "content": None, "tool_calls": calls},
                   {"role": "tool", "content": "done", "tool_call_id": id}]
        return ask(client, 5, history, tools=[LIGHT]).usage.prompt_tokens
    light = {"type": "function", "function": {"name": "light"}}
    with serving(generator) as client:
        named = called(light).choices[0]
        assert named.finish_reason == "tool_calls" and named.message.content == ""
        call = named.message.tool_calls[0]
        assert call.function.name == "light" and call.id.startswith("call_")
        assert {*json.loads(call.function.arguments)} == {"on"}
        any_call = called("required").choices[0].message.tool_calls[0].function
        assert any_call.name in ("light", "door")
        chunks = [*called(light, stream=True)]
        assert chunks[0].choices[0].delta.tool_calls[0].function.arguments == (
            call.function.arguments)
        assert called("none").choices[0].message.tool_calls is None
        assert called("auto").choices[0].message.content == "It is on."
        assert length("xyz") == length("x") + 2
    for parallel, most in ((None, CALLS), (True, CALLS), (False, 1)):
        asked = {"messages": ASK, "tools": [LIGHT], "parallel_tool_calls": parallel}
        with mock.patch.object(generator, "matcher") as compiled:
            Api(generator.folder, lambda: generator).read(json.dumps(asked).encode())
        compiled.assert_called_once_with(generator.call_grammar([LIGHT], most=most))


@pytest.mark.parametrize("pieces, parts, calls", [
    (["It is", " on.", "<call>{{"], ["It is", " on.", "<call>{{"], 0),
    (["a ", "<", " b"], ["a ", "< b", ""], 0),
    (["Yes. ", "<call>", '{"name": "door", "arguments": {}}', "</call>", " Done."],
     ["Yes. ", "\nDone."], 1)])
def test_text_is_streamed_until_a_call_begins(tmp_path, monkeypatch, pieces, parts, calls) -> None:
    """Without llguidance, as no grammar holds the first answer."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    folder = scripted(tmp_path / "f", *pieces, template=TEMPLATE)
    with serving(Generator(folder, threads=1)) as client:
        chunks = [c.choices[0] for c in ask(client, tools=[DOOR], stream=True)]
    assert [c.delta.content for c in chunks] == parts
    assert len(chunks[-1].delta.tool_calls or []) == calls


def test_a_missing_library_is_named_with_its_command(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with serving(Generator(folder, threads=1)) as client, pytest.raises(
            openai.APIStatusError, match="pip install 'llguidance") as refused:
        ask(client, response_format={"type": "json_object"})
    assert refused.value.status_code == 501


# The command line

def test_a_folder_is_served_with_a_key_to_other_machines(folder, signals) -> None:
    with started(folder, "0", "--host", "0.0.0.0", "--api-key", "secret") as (line, log):
        port = int(re.match(r"http://0\.0\.0\.0:(\d+)/v1 answers", line)[1])
        for key, status in (("Bearer secret", 200), ("bearer secret", 200), ("Bearer wrong", 401),
                            ("Basic secret", 401), ("secret", 401), ("", 401)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/v1/models", headers={
                "Host": "laptop.local", "Authorization": key})
            assert connection.getresponse().status == status
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
        completed(client, "a")
        with pytest.raises(openai.BadRequestError):
            ask(client, messages=[])
    assert re.fullmatch(r"/v1/chat/completions: \d+ tokens, 0 of them cached, and 2 written, "
                        r"\d\.\d\d s\n/v1/chat/completions: \d\.\d\d s, messages is empty.*",
                        "\n".join(log))


def test_the_port_is_the_same_unless_it_is_taken(folder, signals) -> None:
    """It is the first that is free from PORT on."""
    with started(folder) as one, started(folder) as other:
        first, second = (int(re.search(r":(\d+)/", line)[1]) for line, _ in (one, other))
        assert program.PORT <= first < second < program.PORT + program.PORTS
        taken = python("-m", "minismoe.runtime", folder, "--serve", first)
        assert taken.returncode == 1 and re.fullmatch(
            f"error: port {first} of 127.0.0.1 cannot be opened: .*\n", taken.stderr)


def test_a_host_of_another_machine_is_refused_at_once(generator) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match=r"192\.0\.2\.1 cannot be opened: .* --host an address"):
        server.serve(Api(generator.folder, lambda: generator), [0], "192.0.2.1", "k")
    assert time.monotonic() - start < 2


def test_a_folder_with_a_page_is_checked_before_it_is_served(folder, tmp_path) -> None:
    """Its generator is made for the first request, which is not to blame if that fails."""
    shutil.copytree(folder, tmp_path / "web")
    (tmp_path / "web" / "index.html").write_text("a page")
    describe(tmp_path / "web")
    done = command(tmp_path / "web", "--serve", "0", "--provider", "nosuch")
    assert done.returncode == 1 and "no provider nosuch" in done.stderr
    flipped = (folder / "model.onnx.data").read_bytes()[:-1] + b"x"
    for name, content, flags, says in (("model.onnx.data", flipped, ["--verify"], "hash differs"),
                                       ("model.onnx", b"cut", [], "it was cut or changed")):
        (tmp_path / "web" / name).write_bytes(content)
        done = command(tmp_path / "web", "--serve", "0", *flags)
        assert done.returncode == 1 and says in done.stderr

    def broken() -> Generator:
        raise ValueError("no adapter of this task")
    with pytest.raises(RequestError, match="no adapter") as failed:
        Api(folder, broken).read(GOOD)
    assert failed.value.status == 500


def test_a_folder_that_is_no_export_and_missing_libraries_are_one_line(folder, tmp_path) -> None:
    for where, said in (tmp_path, "no export.json"), (folder, r"pip install 'minismoe\[serve\]'"):
        done = command(where, "--serve")
        assert done.returncode == 1 and re.fullmatch(f"error: .*{said}.*\n", done.stderr)
