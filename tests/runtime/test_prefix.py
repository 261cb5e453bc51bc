"""A prefix kept: the same logits for less reading, and no file that is not ours is believed."""

import ctypes
import errno
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import KINDS, command, describe, export, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import CHATML

from minismoe.data.tokenizer import FileTokenizer, Tokenizer
from minismoe.export.layouts import write_adapter
from minismoe.export.mixture import AdapterInput
from minismoe.method.freeze import Fit
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator
from minismoe.runtime.prefix import Prefix, shared_tokens

PREFIX = b"System: be brief, and say what you know.\nUser: "          # 47 tokens
PROMPTS = [PREFIX + b"hello", PREFIX + b"h", PREFIX[:30] + b"another end"]
LORA = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def kept(folders, tmp_path_factory) -> Path:
    """The file that a generator of folders["ort"] keeps of PREFIX."""
    file = tmp_path_factory.mktemp("kept") / "p.safetensors"
    Generator(folders["ort"], threads=1).keep(PREFIX, file)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_whole_prompt(model, folders, tmp_path, kind) -> None:
    """Read by one generator, and by another from the file; in every order of prompts."""
    generator, file = Generator(folders[kind], threads=1), tmp_path / "p.safetensors"
    plain = {prompt: list(Generator(folders[kind], threads=1).generate(prompt, 6))
             for prompt in PROMPTS}
    for loaded in (False, True):
        assert generator.keep(PREFIX, file).loaded == loaded
        for prompt in PROMPTS:
            with torch.no_grad():
                expected = model(torch.tensor([[*prompt, 7, 8]]))[0, len(prompt) - 1:]
            for given_, wanted in zip(generator.forced(prompt, [7, 8]), expected):
                found = torch.from_dlpack(given_)[0].flatten()
                torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
            assert generator.kept_tokens == (30 if prompt == PROMPTS[2] else len(PREFIX))
        for prompt in (*PROMPTS, b"quite another", *PROMPTS):
            expected = plain.get(prompt) or list(
                Generator(folders[kind], threads=1).generate(prompt, 6))
            assert list(generator.generate(prompt, 6)) == expected
        generator = Generator(folders[kind], threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_that_begins_like_the_last_one(folders, kind) -> None:
    generator = Generator(folders[kind], threads=1)
    expected = list(generator.generate(PROMPTS[0], 6))
    for length in (6, 11, len(PREFIX)):
        generator.keep(PREFIX[:length])
        assert list(generator.generate(PROMPTS[0], 6)) == expected
        assert generator.kept_tokens == length


def test_a_cache_of_16_bits(model, tmp_path) -> None:
    folder, file = export(model, tmp_path / "f", precision="fp16"), tmp_path / "p.safetensors"
    plain, *others = (Generator(folder, threads=1) for _ in range(3))
    wanted = [torch.from_dlpack(logits).clone() for logits in plain.forced(PROMPTS[0], [7])]
    for generator in others:                 # one reads it, one takes it from the file
        generator.keep(PREFIX, file)
        for logits, expected in zip(generator.forced(PROMPTS[0], [7]), wanted):
            torch.testing.assert_close(torch.from_dlpack(logits), expected, rtol=0, atol=3e-2)
        assert generator.kept_tokens == len(PREFIX)
    with safe_open(file, "pt") as f:
        assert f.get_tensor("1.value").shape == (1, 2, len(PREFIX), 16)
        assert f.get_tensor("1.value").dtype == torch.float16


def test_it_stays_after_other_prompts_and_batches(folders, monkeypatch) -> None:
    generator, sizes = Generator(folders["ort"], threads=1), []
    step = generator.step
    generator.keep(PREFIX)
    monkeypatch.setattr(generator, "step", lambda rows, first=0: (
        sizes.append(len(rows[0])) or step(rows, first)))
    for others in ([b"another"], [b"two", b"at once"], [PROMPTS[0]], [PROMPTS[0], b"both"]):
        generator.batch(others, 1)
        del sizes[:]
        list(generator.generate(PROMPTS[1], 1))
        assert sizes == [1] and generator.kept_tokens == len(PREFIX)
    # A prompt that goes on from the last one is read from there, not from the prefix.
    list(generator.generate(PROMPTS[0] + b" and more", 1))
    list(generator.generate(PROMPTS[0] + b" and more", 1))
    assert generator.kept_tokens == len(PROMPTS[0]) + 8
    found, expected = (dict(g.choose(PROMPTS[0], ["yes", "no"], 2)) for g in (
        generator, Generator(folders["ort"], threads=1)))
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["ort", "portable"])
def test_the_file_is_a_safetensors_file_of_the_cache(folders, tmp_path, kind) -> None:
    generator, file = Generator(folders[kind], threads=1), tmp_path / "p.safetensors"
    generator.keep(PREFIX, file)
    generator.reset()
    generator.step([list(PREFIX)])
    with safe_open(file, "pt") as f:
        assert set(f.keys()) == set(generator._past)
        for name, value in generator._past.items():
            size = 4 * math.prod(value.shape())
            held = torch.frombuffer((ctypes.c_char * size).from_address(value.data_ptr()),
                                    dtype=torch.float32)
            cached = held.view(value.shape())[:, :, :len(PREFIX)]
            torch.testing.assert_close(f.get_tensor(name), cached, rtol=0, atol=1e-5)
        note = f.metadata()
    assert note["format"] == "minismoe.prefix/1"
    assert note["tokens"].split() == [str(token) for token in PREFIX]
    files = json.loads((folders[kind] / "export.json").read_text())["files"]
    assert note["model"] == hashlib.sha256(json.dumps([
        [name, files[name]["sha256"]] for name in ("model.onnx", "model.onnx.data")
    ]).encode()).hexdigest()
    assert note["sha256"] == hashlib.sha256(
        file.read_bytes()[-generator._prefix.bytes * len(generator._past):]).hexdigest()


