"""Answers that a grammar holds: JSON by random schemas, and calls as templates write them."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from exported import Watched, command, export, random_model, scripted
from hypothesis import given, settings
from hypothesis import strategies as st

from minismoe.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from minismoe.runtime import Generator, generation
from minismoe.runtime.grammar import (
    call_grammar,
    follow,
    grammar_tokens,
    json_grammar,
    new_matcher,
)
from minismoe.runtime.sampling import floats_of

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

LIMIT = 160                                  # tokens of an answer


@pytest.fixture(scope="module", params=[3, 4])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grammar") / "tiny"
    return export(random_model(request.param), folder, context=2048)


@pytest.fixture(scope="module")
def generator(folder) -> Watched:
    return Watched(folder, threads=1)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """JSON schemas, most of whose values a random model ends within LIMIT tokens."""
    plain = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "x y"}]),
        st.integers(0, 40).map(lambda n: {"type": "integer", "minimum": -n, "maximum": 7 * n}),
        st.integers(1, 6).map(lambda n: {"type": "string", "maxLength": n}),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}), st.just({"type": "number"}),
        st.lists(st.text("ab\"é\\ ", max_size=4), min_size=1, max_size=4, unique=True).map(
            lambda texts: {"enum": texts}))

    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        fields = st.dictionaries(st.text("abcé\" ", min_size=1, max_size=5), inner, max_size=3)
        return st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
            st.tuples(inner, st.integers(0, 2)).map(lambda pair: {
                "type": "array", "items": pair[0], "maxItems": pair[1] + 1}),
            st.tuples(fields, st.booleans()).map(lambda pair: {
                "type": "object", "properties": pair[0], "additionalProperties": False,
                "required": [*pair[0]] if pair[1] else []}))

    return st.recursive(plain, larger, max_leaves=5)


@settings(max_examples=40)
@given(schema=schemas(), hot=st.booleans(), seed=st.integers(0, 99))
def test_answers_parse_and_validate_or_say_that_they_were_cut(generator, schema, hot, seed) -> None:
    sampling = {"temperature": 2.0, "seed": seed} if hot else {"repetition_penalty": 1.3}
    answer = generator.generate("x", LIMIT, json_grammar(schema), **sampling)
    tokens = list(answer)
    text = generator.tokenizer.decode(tokens)
    if answer.ended == "max_tokens":
        assert len(tokens) == LIMIT
        return
    assert answer.ended == "stop"
    jsonschema.validate(json.loads(text), schema)


def test_what_is_likely_but_forbidden_is_replaced_by_the_likeliest_that_is_not(generator) -> None:
    """Beyond the candidates of the sampler, too: here, one token of 259 may follow."""
    text = "the only value, " * 3
    answer = generator.generate("x", LIMIT, json_grammar({"const": text}))
    assert "".join(generator.text(answer)) == json.dumps(text) and answer.ended == "stop"


def test_what_is_forbidden_may_be_replaced_by_several(generator) -> None:
    """They are drawn though none is among the candidates of the sampler."""
    candidates = generator.likeliest(floats_of(generator.prefill([*b'x"'])[0]))[1]
    others = [letter for letter in string.ascii_letters if ord(letter) not in candidates][:5]
    grammar = json_grammar({"enum": [f"{letter} it is" for letter in others]})
    drawn = {"".join(generator.text(generator.generate(
        "x", LIMIT, grammar, temperature=100.0, seed=seed))) for seed in range(40)}
    assert len(drawn) > 3


def test_tokens_that_alone_may_follow_are_read_in_one_step(generator, monkeypatch) -> None:
    """Text and end are as without, also where the limit falls among them."""
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}, "done": {
        "type": "boolean"}}, "required": ["colour", "done"]}
    for limit in (LIMIT, 20, 5):
        del generator.sizes[:]
        answer = generator.generate("x", limit, json_grammar(schema))
        tokens = [*answer]
        assert len(generator.sizes) <= 5 and len(tokens) <= limit
        with monkeypatch.context() as m:
            m.setattr(generation, "follow", lambda matcher, token, most: follow(matcher, token, 0))
            single = generator.generate("x", limit, json_grammar(schema))
            assert ([*single], single.ended) == (tokens, answer.ended)
    assert answer.ended == "max_tokens"


@pytest.mark.parametrize("schema, message", [
    ({"type": "strange"}, "the schema cannot be compiled: .*strange"),
    ({"not": {}}, "the schema cannot be compiled: .*not"),
    ({"properties": {f"p{n}": {} for n in range(8000)}}, "at most 32,000 are read"),
    ({"$ref": "#/nowhere"}, "cannot be compiled"), ([], "the schema is no JSON object"),
    ({"type": "string", "pattern": "(?=x)"}, "cannot be compiled: .*look-around")])
def test_a_schema_that_cannot_be_compiled_is_one_line_before_anything_is_read(
        generator, schema, message) -> None:
    generator.reset()
    with pytest.raises(ValueError, match=message) as refused:
        list(generator.generate("x", grammar=json_grammar(schema)))
    assert "\n" not in str(refused.value) and "%json" not in str(refused.value)
    assert generator.cache.tokens == []


def test_the_tokens_of_a_file_are_masked_as_they_are(bpe) -> None:
    """Special tokens are no text of a JSON value, and each stop token may end it."""
    tokenizer = Tokenizer(FileTokenizer(bpe), None, "", "<|im_end|>", stop_ids=[0])
    matcher = new_matcher(grammar_tokens(tokenizer, 330), json_grammar({"type": "string"}))
    special = tokenizer.special.values()

    def allowed() -> set[int]:
        mask = matcher.compute_bitmask()
        return {token for token in range(330) if mask[token >> 3] >> (token & 7) & 1}
    for token in tokenizer.encode('"the cat <|im_end|>'.replace("<|im_end|>", "é"))[0]:
        assert token in allowed() and not allowed() & {*special}
        assert matcher.consume_token(token)
    assert matcher.consume_token(tokenizer.encode('"')[0][0])
    assert allowed() == {*tokenizer.stop_ids} == {0, tokenizer.special["<|im_end|>"]}


# Calls

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": properties, "required": [*properties]}}}
    for name, properties in (
    ("light", {"room": {"enum": ["hall", "café"]}, "on": {"type": "boolean"}}),
    ("wait", {"minutes": {"type": "integer", "minimum": 1, "maximum": 9}}))]
START, NEXT = "{% for c in m.tool_calls or [] %}", "{% endfor %}"
FORMS = {                                    # how a template writes calls, and one of them
    "marked": (START + '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
               "{{ c.function.arguments | tojson }}}\n</tool_call>" + NEXT,
               '<tool_call>\n{"name": "wait", "arguments": {"minutes": 3}}\n</tool_call>'),
    "bare": (START + '{"name": "{{ c.function.name }}", "parameters": '
             "{{ c.function.arguments | tojson }}}" + NEXT,
             '{"name": "wait", "parameters": {"minutes": 3}}'),
    "list": ("{% if m.tool_calls %}[CALLS][" + START + "{{ (c.function | tojson)[:-1] }}, "
             '"id": "{{ c.id }}"}{{ \', \' if not loop.last }}' + NEXT + "]{% endif %}",
             '[CALLS][{"name": "wait", "arguments": {"minutes": 3}, "id": "abcdefghi"}, '
             '{"name": "wait", "arguments": {"minutes": 4}, "id": "abcdefgh1"}]'),
    "special": ("{% if m.tool_calls %}<|pad|>[" + START + "{{ c.function | tojson }}"
                "{{ ', ' if not loop.last }}" + NEXT + "]{% endif %}",
                '<|pad|>[{"name": "wait", "arguments": {"minutes": 3}}]')}


def writing(form: str, backend: Any = None) -> Tokenizer:
    """A tokenizer, of bytes by default, whose template writes calls in this form."""
    return Tokenizer(backend or ByteTokenizer(), (
        "{{ tools | tojson if tools }}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
        + FORMS[form][0] + "{{ '<|end|>' if m.role == 'assistant' }}\n{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"), "", "<|end|>")


@pytest.fixture
def tags(bpe, tmp_path) -> Tokenizer:
    """As Qwen's: <tool_call> and </tool_call> are one token each, which are not special."""
    backend = FileTokenizer(bpe).backend
    backend.add_tokens(["<tool_call>", "</tool_call>", "<think>"])
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return writing("marked", FileTokenizer(tmp_path / "tokenizer.json"))


