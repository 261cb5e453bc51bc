"""The runtime: the text that PyTorch gives, streamed, batched, cut off, and from a bare process."""

import copy
import ctypes
import io
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from exported import KINDS, command, describe, export, random_model

from minismoe import generate
from minismoe.export.layouts import write_adapter
from minismoe.export.mixture import AdapterInput
from minismoe.method.freeze import Fit
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator, cache
from minismoe.runtime import __main__ as terminal
from minismoe.runtime.generator import _draw

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [b"a", b"some words", b"longer: the quick brown fox jumps"]
LORA = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(seed=3)


def spoil_sampler(folder: Path, rank: int) -> None:
    """One whose values are not of rank 2, and export.json as it would be with it."""
    graph = onnx.load(folder / "sampler.onnx").graph
    last = onnx.helper.make_node("ReduceMax", ["logits"], ["values"], keepdims=0) if (
        rank == 0) else onnx.helper.make_node("Reshape", ["logits", "flat"], ["values"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(
        [last], "g", graph.input, [onnx.helper.make_tensor_value_info(
            "values", onnx.TensorProto.FLOAT, ["n"] * rank)],
        [onnx.helper.make_tensor("flat", onnx.TensorProto.INT64, [1], [-1])]),
        opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), folder / "sampler.onnx")
    describe(folder, files={p.name: {"bytes": p.stat().st_size, "sha256": ""}
                            for p in folder.iterdir() if p.name != "export.json"})


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_torch(model, folders, kind) -> None:
    generator = Generator(folders[kind], threads=1)
    expected = generate(model, PROMPTS, 12, generator.tokenizer.stop_ids)
    assert len(set(map(tuple, expected))) == len(PROMPTS) and min(map(len, expected)) > 2
    assert [list(generator.generate(p, 12)) for p in PROMPTS] == expected
    for rows in (None, 2, 3, 9):             # 2: another batch for the last prompt
        assert generator.batch(PROMPTS, 12, rows=rows) == expected
    assert [list(generator.generate(p.decode(), 12)) for p in PROMPTS] == expected


@pytest.mark.parametrize("kind, device, rows, sizes", [
    ("ort", "cpu", None, [1, 1, 1]), ("ort", "cpu", 2, [2, 1]), ("ort", "cuda", None, [3]),
    ("portable", "cpu", None, [1, 1, 1]), ("chunks", "cpu", None, [2, 2])])
def test_how_many_prompts_are_read_at_once(folders, monkeypatch, kind, device, rows, sizes) -> None:
    """All on a GPU, and one on a CPU; a static graph of two rows repeats the last prompt."""
    generator, read = Generator(folders[kind], threads=1), []
    step, make = generator.step, ort.OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setattr(generator, "step", lambda rows: read.append(len(rows)) or step(rows))
    monkeypatch.setattr(generator, "_device", device)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type",
                        lambda shape, kind, _: make(shape, kind, "cpu"))
    generator.batch([b"abc", b"defg", b"h"], 1, rows=rows)
    assert read == sizes


