"""Chat templates that are broken, refuse their values or write too much."""

import sys
from pathlib import Path

import pytest
from tiny import encode

from minismoe.data import templates
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer, chat_template

GOOD = "{{ messages[0].content }}"


@pytest.fixture
def compiled_anew() -> None:
    """Forget compiled templates, so that the next one imports jinja2."""
    templates._compiled.cache_clear()


def test_the_length_of_the_text_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}abc{% endfor %}{% endfor %}"
    monkeypatch.setattr(templates, "LENGTH", 1 << 20)
    with pytest.raises(ValueError, match="^the chat template writes more than 1 M characters$"):
        templates.render(endless, {})
    assert templates.render("{{ 'a' * 2 ** 20 }}", {}) == "a" * 2 ** 20


def test_deep_templates_are_refused_at_once() -> None:
    for deep in ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "{% if x %}" * 50_000,
                 "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):
        with pytest.raises(ValueError, match="^the chat template .*RecursionError") as failed:
            templates.render(deep, {})
        assert len(str(failed.value)) < 500


@pytest.mark.parametrize("start", [          # of an answer, by Qwen3.5 of 4B and of 0.8B
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- else %}{{ '<think>\n' }}{%- endif %}",
    "{%- if enable_thinking is defined and enable_thinking is true %}{{ '<think>\n' }}"
    "{%- else %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"])
def test_answers_come_without_thoughts_unless_these_are_asked_for(
        start: str, tmp_path: Path) -> None:
    """The empty thought is a part of the prompt, so that nothing trains it."""
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}" + start + "{% endif %}")
    template = chat_template(tmp_path, {})
    assert template is not None
    tokenizer = Tokenizer(ByteTokenizer(), template, "", "<|end|>")
    asked = [{"role": "user", "content": "Hi"}]
    empty = "user: Hi<|end|>\nassistant: <think>\n\n</think>\n\n"
    assert tokenizer.render(asked, True) == empty
    said = encode("t", [*asked, {"role": "assistant", "content": "yes"}], tokenizer)
    assert [i for i in said.labels if i >= 0] == [*b"yes", 257]
    thinking = templates.render(template, {
        "messages": asked, "add_generation_prompt": True, "enable_thinking": True})
    assert thinking.endswith("assistant: <think>\n")
    (tmp_path / "chat_template.jinja").write_text(template)      # as an export has it
    assert chat_template(tmp_path, {}) == template


def test_a_refusal_is_one_short_line() -> None:
    with pytest.raises(templates.Refused, match="TemplateError: one two") as failed:
        templates.render("{{ raise_exception('one\n' + 'two ' * 1000) }}", {})
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 500


def test_a_broken_template_is_no_refusal() -> None:
    """`Tokenizer` goes on without what a template refuses, but not with a broken one."""
    for broken in ("{% if %}", "{{ 'a' | no_such_filter }}"):
        with pytest.raises(ValueError, match="^the chat template is broken: Template") as failed:
            templates.render(broken, {})
        assert not isinstance(failed.value, templates.Refused)


def test_odd_characters_stay_as_they_are() -> None:
    odd = "é\u2028\x00\x1b[31m\r\n\ud83d 🙂"              # with half of an emoji
    assert templates.render(GOOD, {"messages": [{"content": odd}]}) == odd


def test_every_template_finds_the_same_day_on_all_days() -> None:
    """SmolLM3 asks for the day at once, Llama 3.2 if it was not given one."""
    asks = "{{ strftime_now('%d %b %Y') }}"
    for template in (asks, "{% if date_string is not defined %}" + asks + "{% endif %}"):
        assert Tokenizer(ByteTokenizer(), template, "", "").render([]) == "26 Jul 2024"


def test_a_missing_jinja_names_the_command(
        compiled_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match="the chat template needs jinja2: pip install"):
        templates.render(GOOD, {})


def test_a_jinja_that_cannot_be_imported_is_named(
        compiled_anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").write_text("raise ImportError('no soft_unicode')")
    for name in [name for name in sys.modules if name.split(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip install jinja2 .*no soft_unicode"):
        templates.render(GOOD, {})