def test_another_model_or_prefix_is_refused(model, folders, kept, tmp_path) -> None:
    before = kept.read_bytes()
    with pytest.raises(ValueError, match="is of another prefix: remove it, and"):
        Generator(folders["ort"], threads=1).keep(PREFIX + b"x", kept)
    other = CausalLM(model.config)
    with pytest.raises(ValueError, match="is of another model: remove it, and"):
        Generator(export(other, tmp_path / "f"), threads=1).keep(PREFIX, kept)
    assert kept.read_bytes() == before


def test_an_adapter_is_another_model(model, tmp_path) -> None:
    folder = export(model, tmp_path / "f", **{LORA: AdapterInput()})
    for task in ("one", "two"):
        write_adapter(folder / f"{task}.onnx_adapter", {
            LORA: Fit(torch.randn(4, 64), torch.randn(48, 4))})
    describe(folder, adapters={t: f"{t}.onnx_adapter" for t in ("one", "two")}, files={
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir() if p.name != "export.json"})
    generator, file = Generator(folder, threads=1, task="one"), tmp_path / "p.safetensors"
    generator.keep(PREFIX, file)
    for task in ("two", None):
        expected = list(Generator(folder, threads=1, task=task).generate(PROMPTS[0], 6))
        generator.use(task)                  # which forgets the prefix
        assert list(generator.generate(PROMPTS[0], 6)) == expected and not generator.kept_tokens
        with pytest.raises(ValueError, match="another model"):
            generator.keep(PREFIX, file)
    generator.use("one")
    assert generator.keep(PREFIX, file).loaded
    (tmp_path / "rules").write_text("be brief")                # the command keeps one for each
    for origin in ("read for", "from"):
        for task in ("one", "two"):
            done = command(folder, "hello", "--prefix", tmp_path / "rules", "--task", task,
                           "--stats", "--max-tokens", 2)
            assert f"prefix of 24 tokens {origin}" in done.stderr and not done.returncode


@pytest.fixture(scope="module")
def open_kept(folders, kept, tmp_path_factory) -> Callable[[bytes], Prefix]:
    """Keep PREFIX from a file with this content."""
    generator, file = Generator(folders["ort"], threads=1), tmp_path_factory.mktemp("d") / "p"

    def read(content: bytes) -> Prefix:
        file.write_bytes(content)
        return generator.keep(PREFIX, file)
    return read


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_refused(open_kept, kept, data) -> None:
    """One byte changed, in the header or behind it; an end cut off, or something added."""
    content = bytearray(kept.read_bytes())
    assert open_kept(bytes(content)).loaded
    end = st.one_of(st.integers(0, 900), st.integers(0, len(content) - 1))
    at, kind = data.draw(end), data.draw(st.sampled_from(["flip", "cut", "add"]))
    if kind == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[at:]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    with pytest.raises(ValueError, match="another|damaged|holds no prefix"):
        open_kept(bytes(content))


@pytest.mark.parametrize("header", [b"[]", b'{"__metadata__": []}', b"[" * 100_000, b"\xff", b"{}",
                                    b'{"__metadata__": {"format": "minismoe.prefix/1"}}'])
def test_a_strange_header_is_refused(open_kept, header) -> None:
    with pytest.raises(ValueError, match="holds no prefix|another model"):
        open_kept(len(header).to_bytes(8, "little") + header)


def test_refusals(folders, tmp_path, monkeypatch) -> None:
    generator = Generator(folders["ort"], threads=1)
    with pytest.raises(ValueError, match="96 tokens, which leaves no room in the context of 96"):
        generator.keep(b"x" * 96)
    with pytest.raises(ValueError, match="is empty"):
        generator.keep("")
    monkeypatch.setattr(generator, "_device", "cuda")
    with pytest.raises(ValueError, match="on the CPU"):
        generator.keep(PREFIX)


