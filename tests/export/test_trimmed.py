"""What the runtime and the server do with a base of fewer tokens: sets, schemas, calls, chats."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bpes import byte_level
from exported import log_probabilities
from tiny import random_hf

import export
from minismoe.data.tokenizer import load_tokenizer
from minismoe.export.trim import write_trimmed
from minismoe.io.files import read_json
from minismoe.method.vocabulary import BPE, tokens_to_keep
from minismoe.model.checkpoint import load_model
from minismoe.runtime import Generator
from minismoe.runtime import serve as server
from minismoe.runtime.api import Api
from minismoe.runtime.grammar import json_grammar

CHOICES = ["cat", "the cat", "hats", "größer", "π"]
TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<s>{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
    "{{ '<s>assistant>' if add_generation_prompt }}")
LAMP = {"type": "function", "function": {"name": "lamp", "parameters": {
    "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
    "additionalProperties": False}}}
ASK = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer lost all words but three; it knows calls."""
    folder = tmp_path_factory.mktemp("trimmed")
    random_hf("llama", vocab_size=340, bos_token_id=0, eos_token_id=1, head_dim=16,
              max_position_embeddings=512).save_pretrained(folder / "whole")
    byte_level().save(str(folder / "whole" / "tokenizer.json"))
    (folder / "whole" / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}))
    tokenizer = load_tokenizer(folder / "whole")
    needed = {*tokenizer.encode("the cat sat")[0]}
    kept = tokens_to_keep(BPE(read_json(folder / "whole" / "tokenizer.json")), needed, (), 334)
    assert len(kept) < 300
    write_trimmed(folder / "whole", folder / "base", kept)
    return folder / "base"


@pytest.fixture(scope="module")
def generator(base: Path) -> Generator:
    export.main(["--model", str(base), "--precision", "fp32", "--out", str(base.parent / "onnx")])
    return Generator(base.parent / "onnx", threads=1)


@torch.no_grad()
def test_answers_of_a_set_have_the_probabilities_of_brute_force(base: Path,
                                                                generator: Generator) -> None:
    model, tokenizer = load_model(base), load_tokenizer(base)
    prompt = tokenizer.render(ASK, True)
    ids = tokenizer.encode(prompt)[0]
    end = tokenizer.encode("</s>")[0]
    wanted = log_probabilities(
        {text: [*tokenizer.encode(text)[0], *end] for text in CHOICES},
        lambda start: model(torch.tensor([[*ids, *start]]))[0, -1])
    found = {answer.text: answer.logprob for answer in generator.choose(prompt, CHOICES, 9)}
    assert found == pytest.approx(wanted, abs=1e-3)


@torch.no_grad()
def test_log_probabilities_are_among_the_tokens_that_stay(base: Path,
                                                          generator: Generator) -> None:
    ids = generator.tokenizer.encode("the cat")[0]
    token = next(answer := generator.generate(ids, 1))
    wanted = load_model(base)(torch.tensor([ids]))[0, -1].log_softmax(-1)
    (own, best), *_ = generator.logprobs(answer.logits, token, 1)
    assert best == pytest.approx(wanted[token].item(), abs=1e-3) and own
    assert token == wanted.argmax() and math.exp(best) < 1


@pytest.mark.parametrize("hot", [0.0, 2.0])
def test_schemas_and_calls_hold_their_answers(generator: Generator, hot: float) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"größe": {"enum": ["klein", "猫"]}},
              "required": ["größe"]}
    options: dict[str, Any] = {"temperature": hot, "seed": 1, "max_tokens": 99}
    tokens = [*generator.generate("the cat", grammar=json_grammar(schema), **options)]
    assert json.loads(generator.tokenizer.decode(tokens)) in (
        {"größe": "klein"}, {"größe": "猫"})
    grammar = generator.call_grammar([LAMP], must=True, most=1)
    (call,) = generator.reply(ASK, [LAMP], grammar=grammar, **options)["tool_calls"]
    assert call["function"]["name"] == "lamp"
    assert isinstance(call["function"]["arguments"]["on"], bool)


def test_the_server_answers_with_it(generator: Generator) -> None:
    client = pytest.importorskip("starlette.testclient")
    said = "".join(generator.text(generator.generate(
        generator.tokenizer.render(ASK, True), 9), strip=True))
    app = server.make_server(Api(generator.folder, lambda: generator, None)).config.app
    with client.TestClient(app, base_url="http://127.0.0.1") as there:       # starts the worker
        got = there.post("/v1/chat/completions", json={
            "model": "x", "messages": ASK, "max_tokens": 9}).json()
    assert got["choices"][0]["message"]["content"] == said.strip()
