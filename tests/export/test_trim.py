"""A base with fewer tokens: its logits, its files, the adapters that fit it, and --vocab."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bpes import byte_level
from exported import log_probabilities
from tiny import random_hf, save_bytes_model, write_lines

import export
import train
from minismoe.cli import trimming
from minismoe.data.tasks import Example, Task
from minismoe.data.tokenizer import load_tokenizer
from minismoe.export.trim import trimmed_tokenizer, write_trimmed
from minismoe.io.files import read_json, write_json
from minismoe.method.experts import expert_layers
from minismoe.method.vocabulary import BPE, tokens_to_keep
from minismoe.model.checkpoint import load_adapter, load_model
from minismoe.runtime import Generator

TEXTS = ["the cat sat on the mat", "a man ran again"]
Make = Callable[..., Path]


def save_base(folder: Path, family: str, rows: int = 340, **settings: Any) -> Path:
    """A random model of 334 tokens, and some rows more."""
    random_hf(family, vocab_size=rows, bos_token_id=0, eos_token_id=1, head_dim=16,
              max_position_embeddings=512).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "eos_token": "</s>", "bos_token": "<s>", "added_tokens_decoder": {
            "1": {"content": "</s>"}, "2": {"content": "<unused0>"}}} | settings)
    write_json(folder / "generation_config.json", {
        "eos_token_id": [1, 7], "suppress_tokens": [333, 1]})
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(save_base, tmp_path / "base")


def some_tokens(base: Path) -> list[int]:
    """Special tokens, bytes, those of TEXTS, and those on their way."""
    tokenizer = load_tokenizer(base)
    needed = {i for text in TEXTS for i in tokenizer.encode(text)[0]}
    return tokens_to_keep(BPE(read_json(base / "tokenizer.json")), needed, (), 334)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
@torch.no_grad()
def test_logits_of_tokens_that_stay_are_those_of_the_whole_model(
        make: Make, tmp_path: Path, family: str) -> None:
    """Ours, and of transformers, which opens the folder as any other."""
    transformers = pytest.importorskip("transformers")
    base, out = make(family), tmp_path / "out"
    kept = some_tokens(base)
    write_trimmed(base, out, kept)
    whole, ours = load_model(base), load_model(out)
    assert ours.config.vocab_size == len(kept)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    their_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    for text in TEXTS:
        ids, new = (load_tokenizer(folder).encode(text)[0] for folder in (base, out))
        assert [kept[i] for i in new] == ids
        assert their_tokenizer(text, add_special_tokens=False).input_ids == new
        wanted = whole(torch.tensor([ids]))[..., kept]
        for model in ours, lambda x: theirs(x).logits:
            torch.testing.assert_close(model(torch.tensor([new])), wanted, rtol=1e-6, atol=2e-5)


def test_ids_in_all_files_are_the_new_ones(make: Make, tmp_path: Path) -> None:
    base = make("llama")
    kept = [i for i in some_tokens(base) if i not in (0, 2, 333)]
    write_trimmed(base, tmp_path / "out", kept)
    config, settings, generation, tokenizer = (
        read_json(tmp_path / "out" / name) for name in (
            "config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"))
    assert (config["vocab_size"], config["eos_token_id"]) == (len(kept), 0)
    assert "bos_token_id" not in config and [*settings["added_tokens_decoder"]] == ["0"]
    assert generation["eos_token_id"] == [0, kept.index(7)]
    assert generation["suppress_tokens"] == [0]
    assert [t["id"] for t in tokenizer["added_tokens"]] == [0]


def test_a_post_processor_has_the_new_ids() -> None:
    vocab = {"a": 0, "<s>": 1, "b": 2, "</s>": 3}
    for before, after in (
            ({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
              "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
             {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}),
            ({"type": "Sequence", "processors": [
                {"type": "RobertaProcessing", "sep": ["</s>", 3], "cls": ["<s>", 1]}]}, None)):
        found = trimmed_tokenizer({"model": {"vocab": vocab, "merges": []}, "added_tokens": [],
                                   "post_processor": before, "padding": {"pad_id": 9}},
                                  {1: 0, 3: 1})
        assert found["padding"] is None
        found = found["post_processor"]
        if after:
            assert found["special_tokens"] == after and found["single"] == before["single"]
        else:
            (inner,) = found["processors"]
            assert (inner["sep"], inner["cls"]) == (["</s>", 1], ["<s>", 0])


def test_answers_of_a_set_and_the_template_are_needed(make: Make) -> None:
    """Whether or not a text has them, beside the tokens of the texts."""
    tokenizer = load_tokenizer(make("llama"))
    ids, task = (lambda text: {*tokenizer.encode(text)[0]}), Task("a", [], [])
    texts = {"a": [Example("a", tokenizer.encode("sat")[0], [])]}
    bare = trimming.needed_tokens(tokenizer, [task], texts)
    assert ids("sat") <= bare and ids("User") <= bare and not ids(" ran") <= bare
    task.choices = ["ran"]
    assert trimming.needed_tokens(tokenizer, [task], texts) - bare >= ids(" ran") - bare > set()


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """--data of one task, whose test has a token that no training line has."""
    for name, words in (("train", "cat mat hat"), ("valid", "sat"), ("test", "answer")):
        write_lines(tmp_path / "data" / f"{name}.jsonl", (
            (f"say {word} {i}", word) for i in range(4) for word in words.split()))
    return ["--data", str(tmp_path / "data")]


@pytest.mark.parametrize("known", [True, False])
def test_what_fewer_tokens_lose_is_told_apart_from_what_rounding_loses(
        known: bool, make: Make, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """The trained model is the run's own, with all tokens; it is right here, and the others not.
    The run's after.json says so, or it answers the lines."""
    run, sizes = tmp_path / "run", []
    write_lines(tmp_path / "data" / "test.jsonl", ((f"say answer {i}", "answer") for i in range(8)))
    train.main(["--model", str(make("llama")), *data, "--epochs", "1", "--out", str(run)])

    def right(model: Any, source: Any, task: Any) -> list[int]:
        sizes.append(model.config.vocab_size)
        assert expert_layers(model) and len(task.test) == 8
        assert len(source.tokenizer.encode("say cat")[0]) > 0
        return [1] * 8

    after = read_json(run / "after.json")
    assert len(after["data"].pop("right")) == 8
    write_json(run / "after.json", {"data": after["data"] | ({"right": [1] * 8} if known else {})})
    monkeypatch.setattr(export, "rights_in_torch", right)
    export.main([str(run), "--vocab", "320", "--out", str(tmp_path / "out")])
    found = read_json(tmp_path / "out" / "export.json")["checked"]["exact_match"]["data"]
    assert sizes == [340] * (not known) and found["trained"] == 1.0 > found["trimmed"]
    assert [*found] == ["trained", "trimmed", "int4-8"]
    said, told = capsys.readouterr()
    assert re.search(r"exact match +trained +trimmed +int4-8", said)
    assert ("Right answers: trained 8, trimmed 0, int4-8 0. Most are lost where the model is "
            "trimmed: keep more tokens") in told