def test_the_file_appears_whole_or_not_at_all(folders, tmp_path, monkeypatch) -> None:
    def full(self: Prefix) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")
    generator = Generator(folders["ort"], threads=1)
    with monkeypatch.context() as m:
        m.setattr(Prefix, "header", full)
        with pytest.raises(OSError, match="No space left"):
            generator.keep(PREFIX, tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())
    generator.keep(PREFIX, tmp_path / "p.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]
    monkeypatch.setattr("os.access", lambda path, mode: False)     # a folder that is read only
    generator.keep(PREFIX, tmp_path / "q.safetensors")
    assert list(generator.generate([*PREFIX, 97], 3)) and generator.kept_tokens == len(PREFIX)
    assert not (tmp_path / "q.safetensors").exists()


@settings(max_examples=30)
@given(text=st.text("ab \n.é🙂<", min_size=1, max_size=8), asked=st.text(max_size=6))
def test_every_chat_begins_with_the_tokens_of_its_system_prompt(bpe, text, asked) -> None:
    tokenizer = Tokenizer(FileTokenizer(bpe), CHATML, "", "<|im_end|>")

    def write(said: str) -> str:
        return tokenizer.render([{"role": "system", "content": text},
                                 {"role": "user", "content": said}], True)
    tokens, whole = shared_tokens(tokenizer, write), tokenizer.encode(write(asked))[0]
    end = tokenizer.encode(f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user")[0]
    assert tokens[:len(end)] == end and len(tokens) <= len(end) + 1       # a line end, perhaps
    assert whole[:len(end)] == end


# The command line, in a process without torch.

def test_command(folders, tmp_path) -> None:
    (tmp_path / "rules").write_text("be brief")
    generator = Generator(folders["ort"], threads=1)

    def answer(*said: tuple[str, str]) -> str:
        prompt = generator.tokenizer.render([{"role": r, "content": c} for r, c in said], True)
        return "".join(generator.text(generator.generate(prompt, 6))) + "\n"
    system, flags = ("system", "be brief"), ["--prefix", tmp_path / "rules", "--max-tokens", 6]
    expected = answer(system, ("user", "hello"))
    for origin in ("read for", "from"):
        done = command(folders["ort"], "hello", *flags, "--stats")
        assert done.stdout == expected, done.stderr
        assert re.search(rf"prefix of 24 tokens {origin} .*rules.safetensors: \S+ s", done.stderr)
        assert "and 24 from the cache" in done.stderr
    chat = command(folders["ort"], "--chat", *flags, input="hello\n/clear\nhello\n")
    assert chat.stdout == expected * 2, chat.stderr
    raw = command(folders["ort"], "llo", "--raw", *flags)
    assert raw.returncode == 1 and "is of another prefix: remove it" in raw.stderr
    (tmp_path / "rules.safetensors").unlink()
    raw = command(folders["ort"], " he", "--raw", *flags)
    assert raw.stdout == "".join(generator.text(generator.generate("be brief he", 6))) + "\n"


def test_command_with_the_instruction_of_a_task(model, tmp_path) -> None:
    folder = export(model, tmp_path / "f")
    (folder / "tasks.json").write_text(json.dumps({
        name: {"choices": ["yes", "no"], "instruction": text} for name, text in (
            ("../t", "Say yes or no.\n"), ("u", ""))}))
    describe(folder)
    generator = Generator(folder, threads=1)
    prompt = generator.tokenizer.render([{"role": "user", "content": "Say yes or no.\nhm"}], True)
    expected = generator.choose(prompt, ["yes", "no"])[0].text + "\n"
    for origin in ("read for", "from"):
        done = command(folder, "hm", "--prefix", "../t", "--choices", "../t", "--stats")
        assert done.stdout == expected, done.stderr
        assert f"prefix of 22 tokens {origin} {folder}/prefix-" in done.stderr
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(folder.glob("prefix-*"))) == 1
    chat = command(folder, "--chat", "--prefix", "../t", input="x\n")
    assert chat.returncode == 1 and "is text before one prompt: give PROMPT" in chat.stderr
    lacking = command(folder, "x", "--prefix", "u")
    assert lacking.returncode == 1 and "u is no file, and none of the tasks" in lacking.stderr


@pytest.mark.parametrize("content, message", [
    (b" \n", "is empty: write the"), (b"\xff", "is not UTF-8"),
    (None, "is no file, and none of the tasks"),
    (b"x" * 100, "leaves no room in the context of 96")])
def test_failures_are_one_line(folders, tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "rules").write_bytes(content)
    done = command(folders["ort"], "a", "--prefix", tmp_path / "rules")
    assert done.returncode == 1 and re.fullmatch(f"error: .*{message}.*\n", done.stderr)
    assert not list(tmp_path.glob("*.safetensors"))
