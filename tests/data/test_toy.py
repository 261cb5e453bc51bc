"""The embedded default: right and separate tasks, and a base that is made once, whole."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minismoe import load_model, load_tokenizer
from minismoe.data import toy
from minismoe.data.tasks import encode

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lines(task):
    return [(m[0]["content"], m[1]["content"]) for m in task.train + task.test]


def prompts(part):
    return {m[0]["content"] for m in part}


def learnt(count=4000):
    """(text, answer) of `count` pretraining lessons, by skill."""
    rng, found = random.Random(5), {}
    for _ in range(count):
        lesson = toy._lesson(rng)
        start = next(i for i, label in enumerate(lesson.labels) if label >= 0)
        assert lesson.ids[0] == toy.BOS and lesson.labels[start:] == lesson.ids[start:]
        assert lesson.ids[-1] == toy.END
        found.setdefault(lesson.task, []).append(
            (bytes(lesson.ids[1:start]).decode(), bytes(lesson.ids[start:-1]).decode()[1:]))
    return found


def asked_fact(text):
    """(animal, kind) that a question or a lesson is about."""
    animal = re.search(r"\b[a-z]{4}x\b", text)[0]
    kind = re.search(f"home|colour|food|live(?= {animal}|[?])|look(?= {animal}|[?])|"
                     f"eat(?= {animal}|[?])", text)[0]
    return animal, {"live": "home", "look": "colour", "eat": "food"}.get(kind, kind)


def answer(skill, text):
    """What is right, worked out from the words of a text or a question alone."""
    quoted = re.findall('"([a-p]+)"', text)
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


def test_tasks_have_the_right_form_and_size():
    found = toy.tasks()
    assert len({t.name for t in found}) == len(found) >= 4
    for task in found:
        assert 400 <= len(task.train) <= 600 and 80 <= len(task.test) <= 120
        assert all([m["role"] for m in line] == ["user", "assistant"]
                   for line in task.train + task.test)


@pytest.mark.parametrize("seed", range(4))
def test_no_test_case_is_trained_on(seed):
    for task in toy.tasks(seed):
        assert not prompts(task.train) & prompts(task.test)
        assert len(prompts(task.test)) == len(task.test)
    facts = next(t for t in toy.tasks(seed) if t.name == "facts")
    trained, tested = ({asked_fact(p) for p in prompts(part)} for part in (facts.train, facts.test))
    assert not trained & tested and len(tested) >= 15


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_right(seed):
    facts = {}
    for text, value in learnt()["facts"]:        # one world, in pretraining and in the tasks
        assert facts.setdefault(asked_fact(text), value) == value
    for task in toy.tasks(seed):
        for prompt, given in lines(task):
            expected = facts[asked_fact(prompt)] if task.name == "facts" else answer(
                task.name, prompt)
            assert given == expected, prompt


def test_lessons_are_right_and_never_worded_as_the_tasks_are():
    for skill, cases in learnt(1000).items():
        for text, given in cases:
            assert "?" not in text and "." not in text and "," not in text
            if skill != "facts":
                assert given == answer(skill, text), text


def test_lessons_are_in_the_form_of_fine_tuning(cache):
    tokenizer = load_tokenizer(toy.checkpoint_folder(_steps=STEPS))
    rng = random.Random(1)
    for _ in range(50):
        lesson = toy._lesson(rng)
        start = next(i for i, label in enumerate(lesson.labels) if label >= 0)
        prompt = bytes(lesson.ids[1:start]).decode()
        question = prompt.removeprefix("User: ").removesuffix("\nAssistant:")
        answer = bytes(lesson.ids[start:-1]).decode().strip()
        whole = encode("", [{"role": "user", "content": question},
                            {"role": "assistant", "content": answer}], tokenizer)
        assert whole.ids == [*lesson.ids, ord("\n")]
        assert whole.labels == [*lesson.labels, -100]


def test_tasks_are_deterministic_and_depend_on_the_seed():
    assert [vars(t) for t in toy.tasks(3)] == [vars(t) for t in toy.tasks(3)]
    assert [vars(t) for t in toy.tasks(3)] != [vars(t) for t in toy.tasks(4)]
    code = "from minismoe.data import toy; print([vars(t) for t in toy.tasks(3)])"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)
    assert other.stdout.strip() == str([vars(t) for t in toy.tasks(3)])


def test_sequences_are_short_and_fit_the_base(cache):
    folder = toy.checkpoint_folder(_steps=STEPS)
    tokenizer = load_tokenizer(folder)
    longest = max(len(encode(t.name, m, tokenizer).ids) for t in toy.tasks() for m in t.train)
    assert longest <= 64 < toy.CONFIG["max_position_embeddings"]


def test_base_is_a_loadable_checkpoint(cache):
    folder = toy.checkpoint_folder(_steps=STEPS)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.pad_id, tokenizer.stop_ids) == (toy.PAD, [toy.END])
    assert model.config.vocab_size == tokenizer.backend.vocab_size
    assert torch.isfinite(model(torch.tensor([[toy.BOS, 65, 66]]))).all()


def test_base_is_what_transformers_computes(cache):
    transformers = pytest.importorskip("transformers")
    folder = toy.checkpoint_folder(_steps=STEPS)
    ids = torch.tensor([[toy.BOS, *b"User: max 12 34"]])
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(load_model(folder)(ids), other(ids).logits, atol=1e-5, rtol=1e-4)


def test_second_call_does_not_train(cache, monkeypatch):
    folder = toy.checkpoint_folder(_steps=STEPS)
    before = (folder / "model.safetensors").stat()
    monkeypatch.setattr(toy, "_pretrain", lambda steps: pytest.fail("trained again"))
    assert toy.checkpoint_folder(_steps=STEPS) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_base_is_deterministic_and_another_recipe_is_another_base(cache, monkeypatch):
    one = (toy.checkpoint_folder(_steps=STEPS) / "model.safetensors").read_bytes()
    monkeypatch.setenv("MINISMOE_CACHE", str(cache / "elsewhere"))
    again = toy.checkpoint_folder(_steps=STEPS)
    assert (again / "model.safetensors").read_bytes() == one
    assert toy.checkpoint_folder(_steps=STEPS + 1) != again


@pytest.mark.parametrize("name", ["RECIPE", "CONFIG", "BATCH", "RATE", "SEED", "LETTERS", "LESSONS",
                                  "WEIGHTS", "NOISE", "FACTS"])
def test_a_changed_constant_makes_another_base(monkeypatch, name):
    before, value = toy._recipe(STEPS), getattr(toy, name)
    changed = value[:-1] if isinstance(value, (str, list, tuple)) else (
        dict(list(value.items())[:-1]) if isinstance(value, dict) else value + 1)
    monkeypatch.setattr(toy, name, changed)
    assert toy._recipe(STEPS) != before


def test_two_processes_at_once(cache):
    code = f"from minismoe.data import toy; print(toy.checkpoint_folder(_steps={STEPS}))"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert [str(p) for p in cache.iterdir()] == [outputs[0][0].strip()]


def test_the_slower_process_uses_the_other_ones_base(cache, monkeypatch):
    """The other one finishes while this one trains."""
    train = toy._pretrain

    def overtaken(steps):
        monkeypatch.setattr(toy, "_pretrain", train)
        toy.checkpoint_folder(_steps=STEPS)
        return train(steps)
    monkeypatch.setattr(toy, "_pretrain", overtaken)
    folder = toy.checkpoint_folder(_steps=STEPS)
    assert list(cache.iterdir()) == [folder]
    load_model(folder)


def test_failure_leaves_nothing(cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(toy, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        toy.checkpoint_folder(_steps=STEPS)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_seen_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINISMOE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(toy, "_pretrain", lambda steps: pytest.fail("it trains"))
    with pytest.raises(PermissionError, match="file is no folder that can be written"):
        toy.checkpoint_folder(_steps=STEPS)


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, "home/.cache/minismoe"),
    ({"XDG_CACHE_HOME": "", "MINISMOE_CACHE": ""}, "home/.cache/minismoe"),
    ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/minismoe"),
    ({"XDG_CACHE_HOME": "{}/xdg", "MINISMOE_CACHE": "{}/own"}, "own")])
def test_cache_follows_the_variables(tmp_path, monkeypatch, variables, expected):
    for name in ("XDG_CACHE_HOME", "MINISMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert toy._cache() == tmp_path / expected
