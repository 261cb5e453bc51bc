"""The runtime: the text that PyTorch gives, streamed and cut off; broken folders."""

import copy
import ctypes
import gc
import json
import math
import random
import weakref
from collections import Counter

import onnxruntime as ort
import pytest
import torch
from exported import KINDS, Watched, describe, export, random_model

from minismoe import generate
from minismoe.runtime import Generator
from minismoe.runtime import model as opened
from minismoe.runtime.providers import CPU, Device
from minismoe.runtime.sampling import Sampling

PROMPTS = [b"a", b"some words", b"longer: the quick brown fox jumps"]


def test_an_error_in_a_step_empties_the_cache(generator) -> None:
    """It may have come when the step was half done."""
    expected = list(generator.generate(PROMPTS[1], 6))
    with pytest.raises(Exception, match="indices element out of data bounds"):
        generator.read([999])                # no token
    assert generator.cache.tokens == []
    assert list(generator.generate(PROMPTS[1], 6)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_the_cache_ends_a_generation(folders, kind) -> None:
    """Another generation, which the first does not disturb; an emptied cache."""
    generator = Generator(folders[kind], threads=1)
    expected = [list(generator.generate(p, 6)) for p in PROMPTS[1:]]
    second = generator.generate(PROMPTS[2], 6)
    started = list[int]()
    for change in (lambda: started.append(next(second)), generator.reset):
        first = generator.generate(PROMPTS[1], 6)
        next(first)
        change()
        with pytest.raises(RuntimeError, match="another generation began, or the cache"):
            next(first)
        started.extend(second)
    assert started == expected[1]
    assert [list(generator.generate(p, 6)) for p in PROMPTS[1:]] == expected


def test_a_static_past_begins_as_zeros_whatever_the_device(folders, monkeypatch) -> None:
    generator = Generator(folders["static"], threads=1)
    expected = list(generator.generate(PROMPTS[1], 8))
    make = ort.OrtValue.ortvalue_from_shape_and_type

    def dirty(*sizes: object) -> ort.OrtValue:
        value = make(*sizes)
        ctypes.memset(value.data_ptr(), 0xff, value.tensor_size_in_bytes())      # nan
        return value

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", dirty)
    monkeypatch.setattr(generator, "_memory", ("cuda", 0))
    generator.reset()
    assert not any(torch.from_dlpack(value).any() for value in generator.cache.past.values())
    monkeypatch.setattr(generator, "_memory", ("cpu", 0))
    assert list(generator.generate(PROMPTS[1], 8)) == expected


def test_an_emptied_cache_is_used_again_and_not_read(folders) -> None:
    generator = Generator(folders["ort"], threads=1)
    expected = list(generator.generate(PROMPTS[2], 30))
    before = {name: value.data_ptr() for name, value in generator.cache.past.items()}
    generator.reset()
    for value in generator.cache.past.values():
        ctypes.memset(value.data_ptr(), 0xff, 4 * math.prod(value.shape()))      # nan
    assert list(generator.generate(PROMPTS[2], 30)) == expected
    assert {name: value.data_ptr() for name, value in generator.cache.past.items()} == before


@pytest.mark.parametrize("kind, on_cpu, memory", [
    ("ort", True, "cpu"), ("ort", False, "cuda"), ("portable", True, "cuda")])
def test_the_cache_is_where_attention_is(folders, monkeypatch, kind, on_cpu, memory) -> None:
    """CUDA's attention takes 16 bits only, and leaves 32 bits to the CPU."""
    monkeypatch.setattr(opened, "find_device", lambda name: Device("cuda", memory=("cuda", 0)))
    monkeypatch.setattr(opened, "nodes_by_provider", lambda session: {
        CPU: "2 GroupQueryAttention" if on_cpu else "2 Sub"})
    monkeypatch.setattr(Generator, "renew_cache", lambda *args: None)
    assert Generator(folders[kind])._memory == (memory, 0)


def test_a_generation_that_the_caller_left_has_not_ended(generator) -> None:
    answer = generator.generate(PROMPTS[1], 6)
    next(answer)
    assert answer.ended == ""
    assert len([*answer]) == 5 and answer.ended == "max_tokens"


def test_the_probability_of_an_answer_is_that_of_torch(model, folders) -> None:
    """With that of its end, among all tokens."""
    generator, ends = Generator(folders["ort"], threads=1), set()
    for prompt in PROMPTS:
        answer = generator.generate(prompt)
        tokens = [*answer]
        ends.add(answer.ended)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1:]
        wanted = [row.log_softmax(-1) for row in logits]
        total = sum(float(row[token]) for row, token in zip(wanted, tokens))
        if answer.ended == "stop":
            total += float(wanted[-1].max())
        assert answer.logprob == pytest.approx(total, abs=1e-3)
    assert ends == {"stop", "context"}


