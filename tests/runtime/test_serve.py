"""The server, asked by OpenAI's own client: answers, streams, tools, JSON, clients that leave."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from exported import command, describe, export, random_model

from minismoe.data.tokenizer import ByteTokenizer, Tokenizer
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator
from minismoe.runtime import __main__ as terminal
from minismoe.runtime import serve as server
from minismoe.runtime.api import Api, RequestError

openai = pytest.importorskip("openai")
ASK = [{"role": "user", "content": "hello"}]
LIGHT = {"type": "function", "function": {"name": "light", "parameters": {
    "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
    "additionalProperties": False}}}
DOOR = {"type": "function", "function": {"name": "door"}}
TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ '<|end|>' if m.role == 'assistant' }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}")


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return export(model, tmp_path_factory.mktemp("serve") / "tiny", context=2048)


@contextmanager
def serving(generator: Generator, **client: object) -> Iterator["openai.OpenAI"]:
    """A client of a server of this generator, which another thread runs."""
    running = server._Server((server.HOST, 0), Api(generator.folder, lambda: generator), None)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{running.server_port}/v1", api_key="none",
                            max_retries=0, timeout=30, **client)
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@pytest.fixture(scope="module")
def generator(folder) -> Generator:
    return Generator(folder, threads=1)


@pytest.fixture(scope="module")
def client(generator) -> Iterator["openai.OpenAI"]:
    with serving(generator) as client:
        yield client


@pytest.fixture
def with_tools(generator, monkeypatch) -> None:
    """The generator with a template that writes calls."""
    monkeypatch.setattr(generator, "tokenizer", Tokenizer(ByteTokenizer(), TEMPLATE, "", "<|end|>"))


def address(client: "openai.OpenAI") -> tuple[str, int]:
    return client.base_url.host, client.base_url.port


def said(generator: Generator, limit: int) -> str:
    """The answer to ASK by the runtime itself."""
    prompt = generator.tokenizer.render(ASK, True)
    return "".join(generator.text(generator.generate(prompt, limit), strip=True))


def test_a_chat_a_stream_and_a_text(generator, client) -> None:
    expected = said(generator, 20)
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "minismoe"
    whole = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20)
    assert whole.choices[0].message.content == expected.strip() and whole.model == "tiny"
    assert whole.choices[0].finish_reason == "length"
    length = len(generator.tokenizer.render(ASK, True)) - len("<|bos|>") + 1
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (length, 20)
    assert whole.usage.total_tokens == length + 20
    chunks = [*client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20,
                                              stream=True, stream_options={"include_usage": True})]
    texts = [c.choices[0].delta.content for c in chunks[:-1]]
    assert "".join(texts) == expected and len(texts) > 5
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(texts) - 1) + [
        "length"]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == length - 1
    text = client.completions.create(model="tiny", prompt="once", max_tokens=9).choices[0].text
    assert text == "".join(generator.text(generator.generate("once", 9)))
    several = client.completions.create(model="tiny", prompt=["once"], max_tokens=9, stream=True)
    assert "".join(part.choices[0].text for part in several) == text


def test_settings_reach_the_generator(generator, client) -> None:
    hot = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_tokens": 20}
    first, again, other = (client.chat.completions.create(
        model="x", messages=ASK, **hot | {"seed": seed}).choices[0].message.content
        for seed in (7, 7, 8))
    prompt = generator.tokenizer.render(ASK, True)
    expected = "".join(generator.text(generator.generate(prompt, **hot))).strip()
    assert first == again == expected != other
    text = said(generator, 20)
    stopped = client.chat.completions.create(model="x", messages=ASK, stop=text[4:6], max_tokens=20)
    assert stopped.choices[0].message.content == text[:text.index(text[4:6])].strip()
    assert stopped.choices[0].finish_reason == "stop"
    extra = {"repetition_penalty": 1.5, "min_p": 0.5, "top_k": 3}
    given = client.chat.completions.create(model="x", messages=ASK, extra_body=extra, max_tokens=20)
    assert given.choices[0].message.content == "".join(generator.text(
        generator.generate(prompt, 20, **extra))).strip()


def test_a_chat_that_goes_on_is_read_from_where_it_differs(generator, client) -> None:
    answer = client.chat.completions.create(model="x", messages=ASK, max_tokens=9).choices[0]
    more = [*ASK, answer.message, {"role": "user", "content": "and?"}]
    usage = client.chat.completions.create(model="x", messages=more, max_tokens=1).usage
    before = len(generator.tokenizer.encode(generator.tokenizer.render(ASK, True))[0])
    assert usage.prompt_tokens_details.cached_tokens >= before


def test_log_probabilities_are_those_of_torch(generator, model, client) -> None:
    """Of each token and of the likeliest in its place, in both protocols, and in a stream."""
    ids = generator.tokenizer.encode(generator.tokenizer.render(ASK, True))[0]

    def check(prompt: list[int], tokens: list, likeliest: list[list[float]]) -> None:
        answer = list(generator.generate(prompt, 8))
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1:-1]
        wanted = logits.log_softmax(-1)
        assert [text for text, _ in tokens] == [generator.tokenizer.decode([t]) for t in answer]
        assert [x for _, x in tokens] == pytest.approx(
            [float(row[t]) for row, t in zip(wanted, answer)], abs=1e-4)
        for row, given in zip(wanted, likeliest, strict=True):
            assert given == pytest.approx(row.topk(len(given)).values.tolist(), abs=1e-4)
    settings = {"model": "x", "messages": ASK, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**settings).choices[0].logprobs.content
    check(ids, [(p.token, p.logprob) for p in whole],
          [[other.logprob for other in p.top_logprobs] for p in whole])
    assert {len(p.top_logprobs) for p in whole} == {3}
    for p in whole:                      # a token may be a part of a character
        assert (p.bytes is None) == ("\ufffd" in p.token)
        assert p.bytes is None or bytes(p.bytes).decode() == p.token
    parts = [*client.chat.completions.create(**settings, stream=True)]
    assert [p for part in parts for p in part.choices[0].logprobs.content] == whole
    text = client.completions.create(model="x", prompt="once", max_tokens=8, logprobs=3)
    given = text.choices[0].logprobs
    check([*b"once"], [*zip(given.tokens, given.token_logprobs)],
          [[max(others.values())] for others in given.top_logprobs])
    plain = client.completions.create(model="x", prompt="once", max_tokens=8)
    assert plain.choices[0].logprobs is None


def test_a_chat_begins_with_the_system_prompt_of_the_training(model, tmp_path) -> None:
    folder = export(model, tmp_path / "trained", context=2048)
    describe(folder, system="be brief")
    generator, brief = Generator(folder, threads=1), {"role": "system", "content": "be brief"}
    with serving(generator) as client:
        for messages in ASK, [{"role": "system", "content": "talk"}, *ASK]:
            answer = client.chat.completions.create(model="x", messages=messages, max_tokens=9)
            chat = [brief, *messages] if messages == ASK else messages
            prompt = generator.tokenizer.render(chat, True)
            assert answer.choices[0].message.content == "".join(
                generator.text(generator.generate(prompt, 9))).strip()


def test_content_in_parts_and_another_name_of_the_system(generator, client) -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "},
                                               {"type": "text", "text": "brief"}]}, *ASK]
    plain = [{"role": "system", "content": "be brief"}, *ASK]
    texts = {client.chat.completions.create(model="x", messages=messages, max_tokens=9)
             .choices[0].message.content for messages in (parts, plain)}
    assert len(texts) == 1


@pytest.mark.parametrize("wrong, message", [
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "user", "content": 7}]}, "not iterable"),
    ({"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}, "parts of text only"),
    ({"messages": [{"content": "x"}]}, "KeyError"), ({"n": 2}, "n 2 is not supported"),
    ({"logit_bias": {"1": 2}}, "logit_bias"), ({"temperature": -1}, "temperature -1 is no number"),
    ({"max_tokens": "many"}, "max_tokens 'many' is no int"), ({"stop": [""]}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs 21: expected 0 to 20"),
    ({"seed": True}, "seed True"),
    ({"response_format": {"type": "xml"}}, "'xml' is not supported"),
    ({"tools": [{"name": "f"}]}, "tools is no list"),
    ({"tool_choice": "required"}, "does not offer|not offer"),
    ({"tools": [LIGHT], "tool_choice": "perhaps"}, "expected none, auto, required"),
    ({"tools": [LIGHT]}, "the chat template knows no tools")])
def test_wrong_questions_are_refused_in_one_line(client, wrong, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(**{"model": "x", "messages": ASK} | wrong)
    assert refused.value.body["type"] == "invalid_request_error"
    assert "\n" not in refused.value.body["message"]


def test_null_is_no_choice_of_tools_and_names_may_be_quoted(client, folder) -> None:
    asked = json.dumps({"messages": ASK, "max_tokens": 2, "tool_choice": None}).encode()
    assert post(client, asked, "/v1/chat/completions")[0] == 200
    api = Api(folder, lambda: None)
    api.name = "my folder"
    assert api.models("/v1/models/my%20folder")["id"] == "my folder"
    assert api.models("/v1/%6dodels")["object"] == "list"


def test_a_prompt_beyond_the_context(client) -> None:
    long = [{"role": "user", "content": "x" * 2048}]
    for stream in False, True:
        with pytest.raises(openai.BadRequestError, match="leaves no room") as refused:
            client.chat.completions.create(model="x", messages=long, stream=stream)
        assert refused.value.code == "context_length_exceeded"


def test_an_error_in_the_middle_of_a_stream_reaches_the_client(generator, client, monkeypatch,
                                                               ) -> None:
    def broken(*args: object, **options: object) -> Iterator[int]:
        yield from b"ab"
        raise ArithmeticError("the model's logits are not numbers")
    monkeypatch.setattr(generator, "generate", broken)
    with pytest.raises(openai.APIError, match="not numbers"):
        [*client.chat.completions.create(model="x", messages=ASK, stream=True)]
    with pytest.raises(openai.InternalServerError, match="not numbers"):
        client.chat.completions.create(model="x", messages=ASK)
    monkeypatch.setattr(generator, "generate", lambda *a, **k: Path("nowhere").read_bytes())
    with pytest.raises(openai.InternalServerError, match="nowhere: No such file"):
        client.chat.completions.create(model="x", messages=ASK)


# Clients

def test_requests_wait_in_turn_and_none_is_lost(client) -> None:
    prompts = [f"n {number}: " for number in range(24)]

    def ask(prompt: str) -> str:
        return client.completions.create(model="x", prompt=prompt, max_tokens=12).choices[0].text
    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(ask, prompts)] == alone


def test_a_client_that_leaves_frees_the_generator(generator, client, monkeypatch) -> None:
    """Within a token: of a stream, of a whole answer, and while it waits."""
    made, going, generate = [], threading.Event(), generator.generate

    def slow(*args: object, **options: object) -> Iterator[int]:
        for token in generate(*args, **options):
            made.append(token)
            going.set()
            time.sleep(0.02)
            yield token
    monkeypatch.setattr(generator, "generate", slow)
    monkeypatch.setattr(generator.tokenizer, "stop_ids", [])
    stream = client.completions.create(model="x", prompt="a", max_tokens=2000, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="x", prompt="b", max_tokens=2).choices[0].text
    assert len(made) < 20
    del made[:]
    going.clear()
    body = json.dumps({"prompt": "a", "max_tokens": 2000}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json" \
           b"\r\nContent-Length: %d\r\n\r\n" % len(body)
    first, waiting = (socket.create_connection(address(client)) for _ in range(2))
    first.sendall(head + body)
    assert going.wait(10)
    waiting.sendall(head + body)
    waiting.close()
    first.close()
    assert client.completions.create(model="x", prompt="b", max_tokens=2).choices[0].text
    assert len(made) < 20


def post(client: "openai.OpenAI", body: bytes, path: str = "/v1/completions", method: str = "POST",
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
                                  (bytes(100 << 20), 413, "at most 8388608 are read")):
        found = post(client, body)
        assert found[0] == status and message in found[1]["error"]["message"]
    good = b'{"prompt": "a", "max_tokens": 2}'
    assert post(client, good)[0] == 200
    assert post(client, good, "/v1/nothing")[0] == post(client, b"", "/v1/x", "GET")[0] == 404
    assert post(client, b'{"prompt": ["a", "b"]}')[1]["error"]["message"].endswith("one prompt")
    assert post(client, good, Content_Type="text/plain")[0] == 415
    long = good + b" " * (7 << 20)                       # is read before the refusal is sent
    assert post(client, long, Content_Type="text/plain")[0] == 415
    assert post(client, long, Host="evil.example")[0] == 403
    assert post(client, good, Transfer_Encoding="chunked")[0] in (400, 411)


def test_other_sites_are_refused(client) -> None:
    good, (host, port) = b'{"prompt": "a", "max_tokens": 2}', address(client)
    assert post(client, good, Host="evil.example")[0] == 403
    assert post(client, good, Origin="https://evil.example")[0] == 403
    assert post(client, good, Origin="null")[0] == 403
    assert post(client, good, Origin=f"http://{host}:{port}")[0] == 200
    assert post(client, b"", "/v1/models", "GET", Origin="https://evil.example")[0] == 403
    assert post(client, b"", "/v1/completions", "OPTIONS")[0] == 501
    with socket.create_connection((host, port)) as raw:
        raw.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"".join(iter(lambda: raw.recv(999), b"")).endswith(b"\r\n\r\n")       # no body
    assert post(client, b"", "/export.json", "GET")[0] == 404        # a folder without a page


def test_a_slow_client_delays_nobody(client, monkeypatch) -> None:
    monkeypatch.setattr(server._Handler, "timeout", 0.3)
    with socket.create_connection(address(client)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
                     b"Content-Type: application/json\r\n\r\n{")
        assert client.completions.create(model="x", prompt="b", max_tokens=2).choices[0].text
        slow.settimeout(10)
        assert slow.recv(100) == b""                     # it was given up


# JSON and calls

SCHEMA = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 5}, "on": {"type": "boolean"},
    "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
    "required": ["name", "on", "tags"], "additionalProperties": False}


def test_json_by_a_schema(generator, client) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    for stream in False, True:
        answer = client.chat.completions.create(model="x", messages=ASK, response_format=form,
                                                stream=stream, max_tokens=300)
        text = "".join(c.choices[0].delta.content or "" for c in answer) if stream else (
            answer.choices[0].message.content)
        jsonschema.validate(json.loads(text), SCHEMA)
    assert generator.ended == "stop"
    with pytest.raises(openai.BadRequestError, match="the schema cannot be compiled: .*not"):
        client.chat.completions.create(model="x", messages=ASK, response_format={
            "type": "json_schema", "json_schema": {"name": "s", "schema": {"not": {}}}})


def test_calls_are_of_offered_functions(client, with_tools) -> None:
    pytest.importorskip("llguidance")

    def ask(choice: object, **more: object) -> object:
        return client.chat.completions.create(model="x", messages=ASK, tools=[LIGHT, DOOR],
                                              tool_choice=choice, max_tokens=300, **more)
    named = ask({"type": "function", "function": {"name": "light"}}).choices[0]
    assert named.finish_reason == "tool_calls" and named.message.content == ""
    call = named.message.tool_calls[0]
    assert call.function.name == "light" and call.id.startswith("call_")
    assert {*json.loads(call.function.arguments)} == {"on"}
    any_call = ask("required").choices[0].message.tool_calls[0].function
    assert any_call.name in ("light", "door")
    chunks = [*ask({"type": "function", "function": {"name": "light"}}, stream=True)]
    assert chunks[0].choices[0].delta.tool_calls[0].function.arguments == call.function.arguments
    assert ask("none").choices[0].message.tool_calls is None
    assert ask("auto").choices[0].message.content          # a random model writes free text
    history = [*ASK, named.message, {"role": "tool", "content": "done", "tool_call_id": call.id}]
    assert client.chat.completions.create(model="x", messages=history, tools=[LIGHT],
                                          max_tokens=5).choices


def test_a_missing_library_is_named_with_its_command(generator, client, monkeypatch) -> None:
    vars(generator).pop("_grammar_tokens", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.APIStatusError, match="pip install 'llguidance") as refused:
        client.chat.completions.create(model="x", messages=ASK,
                                       response_format={"type": "json_object"})
    assert refused.value.status_code == 501


# The command line

def test_a_folder_is_served_with_a_key_to_other_machines(folder, signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "minismoe.runtime", str(folder), "--serve", "0", "--host", "0.0.0.0",
         "--api-key", "secret"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        port = int(re.match(r"http://0\.0\.0\.0:(\d+)/v1 answers", line)[1])
        for key, status in (("Bearer secret", 200), ("bearer secret", 200), ("Bearer wrong", 401),
                            ("secret", 401), ("", 401)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/v1/models", headers={
                "Host": "laptop.local", "Authorization": key})
            assert connection.getresponse().status == status
    finally:
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
    assert (process.returncode, err) == (130, "interrupted\n")


def test_the_port_is_the_same_unless_it_is_taken(generator, monkeypatch, capsys) -> None:
    monkeypatch.setattr(server._Server, "serve_forever", lambda _: None)
    with socket.socket() as free:
        free.bind((server.HOST, 0))
        monkeypatch.setattr(server, "PORT", free.getsockname()[1])
    api = Api(generator.folder, lambda: generator)
    for _ in range(2):
        server.serve(api)
        assert f":{server.PORT}/v1 " in capsys.readouterr().out
    with socket.create_server((server.HOST, server.PORT)):
        server.serve(api)
        assert f":{server.PORT}/v1 " not in capsys.readouterr().out
        with pytest.raises(OSError, match=f"port {server.PORT} of .* cannot be opened"):
            server.serve(api, port=server.PORT)


def test_a_host_of_another_machine_is_refused_at_once(generator) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match=r"192\.0\.2\.1 cannot be opened: .* --host an address"):
        server.serve(Api(generator.folder, lambda: generator), "192.0.2.1", key="k")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("flags, says", [
    (["--serve", "--host", "0.0.0.0"], "--host needs --api-key"),
    (["x", "--api-key", "k"], "--api-key needs --serve")])
def test_another_host_needs_a_key(folder, flags, says, capsys) -> None:
    with pytest.raises(SystemExit):
        terminal.main([str(folder), *flags])
    assert says in capsys.readouterr().err


def test_a_folder_with_a_page_is_checked_before_it_is_served(folder, tmp_path) -> None:
    """Its generator is made for the first request, which is not to blame if that fails."""
    shutil.copytree(folder, tmp_path / "web")
    (tmp_path / "web" / "index.html").write_text("a page")
    describe(tmp_path / "web")
    done = command(tmp_path / "web", "--serve", "0", "--provider", "nosuch")
    assert done.returncode == 1 and "no provider nosuch" in done.stderr
    (tmp_path / "web" / "model.onnx").write_bytes(b"cut")
    done = command(tmp_path / "web", "--serve", "0")
    assert done.returncode == 1 and "it was cut or changed" in done.stderr

    def broken() -> Generator:
        raise ValueError("no adapter of this task")
    with pytest.raises(RequestError, match="no adapter") as failed:
        next(Api(folder, broken).answer("/v1/completions", {"prompt": "x"}, lambda: None))
    assert failed.value.status == 500


def test_a_folder_that_is_no_export_is_not_served(tmp_path) -> None:
    done = command(tmp_path, "--serve")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_thousand_requests_take_no_memory(folder) -> None:
    from minismoe.io.process import peak_resident
    generator = Generator(folder, threads=1)
    with serving(generator) as client, ThreadPoolExecutor(4) as pool:
        def ask(number: int) -> str:
            return client.completions.create(model="x", prompt=f"{number}", max_tokens=4).object
        assert len([*pool.map(ask, range(200))]) == 200
        before = peak_resident()
        assert len([*pool.map(ask, range(1000))]) == 1000
    assert peak_resident() - before < 4 << 20, (before, peak_resident())
