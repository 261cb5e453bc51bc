"""Speculation: the very tokens of plain decoding, in fewer steps."""

import ctypes
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import CONFIG, describe, export
from hypothesis import given, settings
from hypothesis import strategies as st

from minismoe.model.decoder import CausalLM, Config
from minismoe.runtime import Generator, speculate
from minismoe.runtime import __main__ as terminal
from minismoe.runtime.speculate import (
    LONGEST,
    MATCH,
    PLACES,
    ROWS,
    SHARE,
    Drafts,
    Pace,
    SharedRows,
    obstacle,
)

REPEATS = b"to be, or not to be, or not"
HOT = {"temperature": 1.2, "top_k": 3, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose text goes round in circles, and leaves them now and then."""
    torch.manual_seed(3)
    model = CausalLM(Config.from_dict(CONFIG | {"tie_word_embeddings": False}))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            layer = name.startswith("model.layers")
            torch.nn.init.normal_(p, std=0.7 * p.shape[1] ** -0.5 if layer else 1.0)
    return export(model.eval(), tmp_path_factory.mktemp("exports") / "ort")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Generator:
    generator = Generator(folder, threads=1)
    generator._obstacle = "a test"
    generator.use(None)
    return generator


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    if (why := obstacle(Generator(folder, threads=1))) and sys.platform != "linux":
        pytest.skip(f"speculation needs {why}")
    assert not why
    return Generator(folder, threads=1)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify every draft: here it does not matter what pays."""
    monkeypatch.setattr(Drafts, "worth", lambda self, length, most, share: most)


def tokens(generator: Generator, prompt: Sequence[int], *args: object, **options: object,
           ) -> list[int]:
    return list(generator.generate(prompt, *args, **options))


texts = st.lists(st.sampled_from(b"abc \n"), min_size=1, max_size=20)
prompts = st.builds(lambda a, b, n: [*b, *a * n, *b][:80], texts, texts, st.integers(1, 4))


@settings(max_examples=20, deadline=None)
@given(prompts, st.sampled_from([{}, HOT, {"temperature": 0.7, "top_p": 0.8, "seed": 1}]))
def test_tokens_equal_those_of_plain_decoding(plain: Generator, generator: Generator,
                                              prompt: list[int], sampling: dict) -> None:
    """Greedy and drawn, whether the text repeats or not, to the end of the context."""
    assert tokens(generator, prompt, **sampling) == tokens(plain, prompt, **sampling)
    assert generator.ended == plain.ended
    assert generator._seen == plain._seen


def test_copies_take_fewer_steps(generator: Generator) -> None:
    found = tokens(generator, REPEATS * 2, 40)
    assert len(found) == 40 and 1 <= generator.steps < 30
    assert tokens(generator, REPEATS * 2, 40, speculate=False) == found and not generator.steps


def test_logits_are_the_same_to_the_last_bit(plain: Generator, generator: Generator) -> None:
    """After speculation too, with its drafts cut off: so are the keys and values in the cache."""
    def step(g: Generator) -> torch.Tensor:
        return torch.from_dlpack(g._read([[*REPEATS, *b"xyz"]], 1)[0]).clone()

    assert tokens(generator, REPEATS, 30) == tokens(plain, REPEATS, 30) and generator.steps < 30
    longer = [*REPEATS, *tokens(plain, REPEATS, 30), *b"and"]
    for g in (generator, plain):
        tokens(g, REPEATS, 30)
    after = [torch.from_dlpack(g._read([longer], 1)[0]).clone() for g in (generator, plain)]
    assert generator.prompt_tokens == plain.prompt_tokens <= 4
    assert torch.equal(*after)
    generator.reset()
    fresh = torch.from_dlpack(generator._read([longer], 1)[0])
    torch.testing.assert_close(after[0], fresh, rtol=1e-4, atol=1e-4)


def test_a_stop_token_in_what_is_drafted(generator: Generator, plain: Generator,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens(plain, REPEATS, 40)
    for stop in dict.fromkeys(whole):
        for g in (generator, plain):
            monkeypatch.setattr(g.tokenizer, "stop_ids", [stop])
        prompt = [*REPEATS, *whole, *REPEATS]                   # it is in the text before
        assert tokens(generator, prompt[:60], 30) == tokens(plain, prompt[:60], 30)
        assert generator.ended == plain.ended
        assert tokens(generator, REPEATS, 40) == whole[:whole.index(stop)]
        assert generator.ended == "stop" and stop not in generator._seen[0][len(REPEATS):]


@pytest.mark.parametrize("most", [1, 2, 5, 6, 7, 8])
def test_the_most_tokens(generator: Generator, plain: Generator, most: int) -> None:
    assert tokens(generator, REPEATS, 0) == tokens(plain, REPEATS, 0) == []
    assert tokens(generator, REPEATS * 2, most) == tokens(plain, REPEATS * 2, most)
    assert generator.ended == "max_tokens"
    assert len(generator._seen[0]) == 2 * len(REPEATS) + most - 1
    for length in range(96 - most, 96):
        prompt = (REPEATS * 4)[:length]
        assert tokens(generator, prompt) == tokens(plain, prompt)
        assert generator.ended == "context"


def test_a_generation_that_is_left_or_overtaken(generator: Generator, plain: Generator) -> None:
    whole = tokens(plain, REPEATS, 40)
    for count in range(1, 20):
        started = generator.generate(REPEATS, 40)
        assert [next(started) for _ in range(count)] == whole[:count]
        started.close()
        assert tokens(generator, [*REPEATS, *whole[:count]], 9) == whole[count:count + 9]
    first = generator.generate(REPEATS, 40)
    assert [next(first) for _ in range(3)] == whole[:3]
    second = generator.generate(REPEATS[:9], 40)
    begun = [next(second)]
    with pytest.raises(RuntimeError, match="another generation or adapter began"):
        list(first)
    assert [*begun, *second] == tokens(plain, REPEATS[:9], 40)


def test_an_interruption_empties_the_cache(generator: Generator, plain: Generator,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    tokens(generator, REPEATS, 9)
    with monkeypatch.context() as patch:
        patch.setattr(speculate, "read_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokens(generator, REPEATS * 2, 40)
    assert generator._seen == [[]]
    assert tokens(generator, REPEATS * 2, 40) == tokens(plain, REPEATS * 2, 40)


# Where it cannot be

def test_rows_that_do_not_give_the_same_logits_are_not_used(folder: Path, plain: Generator,
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            ) -> None:
    """As where a row does not see what those before it wrote in the same step."""
    class Apart(SharedRows):
        def share(self) -> None:
            pass

    monkeypatch.setattr(speculate, "SharedRows", Apart)
    monkeypatch.setattr("minismoe.runtime.cache.SharedRows", Apart)
    generator = Generator(folder, threads=1)
    assert tokens(generator, REPEATS, 40) == tokens(plain, REPEATS, 40)
    assert generator._exact is False and generator.steps == 39


@pytest.mark.parametrize("wrong", [None, *range(ROWS)])
def test_each_row_is_checked(generator: Generator, monkeypatch: pytest.MonkeyPatch,
                             wrong: int | None) -> None:
    """By itself, and by its last bit: kernels take some rows two or four at a time."""
    def read_rows(*args: Any) -> Any:
        logits = speculate_rows(*args)
        if wrong is not None:
            torch.from_dlpack(logits).view(torch.int32)[wrong, 0, 0] ^= 1
        return logits

    speculate_rows = speculate.read_rows
    monkeypatch.setattr(speculate, "read_rows", read_rows)
    generator._read([[*REPEATS]], 9)
    assert speculate.rows_are_exact(generator, *b"to") == (wrong is None)
    assert generator._seen == [[*REPEATS]]


def test_refusals(folder: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs a single prompt"):
        generator.batch([REPEATS, REPEATS], 3, speculate=True)
    assert generator.batch([REPEATS], 3, speculate=True)
    monkeypatch.setattr("sys.platform", "darwin")
    other = Generator(folder, threads=1)
    assert tokens(other, REPEATS, 9) == tokens(generator, REPEATS, 9) and not other.steps
    with pytest.raises(ValueError, match="speculation needs Linux"):
        tokens(other, REPEATS, 9, speculate=True)


def test_what_it_is_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "threads as attention heads (2 here)" in obstacle(Generator(folder, threads=3))
    describe(folder, heads=4)
    assert not obstacle(Generator(folder, threads=3))
    generator = Generator(folder, threads=1)
    generator._device = "cuda"
    assert "on the CPU" in obstacle(generator)
    generator._shared = False
    assert "target ort" in obstacle(generator)


def test_the_command_line(folder: Path, generator: Generator, capsys: pytest.CaptureFixture[str],
                          ) -> None:
    flags = [str(folder), "to be, or not to be", "--raw", "--max-tokens", "40", "--threads", "1"]
    terminal.main([*flags, "--stats"])
    found = capsys.readouterr()
    assert re.search(r"40 tokens at \d+ tokens/s, 1\.\d a step, peak", found.err)
    for flag in ("--speculate", "--no-speculate"):
        terminal.main([*flags, "--stats", flag])
        again = capsys.readouterr()
        assert again.out == found.out and ("a step" in again.err) == (flag == "--speculate")


def test_the_command_line_says_where_nothing_is_drafted(
        folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for in vain, it must not look as if it brought nothing."""
    monkeypatch.setattr(speculate, "rows_are_exact", lambda *_: False)
    flags = [str(folder), "to be, or not to be", "--raw", "--max-tokens", "40", "--threads", "1"]
    for flag in ("--speculate", "--no-speculate"):
        terminal.main([*flags, flag])
        said = capsys.readouterr().err
        assert ("nothing was drafted" in said) == (flag == "--speculate")


# Memory, drafts and pace

def test_rows_are_one_memory() -> None:
    shared = SharedRows([1, 3, 50, 16])
    shared.share()
    _, K, P, C = shared.shape()
    assert P >= 50 and 4 * K * P * C % 4096 == 0
    whole = (ctypes.c_float * (ROWS * K * P * C)).from_address(shared.data_ptr())
    for n in (0, 1, K * P * C - 1):
        whole[ROWS // 2 * K * P * C + n] = n + 0.5
    assert [whole[row * K * P * C + n] for row in range(ROWS) for n in (1, K * P * C - 1)] == [
        1.5, K * P * C - 0.5] * ROWS


@given(st.lists(st.sampled_from([1, 2, 3]), max_size=60), st.integers(0, ROWS))
def test_drafts_follow_the_longest_match(text: list[int], most: int) -> None:
    drafts, length = Drafts(text, ()).find(most)
    found = [(min(n, LONGEST), end) for end in range(MATCH, len(text)) for n in [
        next((n for n in range(end) if text[end - n - 1] != text[-n - 1]), end)] if n >= MATCH]
    if not found:
        assert not drafts
        return
    assert len(drafts) == most
    recent = sorted(found, key=lambda x: x[1])[-PLACES:]
    assert length == max(n for n, _ in recent)
    end = max(end for n, end in recent if n == length)
    assert drafts == [(text[end:] * ROWS)[n] for n in range(most)]


def test_drafts_end_before_a_stop_token() -> None:
    assert Drafts([1, 2, 3, 4, 1, 2], [4]).find(5) == ([3], 2)
    assert Drafts([1, 2, 3, 4, 1, 2], [3]).find(5) == ([], 2)


def test_only_what_pays_is_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    drafts = Drafts([], ())

    def worth(share: float) -> int:
        return drafts.worth(3, ROWS - 1, share)

    drafts.rates = [0.99] * (LONGEST + 1)
    assert worth(0.2) == ROWS - 1 and worth(1.0) == 0
    drafts.rates = [0.5] * (LONGEST + 1)
    assert (worth(0.6), worth(0.4), worth(0.05)) == (0, 1, 3)
    for _ in range(60):
        drafts.learn(3, [False])
    assert drafts.rates[3] < 0.01 and drafts.rates[4] == 0.5 and not worth(0.05)


def test_pace() -> None:
    def steps(count: int) -> Iterator[None]:
        for _ in range(count):
            pace.learn(0, 0.010)
            pace.learn(2, 0.016)
            yield

    pace = Pace()
    list(steps(100))
    assert pace.plain == pytest.approx(0.010) and pace.share == pytest.approx(0.3, abs=0.02)
    pace.learn(2, 5.0)                       # held up
    assert pace.share < 0.35
    for _ in range(1000):                    # what it once found is forgotten in time
        pace.learn(0, 0.010)
    assert pace.share == pytest.approx(SHARE, abs=0.01)
