"""What --prefix puts before a prompt, in a process without torch."""

import json
import re

import pytest
from exported import command, describe, export, random_model

from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(seed=3)


def test_a_file_is_the_system_prompt_or_raw_text(generator, folders, tmp_path) -> None:
    (tmp_path / "rules").write_text("be brief")

    def answer(*said: tuple[str, str]) -> str:
        prompt = generator.tokenizer.render([{"role": r, "content": c} for r, c in said], True)
        return "".join(generator.text(generator.generate(prompt, 6))) + "\n"
    system, flags = ("system", "be brief"), ["--prefix", tmp_path / "rules", "--max-tokens", 6]
    expected = answer(system, ("user", "hello"))
    done = command(folders["ort"], "hello", *flags)
    assert (done.stdout, done.stderr) == (expected, "")
    chat = command(folders["ort"], "--chat", *flags, input="hello\n/clear\nhello\n")
    assert chat.stdout == expected * 2, chat.stderr
    raw = command(folders["ort"], " he", "--raw", *flags)
    assert raw.stdout == "".join(generator.text(generator.generate("be brief he", 6))) + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["rules"]


def test_a_task_is_its_instruction(model, tmp_path) -> None:
    folder = export(model, tmp_path / "f")
    (folder / "tasks.json").write_text(json.dumps({
        name: {"choices": ["yes", "no"], "instruction": text} for name, text in (
            ("../t", "Say yes or no.\n"), ("u", ""))}))
    describe(folder)
    generator = Generator(folder, threads=1)
    prompt = generator.tokenizer.render([{"role": "user", "content": "Say yes or no.\nhm"}], True)
    expected = generator.choose(prompt, ["yes", "no"])[0].text + "\n"
    done = command(folder, "hm", "--prefix", "../t", "--choices", "../t")
    assert (done.stdout, done.stderr) == (expected, "")
    chat = command(folder, "--chat", "--prefix", "../t", input="x\n")
    assert chat.returncode == 1 and "is text before one prompt: give PROMPT" in chat.stderr
    lacking = command(folder, "x", "--prefix", "u")
    assert lacking.returncode == 1 and "u is no file, and none of the tasks" in lacking.stderr


@pytest.mark.parametrize("content, message", [
    (b" \n", "is empty: write the"), (b"\xff", "is not UTF-8"),
    (None, "is no file, and none of the tasks"),
    (b"x" * 100, "leaves no room in the context of 96")])
def test_failures_are_one_line(folders, tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "rules").write_bytes(content)
    done = command(folders["ort"], "a", "--prefix", tmp_path / "rules")
    assert done.returncode == 1 and re.fullmatch(f"error: .*{message}.*\n", done.stderr)
