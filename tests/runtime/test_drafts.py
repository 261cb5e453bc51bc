"""Drafts: the rule that the C program repeats, the table, and its file."""

import json
import shutil

import pytest
from exported import Watched, describe, scripted
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import python

from minismoe.runtime import Generator
from minismoe.runtime.drafts import (
    DRAFTED,
    ENTRIES,
    LONGEST,
    WINDOW,
    drafted,
    make_drafts,
    read_drafts,
    write_drafts,
)
from minismoe.runtime.grammar import json_grammar

texts = st.lists(st.integers(0, 3), max_size=40)


WORDS = ["the", " cat", " sat", " the", " mat"]
JSON = json_grammar({"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "red": {"type": "boolean"}},
    "required": ["name", "red"]})


def next_token(text, table):
    """The rule in plain loops: (length, end) of each earlier occurrence, then the table."""
    n, found = len(text), []
    for end in range(max(2, n - WINDOW), n):
        length = max(k for k in range(min(LONGEST, end) + 1)
                     if text[end - k:end] == text[n - k:])
        found.append((length, end))
    length, end = max(found, default=(0, 0))
    if length >= 2:
        return text[end]
    return next((table[tuple(text[-k:])] for k in (4, 3, 2, 1)
                 if len(text) >= k and tuple(text[-k:]) in table), None)


@given(texts, texts, st.dictionaries(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), st.integers(0, 3)))
@example([1, 2, 3, 1, 2, 0], [1, 2], {})     # of equally long ones, the latest decides
@example([1, 2, 3, 0, 0, 2, 0], [1, 2], {})  # a longer one does before a later one
def test_drafts_follow_the_rule(prompt, written, table):
    wanted = []
    while len(wanted) < DRAFTED and (
            token := next_token([*prompt, *written, *wanted], table)) is not None:
        wanted.append(token)
    assert drafted(prompt, written, table) == wanted


@pytest.fixture(scope="module")
def drafting(folders) -> Watched:
    return Watched(folders["ort"], threads=1)


prompts = st.lists(st.integers(97, 103), min_size=1, max_size=20)


@settings(max_examples=60)
@given(prompts, st.sampled_from([
    {}, {"temperature": 1.5, "seed": 3}, {"grammar": JSON}, {"repetition_penalty": 1.3},
    {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.2}]),
    st.none() | st.integers(1, 30), st.booleans(), st.data())
def test_the_tokens_are_the_same_with_and_without_drafts(drafting, prompt, options, most, wrong,
                                                         data):
    drafting.drafts = {}
    plain = drafting.generate(prompt, most, **options)
    tokens = [*plain]
    # Drafts that are right, and some that are wrong.
    other = data.draw(st.lists(st.integers(0, 258), min_size=len(tokens), max_size=len(tokens)))
    written = [b if wrong and b % 3 == 0 else a for a, b in zip(tokens, other)]
    drafting.drafts = {(*([*prompt, *tokens][max(0, i + len(prompt) - 4):i + len(prompt)]),): token
                       for i, token in enumerate(written)}
    fast = drafting.generate(prompt, most, **options)
    assert [*fast] == tokens and fast.ended == plain.ended
    assert abs(fast.logprob - plain.logprob) < 1e-4
    # What the cache holds is right: the chat goes on as in a fresh one.
    drafting.drafts = {}
    longer = [*prompt, *tokens[:60], 97]
    after = [*drafting.generate(longer, 5)]
    drafting.reset()
    assert after == [*drafting.generate(longer, 5)]


@pytest.mark.parametrize("seed", range(5))
def test_right_drafts_save_steps(drafting, seed):
    prompt = [97 + seed, 98]
    drafting.drafts = {}
    tokens = [*drafting.generate(prompt, 31, temperature=1, seed=seed)]
    drafting.drafts = {(*[*prompt, *tokens][max(0, i - 2):i + 2],): token
                       for i, token in enumerate(tokens)}
    drafting.sizes.clear()
    answer = drafting.generate(prompt, 31, temperature=1, seed=seed)
    assert [*answer] == tokens
    assert answer.steps == len(drafting.sizes) - 1 < 20