@pytest.mark.parametrize("kind", ["ort", "portable"])
def test_goes_on_from_what_was_read(folders, kind) -> None:
    generator = Generator(folders[kind], threads=1)
    first = list(generator.generate(PROMPTS[2], 8))
    for longer, fed in ((PROMPTS[2] + bytes(first) + b"xyz", 4), (PROMPTS[2][:20] + b"q", 1)):
        given = list(generator.generate(longer, 8))
        assert generator.prompt_tokens == (fed if kind == "ort" or fed == 4 else len(longer))
        assert given == list(Generator(folders[kind], threads=1).generate(longer, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_two_at_once_are_refused(folders, kind) -> None:
    """They would read each other's cache."""
    generator = Generator(folders[kind], threads=1)
    expected = [list(generator.generate(p, 6)) for p in PROMPTS[1:]]
    first, second = (generator.generate(p, 6) for p in PROMPTS[1:])
    started = [next(first), next(second)]
    with pytest.raises(RuntimeError, match="another generation or adapter began before this one"):
        next(first)
    assert [started[1], *second] == expected[1]                # which the first has not disturbed
    with pytest.raises(RuntimeError, match="another generation"):
        list(zip(*(generator.generate(p, 6) for p in PROMPTS[1:])))
    assert [list(generator.generate(p, 6)) for p in PROMPTS[1:]] == expected


def test_an_interruption_empties_the_cache(generator, monkeypatch) -> None:
    """It may have come in the middle of a step."""
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    expected = list(generator.generate(PROMPTS[1], 6))
    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run_with_iobinding", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(generator.generate(PROMPTS[1] + b" and more", 6))
    assert generator._seen == [[]]
    assert list(generator.generate(PROMPTS[1], 6)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_another_adapter_ends_a_generation(folders, kind) -> None:
    """It empties the cache."""
    generator = Generator(folders[kind], threads=1)
    tokens = generator.generate(PROMPTS[1], 6)
    next(tokens)
    generator.use(None)
    with pytest.raises(RuntimeError, match="or adapter began"):
        next(tokens)


def test_a_static_past_begins_as_zeros_whatever_the_device(folders, monkeypatch) -> None:
    generator = Generator(folders["static"], threads=1)
    expected = list(generator.generate(PROMPTS[1], 8))
    make = ort.OrtValue.ortvalue_from_shape_and_type

    def dirty(shape, kind, device) -> ort.OrtValue:
        value = make(shape, kind, device)
        ctypes.memset(value.data_ptr(), 0xff, value.tensor_size_in_bytes())      # nan
        return value

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", dirty)
    monkeypatch.setattr(generator, "_device", "cuda")
    generator.reset()
    assert not any(torch.from_dlpack(value).any() for value in generator._past.values())
    monkeypatch.setattr(generator, "_device", "cpu")
    assert list(generator.generate(PROMPTS[1], 8)) == expected


def test_an_emptied_cache_is_used_again_and_not_read(folders) -> None:
    generator = Generator(folders["ort"], threads=1)
    expected = list(generator.generate(PROMPTS[2], 30))
    before = {name: value.data_ptr() for name, value in generator._past.items()}
    generator.reset()
    for value in generator._past.values():
        ctypes.memset(value.data_ptr(), 0xff, 4 * math.prod(value.shape()))      # nan
    assert list(generator.generate(PROMPTS[2], 30)) == expected
    assert {name: value.data_ptr() for name, value in generator._past.items()} == before


@pytest.mark.parametrize("kind, cache_type, device", [
    ("ort", "float32", "cpu"), ("ort", "float16", "cuda"), ("portable", "float32", "cuda")])
def test_the_cache_is_where_attention_is(model, tmp_path, monkeypatch, kind, cache_type,
                                         device) -> None:
    folder = export(model, tmp_path / "f", kind)
    describe(folder, cache_type=cache_type)
    monkeypatch.setattr(cache, "execution_provider", lambda name: "CUDAExecutionProvider")
    opened = cache.open_session
    monkeypatch.setattr(cache, "open_session", lambda file, name, threads: opened(
        file, "CPUExecutionProvider", threads))
    for name in ("_fits", "use"):
        monkeypatch.setattr(Generator, name, lambda *args: None)
    assert Generator(folder)._device == device


def test_a_provider_that_does_not_start_is_named(folders, monkeypatch) -> None:
    """onnxruntime would go on with the CPU in silence."""
    monkeypatch.setattr(cache, "execution_provider", lambda name: "CUDAExecutionProvider")
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    with pytest.raises(ValueError, match="cannot start CUDAExecutionProvider: a library or the"):
        Generator(folders["ort"])


def test_no_prompt_has_no_text(generator) -> None:
    assert generator.batch([]) == []


def test_long_prompts_go_in_chunks(generator, monkeypatch) -> None:
    whole = list(generator.generate(PROMPTS[2], 8))
    generator.reset()
    sizes, step = [], generator.step
    monkeypatch.setattr("minismoe.runtime.cache.CHUNK", 7)
    monkeypatch.setattr(generator, "step", lambda rows: sizes.append(len(rows[0])) or step(rows))
    assert list(generator.generate(PROMPTS[2], 8)) == whole
    assert len(PROMPTS[2]) == 33 and sizes[:6] == [7, 7, 7, 7, 5, 1]


def test_stops(generator, monkeypatch) -> None:
    tokens = list(generator.generate(PROMPTS[1], 12))
    assert len(tokens) == 12 and generator.ended == "max_tokens"
    stop = next(t for t in tokens if tokens.index(t) > 2)
    monkeypatch.setattr(generator.tokenizer, "stop_ids", [stop])
    assert list(generator.generate(PROMPTS[1], 12)) == tokens[:tokens.index(stop)]
    assert generator.ended == "stop"
    short, long = generator.batch([PROMPTS[1], PROMPTS[2]], 12)
    assert short == tokens[:tokens.index(stop)] and stop not in long


def test_the_context_ends(generator) -> None:
    generator.reset()
    tokens = list(generator.generate(PROMPTS[2]))
    assert len(tokens) == 96 - len(PROMPTS[2]) and generator.ended == "context"
    assert generator.batch([PROMPTS[0], PROMPTS[2]])[1] == tokens
    assert list(generator.generate(b"x" * 95)) and generator.ended == "context"


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "empty"), ("", {}, "empty"),
    (b"x" * 96, {}, "96 tokens, which leaves no room .* of 96"),
    ([259], {}, "outside of the model's 259"), ("a", {"temperature": -1}, "temperature >= 0"),
    ("a", {"top_p": 0}, "0 < top-p <= 1"), ("a", {"top_k": 65}, "top-k <= 64"),
    ("a", {"max_tokens": -1}, "max_tokens -1"),
])
def test_refusals(generator, prompt, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(generator.generate(prompt, **options))


def test_sampling(generator) -> None:
    def draw(**options):
        return list(generator.generate(PROMPTS[1], 20, **options))
    greedy = draw()
    hot = {"temperature": 1.5, "top_p": 0.95, "top_k": 40}
    assert draw(seed=1, **hot) == draw(seed=1, **hot) != draw(seed=2, **hot)
    assert draw(temperature=1e-6) == draw(temperature=2.0, top_k=1) == greedy
    assert draw(temperature=2.0, top_p=1e-9) == greedy
    logits, rng = [2.0, 1.0, 0.0, -1.0], random.Random(0)
    seen = Counter(_draw(logits, rng, 2.0, 0.89) for _ in range(4000))
    weights = [math.exp(v / 2) for v in logits[:3]]          # these three reach 0.89
    for n, weight in enumerate(weights):
        assert abs(seen[n] / 4000 - weight / sum(weights)) < 0.03
    assert set(seen) == {0, 1, 2}


def test_each_batch_of_a_static_graph_draws_anew(folders) -> None:
    generator = Generator(folders["static"], threads=1)
    rows, hot = generator.static[0], {"temperature": 5.0, "seed": 1}
    found = generator.batch([PROMPTS[1]] * (2 * rows), 12, **hot)
    assert found[:rows] == generator.batch([PROMPTS[1]] * rows, 12, **hot) != found[rows:]


def test_a_hundred_thousand_threads_are_not_started(folders, generator) -> None:
    many = Generator(folders["ort"], threads=100_000)
    assert list(many.generate(PROMPTS[1], 4)) == list(generator.generate(PROMPTS[1], 4))


def test_text_comes_in_whole_characters(generator) -> None:
    ids = [*"häß € 🙂 z".encode(), 0xFF, 257, *"é".encode(), 0xE2]
    pieces = list(generator.text(ids))
    assert "".join(pieces) == generator.tokenizer.decode(ids)
    assert {"ä", "ß", "€", "🙂", "é"} <= {p.strip("\ufffd") for p in pieces}


def test_text_of_a_bpe(generator, bpe, monkeypatch) -> None:
    from minismoe.data.tokenizer import FileTokenizer
    tokenizer = FileTokenizer(bpe)
    monkeypatch.setattr(generator, "tokenizer", tokenizer)
    for text in ("the answer is yes", " naïve 🙂🙂 cat<|im_end|>mat ", "\n\n日本"):
        ids = tokenizer.encode(text)[0]
        assert "".join(generator.text(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["hi 🙂🙂 ok", "日本語 hi", "é日🙂é", "hi  ho\n日", "🙂"])
def test_text_of_byte_fallback(generator, sentencepiece, monkeypatch, text) -> None:
    """As of Llama 2 and Mistral: half a character spoils all bytes beside it, not itself alone."""
    from minismoe.data.tokenizer import FileTokenizer
    tokenizer = FileTokenizer(sentencepiece)
    monkeypatch.setattr(generator, "tokenizer", tokenizer)
    ids = tokenizer.encode(text)[0]
    pieces = list(generator.text(ids))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert len(pieces) > 1 or len(text) == 1                   # streamed, not kept to the end


@pytest.mark.parametrize("flags", [["hello", "--chat"], ["--chat", "--raw"], ["x", "--seed", "1"],
                                   ["x", "--top-p", "0.5"], ["x", "--top-k", "4"],
                                   ["--serve", "stats", "--stats"]])
def test_flags_that_would_do_nothing_are_refused(folders, flags, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        terminal.main([str(folders["ort"]), *flags])
    assert end.value.code == 2 and flags[-1 if "--chat" in flags else 1] in capsys.readouterr().err


def test_an_old_onnxruntime_and_another_layout_are_named(folders, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as m:
        m.setattr("onnxruntime.__version__", "1.23.2")
        with pytest.raises(ImportError, match="1.23.2 is too old: install 1.30"):
            Generator(folders["ort"])
    (tmp_path / "export.json").write_text(json.dumps({"layout": "hf", "files": {}}))
    with pytest.raises(ValueError, match="its layout is hf, and the runtime reads --layout onnx"):
        Generator(tmp_path)


def test_tasks(model, tmp_path, folders) -> None:
    folder = export(model, tmp_path / "adapters", **{LORA: AdapterInput()})
    pairs, changed = {}, {}
    for task in ("one", "two"):
        pairs[task] = Fit(torch.randn(4, 64), torch.randn(48, 4) * 0.5)
        write_adapter(folder / f"{task}.onnx_adapter", {LORA: pairs[task]})
    describe(folder, adapters={t: f"{t}.onnx_adapter" for t in pairs})
    generator = Generator(folder, threads=1)
    base = generate(model, PROMPTS, 8, ())
    linear = model.get_submodule(LORA)
    for task, f in pairs.items():
        before = linear.weight.data
        linear.weight.data = before + f.lora_B @ f.lora_A
        changed[task] = generate(model, PROMPTS, 8, ())
        linear.weight.data = before
    generator.tokenizer.stop_ids = []
    for task, expected in ((None, base), *changed.items(), (None, base)):
        generator.use(task)
        assert generator.batch(PROMPTS, 8) == expected
    assert changed["one"] != changed["two"] != base
    with pytest.raises(ValueError, match="no adapter 'three'; present: one, two"):
        generator.use("three")
    (folder / "one.onnx_adapter").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot open .*one.onnx_adapter"):
        generator.use("one")
    describe(folder, adapters={"one": "/etc/passwd"})
    with pytest.raises(ValueError, match="no plain file name"):
        Generator(folder, threads=1, task="one")


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "export.json").unlink(), "no export.json"),
    (lambda f: (f / "model.onnx.data").unlink(), "lacks model.onnx.data"),
    (lambda f: (f / "model.onnx").write_bytes(b"x"), "1 bytes instead of"),
    (lambda f: describe(f, files={"../export.json": {}}), "no plain file name"),
    (lambda f: describe(f, layers="2"), "not understood"),
    (lambda f: describe(f, format="other/1"), "other/1"),
    (lambda f: (f / "export.json").write_text("{"), "not valid JSON"),
    (lambda f: describe(f, files={}), "names no model.onnx and no sampler.onnx"),
    (lambda f: ((f / "model.onnx").write_bytes(b"x"), describe(f, files={
        n: {"bytes": (f / n).stat().st_size, "sha256": ""} for n in ("model.onnx", "sampler.onnx")
    })), "cannot open"),
    (lambda f: describe(f, kv_heads=3), "export.json is not of this model.onnx"),
    (lambda f: describe(f, cache_type="float16"), "export.json is not of this model.onnx"),
    (lambda f: describe(f, target="portable"), "export.json is not of this model.onnx"),
    (lambda f: describe(f, target=None), "not understood: .* target None"),
    (lambda f: describe(f, target=["ort"]), r"not understood: .* target \['ort'\]"),
    (lambda f: spoil_sampler(f, 0), "export.json is not of this model.onnx and sampler.onnx"),
    (lambda f: spoil_sampler(f, 1), "export.json is not of this model.onnx and sampler.onnx"),
])
def test_broken_folders(model, tmp_path, change, message) -> None:
    folder = export(model, tmp_path / "f")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
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