def test_an_export_leaves_tokens_out_of_a_run(make: Make, data: list[str], tmp_path: Path,
                                              succeed: Callable[..., str]) -> None:
    """Its logits of the tokens that stay are those of the run; a multiple of 64 tokens stays."""
    base, run, out = make("llama"), tmp_path / "run", tmp_path / "out"
    succeed(train.main, "--model", base, *data, "--epochs", "1", "--out", run)
    said = succeed(export.main, run, "--vocab", "300", "--precision", "fp32", "--out", out)
    assert "log-probability of right answers" in said and "test lines" in said
    assert "vocabulary: 320 of 334 tokens" in said
    info = read_json(out / "export.json")
    assert (info["vocab_size"], info["model"]) == (320, "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "data", "out", "run"]
    load_adapter(model := load_model(base), run / "adapter")
    before, after = (read_json(folder / "tokenizer.json") for folder in (base, out))
    ids = before["model"]["vocab"] | {t["content"]: t["id"] for t in before["added_tokens"]}
    kept = [ids[text] for text, _ in sorted(after["model"]["vocab"].items(), key=lambda x: x[1])]
    with torch.no_grad():
        wanted = model(torch.tensor([load_tokenizer(base).encode("say cat")[0]]))[0, -1, kept]
    generator = Generator(out)
    (given,) = generator.forced(generator.tokenizer.encode("say cat")[0], [])
    torch.testing.assert_close(torch.from_dlpack(given)[0, -1], wanted, rtol=1e-4, atol=1e-4)


def test_a_smaller_base_can_be_trained(make: Make, data: list[str], tmp_path: Path,
                                       succeed: Callable[..., str]) -> None:
    """It is an ordinary checkpoint."""
    succeed(export.main, "--model", make("llama"), "--vocab", "320", "--layout", "hf",
            "--prompts", tmp_path / "data" / "train.jsonl", "--out", tmp_path / "hf")
    assert load_model(tmp_path / "hf").config.vocab_size == 320
    succeed(train.main, "--model", tmp_path / "hf", *data, "--epochs", "1", "--out",
            tmp_path / "run")


def test_a_large_vocabulary_is_named_with_what_fewer_tokens_would_take(make: Make) -> None:
    def hint(total: int, size: float = 257e6) -> str:
        table = SimpleNamespace(weight=torch.empty(total, 640, device="meta"))
        source: Any = SimpleNamespace(base=base, trained=SimpleNamespace(
            get_submodule={"model.embed_tokens": table}.get,
            config=SimpleNamespace(vocab_size=total, tie_word_embeddings=True)))
        return trimming.hint(source, {"bytes": size, "bits": {"model.embed_tokens": [8, 32]}})
    base = make("llama")
    assert hint(262144) == "the vocabulary takes 189 of 257 MB: --vocab 32768 would leave 24\n"
    assert "leave 24" in hint(49152, 100e6) and hint(49152, 110e6) == hint(32768, 30e6) == ""
    (base / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    assert hint(262144) == ""


def test_an_export_says_what_a_large_vocabulary_takes(make: Make, data: list[str], tmp_path: Path,
                                                      succeed: Callable[..., str]) -> None:
    succeed(train.main, "--model", make("llama", rows=40_000), *data, "--epochs", "1",
            "--out", tmp_path / "run")
    said = succeed(export.main, tmp_path / "run", "--out", tmp_path / "out")
    assert re.search(r"the vocabulary takes \d+ of \d+ MB: --vocab 32768 would leave \d+$", said,
                     re.MULTILINE)


@pytest.mark.parametrize("count, says", [
    (64, "--vocab: 64 tokens are too few: special tokens, bytes and the texts take"),
    (330, "--vocab 384: the base has 334 tokens, so none would be left out"),
    (200, "--vocab: the model reads bytes")])
def test_sizes_that_cannot_be_meant_are_refused(make: Make, data: list[str], tmp_path: Path,
                                                count: int, says: str,
                                                fails: Callable[..., None]) -> None:
    base = save_bytes_model(tmp_path / "base") if count == 200 else make("llama")
    fails(export.main, "--model", base, "--vocab", count, "--prompts",
          tmp_path / "data" / "train.jsonl", "--out", tmp_path / "out", says=says)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "data"]


@torch.no_grad()
def test_answers_of_a_set_have_the_probabilities_of_brute_force(make: Make, tmp_path: Path) -> None:
    """They are written in bytes where the tokenizer lost their words."""
    whole, base = make("llama"), tmp_path / "few"
    answers = ["cat", "the cat", "hats", "größer", "π"]
    needed = {*load_tokenizer(whole).encode("the cat sat")[0]}
    write_trimmed(whole, base, tokens_to_keep(
        BPE(read_json(whole / "tokenizer.json")), needed, (), 334))
    export.main(["--model", str(base), "--precision", "fp32", "--out", str(tmp_path / "onnx")])
    model, tokenizer = load_model(base), load_tokenizer(base)
    question = {"role": "user", "content": "the cat sat"}
    ids = tokenizer.encode(prompt := tokenizer.render([question], True))[0]
    assert model.config.vocab_size < 300
    wanted = log_probabilities(
        {text: [*tokenizer.turn([question, {"role": "assistant", "content": text}]),
                tokenizer.end_id] for text in answers},
        lambda start: model(torch.tensor([[*ids, *start]]))[0, -1])
    found = Generator(tmp_path / "onnx", threads=1).choose(prompt, answers, 9)
    assert {answer.text: answer.logprob for answer in found} == pytest.approx(wanted, abs=1e-3)
