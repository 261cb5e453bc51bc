"""Chat templates that want all time or all memory, and what is left of the rest."""

import os
import signal
import sys
import time

import pytest

from minismoe.data import templates
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer

GREEDY = {                   # one call in C, or many small ones: neither can be waited out
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long list": "{{ ([0] * 10 ** 9) | length }}",
    "a wide number": "{{ '%010000000000d' % 1 }}",
    "a large number": "{{ 10 ** (10 ** 9) }}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
                      "{% endfor %}",
    "macros that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
                          "{% endmacro %}{{ f(60) }}",
    "a text that doubles": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
                           "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "a list that doubles": "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}"
                           "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | string | length }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
}
VALUES = {"messages": [{"role": "user", "content": "hi"}]}
GOOD = "{{ messages[0].content }}"


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_templates_end_in_time(name: str) -> None:
    templates.render(GOOD, VALUES)
    start, computed = time.monotonic(), os.times().children_user
    with pytest.raises(ValueError, match=r"the chat template (takes more than|gives more than) "):
        templates.render(GREEDY[name], VALUES)
    # What it computes is limited more tightly than how long that takes on a busy machine.
    assert time.monotonic() - start < templates.WAIT + 1
    assert os.times().children_user - computed < templates.SECONDS + 1
    assert templates.render(GOOD, VALUES) == "hi"        # the next one is served


def test_deep_templates_are_refused_at_once() -> None:
    for deep in ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "{% if x %}" * 50_000,
                 "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):
        with pytest.raises(ValueError, match="^the chat template .*RecursionError") as failed:
            templates.render(deep, VALUES)
        assert len(str(failed.value)) < 500


def test_a_refusal_is_one_short_line() -> None:
    with pytest.raises(templates.Refused, match="TemplateError: one two") as failed:
        templates.render("{{ raise_exception('one\n' + 'two ' * 1000) }}", VALUES)
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 500


def test_text_survives_the_pipe() -> None:
    odd = "é\u2028\x00\x1b[31m\r\n\ud83d 🙂"              # with half of an emoji
    assert templates.render(GOOD, {"messages": [{"content": odd}]}) == odd
    long = "x" * 3_000_000                               # more than a pipe holds
    assert templates.render(GOOD, {"messages": [{"content": long}]}) == long


def test_an_interrupted_rendering_does_not_answer_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    process = templates.start()

    def interrupted() -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "stdout", type("Pipe", (), {
        "readline": staticmethod(interrupted), "close": process.stdout.close,
        "closed": False})())
    monkeypatch.setattr(process, "communicate", process.wait)
    with pytest.raises(KeyboardInterrupt):
        templates.render("old", VALUES)
    assert templates.render(GOOD, VALUES) == "hi"


def test_a_process_that_was_killed_is_replaced() -> None:
    first = templates.start()
    first.kill()
    first.wait()
    assert templates.render(GOOD, VALUES) == "hi" and templates.start() is not first


@pytest.mark.skipif(sys.platform == "win32", reason="it has no process groups")
def test_ctrl_c_does_not_end_it(signals: None) -> None:
    templates.stop()                         # it takes on what the signals were when it started
    templates.render(GOOD, VALUES)
    first = templates.start()
    first.send_signal(signal.SIGINT)
    assert templates.render(GOOD, VALUES) == "hi" and templates.start() is first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_its_own() -> None:
    first = templates.start()
    if (child := os.fork()) == 0:
        own = False
        try:
            own = templates.render(GOOD, VALUES) == "hi" and templates.start() is not first
            templates.stop()
        finally:
            os._exit(not own)
    assert os.waitpid(child, 0)[1] == 0 and templates.start() is first


def test_no_module_of_the_working_directory_is_imported(
        tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    templates.stop()
    assert templates.render(GOOD, VALUES) == "hi"


def test_a_jinja_that_cannot_be_imported_is_named(
        tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").write_text("raise ImportError('no soft_unicode')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    templates.stop()
    with pytest.raises(ValueError, match="is broken: ImportError: no soft_unicode"):
        templates.render(GOOD, VALUES)
    templates.stop()


def test_every_template_finds_the_same_day_on_all_days() -> None:
    """SmolLM3 and Granite ask for the day at once, Llama 3.2 if it was not given one."""
    asks = "{{ strftime_now('%d %b %Y') }}"
    for template in (asks, "{% if date_string is not defined %}" + asks + "{% endif %}"):
        assert Tokenizer(ByteTokenizer(), template, "", "").render([]) == "26 Jul 2024"


def test_a_missing_jinja_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    templates.stop()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install jinja2"):
        templates.render(GOOD, VALUES)
