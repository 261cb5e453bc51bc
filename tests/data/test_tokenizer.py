"""Tokenizers and chat templates, against `tokenizers` and the templates of `transformers`."""

import json
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML, python

from minismoe.data import templates
from minismoe.data.tokenizer import (
    DEFAULT_TEMPLATE,
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
)
from minismoe.data.tools import Message
from minismoe.data.turns import encode_line
from minismoe.export.layouts import copy_tokenizer
from minismoe.io.files import read_json

TEXT = "the naïve café 日本 🙂\u2028\u0085 <|im_end|> end"

# In the style of published templates, written for these tests.
GEMMA = """{{- bos_token -}}
{%- set start = namespace(text='', turns=messages) -%}
{%- if messages[0].role == 'system' -%}
    {%- set start.text = messages[0].content + '\n\n' -%}
    {%- set start.turns = messages[1:] -%}
{%- endif -%}
{%- for message in start.turns -%}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{- raise_exception('turns must alternate') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}
    {{- start.text if loop.first -}}
    {{- message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt -}}
"""
CONTROLS = """{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index > 3 %}{% break %}{% endif %}
{{ message | tojson }}{{ message.content | tojson(indent=2) }}
{{ message | tojson(separators=(',', ':'), sort_keys=true) }}
    {% endfor %}{{ tools is none }}{{ documents is none }}"""
GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}{{ 'Bot: ' }}{% set end = eos_token %}\
{% generation %}{{ message.content }}{{ end }}{% endgeneration %}
{% else %}
{{ message.role | capitalize }}: {{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "controls": CONTROLS, "generation": GENERATION}

USER = {"role": "user", "content": " Is <it> \"1 & 2\"? 日本 \n"}
ANSWER = {"role": "assistant", "content": "yes 🙂"}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS: list[list[Message]] = [
    [USER], [USER, ANSWER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER, ANSWER]]


def write(folder: Path, bpe: Path, **files: dict[str, Any]) -> Path:
    """A folder with the tokenizer `bpe` and these JSON files."""
    shutil.copy(bpe, folder / "tokenizer.json")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tokenizer.json of a folder."""
    content = read_json(folder / "tokenizer.json")
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def tokenizer_of(template: str) -> Tokenizer:
    return Tokenizer(ByteTokenizer(), template, "<|bos|>", "<|end|>")


# Bytes

def test_bytes_of_special_tokens_and_others() -> None:
    ids, starts = ByteTokenizer().encode("é<|end|>🙂<|bos|><|pad|>a<|x|>")
    assert ids == [*"é".encode(), 257, *"🙂".encode(), 256, 258, *b"a<|x|>"]
    assert starts == [0, 0, 1, 8, 8, 8, 8, 9, 16, *range(23, 29)]
    assert ByteTokenizer().encode("<|end|>", special=False) == ([*b"<|end|>"], [*range(7)])
    assert ByteTokenizer().decode(ids) == "é🙂a<|x|>"
    assert ByteTokenizer().decode("é".encode()[:1]) == "\N{REPLACEMENT CHARACTER}"


@given(st.text().filter(lambda text: "<|" not in text))
def test_bytes_round_trip(text: str) -> None:
    """Every character's bytes, each with the character's place."""
    ids, starts = ByteTokenizer().encode(text)
    assert ids == list(text.encode())
    assert starts == [i for i, c in enumerate(text) for _ in c.encode()]
    assert ByteTokenizer().decode(ids) == text


# tokenizer.json

def test_a_file_tokenizer_encodes_as_its_library_does(bpe: Path, tmp_path: Path) -> None:
    """But no text is cut or padded, and none gets a start token: the template writes that, and
    Llama's tokenizer.json would put a second one before."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_file(str(bpe))
    encoding, file = backend.encode(TEXT, add_special_tokens=False), tmp_path / "t.json"
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", backend.token_to_id("<s>"))])
    backend.enable_truncation(3)
    backend.enable_padding(length=100)
    backend.save(str(file))
    assert len(Backend.from_file(str(file)).encode(TEXT).ids) == 100
    ours, (ids, starts) = FileTokenizer(bpe), FileTokenizer(file).encode(TEXT)
    assert ours.encode(TEXT) == (ids, starts)
    assert ids == encoding.ids and starts == [start for start, _ in encoding.offsets]
    assert starts[ids.index(ours.special["<|im_end|>"])] == TEXT.index("<|im_end|>")
    assert ours.decode(ids) == TEXT.replace("<|im_end|>", "")
    assert ours.vocab_size == backend.get_vocab_size()
    assert ours.special.keys() >= {"<s>", "</s>", "<|endoftext|>", "[INST]"}
    assert "the" not in ours.special


# What a conversation's texts hold is text, whatever it looks like.

@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", ""])
@given(said=st.lists(st.text("the cat\n日") | st.sampled_from(["yes", " 🙂 ", "<s"]),
                     min_size=1, max_size=3))
def test_a_prompt_has_the_tokens_of_training(request, kind: str, said: list[str]) -> None:
    backend = FileTokenizer(request.getfixturevalue(kind)) if kind else ByteTokenizer()
    tokenizer = Tokenizer(backend, CHATML if kind else None, "", "<|im_end|>")
    roles = ["user", "assistant"] * 2
    chat = [{"role": role, "content": text} for role, text in zip(roles, said)]
    text = tokenizer.render(chat, True)
    ids, starts = tokenizer.encode(text)
    assert tokenizer.encode_chat(chat, True) == (text, ids, starts)
    if chat[-1]["role"] == "user":
        return
    line = encode_line(chat, tokenizer)
    text, ids, starts = line.whole
    assert (ids, starts) == tokenizer.encode(text) and text == tokenizer.render(chat)
    assert line.prompt == tokenizer.encode_chat(chat[:-1], True).ids
    assert line.answer == tokenizer.turn(chat)
    asked = [tokenizer.decode(ids[turn.tokens.start:turn.tokens.stop]) for turn in line.turns
             if turn.role == "user"]
    assert [a.strip() for a in asked] == [m["content"].strip() for m in chat[::2]
                                          if m["content"].strip()]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", ""])
@pytest.mark.parametrize("text", ["{}", "a {} b", "\n{}{}\n", "<|im_{}end|>", "{} \ufdd0",
                                  "\ufdd1\ufdd0{}\ufdd0\ufdd0\ufdd1"])
def test_special_tokens_come_from_the_template_alone(request, kind: str, text: str) -> None:
    """Also in calls and tools. What a text says is what was typed."""
    backend = FileTokenizer(request.getfixturevalue(kind)) if kind else ByteTokenizer()
    end = "<|im_end|>" if kind else "<|end|>"
    template = ("{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}"
                "{{ m.tool_calls | tojson if m.tool_calls }}" + end + "{% endfor %}")
    tokenizer, typed = Tokenizer(backend, template, "", end), text.replace("{}", end)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": typed, typed: 1}}}
    chat = [{"role": "user", "content": typed, "tools": [{typed: typed}]},
            {"role": "assistant", "content": "yes " + typed, "tool_calls": [call], "weight": 0}]
    for encoded in (tokenizer.encode_chat(chat, True), tokenizer.encode_chat(chat)):
        assert sum(token in tokenizer.special.values() for token in encoded.ids) == 2
        plain = tokenizer.decode(encoded.ids).replace(" ", "")
        assert plain.count(typed.replace(" ", "")) >= 2
        assert encoded.text == tokenizer.render(chat)
    if not kind:
        line = encode_line([chat[0], {"role": "assistant", "content": "no"}], tokenizer)
        found = {turn.role: len(turn.tokens) for turn in line.turns}
        # A user's text that holds a border of our own has no loss of its own.
        assert found == {"assistant": 3} | ({} if "\ufdd1" in text else {
            "user": len(typed.strip().encode())})


def test_a_missing_tokenizers_names_the_command(monkeypatch: pytest.MonkeyPatch, bpe: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'minismoe\[hub\]'"):
        load_tokenizer(bpe.parent)


def test_broken_folders_are_refused(bpe: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no valid tokenizer"):
        load_tokenizer(tmp_path)
    size = FileTokenizer(bpe).vocab_size
    with pytest.raises(ValueError, match=f"has {size} tokens, and the model only {size - 1}"):
        load_tokenizer(write(tmp_path, bpe, config={"vocab_size": size - 1}))
    for name in ("config", "tokenizer_config", "generation_config"):
        for content, error in (("{", "not valid JSON"), ("[]", "no JSON object")):
            (tmp_path / f"{name}.json").write_text(content)
            with pytest.raises(ValueError, match=f"{name}.json .*{error}"):
                load_tokenizer(tmp_path)
        (tmp_path / f"{name}.json").unlink()
    load_tokenizer(write(tmp_path, bpe, config={"vocab_size": size}))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's tokenizer files as Gemma 3's instruction models have them: SentencePiece's BPE
    with bytes for the rest, turns of user and model, and one token that the model does not have."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
              *(f"<0x{n:02X}>" for n in range(256)), "\n", "\n\n", *"▁Bemodlubriefsath!.",
              "us", "er", "user", "mo", "de", "mode", "model", "▁c", "at", "▁cat"]
    merges = [("\n", "\n"), ("u", "s"), ("e", "r"), ("us", "er"), ("m", "o"), ("d", "e"),
              ("mo", "de"), ("mode", "l"), ("a", "t")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    made = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse()])
    made.add_special_tokens([*pieces[:6], "<image_soft_token>"])
    folder = tmp_path_factory.mktemp("gemma")
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(GEMMA)
    for name, content in (("config", {"vocab_size": len(vocab), "eos_token_id": [1, 5]}),
                          ("tokenizer_config", {"bos_token": "<bos>", "eos_token": "<eos>",
                                                "pad_token": "<pad>", "unk_token": "<unk>"})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_gemmas_chats_are_those_of_transformers(gemma: Path) -> None:
    """A system prompt goes into the first turn, and texts are trimmed."""
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(gemma), AutoTokenizer.from_pretrained(gemma)
    assert theirs.chat_template == GEMMA
    user, answer = {"role": "user", "content": " the cat "}, {"role": "assistant", "content": "a\n"}
    for messages, prompted in product(
            ([user], [SYSTEM, user], [user, answer, user], [SYSTEM, user, answer]), (False, True)):
        text, ids = (theirs.apply_chat_template(messages, add_generation_prompt=prompted,
                                                tokenize=tokenize) for tokenize in (False, True))
        assert ours.render(messages, prompted) == text
        assert ours.encode(text)[0] == ids["input_ids"]
    for wrong in ([user, user], [answer, user]):
        with pytest.raises(ValueError, match="turns must alternate"):
            ours.render(wrong)


def test_gemma_stops_at_the_end_of_a_turn_whatever_files_say(gemma: Path, tmp_path: Path) -> None:
    """Its configuration names both ends; a base whose template was added names <eos> alone. A token
    beyond the model is refused in a text alone."""
    declared, size = load_tokenizer(gemma), read_json(gemma / "config.json")["vocab_size"]
    assert declared.stop_ids == [1, 5] and declared.end_id == 5 and declared.pad_id == 0
    base = shutil.copytree(gemma, tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"vocab_size": 400, "eos_token_id": 1}))
    assert load_tokenizer(base).stop_ids == [1, 5]
    answer = {"role": "assistant", "content": "the cat"}
    assert declared.decode(declared.turn([{"role": "user", "content": "a"}, answer])) == "the cat"
    assert declared.special["<image_soft_token>"] == size
    with pytest.raises(ValueError, match=f"token {size}, and the model has only {size}"):
        declared.encode("the <image_soft_token>")