def test_a_generator_that_is_gone_leaves_no_tokenizer(folders) -> None:
    generator = Generator(folders["ort"], threads=1)
    generator.choose(PROMPTS[0], ["yes", "no"])
    tokenizer = weakref.ref(generator.tokenizer)
    del generator
    gc.collect()
    assert tokenizer() is None


def test_long_prompts_go_in_chunks(model, tmp_path) -> None:
    prompt = PROMPTS[2] * 40
    generator = Watched(export(model, tmp_path / "f", context=2048), threads=1)
    assert list(generator.generate(prompt, 4)) == generate(model, [prompt], 4, ())[0]
    assert generator.sizes[:4] == [1320 - 1024, 512, 512, 1]


def test_stops(model, generator, tmp_path) -> None:
    """At any token that generation_config.json says."""
    tokens = list(generator.generate(PROMPTS[1], 12))
    stop = next(t for t in tokens if tokens.index(t) > 2)
    other = Generator(export(model, tmp_path / "f", files={
        "generation_config.json": json.dumps({"eos_token_id": [stop]})}), threads=1)
    answer = other.generate(PROMPTS[1], 12)
    assert list(answer) == tokens[:tokens.index(stop)] and answer.ended == "stop"
    short, long = other.batch([PROMPTS[1], PROMPTS[2]], 12)
    assert short == tokens[:tokens.index(stop)] and stop not in long


@pytest.mark.parametrize("kind, T", [("static", 1), ("chunks", 4), ("portable", 1), ("ort", 1)])
def test_a_text_ends_where_the_places_of_the_past_do(model, folders, kind, T) -> None:
    """A step of a static graph takes T places, whatever it writes."""
    generator = Generator(folders[kind], threads=1)
    generator.tokenizer.stop_ids = []
    for length in 41, 96 - T:
        answer = generator.generate(prompt := b"x" * length)
        found = list(answer)
        assert len(found) == (96 - length) // T and answer.ended == "context"
        assert found == generate(model, [prompt], len(found), ())[0]


def test_a_static_past_that_is_shorter_than_the_context(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(KINDS, "short", ("portable", (1, 1, 48)))
    generator = Generator(export(model, tmp_path / "f", "short"), threads=1)
    generator.tokenizer.stop_ids = []
    assert generator.context == 48 and len(list(generator.generate(b"x" * 41))) == 7


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_numbers_end_a_text(model, tmp_path, wrong) -> None:
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(wrong)
    generator = Generator(export(broken, tmp_path / "f"), threads=1)
    for options in {}, {"temperature": 1.0}:
        with pytest.raises(ArithmeticError, match="logits are not numbers"):
            next(generator.generate(PROMPTS[1], **options))


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "empty"), ("", {}, "empty"),
    (b"x" * 96, {}, "96 tokens, which leaves no room .* of 96"),
    ("x" * 672, {}, "672 tokens, which leaves"),
    ([259], {}, "outside of the model's 259"),
    ("a", {"temperature": -1}, "temperature -1 is no number of at least 0"),
    ("a", {"temperature": "1"}, "temperature '1' is no float"),
    ("a", {"top_p": 0}, r"top_p 0 is not in \(0, 1\]"),
    ("a", {"max_tokens": 1.0}, "1.0 is no int"),
    ("a", {"repetition_penalty": 1e-300}, r"1e-300 is not in"),
    ("a", {"repetition_penalty": 0}, r"repetition_penalty 0 is not in \[0.01, 100\]"),
    ("a", {"max_tokens": -1}, "max_tokens -1 is below 0"),
])
def test_refusals(generator, prompt, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(generator.generate(prompt, **options))


def test_an_empty_chat_is_refused(generator) -> None:
    with pytest.raises(ValueError, match="the chat is empty"):
        generator.reply([])


def test_sampling(generator) -> None:
    def draw(**options):
        return list(generator.generate(PROMPTS[1], 20, **options))
    greedy = draw()
    hot = {"temperature": 1.5, "top_p": 0.95}
    assert draw(seed=1, **hot) == draw(seed=1, **hot) != draw(seed=2, **hot)
    assert draw(temperature=1e-6) == greedy
    assert draw(temperature=2.0, top_p=1e-9) == greedy
    logits, rng = [2.0, 1.0, 0.0, -1.0], random.Random(0)
    sampling = Sampling(temperature=2.0, top_p=0.89)
    seen = Counter(sampling.draw(logits, rng) for _ in range(4000))
    weights = [math.exp(v / 2) for v in logits[:3]]          # these three reach 0.89
    for n, weight in enumerate(weights):
        assert abs(seen[n] / 4000 - weight / sum(weights)) < 0.03
    assert set(seen) == {0, 1, 2}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}])
