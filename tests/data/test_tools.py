"""Tools and calls: lines, texts and supervised tokens as transformers', answers as messages."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, ROOT, encode

from minismoe.cli.flags import InputConfig
from minismoe.cli.inputs import print_examples
from minismoe.data.lines import to_messages
from minismoe.data.tasks import (
    Task,
    closed_answers,
    encode_all,
    load_tasks,
)
from minismoe.data.tokenizer import Tokenizer, load_tokenizer
from minismoe.export.layouts import copy_base_files
from minismoe.method.loss import IGNORE
from minismoe.training.evaluate import Accuracy, exact_match, questions

TEMPLATE = (ROOT / "minismoe/data/smollm2_tools.jinja").read_text(encoding="utf-8")
TOOLS = [{"type": "function", "function": {"name": name, "description": f"Does {name}.",
          "parameters": {"type": "object", "properties": properties, "required": [*properties]}}}
         for name, properties in (
    ("set_light", {"room": {"type": "string", "description": "which room"},
                   "on": {"type": "boolean", "description": "on or off"}}),
    ("add", {"numbers": {"type": "array", "description": "all", "items": {"type": "number"}}}))]


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    return {"type": "function", "id": f"call0000{number}",
            "function": {"name": name, "arguments": arguments}}


def line(*messages: dict[str, Any], tools: Any = TOOLS) -> dict[str, Any]:
    """A line of a task, without what other lines share with it."""
    return copy.deepcopy({"messages": list(messages), "tools": tools})


USER = {"role": "user", "content": "Light on in the hall, <b>\"Zoë\"</b>!"}
LIGHT, ADD = call("set_light", {"room": "hall", "on": True}), call("add", {"numbers": [2, 0.5]}, 2)
CALL = {"role": "assistant", "content": "", "tool_calls": [LIGHT]}
RESULT = {"role": "tool", "content": "{\"done\": 1}", "name": "set_light",
          "tool_call_id": "call00001"}
ANSWER = {"role": "assistant", "content": "It is on."}
CHATS = {
    "call": line(USER, CALL), "answer": line(USER, ANSWER),
    "content": line(USER, CALL | {"content": "Sure."}),
    "null": line(USER, CALL | {"content": None}),
    "two": line(USER, CALL | {"tool_calls": [LIGHT, ADD]}),
    "result": line({"role": "system", "content": "Be brief."}, USER, CALL, RESULT, ANSWER),
    "later": line(USER, CALL, RESULT, ANSWER, USER, CALL),
    "none": line(USER, ANSWER, tools=None)}

Both = Callable[..., tuple[Any, Tokenizer]]


@pytest.fixture
def both(bpe: Path, tmp_path: Path) -> Both:
    """template, end token -> transformers' tokenizer and ours."""
    from transformers import PreTrainedTokenizerFast

    def make(template: Any, end: str = "</s>") -> tuple[Any, Tokenizer]:
        names = {"bos_token": "<s>", "eos_token": end}
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(bpe), **names)
        theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(names | {"chat_template": template}))
        theirs.chat_template = {t["name"]: t["template"] for t in template} if isinstance(
            template, list) else template
        return theirs, load_tokenizer(tmp_path)

    return make


def same_text(theirs: Any, ours: Tokenizer, chat: dict[str, Any]) -> str:
    """The text that both render, without a generation prompt as with one."""
    for prompted in (True, False):
        text = theirs.apply_chat_template(chat["messages"], tools=chat["tools"], tokenize=False,
                                          add_generation_prompt=prompted)
        assert ours.render(to_messages(chat), prompted) == text
    return str(text)


# Texts and tokens

@pytest.mark.parametrize("name", CHATS)
def test_our_own_template_is_supervised_as_by_transformers(both: Both, name: str) -> None:
    theirs, ours = both(TEMPLATE)
    chat, messages = CHATS[name], to_messages(CHATS[name])
    assert same_text(theirs, ours, chat)
    found = theirs.apply_chat_template(chat["messages"], tools=chat["tools"], return_dict=True,
                                       return_assistant_tokens_mask=True)
    example = encode("t", messages, ours)
    assert example.ids == found["input_ids"]
    assert [int(label != IGNORE) for label in example.labels] == found["assistant_masks"]


@pytest.mark.parametrize("end", ["", "\n", "\n  "])
def test_a_template_for_tools_of_its_own_is_joined(both: Both, bpe: Path, tmp_path: Path,
                                                   end: str) -> None:
    """As Hermes and Command R have it; an export carries it as well."""
    tools = "\n  " + TEMPLATE.replace("an expert", "the expert") + end
    theirs, ours = both([{"name": "default", "template": "\n" + CHATML + end},
                         {"name": "tool_use", "template": tools}])
    (tmp_path / "config.json").write_text("{}")
    copy_base_files(tmp_path, tmp_path / "out")
    for chat in CHATS.values():
        text = same_text(theirs, ours, chat)
        assert ("the expert" in text) == bool(chat["tools"])
        assert load_tokenizer(tmp_path / "out").render(to_messages(chat)) == text


