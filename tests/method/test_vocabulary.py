"""The rule of vocabulary.py: which tokens stay, and that texts made of them stay as they are."""

import json
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpes import CORPUS, WORDS, byte_fallback, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import padded, random_hf
from tokenizers import Tokenizer

from minismoe.export.trim import trimmed_tokenizer
from minismoe.method.vocabulary import BPE, BYTES, expected, tokens_to_keep

MADE = {"bytes": byte_level(), "whole words": byte_level(ignore_merges=True),
        "fallback": byte_fallback()}


def trimmed(old: Tokenizer, kept: list[int]) -> tuple[Tokenizer, dict[int, int]]:
    new = {i: number for number, i in enumerate(kept)}
    return Tokenizer.from_str(json.dumps(trimmed_tokenizer(json.loads(old.to_str()), new))), new


def test_a_word_that_no_merges_make_stays_whole() -> None:
    """With ignore_merges, as in Llama 3, the encoding looks a whole word up before it merges."""
    content = json.loads(byte_level(ignore_merges=True).to_str())
    model, word = content["model"], "cats"
    model["vocab"].setdefault(word, len(model["vocab"]))
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) != word]
    old = Tokenizer.from_str(json.dumps(content))
    (token,) = old.encode(word).ids
    new, ids = trimmed(old, tokens_to_keep(BPE(content), [token], (), 400))
    assert new.encode(word).ids == [ids[token]]


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=60)
@given(data=st.data())
def test_texts_whose_tokens_stay_are_encoded_as_before(kind: str, data: Any) -> None:
    old = MADE[kind]
    size, bpe = old.get_vocab_size(), BPE(json.loads(old.to_str()))
    words = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=5).map(" ".join)
    lines = data.draw(st.lists(words, max_size=3))
    needed = {i for line in lines for i in old.encode(line).ids}
    order = [*range(size)]
    random.Random(data.draw(st.integers(0, 999))).shuffle(order)
    count = data.draw(st.integers(size // 2, size) | st.just(size))       # or all of them
    try:
        kept = tokens_to_keep(bpe, needed, order, count)
    except ValueError as e:
        least = int(str(e).split()[-1])
        assert count < least <= size
        kept = tokens_to_keep(bpe, needed, order, least)
    assert kept == sorted({*kept}) and needed <= {*kept}
    assert {old.token_to_id(text) for text in (*bpe.special, *bpe.bytes)} <= {*kept}
    new, ids = trimmed(old, kept)
    assert new.get_vocab_size() == len(kept)
    assert all(new.id_to_token(ids[i]) == old.id_to_token(i) for i in kept)
    for text in (*lines, data.draw(words), data.draw(words), *CORPUS):
        before, after = old.encode(text), new.encode(text)
        assert new.decode(after.ids) == old.decode(before.ids)
        if {*before.ids} <= {*kept}:
            assert after.ids == [ids[i] for i in before.ids]


def test_a_likely_token_brings_those_on_its_way_and_one_without_a_way_stays_out() -> None:
    bpe = BPE({"added_tokens": [], "model": {
        "vocab": {text: i for i, text in enumerate([*BYTES, "ab", "abc", "bc", "bcd"])},
        "merges": ["b c", ["a", "b"], "ab c", "a bc"]}})
    assert bpe.way("abc") == ["a", "b", "c", "bc", "abc"]
    assert bpe.way("bcd")[-1] != "bcd"                   # no merge makes it: no text holds it
    abc, bc, bcd = (bpe.vocab[text] for text in ("abc", "bc", "bcd"))
    assert tokens_to_keep(bpe, [], [bcd, abc], 258) == [*range(256), abc, bc]
    assert tokens_to_keep(bpe, [], [abc, bpe.vocab["ab"]], 257) == [*range(256), bpe.vocab["ab"]]
    with pytest.raises(ValueError, match="257 tokens are too few: .* take 258"):
        tokens_to_keep(bpe, [abc], [], 257)


def test_placeholders_are_no_special_tokens() -> None:
    bpe = BPE(json.loads(MADE["fallback"].to_str()))
    assert bpe.special == {"<unk>", "<bos>"} and "<unused0>" in bpe.added


@pytest.mark.parametrize("model, says", [
    ({"type": "Unigram"}, "is Unigram, and only BPE"), ({"type": "WordPiece"}, "is WordPiece"),
    ({"type": "BPE", "end_of_word_suffix": "</w>"}, "marks the ends of words"),
    ({"type": "BPE", "vocab": {"a": 0}, "merges": []}, "no tokens of bytes")])
def test_other_tokenizers_are_refused_by_name(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BPE({"model": model, "added_tokens": []})


def test_a_character_without_a_token_takes_its_bytes() -> None:
    vocab = {text: n for n, text in enumerate(["a", "aé", *(f"<0x{n:02X}>" for n in range(128)),
                                               "<0xC3>", "<0xA9>"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
    assert BPE({"model": model, "added_tokens": []}).way("aé") == ["a", "<0xC3>", "<0xA9>"]
    for byte in (127, 126, 125):             # 129, 128 and 127 are left
        del vocab[f"<0x{byte:02X}>"]
        enough = nullcontext() if byte > 125 else pytest.raises(ValueError, match="of bytes")
        with enough:
            BPE({"model": model, "added_tokens": []})


def test_what_a_model_expects_is_the_largest_of_its_probabilities(monkeypatch) -> None:
    monkeypatch.setattr("minismoe.method.vocabulary.CHUNK", 300)         # three rows of logits
    model = random_hf("llama").train()
    batches = [padded([5, 3, 1], vocabulary=97), padded([4], vocabulary=97)]
    with torch.no_grad():
        rows = [F.softmax(model.eval()(row[None, :int(n)]).logits[0], -1)
                for ids, mask in batches for row, n in zip(ids, mask.sum(1))]
    found = expected(model.train(), batches)
    torch.testing.assert_close(found, torch.cat(rows).amax(0))
    assert model.training
