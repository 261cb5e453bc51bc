"""Answers from a set: their probabilities by brute force in PyTorch, and only these come out."""

import json
import math
import re

import pytest
import torch
from exported import KINDS, Watched, command, export, log_probabilities, random_model, user
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, encode

from minismoe.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from minismoe.method.loss import IGNORE
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator
from minismoe.runtime.choices import answer_tokens
from minismoe.runtime.folder import read_choices

# One begins another; all of some begin alike; one stands alone; some are not ASCII.
CHOICES = ["card", "card arrival", "card arrested", "cards", "no", "ärger", "ähre", "caro"]
PROMPTS = ["User: a\nAssistant:", "User: what is it?\nAssistant:", "User: b\nAssistant:"]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(seed=5)


@torch.no_grad()
def by_hand(model: CausalLM, prompt: str, choices: list[str]) -> dict[str, float]:
    """By PyTorch. The default template writes a space before an answer, and 257 ends it."""
    return log_probabilities(
        {choice: [*f" {choice}".encode(), 257] for choice in choices},
        lambda start: model(torch.tensor([[*prompt.encode(), *start]]))[0, -1])


def agree(answers: list, expected: dict[str, float]) -> None:
    assert {a.text for a in answers} == set(expected)
    for answer in answers:
        assert answer.logprob == pytest.approx(expected[answer.text], abs=1e-3)
    assert [a.logprob for a in answers] == sorted((a.logprob for a in answers), reverse=True)
    assert sum(math.exp(a.logprob) for a in answers) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_brute_force(model, folders, kind) -> None:
    generator = Generator(folders[kind], threads=1)
    for prompt in PROMPTS:
        whole = generator.choose(prompt, CHOICES, best=99)
        agree(whole, by_hand(model, prompt, CHOICES))
        for best in (1, 3):
            assert [a.text for a in generator.choose(prompt, CHOICES, best)] == [
                a.text for a in whole[:best]]


@settings(max_examples=40)
@given(choices=st.lists(st.text("ab é", min_size=1, max_size=6).map(str.strip).filter(bool),
                        min_size=1, max_size=7, unique=True),
       asked=st.text("abc", min_size=1, max_size=4))
def test_any_set(model, generator, choices: list[str], asked: str) -> None:
    """Most of these sets hold answers that begin others."""
    prompt = f"User: {asked}\nAssistant:"
    agree(generator.choose(prompt, choices, len(choices)), by_hand(model, prompt, choices))


def test_tokens_without_a_choice_take_no_step(folders) -> None:
    generator, length = Watched(folders["ort"], threads=1), len(PROMPTS[0])

    def steps(*choices: str, best: int = 1) -> list[int]:
        del generator.sizes[:]
        generator.reset()
        generator.choose(PROMPTS[0], choices, best)
        return generator.sizes[:]
    assert steps("only this") == []                             # known before anything is read
    assert steps("yes, it is", "no") == [length + 1]            # after the space: y or n
    assert steps("the answer is a", "the answer is b") == [length + len(" the answer is ")]
    # The whole set: first a or b; then one step for each, from the token that differs.
    both = steps("a long way", "a long walk", "b so it is", "b so it was", best=4)
    assert sorted(both[1:]) == sorted([len("a long wa"), len("b so it ")])


def test_what_prompts_share_is_read_once(folders) -> None:
    generator = Watched(folders["ort"], threads=1)
    header = "User: " + "one and the same question: " * 2
    prompts = [f"{header}{n}\nAssistant:" for n in "xyz"]
    for prompt in prompts:
        generator.choose(prompt, ["yes", "no"])
    assert generator.sizes == [len(prompts[0]) + 1, *[len("x\nAssistant: ")] * 2]


@pytest.mark.parametrize("prompt, choices, message", [
    (PROMPTS[0], [], "the set of answers is empty"),
    (PROMPTS[0], ["a", " "], "an answer of the set is empty"),
    (PROMPTS[0], ["a", "b", "a"], "'a' is in the set twice"),
    (PROMPTS[0], ["\ud800"], r"cannot write .* would read ' \?'"),
    (PROMPTS[0], ["a" * 80], "no room for an answer of 82 in"),
    (PROMPTS[0], "yes", "the answers are the text 'yes': give a list of texts"),
    ("", ["a"], "^the prompt is empty"),
    ("c" * 90, ["a" * 10], "^the prompt has 90 tokens, which leaves no room for")])
def test_refusals(generator, prompt, choices, message) -> None:
    with pytest.raises(ValueError, match=message):
        generator.choose(prompt, choices)


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no token that ends an answer"):
        answer_tokens(Tokenizer(ByteTokenizer(), None, "", ""), ("yes",))


def test_logits_that_are_not_numbers_end_it(model, tmp_path) -> None:
    broken = CausalLM(model.config)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="not numbers"):
        Generator(export(broken, tmp_path / "f"), threads=1).choose(PROMPTS[0], ["a", "b"])


THINK = CHATML.replace(
    "+ message['content']", "+ ('<s></s>\n' if message['role'] == 'assistant' else '') "
    "+ message['content']").replace("eos_token", "'<|im_end|>'")