def test_arguments_and_tools_may_be_given_as_json_text() -> None:
    spelt = line(USER, CALL | {"tool_calls": [call("set_light", '{"room": "hall", "on": true}')]},
                 tools=json.dumps(TOOLS))
    assert to_messages(spelt) == to_messages(CHATS["call"])


@pytest.mark.parametrize("split, word", [("train", "training"), ("valid", "validation")])
def test_a_template_that_knows_no_tools_is_refused_once(both: Both, split: str, word: str) -> None:
    _, ours = both(CHATML)
    lines = [to_messages(CHATS[name]) for name in ("none", "call", "call")]
    task = Task("lights", **{"train": [], "test": [], split: lines})
    with pytest.raises(ValueError, match=f"^task lights, {word} example 2, 'Light on.*: the chat "
                                         "template knows no tools") as refused:
        encode_all(task, ours, 1000, split)
    assert str(refused.value).count("tools") == 1
    with pytest.raises(ValueError, match="the chat template knows no tools"):
        Tokenizer(ours.backend, None, "<s>", "</s>").render(lines[1])


def test_a_template_that_leaves_out_calls_is_refused(both: Both) -> None:
    """As that of LFM2, which lists tools."""
    _, ours = both("{{ tools | tojson }}" + CHATML)
    lines = [to_messages(CHATS[name]) for name in ("answer", "call")]
    with pytest.raises(ValueError, match="example 2, .* the chat template leaves out tool_calls"):
        encode_all(Task("t", lines, []), ours, 999)
    assert len(encode_all(Task("t", lines[:1], []), ours, 999)) == 1


def test_a_template_that_refuses_other_roles_still_shows_its_call(both: Both) -> None:
    strict = "{% for m in messages if m.role not in ('system', 'user', 'assistant', 'tool') %}" \
             "{{ raise_exception('roles') }}{% endfor %}"
    assert '"name": "shown"' in both(strict + TEMPLATE)[1].shown_call()