@pytest.mark.parametrize("kind", ["bpe", "gemma"])
def test_a_lean_copy_is_the_same_tokenizer(request: pytest.FixtureRequest, tmp_path: Path,
                                           kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    file = request.getfixturevalue(kind)
    file, lean = file / "tokenizer.json" if kind == "gemma" else file, tmp_path / "tokenizer.json"
    copy_tokenizer(file, lean)
    whole, content = read_json(file), read_json(lean)
    assert len(whole["model"]["merges"]) == len(content["model"]["merges"]) > 3
    assert {type(m) for m in whole["model"]["merges"]} == {list}
    assert {type(m) for m in content["model"]["merges"]} == {str}
    backends = [PreTrainedTokenizerFast(tokenizer_file=str(f)).backend_tokenizer
                for f in (file, lean)]
    assert backends[0].to_str() == backends[1].to_str()
    for model in ({"merges": [["a", "b c"], ["d", "e"]]},        # a text would be ambiguous
                  {"merges": [["#version", "a"]]}, {"type": "WordLevel", "vocab": {"a": 0}}):
        (tmp_path / "odd.json").write_text(json.dumps({"model": model}))
        copy_tokenizer(tmp_path / "odd.json", lean)
        assert read_json(lean) == {"model": model}


def test_a_text_that_cannot_be_encoded_is_refused(bpe: Path, tmp_path: Path) -> None:
    write(tmp_path, bpe, config={"vocab_size": 400})
    # Few tokens, but a number out of range.
    edit(tmp_path, lambda content: content["model"]["vocab"].update({"Ġcat": 5000}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the")
    with pytest.raises(ValueError, match="'the cat' with token 5000, and the model has only 400"):
        tokenizer.encode("the cat")
    edit(tmp_path, lambda content: content.update(pre_tokenizer=None, added_tokens=[], model={
        "type": "WordLevel", "vocab": {"the": 0}, "unk_token": "<none>"}))
    with pytest.raises(ValueError, match="tokenizer.json cannot encode .*: WordLevel error"):
        load_tokenizer(tmp_path)             # which looks at the end of a turn


def test_bytes_where_the_model_has_their_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 259, "eos_token_id": [257, 10]}')
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer.backend, ByteTokenizer)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad_id) == ("<|bos|>", "<|end|>", 258)
    assert tokenizer.stop_ids == [10, 257]
    assert tokenizer.template is None


