"""Greedy generation, exact match and its interval, and the loss of lines, beside plain loops."""

import pytest
import torch
from tiny import save_bytes_model

from minismoe.data.tasks import Example, Task
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer
from minismoe.method.loss import IGNORE
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM, Config
from minismoe.training import evaluate as evaluating
from minismoe.training.evaluate import (
    Accuracy,
    alike,
    evaluate,
    generate,
    questions,
    token_scores,
)

TINY = Config(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=8, windows=(None, None))
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3], [100, 200], [50] * 12]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(3)
    model = CausalLM(TINY).requires_grad_(False).eval()
    for p in model.parameters():
        p.mul_(3.0)                  # sharp enough that near-ties do not decide
    return model


def greedy(model: CausalLM, prompt: list[int], limit: int, stops: list[int]) -> list[int]:
    """The slow way: no cache, no batch."""
    ids: list[int] = []
    for _ in range(limit):
        token = int(model(torch.tensor([prompt + ids]))[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("shared", [[], [11, 12, 13, 14]])
def test_generate_equals_a_plain_loop(model: CausalLM, batch_size: int, shared: list[int]) -> None:
    """Also where the prompts of a batch begin alike, which is computed once."""
    prompts = [shared + p for p in PROMPTS]
    free = [greedy(model, p, 12, []) for p in prompts]
    assert generate(model, prompts, 12, [], batch_size) == free
    stops = sorted({free[0][3], free[2][6], free[4][0]})     # rows end at different steps
    expected = [greedy(model, p, 12, stops) for p in prompts]
    assert len({len(e) for e in expected}) > 1
    assert generate(model, prompts, 12, stops, batch_size) == expected


def test_each_prompt_has_its_own_limit(model: CausalLM) -> None:
    free = [greedy(model, p, 12, []) for p in PROMPTS]
    limits = [3, 12, 0, 1, 7]
    assert generate(model, PROMPTS, limits, []) == [a[:n] for a, n in zip(free, limits)]


def test_one_long_answer_lets_no_other_batch_run_on(model: CausalLM, monkeypatch) -> None:
    """Without a stop, each batch takes as many steps as its longest right answer, and 4."""
    steps, lm_head = [], model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: steps.append(len(x)) or lm_head(x))
    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>", 258, [])
    task = Task("t", [], [[{"role": "user", "content": "q"}, {
        "role": "assistant", "content": "a" * n}] for n in (1, 1, 1, 1, 30, 1)])
    evaluate(model, tokenizer, questions(tokenizer, task, 99), batch_size=2)
    assert sorted(steps) == [2] * (2 * 6 + 35)           # a space and an end are written, too


def test_exact_match_needs_the_whole_answer(model: CausalLM, monkeypatch) -> None:
    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>", 258, [257])
    answers = {"one": "yes", "two": " yes ", "three": "yes it is", "four": ""}
    task = Task("t", [], [[{"role": "user", "content": q},
                           {"role": "assistant", "content": "yes"}] for q in answers])

    def fake(model, prompts, limits, stops, batch_size, progress):
        texts = [tokenizer.decode(p) for p in prompts]
        assert all(t.endswith("Assistant:") for t in texts)
        return [list(a.encode())[:limits[0]] for q, a in answers.items()
                for t in texts if f": {q}\n" in t]

    monkeypatch.setattr("minismoe.training.evaluate.generate", fake)
    result = evaluate(model, tokenizer, questions(tokenizer, task, 99))
    assert (result.correct, result.examples) == (2, 4)
    assert result.wrong == [{"prompt": "three", "expected": "yes", "given": "yes it i"},
                            {"prompt": "four", "expected": "yes", "given": ""}]


def test_the_expected_answer_is_the_turn_as_the_template_writes_it(
        model: CausalLM, monkeypatch) -> None:
    """As Qwen3's, which puts an empty <think> before the last answer, to be generated too."""
    template = ("{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}\nA "
                "{% else %}<think>\n\n</think>\n{{ m.content }}<|end|>{% endif %}{% endfor %}")
    tokenizer = Tokenizer(ByteTokenizer(), template, "<|bos|>", "<|end|>", 258, [257])
    task = Task("t", [], [[{"role": "user", "content": "two"},
                           {"role": "assistant", "content": answer}] for answer in ("2", "yes")])
    given = [list(b"<think>\n\n</think>\n2"), list(b"yes")]
    monkeypatch.setattr("minismoe.training.evaluate.generate", lambda model, prompts, limits, *_: [
        g[:limit] for g, limit in zip(given, limits)])
    assert evaluate(model, tokenizer, questions(tokenizer, task, 99)).right == [1, 0]


def test_the_interval_equals_the_published_one() -> None:
    # Newcombe 1998, Statistics in Medicine 17: 857-872, table I, method 3 (score): 81 of 263.
    assert Accuracy(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Accuracy(0, 20).interval == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_a_prompt_that_fills_the_context_is_left_out() -> None:
    """Nothing could be written after it."""
    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>")
    task = Task("t", [], [[{"role": "user", "content": "hm"},
                           {"role": "assistant", "content": "a"}]])
    asked = questions(tokenizer, task, 99)
    (prompt,) = asked.prompts
    assert (asked.answers, asked.limits) == ([[*b" a"]], [6])
    assert questions(tokenizer, task, len(prompt) + 1).prompts == [prompt]
    assert questions(tokenizer, task, len(prompt)).lines == []


@pytest.mark.parametrize("head_rows", [2, 512])
def test_token_scores_are_those_of_a_plain_loop(tmp_path, monkeypatch, head_rows) -> None:
    monkeypatch.setattr("minismoe.method.loss.CHUNK", 259 * head_rows)
    model = load_model(save_bytes_model(tmp_path / "model"))
    generator = torch.Generator().manual_seed(0)
    losses, rights, examples = [], [], []
    for length in (7, 4, 9, 6):
        ids = torch.randint(0, 259, (length,), generator=generator).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].double()
        ids[-1] = logits[-2].argmax().item()             # one token of each is the likeliest
        labels = [IGNORE] * (length - 3) + ids[-3:]
        examples.append(Example("t", ids, labels))
        for i in range(length - 3, length):
            losses.append(-logits[i - 1].log_softmax(-1)[ids[i]].item())
            rights.append(logits[i - 1].argmax().item() == ids[i])
    loss, right, lines = token_scores(model, examples, 0, batch_size=3)
    assert loss == pytest.approx(sum(losses) / 12, abs=1e-5)
    assert right == sum(rights) / 12 >= 4 / 12
    assert lines == sum(all(rights[i:i + 3]) for i in range(0, 12, 3))


def test_batches_hold_texts_of_similar_length(monkeypatch, tmp_path) -> None:
    """One long line among short ones is computed by itself, and the head runs once on each."""
    model, seen = load_model(save_bytes_model(tmp_path / "model")), []
    monkeypatch.setattr(model.lm_head, "forward", lambda x: pytest.fail("the head runs again"))
    pack = evaluating.Tokens
    monkeypatch.setattr(evaluating, "Tokens", lambda ids, *rest, **more: seen.append(
        tuple(ids.shape)) or pack(ids, *rest, **more))
    lengths = [9, 5, 300, *range(10, 39)]
    token_scores(model, [Example("t", [i] * n, [IGNORE] * (n - 1) + [i])
                         for i, n in enumerate(lengths)], 0)
    assert seen == [(1, 300), (20, 38), (10, 18), (1, 5)]
    assert alike([3, 4, 4, 4, 2], 2) == [[1, 2], [3, 0], [4]]