def test_show_prints_tools_and_marks_calls(both: Both, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    both(TEMPLATE)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.jsonl").write_text(2 * (json.dumps(CHATS["later"]) + "\n"))
    print_examples(InputConfig(model=str(tmp_path), data=str(tmp_path / "data")), 1)
    shown = capsys.readouterr().out
    assert f"<tools>{json.dumps(TOOLS)}</tools>" in shown
    calls = '[[<tool_call>[{"name": "set_light", "arguments": {"room": "hall", "on": true}}]' \
            '</tool_call><|im_end|>]]'
    assert shown.count(calls) == 2 and shown.count("[[It is on.<|im_end|>]]") == 1


# Lines

@pytest.mark.parametrize(("bad", "reason"), [
    *((line(USER, CALL, tools=wrong), 'tools is no list of {"type": "function", ') for wrong in (
        ["set_light"], [{"name": "set_light"}], [{"function": {"name": 1}}], {"a": 1}, 7)),
    (line(USER, CALL, tools="x"), "tools: Expecting value"),
    (line(USER, CALL, tools=TOOLS[1:]), "a call of 'set_light', which is not among tools: add"),
    (line(USER, CALL, tools=None), "a call of 'set_light', which is not among tools: none"),
    *((line(USER, CALL | {"tool_calls": [call("add", wrong)]}),
       "the arguments of 'add' are no JSON") for wrong in ("[1, 2]", "{", None)),
    *((line(USER, CALL | {"tool_calls": wrong}), "tool_calls is no list of") for wrong in (
        [{"name": "add", "arguments": {}}], {"a": 1}, 5)),
    *((line(*turns, RESULT, ANSWER), "a tool turn follows no call") for turns in (
        [USER], [], [USER, CALL, USER])),
    (line(USER, CALL, RESULT | {"content": {"done": 1}}, ANSWER), "a string content"),
    (line(USER, CALL, RESULT), "the last message is not the assistant's"),
    (line(USER, {"role": "assistant", "tool_calls": []}), "a string content"),
    (line(USER, CALL | {"tool_calls": []}), "the last answer is empty"),
    (line(USER | {"tool_calls": [LIGHT]}, ANSWER), "a message has tool_calls, which is not"),
    (line(CALL | {"content": None}, RESULT, ANSWER), "a string content"),
    (line(USER, CALL | {"tool_calls": [call("add", {"a": "\ud83d"})]}), "surrogates"),
], ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_a_bad_line_is_refused_with_its_place(tmp_path: Path, bad: Any, reason: str) -> None:
    good = json.dumps(CHATS["result"])
    (tmp_path / "t.jsonl").write_text(f"{good}\n{json.dumps(bad)}\n{good}\n")
    place = re.escape(f"1 bad line: {tmp_path}/t.jsonl:2: ")
    with pytest.raises(ValueError, match=f"^{place}.*{re.escape(reason)}"):
        load_tasks(tmp_path)


def test_calls_are_no_closed_set_of_answers() -> None:
    lines = [[{"role": "user", "content": f"q{i}"}, *to_messages(CHATS["answer"])] for i in (0, 1)]
    assert closed_answers(lines) == ["It is on."]
    assert closed_answers([to_messages(CHATS[n]) for n in ("answer", "call")] * 9) == []


# Answers

START, NEXT = "{% for c in m.tool_calls or [] %}", "{% endfor %}"
CALLS = {                                    # how a template writes a call, and another order of it
    "qwen": (START + "\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
             "{{ c.function.arguments | tojson }}}\n</tool_call>" + NEXT,
             '<tool_call>\n{"arguments": {"on": true,"room":"hall"},"name": "set_light"}\n'
             '</tool_call>'),
    "llama": (START + "{\"name\": \"{{ c.function.name }}\", \"parameters\": "
              "{{ c.function.arguments | tojson }}}" + NEXT,
              '{"parameters": {"on": true, "room": "hall"}, "name": "set_light"}'),
    "mistral": ("{% if m.tool_calls %}[TOOL_CALLS][" + START + "{{ (c.function | tojson)[:-1] }}, "
                "\"id\": \"{{ c.id }}\"}{{ ', ' if not loop.last }}" + NEXT + "]{% endif %}",
                '[TOOL_CALLS] [{"arguments": {"on": true, "room": "hall"}, "id": "other", '
                '"name": "set_light"}]')}


def written(how: str) -> str:
    return ("{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
            "{{ m.content or '' }}" + how + "<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def right_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> Accuracy:
    """What exact match says of answers to CHATS["call"]."""
    task = Task("t", [], [to_messages(CHATS["call"])] * len(answers))
    given = [tokenizer.encode(answer)[0] for answer in answers]
    return exact_match(tokenizer, questions(tokenizer, task, 10_000), lambda *_: given)


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_compared_as_json(both: Both, name: str) -> None:
    """The order of keys, and spaces, make no difference; names and arguments do."""
    how, call = CALLS[name]
    _, ours = both(written(how))
    wrong = [call.replace("true", "false"), call.replace("true", "1"),
             call.replace("set_light", "add"), re.sub(', ?"room": ?"hall"', "", call), call[:-1],
             call + " and more", "It is on.", "", "[]", "{", *["Sure." + call] * (name == "llama")]
    found = right_answers(ours, [call, *wrong])
    assert found.right == [1] + [0] * len(wrong)
    assert found.wrong[0] == {
        "prompt": USER["content"], "given": wrong[0],
        "expected": ours.decode(ours.turn(to_messages(CHATS["call"]))).strip()}


def test_calls_that_are_no_json_are_compared_as_text(both: Both) -> None:
    _, ours = both(written(START + "<{{ c.function.name }} {{ c.function.arguments | tojson }}>"
                           + NEXT))
    assert right_answers(ours, ['<set_light {"room": "hall", "on": true}>',
                                '<set_light {"on": true, "room": "hall"}>']).right == [1, 0]


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_becomes_a_message(both: Both, name: str) -> None:
    """With several calls, and text before them; where no tools are offered, all is text."""
    _, ours = both(written(CALLS[name][0]))
    for chat in ("call", "answer", *(("two", "content") if name != "llama" else ())):
        *asked, reply = to_messages(CHATS[chat])
        text = ours.decode(ours.turn([*asked, reply]))
        said = ours.parse(asked, text)
        assert said["content"] == reply["content"] and said["role"] == "assistant"
        assert said.get("tool_calls", []) == [
            {"type": "function", "function": c["function"]} for c in reply.get("tool_calls", [])]
        assert ours.parse([USER], text) == {"role": "assistant", "content": text.strip()}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_nobody_can_execute_are_text(both: Both, name: str) -> None:
    """Of a function that is not offered, or with arguments that are no object."""
    _, ours = both(written(CALLS[name][0]))
    asked, good = to_messages(CHATS["call"])[:1], CALLS[name][1]
    arguments = r"{[^{}]*room[^{}]*}"
    for bad in (good.replace("set_light", "open_door"), re.sub(arguments, "[1]", good),
                re.sub(arguments, "7", good)):
        assert bad != good
        assert ours.parse(asked, bad) == {"role": "assistant", "content": bad.strip()}


def test_words_around_calls_are_the_content(both: Both) -> None:
    _, ours = both(written(CALLS["qwen"][0]))
    asked, call = to_messages(CHATS["call"])[:1], CALLS["qwen"][1]
    answer = ours.parse(asked, f" Sure.\n{call} now\n{call}\nDone. ")
    assert answer["content"] == "Sure.\nnow\nDone."
    assert [c["function"] for c in answer["tool_calls"]] == [LIGHT["function"]] * 2
    _, ours = both(written(CALLS["llama"][0]))          # JSON alone may be a part of a text
    text = CALLS["llama"][1] + " is how to call it"
    assert ours.parse(asked, text) == {"role": "assistant", "content": text}


def test_a_template_that_cannot_write_the_known_call_is_no_obstacle(both: Both) -> None:
    _, ours = both("{% if messages[0].role != 'system' %}{{ raise_exception('system') }}{% endif %}"
                   + written(CALLS["qwen"][0]))
    asked = to_messages(CHATS["result"])[:2]
    assert ours.parse(asked, CALLS["qwen"][1])["content"] == CALLS["qwen"][1]