# The command line.

def test_a_missing_onnxruntime_is_one_line(folders) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; sys.argv = ['x', 'y', 'z']; " + (
        "import runpy; runpy.run_module('minismoe.runtime', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and re.fullmatch("error: .*onnxruntime.*\n", done.stderr)


def test_command_in_a_bare_process(generator, folders) -> None:
    prompt = generator.tokenizer.render([{"role": "user", "content": "hello"}], True)
    expected = "".join(generator.text(generator.generate(prompt, 10)))
    asked = command(folders["ort"], "hello", "--max-tokens", 10, "--stats", "--verify")
    assert (asked.returncode, asked.stdout) == (0, expected + "\n"), asked.stderr
    assert re.search(r"first token \S+ s, .* peak memory \d+ MB", asked.stderr)
    piped = command(folders["ort"], "--max-tokens", 10, input="hello\n")
    assert (piped.stdout, piped.stderr) == (expected + "\n", "")
    raw = command(folders["portable"], "some words", "--raw")
    assert raw.stdout == "".join(generator.text(generator.generate("some words"))) + "\n"
    assert raw.stderr == ("" if generator.ended == "stop" else
                          "[the context of 96 tokens is full]\n")


@pytest.mark.parametrize("args, line", [
    (("FOLDER", "a", "--provider", "nowhere"), "no provider 'nowhere' here; present: .*CPU"),
    (("FOLDER/missing", "a"), "missing has no export.json"), (("FOLDER", ""), "prompt is empty"),
    (("FOLDER", "x" * 96), "leaves no room"), (("FOLDER", "a", "--task", "t"), "present: none"),
])
def test_failures_are_one_line(folders, args, line) -> None:
    run = command(*(a.replace("FOLDER", str(folders["ort"])) for a in args))
    assert run.returncode == 1 and re.fullmatch(f"error: .*{line}.*\n", run.stderr), run.stderr
    assert command(folders["ort"], "a", "--threads", "0").returncode == 2