def test_tokens_that_can_be_drawn_are_those_of_transformers(options) -> None:
    from transformers.generation import logits_process as theirs
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)).mul(2)
    scores = theirs.TemperatureLogitsWarper(1.5)(None, logits)
    if options:
        scores = theirs.TopPLogitsWarper(options["top_p"])(None, scores)
    best, rng = logits[0].sort(descending=True).values, random.Random(0)
    found = {Sampling(temperature=1.5, **options).draw(best.tolist(), rng) for _ in range(20_000)}
    assert len(found) == scores.isfinite().sum()


def test_a_repetition_penalty_is_that_of_transformers(model, folders) -> None:
    """Of tokens in the prompt and in the answer."""
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    generator, expected = Generator(folders["ort"], threads=1), []
    generator.tokenizer.stop_ids = []
    for prompt in PROMPTS:
        ids = torch.tensor([[*prompt]])
        for _ in range(12):
            with torch.no_grad():
                logits = model(ids)[:, -1]
            token = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits).argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
        expected.append(ids[0, len(prompt):].tolist())
    assert generator.batch(PROMPTS, 12, repetition_penalty=1.7) == expected
    assert generator.batch(PROMPTS, 12) != expected


def test_a_batch_names_a_wrong_prompt_first(generator) -> None:
    hot = {"temperature": 5.0, "seed": 1}
    assert generator.batch(PROMPTS, 12, **hot) == [[*generator.generate(p, 12, **hot)]
                                                   for p in PROMPTS]
    generator.reset()
    with pytest.raises(ValueError, match="^prompt 2 of 3 is empty"):
        generator.batch(["a", "", "b"])
    assert generator.cache.tokens == [] == generator.batch([])


def test_a_large_model_moves_to_huge_pages_once(folders, monkeypatch) -> None:
    seen: list[set[int]] = []
    monkeypatch.setattr(opened, "use_huge_pages", seen.append)
    for least, count in ((1 << 40, 0), (0, 1)):
        monkeypatch.setattr(opened, "LARGE", least)
        generator = Generator(folders["ort"], threads=1)
        assert len([*generator.generate(PROMPTS[1], 4)]) == 4
        assert len(seen) == count


def test_text_comes_in_whole_characters(generator) -> None:
    ids = [*"häß € 🙂 z".encode(), 0xFF, 257, *"é".encode(), 0xE2]
    pieces = list(generator.text(ids))
    assert "".join(pieces) == generator.tokenizer.decode(ids)
    assert {"ä", "ß", "€", "🙂", "é"} <= {p.strip("\ufffd") for p in pieces}


@pytest.mark.parametrize("kind, text", [
    ("bpe", "the answer is yes"), ("bpe", " naïve 🙂🙂 cat<|im_end|>mat "), ("bpe", "\n\n日本"),
    *(("sentencepiece", text) for text in (
        "hi 🙂🙂 ok", "日本語 hi", "é日🙂é", "hi  ho\n日", "🙂"))])