@pytest.mark.parametrize("kind, template", [
    ("bpe", CHATML), ("bpe", THINK), ("", None),
    # Llama 2's tokenizer puts a space before what it encodes: an answer is not encoded by itself.
    ("sentencepiece", CHATML.replace("eos_token", "'<|im_end|>'")), ("sentencepiece", None)])
def test_tokens_of_an_answer_are_those_that_training_supervises(request, kind, template) -> None:
    backend = FileTokenizer(request.getfixturevalue(kind)) if kind else ByteTokenizer()
    tokenizer = Tokenizer(backend, template, "", "<|im_end|>" if kind else "<|end|>")
    choices = ("hi", "ho ko", "k") if kind == "sentencepiece" else (
        "yes", "the mat", "the answer is yes", "日本")
    if template == THINK:                    # </s> is a special token within the turn
        tokenizer.stop_ids = [backend.special["<|im_end|>"]]
        tokenizer.end_id = tokenizer.stop_ids[0]
    for tokens, text in answer_tokens(tokenizer, choices).items():
        example = encode("t", [{"role": "user", "content": "question"},
                               {"role": "assistant", "content": text}], tokenizer)
        assert [*tokens] == [label for label in example.labels if label != IGNORE]


# Where the set comes from.

def test_answers_come_from_a_file_or_the_folder(tmp_path) -> None:
    tasks = {"t": ["a", "b c"], "u": ["x"], "open": []}
    (tmp_path / "tasks.json").write_text(json.dumps({
        name: {"choices": choices, "instruction": ""} for name, choices in tasks.items()}))
    (tmp_path / "lines").write_bytes("\ufeffyes \r\nnö\n".encode())
    assert read_choices(tmp_path, "t") == ["a", "b c"]
    assert read_choices(tmp_path, str(tmp_path / "lines")) == ["yes", "nö"]
    with pytest.raises(ValueError, match="open is no file, and none .* knows: t, u$"):
        read_choices(tmp_path, "open")
    with pytest.raises(ValueError, match="v is no file, and none .* knows: none"):
        read_choices(tmp_path / "other", "v")


@pytest.mark.parametrize("content, message", [
    (b"", "line 1 is empty: write one answer a line"), (b"a\n\nb\n", "line 2 is empty"),
    (b"a\n\xff\n", "is not UTF-8 text")])
def test_broken_files_of_answers(tmp_path, content, message) -> None:
    (tmp_path / "lines").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_choices(tmp_path, str(tmp_path / "lines"))


@pytest.mark.parametrize("content", [
    "[]", '{"t": ["ab"]}', '{"t": {"choices": [1], "instruction": ""}}', "{", "[" * 100_000,
    '{"t": {"choices": [], "instruction": 1}}', '{"t": {"choices": null, "instruction": ""}}'])
def test_a_broken_tasks_json_is_named(tmp_path, content) -> None:
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ValueError, match="tasks.json"):
        read_choices(tmp_path, "t")


# The command line, in a process without torch.

def test_command(generator, folders, tmp_path) -> None:
    (tmp_path / "lines").write_text("\n".join(CHOICES))
    expected = generator.choose(user("hello"), CHOICES, 3)
    asked = [folders["ort"], "hello", "--choices", tmp_path / "lines", "--threads", 1]
    assert command(*asked).stdout == expected[0].text + "\n"
    several = command(*asked, "--best", 3, "--stats")
    assert several.stdout == "".join(f"{math.exp(p):.4f}\t{text}\n" for text, p in expected)
    assert re.match(r"\[one of 8 answers in \S+ s, peak", several.stderr)


def test_each_line_gets_a_line(generator, folders, tmp_path) -> None:
    """With --best, the answers to it stand in this line; with --json, its object has them."""
    (tmp_path / "lines").write_text("\n".join(CHOICES))
    said = [f"{word} {n}" for n in range(3) for word in ("hello", "the", "a", "yes", "no", "who")]
    asked = [folders["ort"], "--lines", "--choices", tmp_path / "lines", "--threads", 1]
    found = [generator.choose(user(text), CHOICES, 2) for text in said]
    assert command(*asked, input="\r\n".join(said) + "\n").stdout.splitlines() == [
        best.text for best, _ in found]
    assert command(*asked, "--best", 2, input="\n".join(said)).stdout.splitlines() == [
        "\t".join(f"{math.exp(p):.4f}\t{text}" for text, p in answers) for answers in found]
    objects = command(*asked, "--best", 2, "--json", input="\n".join(said)).stdout.splitlines()
    for line, answers in zip(map(json.loads, objects), found, strict=True):
        assert line["text"] == answers[0].text
        assert [(a["text"], a["probability"]) for a in line["likeliest"]] == [
            (a.text, pytest.approx(math.exp(a.logprob))) for a in answers]
    wrong = command(*asked, input="hello 0\n" + "x" * 96)
    assert (wrong.returncode, wrong.stdout) == (1, found[0][0].text + "\n\n")
    assert re.match("line 2: the prompt has .* tokens, which leaves no room for an", wrong.stderr)