def accepts(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether an answer may be this text."""
    matcher = new_matcher(grammar_tokens(tokenizer, tokenizer.backend.vocab_size), grammar)
    return matcher.consume_tokens(tokenizer.encode(text)[0]) and matcher.is_accepting()


@pytest.mark.parametrize("form", [*FORMS, "tags"])
def test_calls_are_held_to_the_offered_functions(form, tags) -> None:
    """Where the template marks calls, text may stand around them."""
    form, tokenizer = ("marked", tags) if form == "tags" else (form, writing(form))
    call = FORMS[form][1]
    grammar = call_grammar(tokenizer, TOOLS)
    chat = [{"role": "user", "content": "x", "tools": TOOLS}]
    parsed = tokenizer.parse(chat, tokenizer.decode(tokenizer.encode(call)[0]))
    assert {c["function"]["name"] for c in parsed["tool_calls"]} == {"wait"}
    assert accepts(tokenizer, grammar, call)
    for bad in (call.replace("wait", "open"), call.replace("3", "33"), call.replace("3", '"3"'),
                call.replace("3}", '3, "hours": 1}'), call.replace("minutes", "hours"), call[:-3]):
        assert not accepts(tokenizer, grammar, bad)
    for text in "Sure, it is on.", "", "a {b} [c] <d>\né":
        assert accepts(tokenizer, grammar, text)
    if form in ("marked", "list"):
        assert accepts(tokenizer, grammar, f"Sure. {call} Done.")
        assert accepts(tokenizer, grammar, f"{call}\n{call}")
        assert not accepts(tokenizer, grammar, f"Sure. {call.replace('wait', 'open')}")


def test_a_list_has_eight_calls_at_most() -> None:
    """Small models go on calling."""
    tokenizer = writing("list")
    grammar, (first, second) = call_grammar(tokenizer, TOOLS), FORMS["list"][1].split(", {")
    for count, accepted in (1, True), (8, True), (9, False):
        calls = ", {".join([first, *[second.removesuffix("]")] * (count - 1)]) + "]"
        assert accepts(tokenizer, grammar, calls) == accepted


def test_a_template_that_writes_no_json_holds_no_calls(tmp_path) -> None:
    other = ("{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}"
             "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}{% endfor %}")
    generator = Generator(scripted(tmp_path / "f", "x", template=other), threads=1)
    assert generator.call_grammar(TOOLS) == ""


# The command line

def test_a_schema_on_the_command_line(model, tmp_path, capsys) -> None:
    folder, file = export(model, tmp_path / "f", context=600), tmp_path / "schema.json"
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}, "b": {
        "enum": ["x", "y"]}}, "required": ["a", "b"], "additionalProperties": False}
    file.write_text(json.dumps(schema), encoding="utf-8-sig")            # as Windows saves it
    done = command(folder, "hello", "--schema", file, "--repetition-penalty", "1.3")
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), schema)
    cut = command(folder, "hello", "--schema", file, "--max-tokens", 3)
    assert (cut.returncode, cut.stderr) == (0, "[the answer was cut at 3 tokens]\n")
    file.write_text('{"not": {}}')
    for asked in ["hello"], ["--lines"]:
        wrong = command(folder, *asked, "--schema", file, input="a\nb\n")
        assert (wrong.returncode, wrong.stdout) == (1, "") and wrong.stderr.startswith(
            "error: the schema cannot be compiled: ") and wrong.stderr.count("\n") == 1