def test_importing_and_loading_import_no_torch(bpe: Path) -> None:
    code = ("import sys, minismoe.runtime; from minismoe.data.tokenizer import load_tokenizer; "
            "t = load_tokenizer(sys.argv[1]); t.render([{'role': 'user', 'content': 'x'}]); "
            "print(t.encode('a?b')[1]); assert 'torch' not in sys.modules")
    run = python("-c", code, bpe.parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[0, 1, 2]\n"


# Templates

@pytest.mark.parametrize("source", ["file", "string", "list"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_by_transformers(bpe: Path, tmp_path: Path, name: str, source: str) -> None:
    """A file outranks what tokenizer_config.json holds."""
    from transformers import PreTrainedTokenizerFast

    template = TEMPLATES[name]
    if source == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    ours = load_tokenizer(write(tmp_path, bpe, tokenizer_config={
        "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False},
        "chat_template": {"file": "wrong", "string": template, "list": [
            {"name": "tool_use", "template": "wrong"},
            {"name": "default", "template": template}]}[source]}))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(bpe), bos_token="<s>", eos_token="</s>")
    for messages, prompted in product(CONVERSATIONS, (False, True)):
        text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False,
                                          add_generation_prompt=prompted)
        assert ours.render(messages, prompted) == text
        assert ours.encode(text)[0] == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__globals__['x'] }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
])
def test_the_sandbox_stops_a_template_that_reaches_out(template: str) -> None:
    with pytest.raises(ValueError, match="the chat template fails"):
        tokenizer_of(template).render([dict(USER)])


@pytest.mark.parametrize("name", ["__class__", "__class__.__init__", "__len__"])
def test_the_sandbox_shows_nothing(name: str) -> None:
    """What is only printed is no error in jinja2, but empty."""
    assert tokenizer_of("{{ messages." + name + " }}").render([USER]) == ""


# Stop ids

def test_stop_ids_are_of_every_source(bpe: Path, tmp_path: Path) -> None:
    """config, generation_config (a list), the eos token by name, and the template's turn end."""
    special = FileTokenizer(bpe).special
    eos, turn = special["</s>"], special["<|im_end|>"]
    a, b, c = 301, 302, 303
    files = {"config": {"eos_token_id": a}, "generation_config": {"eos_token_id": [b, c]},
             "tokenizer_config": {"eos_token": "</s>", "chat_template": CHATML}}
    assert load_tokenizer(write(tmp_path, bpe, **files)).stop_ids == sorted({a, b, c, eos, turn})
    for name, gone in (("config", {a}), ("generation_config", {b, c}),
                       ("tokenizer_config", {eos, turn})):
        fewer = files | {name: {}}
        found = load_tokenizer(write(tmp_path, bpe, **fewer)).stop_ids
        assert found == sorted({a, b, c, eos, turn} - gone)


@pytest.mark.parametrize("files", [
    {"special_tokens_map": {"eos_token": "</s>"}},
    {"special_tokens_map": {"eos_token": {"content": "</s>"}}, "tokenizer_config": {}},
    {"special_tokens_map": {"eos_token": "<s>"}, "tokenizer_config": {"eos_token": "</s>"}},
    {"generation_config": {"eos_token_id": 4}},
    {"config": {"eos_token_id": [4]}, "tokenizer_config": {"eos_token": ""}}])
