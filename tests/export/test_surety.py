"""--max-error on the toy's base, which knows some questions and not others: by brute force."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_toy
import pytest
from exported import command, describe, export

from minismoe import load_model
from minismoe.data import toy
from minismoe.data.tasks import Task
from minismoe.export.surety import least_logprobs
from minismoe.runtime import Generator
from minismoe.runtime.api import CHAT, Api

ERROR, SET = 0.1, ["left", "right", "blue"]


def lesson(rng: random.Random) -> list[dict[str, str]]:
    """A question that the base was taught, with the right answer."""
    found = make_toy.lesson(rng)
    start = next(i for i, label in enumerate(found.labels) if label >= 0)
    prompt = bytes(found.ids[1:start]).decode()
    return [{"role": "user",
             "content": prompt.removeprefix("User: ").removesuffix("\nAssistant:")},
            {"role": "assistant", "content": bytes(found.ids[start:-1]).decode().strip()}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(load_model(toy.FOLDER), tmp_path_factory.mktemp("surety") / "toy", context=200)


@pytest.fixture(scope="module")
def task() -> Task:
    """Lines of which the base knows two of three."""
    rng, hard = random.Random(3), next(t for t in toy.tasks() if t.name == "second")
    lines = [lesson(rng) for _ in range(120)] + hard.test[:60]
    return Task("known", [], lines[::3], [line for i, line in enumerate(lines) if i % 3])


def test_answers_above_the_threshold_are_right(folder: Path, task: Task,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """The runtime, its command line and the server say so of the same answers."""
    generator = Generator(folder, threads=1)
    source = SimpleNamespace(tasks=[task])
    found = least_logprobs(generator, source, None, ERROR)          # type: ignore[arg-type]
    assert found.keys() == {"known"} and found["known"].keys() == {"text"}
    least, answers = found["known"]["text"], {}
    assert least is not None
    for line in task.test + task.valid:
        prompt = generator.tokenizer.render(line[:1], True)
        text = "".join(generator.text(generator.generate(prompt, 30))).strip()
        answers[line[0]["content"]] = text, generator.logprob >= least, text == line[1]["content"]
    sure = [right for _, is_sure, right in answers.values() if is_sure]
    assert 60 < len(sure) < 170 and sum(sure) >= (1 - ERROR) * len(sure)
    assert f"{len(task.test):>10}" in capsys.readouterr().out

    describe(folder, sure=found)
    knows, (first, *_, last) = Generator(folder, threads=1), answers
    api = Api(folder, lambda: knows)
    seen = set()
    for question in [*answers][::20]:
        chat = [{"role": "user", "content": question}]
        text, is_sure, _ = answers[question]
        assert knows.reply(chat, max_tokens=30) == {
            "role": "assistant", "content": text, "sure": is_sure}
        call = api.read(CHAT, {"messages": chat, "max_tokens": 30})
        choice = next(api.answer(call, lambda: None))["choices"][0]
        assert choice["message"]["content"] == text and choice["sure"] == is_sure
        seen.add(is_sure)
    assert seen == {True, False}
    done = command(folder, "--lines", "--sure", "--max-tokens", "30", input=f"{first}\n{last}\n")
    assert done.stdout == "".join(f"{'sure' if answers[q][1] else 'unsure'}\t{answers[q][0]}\n"
                                  for q in (first, last))


@pytest.mark.parametrize("changes", [
    {"max_tokens": 1}, {"stop": ["e"]}, {"temperature": 0.001, "seed": 0},
    {"repetition_penalty": 1.001}, {"presence_penalty": 0.001}, {"frequency_penalty": 0.001}])
def test_answers_that_are_cut_or_drawn_or_penalized_are_not_sure(
        folder: Path, task: Task, changes: dict[str, Any]) -> None:
    """Only answers as they were tested may be, however likely these are."""
    describe(folder, sure={"known": {"text": -100.0}})
    generator, (question, _) = Generator(folder, threads=1), task.test[0]
    assert generator.reply([question], max_tokens=30)["sure"] is True
    assert generator.reply([question], **{"max_tokens": 30} | changes)["sure"] is False


def test_of_a_set_and_of_unknown_tasks(folder: Path, tmp_path: Path) -> None:
    """The set has a threshold of its own; null means that no answer is likely enough."""
    (folder / "tasks.json").write_text(json.dumps(
        {"side": {"choices": SET, "instruction": ""}, "never": {"choices": SET[:2],
                                                                "instruction": ""}}))
    best = Generator(folder, threads=1).choose("User: up\nAssistant:", SET)[0]
    assert best.sure is None
    describe(folder, sure={"side": {"set": best.logprob, "text": None},
                           "never": {"set": None}})
    generator = Generator(folder, threads=1)
    first, second, _ = generator.choose("User: up\nAssistant:", SET, 3)
    assert (first.text, first.sure, second.sure) == (best.text, True, False)
    assert generator.choose("User: up\nAssistant:", SET[:2])[0].sure is False
    assert generator.choose("User: up\nAssistant:", SET[1:])[0].sure is None       # another set
    assert generator.reply([{"role": "user", "content": "up"}], max_tokens=2)["sure"] is False
    done = command(folder, "up", "--choices", "side", "--sure")
    assert done.stdout in (f"{word}\t{text}\n" for word in ("sure", "unsure") for text in SET)
    describe(folder, sure={"side": {"set": "much"}})
    with pytest.raises(ValueError, match="sure"):
        Generator(folder)
    file = folder / "export.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(
        file.read_text()).items() if name != "sure"}))
    done = command(folder, "up", "--sure")
    assert done.returncode == 1 and "export with --max-error 2%" in done.stderr