def test_a_text_that_repeats_itself_is_drafted(tmp_path):
    folder = scripted(tmp_path / "out", *WORDS)
    prompt = "".join(WORDS) + "x"
    plain = [*Generator(folder, threads=1).generate(prompt)]
    write_drafts(folder, {(1, 2): 3})
    generator = Watched(folder, threads=1)
    answer = generator.generate(prompt)
    assert [*answer] == plain and len(plain) == 5 and answer.steps == 2
    assert generator.sizes == [6, 2, 4]      # two words are needed to find those that follow
    generator.drafts = {}                    # no text depends on whether there are drafts
    generator.sizes.clear()
    assert [*generator.generate(prompt)] == plain and generator.sizes == [2] * 6
    fast = python("-m", "minismoe.runtime", folder, f"x{prompt}", "--stats")
    (folder / "drafts.json").unlink()
    describe(folder)
    slow = python("-m", "minismoe.runtime", folder, f"x{prompt}", "--stats")
    assert fast.stdout == slow.stdout == "the cat sat the mat\n"
    assert "2.50 tokens a step" in fast.stderr and "1.00 tokens a step" in slow.stderr


def test_drafts_end_where_the_context_does(tmp_path):
    folder = scripted(tmp_path / "out", *WORDS, after={" mat": "the"})       # it goes on for ever
    tokens = [*Generator(folder, threads=1).generate("x")]
    write_drafts(folder, {(1, 2): 3})
    drafting = Generator(folder, threads=1)
    for length in range(1, 5):
        answer = drafting.generate("x" * length)
        assert [*answer] == tokens[:512 - length] and answer.ended == "context"
        assert answer.steps < 200 and len(drafting.cache.tokens) <= 512


def test_a_table_needs_logits_of_several_tokens(folders, tmp_path):
    for kind in ("portable", "static"):
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        write_drafts(folder, {(1,): 2})
        with pytest.raises(ValueError, match="drafts.json is of another model.onnx"):
            Generator(folder, threads=1)


def test_the_search_has_a_window():
    assert drafted([7, 8, 9, *range(100, 97 + WINDOW)], [7, 8], {}) == [9, 100, 101]
    assert drafted([7, 8, 9, *range(100, 98 + WINDOW)], [7, 8], {}) == []
    assert drafted([7, 8, 9, *range(100, 98 + WINDOW)], [7, 8], {(8,): 5}) == [5]


@given(st.lists(st.tuples(texts, texts), max_size=8), st.integers(0, 20))
def test_a_table_says_what_most_answers_go_on_with(lines, most):
    table = make_drafts(lines, most)
    assert len(table) <= most
    followed: dict[tuple[int, ...], list[int]] = {}
    for prompt, answer in lines:
        whole = [*prompt, *answer]
        for end in range(len(prompt), len(whole)):
            for k in range(1, min(4, end) + 1):
                followed.setdefault(tuple(whole[end - k:end]), []).append(whole[end])
    for suffix, token in table.items():
        count = followed[suffix].count(token)
        assert count >= 2 and 2 * count > len(followed[suffix])
        assert all(table.get(suffix[i:]) != token for i in (1,) if suffix[1:] in table)
    # Without a cap, each frequent suffix is drafted from, if not by itself by a shorter one.
    whole_table = make_drafts(lines, ENTRIES)
    for suffix, tokens in followed.items():
        token = max(tokens, key=tokens.count)
        if tokens.count(token) >= 2 and 2 * tokens.count(token) > len(tokens):
            assert next(whole_table[suffix[i:]] for i in range(len(suffix))
                        if suffix[i:] in whole_table) == token


def test_the_file_comes_back_and_a_broken_one_is_refused(tmp_path):
    assert read_drafts(tmp_path) is None
    table = {(3,): 1, (1, 2, 3, 4): 5}
    write_drafts(tmp_path, table)
    assert json.loads((tmp_path / "drafts.json").read_text()) == {
        "format": "minismoe.drafts/2", "next": [[1, 2, 3, 4, 5], [3, 1]]}
    assert read_drafts(tmp_path) == table
    for entry in ([1], [1, 2, 3, 4, 5, 6], [1, -1], [1, "a"], 3):
        (tmp_path / "drafts.json").write_text(json.dumps(
            {"format": "minismoe.drafts/2", "next": [entry]}))
        with pytest.raises(ValueError, match="drafts.json does not hold"):
            read_drafts(tmp_path)