def test_the_end_token_is_found_where_older_checkpoints_name_it(bpe: Path, tmp_path: Path,
                                                                files: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(write(tmp_path, bpe, **files))
    assert tokenizer.render([USER, ANSWER]).endswith("yes 🙂</s>\n")
    assert tokenizer.stop_ids == [FileTokenizer(bpe).special["</s>"]] == [4]


@pytest.mark.parametrize("number", [-1, 1 << 40])
def test_an_end_that_is_no_token_is_none(bpe: Path, tmp_path: Path, number: int) -> None:
    files = {"config": {"eos_token_id": number, "vocab_size": 400}}
    assert load_tokenizer(write(tmp_path, bpe, **files)).eos == ""


def test_an_end_token_is_special_whatever_tokenizer_json_says(bpe: Path, tmp_path: Path) -> None:
    """As one that was added as a word, and then named: transformers leaves it out of texts."""
    write(tmp_path, bpe, tokenizer_config={"eos_token": "<|im_end|>"})
    edit(tmp_path, lambda content: [token.update(special=token["content"] != "<|im_end|>")
                                    for token in content["added_tokens"]])
    assert "<|im_end|>" not in FileTokenizer(tmp_path / "tokenizer.json").special
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == [2]
    assert tokenizer.decode(tokenizer.encode("yes<|im_end|>")[0]) == "yes"


def test_a_special_token_goes_on_stripping_the_spaces_beside_it(bpe: Path, tmp_path: Path) -> None:
    write(tmp_path, bpe, tokenizer_config={"eos_token": "</s>"})
    edit(tmp_path, lambda content: [token.update(lstrip=token["content"] == "</s>")
                                    for token in content["added_tokens"]])
    alone, named = FileTokenizer(tmp_path / "tokenizer.json"), load_tokenizer(tmp_path)
    assert named.encode("a  </s>b") == alone.encode("a  </s>b")
    assert len(named.encode("a  </s>b")[0]) == 3


@pytest.mark.parametrize(("template", "end"), [
    (CHATML.replace("add_generation_prompt", "false"), "<|im_end|>"),
    ("<s>" + CHATML.replace("message['content']", "message['content'] | upper"), "<|im_end|>"),
    (CHATML.replace("+ message['content']", "+ '<s>' + message['content']"), "<|im_end|>"),
    (CHATML, "<|im_end|>"), (GENERATION, "</s>")])
def test_a_turn_end_is_read_off_the_template(bpe: Path, template: str, end: str) -> None:
    backend = FileTokenizer(bpe)
    tokenizer = Tokenizer(backend, template.replace("eos_token", "'</s>'"), "<s>", "")
    assert tokenizer.stop_ids == [backend.special[end]]


@pytest.mark.parametrize("settings, pad", [
    ({"pad_token": "<|endoftext|>", "eos_token": "</s>"}, "<|endoftext|>"),
    ({"eos_token": "</s>"}, "</s>")])
def test_the_pad_token_is_the_declared_one_or_an_end_token(
        bpe: Path, tmp_path: Path, settings: dict[str, str], pad: str) -> None:
    tokenizer = load_tokenizer(write(tmp_path, bpe, tokenizer_config=settings))
    assert tokenizer.pad_id == FileTokenizer(bpe).special[pad]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("template", [None, DEFAULT_TEMPLATE])
def test_the_default_template_needs_no_jinja(template: str | None, generate: bool,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an export has written it down."""
    turns = [("system", "Be {{ brief }}."), ("user", "a\n"), ("assistant", "b"), ("user", "")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = templates.render(DEFAULT_TEMPLATE, {
        "messages": messages, "bos_token": "<|bos|>", "eos_token": "<|end|>",
        "add_generation_prompt": generate})
    assert expected == ("<|bos|>System: Be {{ brief }}.\nUser: a\n\nAssistant: b<|end|>\n"
                        "User: \n" + "Assistant:" * generate)
    monkeypatch.setattr("minismoe.data.templates.render", lambda *_: pytest.fail("asked for jinja"))
    plain = Tokenizer(ByteTokenizer(), template, "<|bos|>", "<|end|>")
    assert plain.render(messages, generate) == expected
    assert plain.stop_ids == [257]
