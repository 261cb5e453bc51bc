"""The command line of the runtime, most of it in a process without torch."""

import copy
import io
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from exported import command, describe, export
from tiny import ROOT, python

from minismoe.runtime import Generator
from minismoe.runtime import __main__ as terminal
from minismoe.runtime.folder import read_prefix


def test_a_missing_onnxruntime_is_one_line(folders) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; sys.argv = ['x', 'y', 'z']; " + (
        "import runpy; runpy.run_module('minismoe.runtime', run_name='__main__')")
    done = python("-c", code)
    assert done.returncode == 1 and re.fullmatch("error: .*onnxruntime.*\n", done.stderr)


def test_command_in_a_bare_process(generator, folders) -> None:
    prompt = generator.tokenizer.render([{"role": "user", "content": "hello"}], True)
    expected = "".join(generator.text(generator.generate(prompt, 10))).lstrip()
    asked = command(folders["ort"], "hello", "--max-tokens", 10, "--stats", "--verify")
    assert (asked.returncode, asked.stdout) == (0, expected + "\n"), asked.stderr
    assert re.search(r"first token \S+ s, .* peak memory \d+ MB", asked.stderr)
    piped = command(folders["ort"], "--max-tokens", 10, input="hello\n")
    assert (piped.stdout, piped.stderr) == (expected + "\n", "")
    raw = command(folders["portable"], "some words", "--raw")
    assert raw.stdout == "".join(generator.text(generator.generate("some words"))) + "\n"
    assert raw.stderr == ("" if generator.ended == "stop" else
                          "[the context of 96 tokens is full]\n")


@pytest.mark.parametrize("args, line", [
    (("FOLDER", "a", "--provider", "nowhere"), "no provider nowhere; here are .*cpu.*"),
    (("FOLDER/missing", "a"), "missing has no export.json"), (("FOLDER", ""), "prompt is empty"),
    (("FOLDER", "x" * 96), "leaves no room"), (("FOLDER", "a", "--task", "t"), "present: none"),
])
def test_failures_are_one_line(folders, args, line) -> None:
    run = command(*(a.replace("FOLDER", str(folders["ort"])) for a in args))
    assert run.returncode == 1 and re.fullmatch(f"error: .*{line}.*\n", run.stderr), run.stderr


def test_chat(generator, folders) -> None:
    history, expected = [], ""
    for line in ("one", "two"):
        history.append({"role": "user", "content": line})
        prompt = generator.tokenizer.render(history, True)
        answer = "".join(generator.text(generator.generate(prompt, 9))).lstrip()
        history.append({"role": "assistant", "content": answer.strip()})
        expected += answer + "\n"
    chat = command(folders["ort"], "--chat", "--max-tokens", 9,
                   input=f"one\n\ntwo\n{'x' * 90}\n/clear\none\n/exit\nthree\n")
    assert chat.returncode == 0
    assert chat.stdout == expected + expected.split("\n")[0] + "\n"
    assert re.fullmatch("error: the prompt has .* leaves no room .*; /clear .*\n", chat.stderr)


def test_a_space_before_an_answer_is_not_printed(folders, monkeypatch, capsys) -> None:
    """The template writes it; before the text that follows a raw prompt, it is text."""
    monkeypatch.setattr(Generator, "generate", lambda *a, **k: iter(b"  \n yes it is"))
    for flags, printed in ([], "yes it is\n"), (["--raw"], "  \n yes it is\n"):
        terminal.main([str(folders["ort"]), "x", *flags])
        assert capsys.readouterr().out == printed


def test_lines_of_a_pipe_are_one_prompt_or_each_its_own(generator, folders) -> None:
    def answer(text: str) -> str:
        prompt = generator.tokenizer.render([{"role": "user", "content": text}], True)
        return "".join(generator.text(generator.generate(prompt, 9))).lstrip() + "\n"
    one, each = (command(folders["ort"], "--max-tokens", 9, *flags, input="one\ntwo\n")
                 for flags in ((), ("--lines",)))
    assert (one.stdout, one.stderr) == (
        answer("one\ntwo"), "[2 lines are one prompt; --lines answers each line]\n")
    assert (each.stdout, each.stderr) == (answer("one") + answer("two"), "")


