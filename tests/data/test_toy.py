"""The built-in toy: right and separate tasks, and a base that knows what they build on."""

import random
import re

import make_toy
import pytest
from tiny import encode, python

from minismoe import load_model, load_tokenizer
from minismoe.data import toy
from minismoe.io.files import read_json, sha256


def lines(task):
    return [(m[0]["content"], m[1]["content"]) for m in task.train + task.test]


def prompts(part):
    return {m[0]["content"] for m in part}


def parts(lesson):
    """The text and the answer of a pretraining lesson, whose answer is supervised to its end."""
    start = next(i for i, label in enumerate(lesson.labels) if label >= 0)
    assert lesson.ids[0] == make_toy.BOS and lesson.labels[start:] == lesson.ids[start:]
    assert lesson.ids[-1] == make_toy.END
    return bytes(lesson.ids[1:start]).decode(), bytes(lesson.ids[start:-1]).decode()[1:]


def learnt(count=4000):
    """(text, answer) of `count` pretraining lessons, by skill."""
    rng, found = random.Random(5), {}
    for _ in range(count):
        lesson = make_toy.lesson(rng)
        found.setdefault(lesson.task, []).append(parts(lesson))
    return found


KINDS = {"meet": "home", "paint": "colour", "serve": "food", "play": "friend"}


def asked_fact(text):
    """(animal, kind) that a question or a lesson is about."""
    words = re.findall("[a-z]+", text)
    named = [kind for kind, nouns in make_toy.NOUNS.items() if {*nouns.split()} & {*words}]
    asked = [KINDS[word] for word in words if word in KINDS]     # may be filler of a lesson
    (animal,) = {*words} & {*toy.ANIMALS}
    return animal, (named or asked)[0]


def answer(skill, text):
    """What is right, worked out from the words of a text or a question alone."""
    quoted = re.findall(r'"([a-p]+|\d\d)"', text)
    if skill in ("larger", "smaller"):
        return sorted(re.findall(r"\d\d", text))[-1 if skill == "larger" else 0]
    if skill == "second":
        return quoted[1]
    if skill == "capitals":
        return "".join(chr(ord(c) - 32) for c in quoted[0])
    if skill == "count":
        return str(sum(1 for _ in quoted[0]))
    assert skill == "echo" and 1 <= len(quoted) <= 2
    return " ".join(quoted)


@pytest.mark.parametrize("seed", range(4))
def test_tasks_have_the_right_form_and_no_test_case_is_trained_on(seed):
    found = toy.tasks(seed)
    assert {t.name for t in found} == {*toy.TASKS}
    for task in found:
        assert not prompts(task.train) & prompts(task.test + task.valid)
        assert not prompts(task.valid) & prompts(task.test)
        assert len(prompts(task.test)) == len(task.test)
        assert len(task.train) == toy.TRAIN and 90 <= len(task.test) <= toy.TEST
        assert len(task.valid) == toy.VALID
        assert all([m["role"] for m in line] == ["user", "assistant"]
                   for line in task.train + task.test)
        if task.name in ("capitals", "second"):      # the first lines are of many words
            assert len({messages[-1]["content"] for messages in task.train[:20]}) > 15
    facts = next(t for t in found if t.name == "facts")
    trained, validated, tested = ({animal for animal, _ in map(asked_fact, prompts(part))}
                                  for part in (facts.train, facts.valid, facts.test))
    assert not trained & tested and not trained & validated and not validated & tested
    assert (len(validated), len(tested)) == (4, 8)


def test_lessons_are_right_and_never_worded_as_the_tasks_are():
    for skill, cases in learnt(1000).items():
        for text, given in cases:
            assert not {*"?.,"} & {*text}
            assert skill == "facts" or given == answer(skill, text), text


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_right(seed):
    facts = {}
    for text, value in learnt()["facts"]:        # one world, in pretraining and in the tasks
        assert facts.setdefault(asked_fact(text), value) == value
    for task in toy.tasks(seed):
        for prompt, given in lines(task):
            assert given == (facts[asked_fact(prompt)] if task.name == "facts" else
                             answer(task.name, prompt)), prompt


def test_lessons_are_in_the_form_of_fine_tuning():
    tokenizer, rng = load_tokenizer(toy.FOLDER), random.Random(1)
    for _ in range(50):
        lesson = make_toy.lesson(rng)
        prompt, answer = parts(lesson)
        question = prompt.removeprefix("User: ").removesuffix("\nAssistant:")
        whole = encode("", [{"role": "user", "content": question},
                            {"role": "assistant", "content": answer}], tokenizer)
        assert whole.ids == [*lesson.ids, ord("\n")]
        assert whole.labels == [*lesson.labels, -100]


def test_tasks_depend_on_the_seed_alone():
    assert [vars(t) for t in toy.tasks(3)] != [vars(t) for t in toy.tasks(4)]
    code = "from minismoe.data import toy; print([vars(t) for t in toy.tasks(3)])"
    other = python("-c", code, PYTHONHASHSEED="1")
    assert other.stdout.strip() == str([vars(t) for t in toy.tasks(3)])


def test_the_base_is_the_one_that_was_made_and_knows_what_it_was_taught():
    assert {p.name for p in toy.FOLDER.iterdir()} == {
        "config.json", "model.safetensors", "capitals.jsonl", "smaller.jsonl"}   # reference.py's
    assert sha256(toy.FOLDER / "model.safetensors") == make_toy.SHA256
    assert read_json(toy.FOLDER / "config.json") == make_toy.CONFIG
    model, tokenizer = load_model(toy.FOLDER), load_tokenizer(toy.FOLDER)
    assert (tokenizer.pad_id, tokenizer.stop_ids) == (make_toy.PAD, [make_toy.END])
    skills = make_toy.skills(model)
    assert skills.keys() == make_toy.LESSONS.keys() and min(skills.values()) >= 0.98, skills


@pytest.mark.slow
def test_a_base_made_anew_is_as_good(tmp_path):
    make_toy.main(tmp_path / "base")
    assert min(make_toy.skills(load_model(tmp_path / "base")).values()) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(2))
def test_training_teaches_every_task(tmp_path, seed, dtype):
    done = python("train.py", "--seed", seed, "--dtype", dtype, "--out", tmp_path / "run",
                  timeout=600)
    assert done.returncode == 0, done.stderr
    for task in read_json(tmp_path / "run" / "results.json")["tasks"].values():
        assert task["before"] < 0.5 and task["after"] > 0.9, task
    experts = read_json(tmp_path / "run" / "allocation.json")["experts"]
    assert sum(count == 1 for count in experts.values()) >= 2
