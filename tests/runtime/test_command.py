"""The command line of the runtime, most of it in a process without torch."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from exported import answer_of, command, describe, export, scripted, user
from tiny import ROOT, python

from minismoe.runtime import __main__ as program

posix = pytest.mark.skipif(sys.platform == "win32", reason="it needs POSIX")


def in_one_line(text: str) -> str:
    """An answer as --lines prints it."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def at_terminal(*args: object, typed: str) -> str:
    """What the runtime prints at a terminal, where a user types this."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST            # \n is no \r\n there
    settings[3] &= ~termios.ECHO             # what is typed is not printed
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    os.write(ours, typed.encode() + b"\4")   # Ctrl-D
    process = subprocess.Popen([sys.executable, "-m", "minismoe.runtime", *map(str, args)],
                               cwd=ROOT, stdin=theirs, stdout=theirs)
    process.wait(60)
    os.write(theirs, b"<end>")
    printed = b""
    while not printed.endswith(b"<end>"):
        printed += os.read(ours, 1000)
    os.close(ours)
    os.close(theirs)
    return printed.decode().removesuffix("<end>")


def runtime_after(code: str) -> str:
    """Code that runs this first, and then `python -m minismoe.runtime`."""
    return f"import os, runpy, signal, sys\n{code}\n" \
           "runpy.run_module('minismoe.runtime', run_name='__main__')"


def test_a_missing_onnxruntime_is_one_line() -> None:
    done = python("-c", runtime_after("sys.modules['onnxruntime'] = None"), "y", "z")
    assert done.returncode == 1 and re.fullmatch("error: .*onnxruntime.*\n", done.stderr)


def test_command_in_a_bare_process(generator, folders) -> None:
    expected = answer_of(generator, user("hello"), 10) + "\n"
    asked = command(folders["ort"], "hello", "--max-tokens", 10, "--stats", "--verify")
    assert (asked.returncode, asked.stdout) == (0, expected), asked.stderr
    assert re.search(r"first token \S+ s, .* peak memory \d+ MB", asked.stderr)
    piped = command(folders["ort"], "--max-tokens", 10, input="hello\n")
    assert (piped.stdout, piped.stderr) == (expected, "")
    several = command(folders["ort"], "--max-tokens", 9, input="one\ntwo\n")
    assert (several.stdout, several.stderr) == (
        answer_of(generator, user("one\ntwo")) + "\n",
        "[2 lines are one prompt; --lines answers each line]\n")
    full = command(folders["portable"], "x" * 75)
    assert full.stdout == answer_of(generator, user("x" * 75), None) + "\n"
    assert full.stderr == "[the context of 96 tokens is full]\n"


@pytest.mark.parametrize("args, line", [
    (("FOLDER", "a", "--provider", "nowhere"), "no provider nowhere; here are .*cpu.*"),
    (("FOLDER/missing", "a"), "missing has no export.json"), (("FOLDER", ""), "prompt is empty"),
    (("FOLDER", "x" * 96), "leaves no room"), (("FOLDER", "a", "--task", "t"), "present: none"),
])
def test_failures_are_one_line(folders, args, line) -> None:
    run = command(*(a.replace("FOLDER", str(folders["ort"])) for a in args))
    assert run.returncode == 1 and re.fullmatch(f"error: .*{line}.*\n", run.stderr), run.stderr


# --chat

def test_chat(generator, folders) -> None:
    """Each turn is rendered as it was trained; a text that is too long ends nothing."""
    history, expected = [], ""
    for line in ("one", "two"):
        history += user(line)
        said = answer_of(generator, history)
        history.append({"role": "assistant", "content": said.strip()})
        expected += said + "\n"
    done = command(folders["ort"], "--chat", "--max-tokens", 9,
                   input=f"one\n\ntwo\n{'x' * 90}\n/clear\none\n/exit\nthree\n")
    assert done.returncode == 0
    assert done.stdout == expected + expected.split("\n")[0] + "\n"
    assert re.fullmatch("error: the prompt has .* leaves no room .*; /clear .*\n", done.stderr)


def test_a_space_before_an_answer_is_not_printed(tmp_path, capsys) -> None:
    """The template writes it."""
    program.main([str(scripted(tmp_path / "f", "  ", "\n yes", " it is")), "x"])
    assert capsys.readouterr().out == "yes it is\n"


def test_each_call_of_an_answer_gets_its_result(tmp_path) -> None:
    """Lines after two calls are their two results, and the next one is the user's."""
    calls = [f'\n<call>{{"name": "{name}", "arguments": {{}}}}</call>' for name in "fg"]
    template = (                             # it takes no other chats; prompts end in : or ]
        "{% set roles = messages | map(attribute='role') | join(' ') %}"
        "{% if roles not in ('user', 'user assistant', 'user assistant tool tool', "
        "'user assistant tool tool assistant user') %}{{ raise_exception(roles) }}{% endif %}"
        "{{ tools | length if tools }}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "{{ {'assistant': '<|end|>', 'tool': ']', 'user': ':'}[m.role] }}{% endfor %}")
    folder = scripted(tmp_path / "f", *calls, "done", template=template,
                      after={calls[1]: "<|end|>", "]": "done"})
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    done = python("-m", "minismoe.runtime", folder, "--chat", "--tools", tmp_path / "tools.json",
                  input="ask\n1\n2\nmore\n")
    called = "".join(f'{{"name": "{name}", "arguments": {{}}}}\n' for name in "fg")
    assert (done.stdout, done.stderr) == (f"{called}done\n{called}", "")


@posix
def test_interrupt_stops_the_answer_and_not_the_chat(model, tmp_path, signals) -> None:
    endless = copy.deepcopy(model)
    for ids in (slice(10, 11), slice(256, None)):               # tied: no newline, and no end
        endless.model.embed_tokens.weight.data[ids] = 0
    folder = export(endless, tmp_path / "endless", context=1 << 18)
    program = [sys.executable, "-m", "minismoe.runtime", str(folder)]
    with subprocess.Popen([*program, "--chat"], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chat:
        for line in (b"hello\n", b"again\n"):
            chat.stdin.write(line)
            chat.stdin.flush()
            assert chat.stdout.read(20)
            chat.send_signal(signal.SIGINT)
            while chat.stdout.read(1) != b"\n":             # of what was on its way
                pass
        _, err = chat.communicate(b"/exit\n", timeout=30)
    assert (chat.returncode, err) == (0, b"")
    with subprocess.Popen([*program, "hello"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as single:
        assert single.stdout.read(20)
        single.send_signal(signal.SIGINT)
        _, err = single.communicate(timeout=30)
    assert (single.returncode, err) == (130, b"interrupted\n")


@posix
def test_a_terminal_gets_no_control_characters(tmp_path) -> None:
    folder = scripted(tmp_path / "f", "a\x1b[31mb", "\r\n", "\tc")
    (tmp_path / "set").write_text("a\x1b[31mb")
    chosen = folder, "x", "--choices", tmp_path / "set"
    assert python("-m", "minismoe.runtime", folder, "x").stdout == "a\x1b[31mb\n\tc\n"
    assert python("-m", "minismoe.runtime", *chosen).stdout == "a\x1b[31mb\n"
    assert at_terminal(folder, "x", typed="") == "a\ufffd[31mb\ufffd\n\tc\n"
    assert at_terminal(*chosen, typed="") == "a\ufffd[31mb\n"


# --lines

def test_each_line_gets_a_line(generator, folders) -> None:
    """A wrong one, too, with a message that has its number; others are answered nevertheless."""
    lines = ["one", "", "x" * 96, " two "]
    done = command(folders["ort"], "--lines", "--max-tokens", 9, input="\n".join(lines))
    assert done.returncode == 1
    assert done.stdout == "".join(f"{text}\n" for text in (
        answer_of(generator, user("one")), "", "", answer_of(generator, user("two"))))
    assert re.fullmatch("line 2: the line is empty\nline 3: the prompt has .* leaves no room .*\n"
                        "error: 2 of 4 lines have no answer\n", done.stderr)
    assert "has no line" in command(folders["ort"], "--lines").stderr


def test_marks_in_a_question_are_asked_too(folders, generator, capsys) -> None:
    """U+FDD0 and U+FDD1, which mark texts within the runtime."""
    text = "a\ufdd0b\ufdd0\ufdd1"
    ids = [256, *f"User: {text}\nAssistant:".encode()]
    said = "".join(generator.text(generator.generate(ids, 4), strip=True))
    program.main([str(folders["ort"]), text, "--max-tokens", "4"])
    assert capsys.readouterr().out == said + "\n"
    lines = command(folders["ort"], "--lines", "--json", "--max-tokens", 4, input=text)
    assert json.loads(lines.stdout)["text"] == said


def test_line_ends_of_an_answer_are_two_characters_or_json(tmp_path) -> None:
    folder = scripted(tmp_path / "f", "a", "\n", "b\r\n")
    said = [python("-m", "minismoe.runtime", folder, "--lines", *flags, input="x\n\ny\n").stdout
            for flags in ([], ["--json"])]
    assert said[0] == "a\\nb\\r\\n\n\n" + "a\\nb\\r\\n\n"
    good = {"text": "a\nb\r\n", "ended": "stop", "logprob": pytest.approx(0, abs=1e-3)}
    assert [*map(json.loads, said[1].splitlines())] == [
        good, {"text": "", "error": "the line is empty"}, good]


def test_lines_of_a_live_pipe_are_answered_as_they_come(folders, generator) -> None:
    with subprocess.Popen([sys.executable, "-m", "minismoe.runtime", str(folders["ort"]), "--lines",
                           "--max-tokens", "5"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        patience = threading.Timer(60, process.kill)
        patience.start()
        for line in ("one", "two"):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == answer_of(generator, user(line), 5) + "\n"
        patience.cancel()


TASKS = {"color": {"choices": ["red", "blue"], "instruction": "Name it.\n"}}


def test_a_question_is_asked_as_it_was_judged(model, tmp_path, generator) -> None:
    """Behind the task's instruction: one question, lines, one of a set; but not as it is."""
    task = export(model, tmp_path / "one", files={"tasks.json": json.dumps(TASKS)})
    said = [answer_of(generator, user(f"Name it.\n{text}")) for text in ("sky", "sea")]
    limit = ("--max-tokens", 9)
    assert command(task, "sky", *limit).stdout == said[0] + "\n"
    assert command(task, "Name it.\nsky", *limit).stdout == said[0] + "\n"
    lines = command(task, "--lines", *limit, "--task", "color", input="sky\nsea\n").stdout
    assert lines == "".join(in_one_line(text) + "\n" for text in said)
    best, = generator.choose(user("Name it.\nsky"), ["red", "blue"])
    chosen = command(task, "sky", "--choices", "color", "--best", 1).stdout
    assert chosen == f"{math.exp(best.logprob):.4f}\t{best.text}\n"
    wrong = command(task, "sky", "--task", "size")
    assert wrong.returncode == 1 and "has no task 'size'; present: color" in wrong.stderr
    folder = export(model, tmp_path / "two", files={"tasks.json": json.dumps(
        {**TASKS, "b": {"choices": [], "instruction": ""}})})
    assert command(folder, "sky", "--choices", "color", "--best", 1).stdout == chosen
    plain = command(folder, "sky", *limit)
    assert plain.stdout == answer_of(generator, user("sky")) + "\n"
    assert plain.stderr == ("[asked without an instruction; --task NAME puts that of a task before "
                            "the question: color, b]\n")


def test_lines_are_utf_8(folders, generator) -> None:
    """Whatever the locale; a mark of the order of bytes is no text, and other bytes no answer."""
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "minismoe.runtime", str(folders["ort"]), "--lines",
         "--max-tokens", "4"], input="\ufeffä\n".encode() + b"\xe4\n" + "\ufeffä\n".encode(),
        capture_output=True, cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONCOERCECLOCALE": "0"})
    said = in_one_line(answer_of(generator, user("ä"), 4)).encode("latin-1", "replace")
    assert done.returncode == 1 and done.stdout == said + b"\n\n" + said + b"\n"
    assert re.fullmatch("line 2: the line is not UTF-8 text: .*\nerror: 1 of 3 lines have no "
                        "answer\n", done.stderr.decode())


def test_a_long_chat_forgets_its_oldest_turns(folders, generator) -> None:
    lines = ["a" * 30, "b" * 30, "c" * 30]
    done = command(folders["ort"], "--chat", "--max-tokens", 4, input="\n".join(lines))
    assert done.returncode == 0 and "the oldest turns are forgotten" in done.stderr
    assert done.stdout.endswith(answer_of(generator, user(lines[2]), 4) + "\n")


# Limits

def test_starts_fast_and_small(folders) -> None:
    start = time.perf_counter()
    run = command(folders["ort"], "hello", "--max-tokens", 4, "--stats", "--threads", 1)
    assert time.perf_counter() - start < 5        # 0.2 s where nothing else runs
    assert int(re.search(r"peak memory (\d+) MB", run.stderr)[1]) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound memory so")
def test_too_little_memory_names_the_context(model, tmp_path) -> None:
    """A cache of 8 GB, where 4 GB may be had."""
    describe(export(model, tmp_path / "f"), context=1 << 24)
    done = python("-c", runtime_after(
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2)"),
        tmp_path / "f", "hello")
    assert (done.returncode, done.stderr) == (
        1, "error: out of memory: export again, with a smaller --context\n")


def test_flags_reach_the_generator(folders, monkeypatch) -> None:
    made = []
    monkeypatch.setattr("minismoe.runtime.generator.Generator", lambda *given: made.append(given))
    for flags in ["--verify", "--threads", "3", "--provider", "cpu"], []:
        with pytest.raises(AttributeError):  # of the generator that is None
            program._open(program._parse([str(folders["ort"]), *flags]))
    assert made == [(str(folders["ort"]), "cpu", 3, True),
                    (str(folders["ort"]), None, None, False)]