def test_chat(generator, folders) -> None:
    history, expected = [], ""
    for line in ("one", "two"):
        history.append({"role": "user", "content": line})
        prompt = generator.tokenizer.render(history, True)
        answer = "".join(generator.text(generator.generate(prompt, 9)))
        history.append({"role": "assistant", "content": answer.strip()})
        expected += answer + "\n"
    chat = command(folders["ort"], "--chat", "--max-tokens", 9,
                   input=f"one\n\ntwo\n{'x' * 90}\n/clear\none\n/exit\nthree\n")
    assert chat.returncode == 0
    assert chat.stdout == expected + expected.split("\n")[0] + "\n"
    assert re.fullmatch("error: the prompt has .* leaves no room .*; /clear .*\n", chat.stderr)


def test_a_chat_is_rendered_as_it_was_trained(generator, monkeypatch) -> None:
    """The space that a template writes before an answer is generated, and not written twice."""
    prompts: list[str] = []
    monkeypatch.setattr(terminal, "_answer",
                        lambda _, prompt, *rest: prompts.append(prompt) or " yes")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    terminal._chat(generator, {}, False)
    assert prompts[1] == generator.tokenizer.render(
        [{"role": r, "content": c} for r, c in (
            ("user", "one"), ("assistant", "yes"), ("user", "two"))], True)
    assert "Assistant: yes" in prompts[1]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT reaches whole consoles there")