def test_each_call_of_an_answer_gets_its_result(generator, monkeypatch) -> None:
    """Lines after two calls are their two results, and the next one is the user's."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chats: list[list[dict]] = []

    def answer(_: object, chat: list[dict], *rest: object) -> dict:
        chats.append(chat)
        return {"role": "assistant", "content": ""} | (
            {"tool_calls": [call, call]} if len(chats) == 1 else {}), False
    monkeypatch.setattr(terminal, "_answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("ask\n1\n2\nmore\n"))
    terminal._chat(generator, {}, (), False)
    assert [[m["role"] for m in chat] for chat in chats] == [
        ["user"], ["user", "assistant", "tool", "tool"],
        ["user", "assistant", "tool", "tool", "assistant", "user"]]
    assert [m["content"] for m in chats[1][2:]] == ["1", "2"]


def test_a_chat_is_rendered_as_it_was_trained(generator, monkeypatch) -> None:
    """The space that a template writes before an answer is generated, and not written twice."""
    prompts: list[str] = []
    monkeypatch.setattr(generator, "generate", lambda prompt: prompts.append(prompt) or b" yes")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    terminal._chat(generator, {}, (), False)
    assert prompts[1] == generator.tokenizer.render(
        [{"role": r, "content": c} for r, c in (
            ("user", "one"), ("assistant", "yes"), ("user", "two"))], True)
    assert "Assistant: yes" in prompts[1]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT reaches whole consoles there")
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


def test_a_terminal_gets_no_control_characters(folders, tmp_path, monkeypatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(Generator, "generate", lambda *a, **k: iter(b"a\x1b[31mb\r\n\tc"))
    monkeypatch.setattr(sys, "stdout", written)
    (tmp_path / "set").write_text("a\x1b[31m")
    for tty, expected in ((False, "a\x1b[31mb\r\n\tc\n"), (True, "a\ufffd[31mb\ufffd\n\tc\n")):
        written.seek(0)
        written.truncate()
        written.isatty = lambda tty=tty: tty
        terminal.main([str(folders["ort"]), "x"])
        terminal.main([str(folders["ort"]), "x", "--choices", str(tmp_path / "set")])
        assert written.getvalue() == expected + expected[:6] + "\n"


def test_a_raw_prompt_at_a_terminal_is_read_as_it_is(folders, generator, monkeypatch, capsys,
                                                     ) -> None:
    typed = io.StringIO("hello\n")
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    terminal.main([str(folders["ort"]), "--raw", "--max-tokens", "4"])
    assert capsys.readouterr().out == "".join(generator.text(generator.generate("hello", 4))) + "\n"


def test_starts_fast_and_small(folders) -> None:
    start = time.perf_counter()
    run = command(folders["ort"], "hello", "--max-tokens", 4, "--stats", "--threads", 1)
    assert time.perf_counter() - start < 5        # 0.2 s where nothing else runs
    assert int(re.search(r"peak memory (\d+) MB", run.stderr)[1]) < 100


def test_the_end_of_the_context_is_said(model, folders, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Generator, "generate", lambda self, *_, **__: (
        setattr(self, "ended", "context"), iter(b"ab"))[1])
    terminal.main([str(folders["ort"]), "x"])
    assert capsys.readouterr().err == "[the context of 96 tokens is full]\n"


def test_too_little_memory_names_the_context(monkeypatch, capsys) -> None:
    def full(_: object) -> None:
        raise MemoryError
    monkeypatch.setattr(terminal, "main", full)
    with pytest.raises(SystemExit) as end:
        terminal.run()
    assert end.value.code == 1 and capsys.readouterr().err == (
        "error: out of memory: export again, with a smaller --context\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes streams")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_end_nothing(folders, closed) -> None:
    said = f"{sys.executable} -m minismoe.runtime {folders['ort']} hi --max-tokens 2 {closed}"
    done = subprocess.run(said, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


# --instructions

def test_a_prefix_from_a_file_is_a_system_prompt_or_raw_text(generator, folders, tmp_path) -> None:
    (tmp_path / "rules").write_text("be brief")

    def answer(*said: tuple[str, str]) -> str:
        prompt = generator.tokenizer.render([{"role": r, "content": c} for r, c in said], True)
        return "".join(generator.text(generator.generate(prompt, 6))).lstrip() + "\n"
    system = "system", "be brief"
    flags = ["--instructions", tmp_path / "rules", "--max-tokens", 6]
    expected = answer(system, ("user", "hello"))
    done = command(folders["ort"], "hello", *flags)
    assert (done.stdout, done.stderr) == (expected, "")
    chat = command(folders["ort"], "--chat", *flags, input="hello\n/clear\nhello\n")
    assert chat.stdout == expected * 2, chat.stderr
    raw = command(folders["ort"], " he", "--raw", *flags)
    assert raw.stdout == "".join(generator.text(generator.generate("be brief he", 6))) + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["rules"]


def test_a_prefix_from_a_task_is_its_instruction(model, tmp_path) -> None:
    folder = export(model, tmp_path / "f")
    (folder / "tasks.json").write_text(json.dumps({
        name: {"choices": ["yes", "no"], "instruction": text} for name, text in (
            ("../t", "Say yes or no.\n"), ("u", ""))}))
    describe(folder)
    generator = Generator(folder, threads=1)
    prompt = generator.tokenizer.render([{"role": "user", "content": "Say yes or no.\nhm"}], True)
    expected = generator.choose(prompt, ["yes", "no"])[0].text + "\n"
    done = command(folder, "hm", "--instructions", "../t", "--choices", "../t")
    assert (done.stdout, done.stderr) == (expected, "")
    assert read_prefix(folder, "../t", raw=False) == ([], "Say yes or no.\n")
    describe(folder, system="Be brief.")                 # lines had both in training
    system = [{"role": "system", "content": "Be brief."}]
    assert read_prefix(folder, "../t", raw=False) == (system, "Say yes or no.\n")
    assert read_prefix(folder, "../t", raw=True) == ([], "Say yes or no.\n")
    chat = command(folder, "--chat", "--instructions", "../t", input="x\n")
    assert chat.returncode == 1 and "is text before one prompt: give PROMPT" in chat.stderr
    lacking = command(folder, "x", "--instructions", "u")
    assert lacking.returncode == 1 and "u is no file, and none of the tasks" in lacking.stderr


@pytest.mark.parametrize("content, message", [
    (b" \n", "is empty: write the"), (b"\xff", "is not UTF-8"),
    (None, "is no file, and none of the tasks"),
    (b"x" * 100, "leaves no room in the context of 96")])
def test_a_prefix_that_is_wrong_is_one_line(folders, tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "rules").write_bytes(content)
    done = command(folders["ort"], "a", "--instructions", tmp_path / "rules")
    assert done.returncode == 1 and re.fullmatch(f"error: .*{message}.*\n", done.stderr)