def test_text_is_what_a_tokenizer_decodes(request, tmp_path, kind, text) -> None:
    """With byte fallback, half a character spoils all bytes beside it, not itself alone; and a
    text's first token begins with a space, which is the answer's after a prompt."""
    generator = Generator(export(random_model(vocab_size=330), tmp_path / "f", files={
        "config.json": '{"vocab_size": 330}',
        "tokenizer.json": request.getfixturevalue(kind).read_text()}), threads=1)
    tokenizer = generator.tokenizer
    ids, space = tokenizer.encode(text)[0], " " * (kind == "sentencepiece")
    pieces = list(generator.text(ids))
    assert "".join(pieces) == space + tokenizer.decode(ids)
    assert len(pieces) > 1                   # streamed, not kept to the end
    if space:
        assert tokenizer.decode(ids) == text
        assert [*generator.text([tokenizer.backend.backend.token_to_id("▁")])] == [" "]


def test_an_old_onnxruntime_and_another_layout_are_named(folders, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as m:
        m.setattr("onnxruntime.__version__", "1.23.2")
        with pytest.raises(ImportError, match="1.23.2 is too old: install 1.30"):
            Generator(folders["ort"])
    (tmp_path / "export.json").write_text(json.dumps({"layout": "hf", "files": {}}))
    with pytest.raises(ValueError, match="its layout is hf, and the runtime reads --layout onnx"):
        Generator(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "export.json").unlink(), "no export.json"),
    (lambda f: (f / "model.onnx.data").unlink(), "lacks model.onnx.data"),
    (lambda f: (f / "model.onnx").write_bytes(b"x"), "1 bytes instead of"),
    (lambda f: (f / "model.onnx.data").open("ab").write(b"x"), "bytes instead of"),
    *((lambda f, name=name: describe(f, files={name: {}}), "no plain file name")
      for name in ("../export.json", "C:x", "a\\b", "/etc/passwd")),
    *((lambda f, size=size: describe(f, **size), f"not understood: .* {[*size][0]}")
      for size in ({"context": 0}, {"context": "2"}, {"static": [1, 0, 96]})),
    (lambda f: describe(f, format="other/1"), "other/1"),
    (lambda f: (f / "export.json").write_text("{"), "not valid JSON"),
    (lambda f: ((f / "model.onnx").write_bytes(b"x"), describe(f, files={
        n: {"bytes": (f / n).stat().st_size, "sha256": ""} for n in ("model.onnx", "sampler.onnx")
    })), "cannot open"),
    (lambda f: describe(f, static=[2, 4, 96]), r"not understood: .* static \[2, 4, 96\]"),
    (lambda f: describe(f, context=1 << 40), "not understood"),
    (lambda f: (f / "export.json").write_text("[" * 100_000), "not valid JSON"),
    (lambda f: describe(f, target=None), "not understood: .* target None"),
    (lambda f: describe(f, target=["ort"]), r"not understood: .* target \['ort'\]"),
    (lambda f: describe(f, soc="60"), "not understood: .* soc '60'"),
    (lambda f: describe(f, contract={"cache": "other"}), "not understood: .* contract"),
])
def test_broken_folders(model, tmp_path, change, message) -> None:
    folder = export(model, tmp_path / "f")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Generator(folder, threads=1)


def test_links_to_folders_are_followed_only_within_the_folder(model, tmp_path) -> None:
    folder = export(model, tmp_path / "f")
    (folder / "more").mkdir()
    (folder / "link").symlink_to(folder / "more")
    Generator(folder, threads=1)
    (tmp_path / "other").mkdir()
    (folder / "out").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="out is a link that leads out of its folder"):
        Generator(folder, threads=1)


def test_verify_compares_hashes(model, tmp_path) -> None:
    folder = export(model, tmp_path / "f")
    Generator(folder, threads=1, verify=True)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    Generator(folder, threads=1)
    with pytest.raises(ValueError, match="its hash differs"):
        Generator(folder, threads=1, verify=True)