def test_interrupt_stops_the_answer_and_not_the_chat(model, tmp_path, signals) -> None:
    endless = copy.deepcopy(model)
    for ids in (slice(10, 11), slice(256, None)):               # tied: no newline, and no end
        endless.model.embed_tokens.weight.data[ids] = 0
    folder = export(endless, tmp_path / "endless", context=1 << 18)
    program = [sys.executable, "-m", "minismoe.runtime", str(folder)]
    with subprocess.Popen([*program, "--chat"], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chat:
        for line in (b"hello\n", b"again\n"):
            chat.stdin.write(line)
            chat.stdin.flush()
            assert chat.stdout.read(20)
            chat.send_signal(signal.SIGINT)
            while chat.stdout.read(1) != b"\n":             # of what was on its way
                pass
        _, err = chat.communicate(b"/exit\n", timeout=30)
    assert (chat.returncode, err) == (0, b"")
    with subprocess.Popen([*program, "hello"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as single:
        assert single.stdout.read(20)
        single.send_signal(signal.SIGINT)
        _, err = single.communicate(timeout=30)
    assert (single.returncode, err) == (130, b"interrupted\n")


def test_a_terminal_gets_no_control_characters(folders, monkeypatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(Generator, "generate", lambda *a, **k: iter(b"a\x1b[31mb\r\n\tc"))
    monkeypatch.setattr(sys, "stdout", written)
    for tty, expected in ((False, "a\x1b[31mb\r\n\tc\n"), (True, "a\ufffd[31mb\ufffd\n\tc\n")):
        written.seek(0)
        written.truncate()
        written.isatty = lambda tty=tty: tty
        terminal.main([str(folders["ort"]), "x"])
        assert written.getvalue() == expected


def test_a_raw_prompt_at_a_terminal_is_read_as_it_is(folders, generator, monkeypatch, capsys,
                                                     ) -> None:
    typed = io.StringIO("hello\n")
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    terminal.main([str(folders["ort"]), "--raw", "--max-tokens", "4"])
    assert capsys.readouterr().out == "".join(generator.text(generator.generate("hello", 4))) + "\n"


def test_starts_fast_and_small(folders) -> None:
    start = time.perf_counter()
    run = command(folders["ort"], "hello", "--max-tokens", 4, "--stats", "--threads", 1)
    assert time.perf_counter() - start < 5        # 0.2 s where nothing else runs
    assert int(re.search(r"peak memory (\d+) MB", run.stderr)[1]) < 100


@pytest.mark.parametrize("kind, T", [("static", 1), ("chunks", 4), ("portable", 1), ("ort", 1)])
def test_a_text_ends_where_the_places_of_the_past_do(model, folders, kind, T) -> None:
    """A step of a static graph takes T places, whatever it writes."""
    generator, prompt = Generator(folders[kind], threads=1), b"x" * 41
    generator.tokenizer.stop_ids = []
    found = list(generator.generate(prompt))
    assert len(found) == (96 - 41) // T and generator.ended == "context"
    assert found == generate(model, [prompt], len(found), ())[0]


def test_a_static_past_that_is_shorter_than_the_context(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(KINDS, "short", ("portable", (1, 1, 48)))
    generator = Generator(export(model, tmp_path / "f", "short"), threads=1)
    generator.tokenizer.stop_ids = []
    assert generator.context == 48 and len(list(generator.generate(b"x" * 41))) == 7


def test_logits_that_are_not_numbers_end_a_text(model, tmp_path) -> None:
    broken = CausalLM(model.config)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="logits are not numbers"):
        list(Generator(export(broken, tmp_path / "f"), threads=1).generate("a", 2))


def test_the_end_of_the_context_is_said(model, folders, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Generator, "generate", lambda self, *_, **__: (
        setattr(self, "ended", "context"), iter(b"ab"))[1])
    terminal.main([str(folders["ort"]), "x"])
    assert capsys.readouterr().err == "[the context of 96 tokens is full]\n"


@pytest.mark.parametrize("flags, says", [
    (["--serve", "web"], "web is no port; write the folder before --serve"),
    (["--serve=-1"], "-1 is no port"),
    (["x", "--best", "2"], "--best and --lines need --choices"),
    (["x", "--lines"], "--best and --lines need --choices"),
    (["--serve", "--stats"], "leave out stats"), (["--serve", "--task", "t"], "leave out task"),
    (["x", "--seed", "1"], "draw nothing without a --temperature"),
    (["x", "--temperature", "nan"], "nan is no number of at least 0"),
    (["x", "--top-p", "2"], "2 is not in (0, 1]"), (["x", "--top-k", "-1"], "-1 is below 0"),
    (["x", "--choices="], "it is empty"),
    (["x", "--chat"], "--chat asks for prompts itself")])
def test_what_is_wrong_with_flags_is_said(folders, flags, says, capsys) -> None:
    """In the last line: the usage above it names every flag."""
    with pytest.raises(SystemExit) as end:
        terminal.main([str(folders["ort"]), *flags])
    assert end.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_too_little_memory_names_the_context(monkeypatch, capsys) -> None:
    def full(_: object) -> None:
        raise MemoryError
    monkeypatch.setattr(terminal, "main", full)
    with pytest.raises(SystemExit) as end:
        terminal.run()
    assert end.value.code == 1 and capsys.readouterr().err == (
        "error: out of memory: export again, with a smaller --context\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes streams")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_end_nothing(folders, closed) -> None:
    said = f"{sys.executable} -m minismoe.runtime {folders['ort']} hi --max-tokens 2 {closed}"
    done = subprocess.run(said, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
