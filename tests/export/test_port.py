"""answer.c: its tokens are those of the tokenizers library, its answers those of the runtime, on
every kind of export that it takes; damaged files and texts end in one line.

MINISMOE_TOKENIZERS names folders with a tokenizer.json whose tokens are compared as well.
"""

import doctest
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from app import App
from exported import ship
from tiny import BYTES, DELTA, ROOT, random_hf, save_bytes_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from minismoe.cli.export_flags import parse
from minismoe.data import toy
from minismoe.data.tokenizer import FileTokenizer, load_tokenizer
from minismoe.export import table
from minismoe.export.contract import prompt
from minismoe.export.table import write_port
from minismoe.export.trim import trimmed_tokenizer
from minismoe.export.write import record
from minismoe.io.files import read_json
from minismoe.method.vocabulary import BPE, tokens_to_keep
from minismoe.runtime import Generator
from minismoe.runtime.drafts import make_drafts, write_drafts

PORT = ROOT / "minismoe" / "export" / "port"
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
HEADERS = Path("/usr/include/onnxruntime/onnxruntime_c_api.h")       # Debian's libonnxruntime-dev
LIBRARY = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
# A damaged size may ask for more memory than there is, which answer.c says.
QUIET = {"ASAN_OPTIONS": "allocator_may_return_null=1"}
SANITIZED = ("-g", "-fsanitize=address,undefined", "-Wno-unused-function")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
          r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<unk>"]
CHOICES = ["yes", "yes, both", "no", "nobody", "none of these"]
pytestmark = pytest.mark.skipif(not (COMPILERS and HEADERS.is_file() and LIBRARY), reason=(
    "no C compiler, no header of onnxruntime's C API, or no shared library of it"))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a C file, once with the same flags; returns the program."""
    folder = tmp_path_factory.mktemp("built")
    assert LIBRARY
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(LIBRARY)

    @cache
    def built(source: Path, *flags: object, compiler: str = "") -> Path:
        out = folder / f"program{len([*folder.iterdir()])}"
        subprocess.run([compiler or COMPILERS[0], "-O2", *flags, f"-I{PORT}", source, f"-L{folder}",
                        f"-Wl,-rpath,{folder}", "-lonnxruntime", "-lm", "-o", out], check=True)
        return out

    return built


def ask(program: Path, *args: object, text: str | bytes = "", code: int = 0) -> str:
    """What the program prints on standard output; of an error, its one line."""
    done = subprocess.run([program, *map(str, args)], capture_output=True, timeout=600,
                          input=text.encode() if isinstance(text, str) else text,
                          env=os.environ | QUIET)
    out, said = done.stdout.decode(errors="surrogateescape"), done.stderr.decode(errors="replace")
    assert done.returncode == code, (done.returncode, said)
    assert not code or re.fullmatch(r"error: .*\n", said.splitlines(True)[-1]), said
    assert "Sanitizer" not in said and "runtime error" not in said, said
    return said if code else out


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_it_compiles_without_a_warning(compiler: str, build: Callable[..., Path]) -> None:
    if compiler not in COMPILERS:
        pytest.skip(f"no compiler {compiler}")
    build(PORT / "answer.c", *STRICT, compiler=compiler)
    lines = [line for name in ("answer.c", "answer.h")
             for line in (PORT / name).read_text().splitlines()]
    assert len(lines) <= 800 and max(map(len, lines)) <= 100


# Tokens

def test_what_a_token_writes() -> None:
    assert doctest.testmod(table).attempted and not doctest.testmod(table).failed


def random_texts(count: int, words: Sequence[str], seed: int = 0) -> list[str]:
    """Texts of characters of all planes, marks in any order, Hangul, emoji, digits, white space of
    all kinds, and words."""
    rng = random.Random(seed)

    def one_of(*ranges: tuple[int, int]) -> Callable[[], str]:
        return lambda: chr(rng.randint(*rng.choice(ranges)))

    pieces: list[Callable[[], str]] = [
        one_of((0, 0xD7FF), (0xE000, 0x10FFFF)), one_of((0x300, 0x36F), (0x591, 0x5BD)),
        one_of((32, 126)), one_of((0, 0x2FF), (0x370, 0x2FFF)), one_of((0x1100, 0x11FF)),
        one_of((0xAC00, 0xD7A3)), one_of((0xF900, 0xFFFF), (0x1D000, 0x1DFFF)),
        one_of((0x1F1E6, 0x1F6FF), (0x200D, 0x200D), (0xFE0F, 0xFE0F)), one_of((48, 57)),
        lambda: str(rng.randrange(10 ** 8)),
        lambda: " " * rng.randint(1, 5), lambda: rng.choice("\n\r\t\v\f\x1c\x85\xa0\u2003\u2028"),
        lambda: "\n" * rng.randint(1, 4), lambda: "\r\n", lambda: rng.choice("aeouAEqK"),
        lambda: rng.choice(["'s", "'S", "'ſ", "'ll", "'Ve", "n't", " '", "e\u0301", "a\u0323\u0307",
                            "\u0344", "\u0958", "\u212b", "\u0f73", "\U0001d15f"]),
        lambda: rng.choice(words), lambda: rng.choice(words), lambda: rng.choice(SPECIAL)]
    return ["".join(rng.choice(pieces)() for _ in range(rng.choice([1, 1, 2, 4, 8, 20])))
            for _ in range(count)]


def trained(pre_tokenizer: Any, normalizer: Any = None, **options: Any) -> dict[str, Any]:
    """The tokenizer.json of a BPE. It was trained without splitting texts, so that its merges cross
    the ends of words: a wrong end changes the tokens."""
    fallback = "byte_fallback" in options
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = None if fallback else pre.ByteLevel(False, use_regex=False)
    made.normalizer = normalizers.Replace(" ", "▁") if fallback else None
    texts = random_texts(3000, (ROOT / "README.md").read_text().split(" "), seed=1)
    made.train_from_iterator([text[:40] for text in texts], trainers.BpeTrainer(
        vocab_size=3000, show_progress=False, min_frequency=3, special_tokens=[
            *SPECIAL, *(f"<0x{b:02X}>" for b in range(256) if fallback)],
        limit_alphabet=300 if fallback else 240))        # so that some bytes have no token
    made.pre_tokenizer, made.normalizer = pre_tokenizer, normalizer
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, normalized=False)
                     for text in ("\n\n", "\n\n\n", "<b>", "<br>", "▁▁")])
    content = json.loads(made.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"][:3] != "<0x"]
    if options.get("ignore_merges"):         # so that merges do not lead to each token
        content["model"]["merges"] = content["model"]["merges"][::2]
    return content


def split(regex: str) -> Any:
    return pre.Sequence([pre.Split(Regex(regex), "isolated"),
                         pre.ByteLevel(False, use_regex=False)])


def qwen(version: str) -> dict[str, Any]:
    """The tokenizer.json of a BPE that splits texts as Qwen 2 or 3.5."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

    return trained(split({"2": QWEN2, "3.5": QWEN35}[version]), normalizers.NFC())


def fewer_tokens() -> dict[str, Any]:
    """A tokenizer.json with a third of its tokens, as --vocab leaves it."""
    content = trained(pre.ByteLevel(False))
    kept = tokens_to_keep(BPE(content), [], range(0, 3000, 2), 1000)
    return trimmed_tokenizer(content, {old: new for new, old in enumerate(kept)})


MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt2": lambda: trained(pre.ByteLevel(False)), "vocab": fewer_tokens,
    "digits": lambda: trained(pre.Sequence([pre.Digits(True), pre.ByteLevel(False)])),
    "one word": lambda: trained(pre.ByteLevel(False, use_regex=False)),
    "llama3": lambda: trained(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: qwen("2"), "qwen3.5": lambda: qwen("3.5"),
    "gemma": lambda: trained(pre.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"),
                             byte_fallback=True, fuse_unk=True, unk_token="<unk>")}
REAL = {Path(folder).name: folder
        for folder in os.environ.get("MINISMOE_TOKENIZERS", "").split(":") if folder}


def port_of(folder: Path, system: str | None = None, strip: bool = False) -> Any:
    """Write answer.bin of a folder that holds a tokenizer alone; returns the tokenizer."""
    tokenizer = load_tokenizer(folder)
    if strip:
        tokenizer.template = tokenizer.template.replace("m.content", "m.content | trim")
    source: Any = SimpleNamespace(system=system, tokenizer=tokenizer, tasks=[], name="a model")
    write_port(folder, {"vocab_size": tokenizer.backend.vocab_size, "context": 2048, "contract": {
        "prompt": prompt(source), "cache": "shared", "stop_ids": [1], "golden": {
            "input_ids": [1], "tokens": [2], "logits": {
                "ids": [3], "values": [0.5], "tolerance": 0.1}}}}, tokenizer)
    return tokenizer


def compare_tokens(folder: Path, program: Path, texts: Sequence[str], **options: Any) -> None:
    """The library's tokens of the prompts equal answer.c's; special tokens in a text stay text."""
    tokenizer, strip = port_of(folder, **options), options.get("strip")
    sent = (text.encode() for text in texts)
    lines = ask(program, folder, text=b"".join(struct.pack("<I", len(b)) + b for b in sent))
    chat = [{"role": "system", "content": options["system"]}] if "system" in options else []
    whole = tokenizer.render([*chat, {"role": "user", "content": "\ue000"}], True)
    cut = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    parts = re.split(f"({cut})", whole)          # every second one is a special token
    for text, line in zip(texts, lines.splitlines(), strict=True):
        ids = [tokenizer.encode(part.replace("\ue000", text.strip() if strip else text), i % 2)[0]
               for i, part in enumerate(parts)]
        assert [*map(int, line.split())] == sum(ids, []), repr(text)


def tokenizer_folder(name: str, root: Path) -> Path:
    """A folder with one of MADE."""
    (root / name).mkdir()
    content = MADE[name]()
    (root / name / "tokenizer.json").write_text(json.dumps(content))
    ids = [*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])]
    (root / name / "config.json").write_text(json.dumps({"vocab_size": max(ids) + 1}))
    (root / name / "tokenizer_config.json").write_text(json.dumps(
        {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    return root / name


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*MADE, "toy", *REAL])
def test_tokens_are_those_of_the_library(name: str, count: int, tmp_path: Path,
                                         build: Callable[..., Path]) -> None:
    if name == "toy":
        ship(tmp_path / "toy", "--precision fp32")
    elif name in REAL:
        for file in Path(REAL[name]).glob("*.j*"):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / name)
    else:
        tokenizer_folder(name, tmp_path)
    folder, program = tmp_path / name, build(ROOT / "tests/tools/tokens.c", *SANITIZED)
    lines = [m[0]["content"] for task in toy.tasks() for m in task.test]
    compare_tokens(folder, program, [*random_texts(count, lines), *lines])
    if name in ("gpt2", "gemma"):
        compare_tokens(folder, program, random_texts(200, lines, 2), strip=True, system="Be brief.")


# Answers

def ported(root: Path, *flags: str, **config: Any) -> Path:
    """The export of a random checkpoint, with answer.c and a task's set of answers."""
    save_bytes_model(root / "base", large=True, **BYTES | {
        "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024} | config)
    ship(root / "out", "--port --model", root / "base", *flags)
    return tasked(root / "out", {"one": {"choices": CHOICES, "instruction": ""},
                                 "free": {"choices": [], "instruction": ""}})


def tasked(folder: Path, tasks: Any, **changes: Any) -> Path:
    """Write answer.bin of an exported folder anew, for these tasks and a changed contract."""
    info = read_json(folder / "export.json")
    (folder / "tasks.json").write_text(json.dumps(tasks))
    write_port(folder, info | {"contract": info["contract"] | changes}, load_tokenizer(folder))
    record(info, folder)
    return folder


def readable(text: str) -> list[str]:
    """Its lines, without bytes that are no UTF-8 and zeros, which the two replace differently."""
    return re.sub("[\0\ufffd]+", "?", text).split("\n")


def lines_of(folder: Path, questions: Sequence[str], *flags: str) -> list[str]:
    """What the runtime's command prints."""
    done = subprocess.run([sys.executable, "-m", "minismoe.runtime", folder, "--lines", *flags],
                          cwd=ROOT, input="\n".join(questions), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return readable(done.stdout)


def answers_of(folder: Path, questions: Sequence[str], choices: Sequence[str] = ()) -> list[str]:
    """The runtime's answers of at most 24 tokens, or from a set, in lines."""
    generator = Generator(folder, threads=1)
    prompts = (generator.tokenizer.render([{"role": "user", "content": question.strip()}], True)
               for question in questions)
    texts = (generator.choose(prompt, choices)[0].text if choices else
             "".join(generator.text(generator.generate(prompt, 24), strip=True))
             for prompt in prompts)
    return readable("".join(
        text.replace("\n", "\\n").replace("\r", "\\r") + "\n" for text in texts))


KINDS = {"int4-8": ("--precision int4-8", {}), "int8": ("--precision int8", {}),
         "fp16": ("--precision fp16", {}),
         "portable": ("--precision fp32 --target portable", {}),
         "genai": ("--layout genai --precision int4", {}), "qwen3.5": ("--precision fp32", DELTA)}


@pytest.mark.parametrize("kind", [*KINDS, "lfm2", "toy"])
def test_answers_are_those_of_the_runtime(kind: str, tmp_path: Path,
                                          build: Callable[..., Path]) -> None:
    """Greedy answers and answers from a set; --check passes, and fails with other weights."""
    questions = ["Which is less, 52 or 37?", "Why?", "long " * 120, "naïve 日本 🙂", "a", "b"]
    folder = tmp_path / "out"
    if kind == "toy":
        questions = [m[0]["content"] for task in toy.tasks() for m in task.test][:300]
        info = ship(folder, "--port")
        assert info["contract"]["prompt"] == {
            "before": "<|bos|>User: ", "after": "\nAssistant:", "strip": False}
        assert {"answer.c", "answer.h", "answer.bin", "tokenizer.json"} <= info["files"].keys()
    elif kind == "lfm2":
        random_hf("lfm2", vocab_size=259, hidden_size=64, head_dim=16, eos_token_id=257,
                  max_position_embeddings=1024).save_pretrained(tmp_path / "base")
        ship(folder, "--port --precision fp32 --model", tmp_path / "base")
    else:
        ported(tmp_path, KINDS[kind][0], **KINDS[kind][1])
    program = build(folder / "answer.c")
    ask(program, folder, "--check")
    text = "\r\n".join(questions)
    said = readable(ask(program, folder, "--max-tokens=24", text=text))
    assert said == answers_of(folder, questions)
    if kind in KINDS:
        said = readable(ask(program, folder, "--task=one", "--choices", text=text))
        assert said == answers_of(folder, questions, CHOICES) and len({*said}) > 2
        assert "free has no set" in ask(program, folder, "--choices", "--task=free", "a", code=1)
    weights = folder / "model.onnx.data"
    weights.write_bytes(bytes(b ^ 0x11 for b in weights.read_bytes()))
    assert subprocess.run([program, folder, "--check"], capture_output=True).returncode == 1


# What is refused

@pytest.mark.parametrize("flags", ["--layout web", "--layout peft", "--target npu",
                                   "--target portable --static 1x1x64"])
def test_exports_that_it_cannot_run_are_refused(
        flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["run", "--port", *flags.split()], "")
    assert "leave out --port" in capsys.readouterr().err


@pytest.mark.parametrize("template, says", [
    ("{{ messages[0].content | upper }}", "chat template of"), ("hello", "chat template of"),
    ("", "does not know such a tokenizer.*Prepend")])
def test_templates_and_tokenizers_are_refused_by_name(
        template: str, says: str, tmp_path: Path, sentencepiece: Path, bpe: Path) -> None:
    """A template that changes a question, one without it, and a tokenizer as of Llama 2."""
    file = bpe if template else sentencepiece
    size = FileTokenizer(file).vocab_size
    save_bytes_model(tmp_path / "base", **BYTES | {"vocab_size": size, "hidden_size": 64})
    shutil.copy(file, tmp_path / "base/tokenizer.json")
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|im_end|>", "chat_template": template or TEMPLATE}))
    with pytest.raises(ValueError, match=says):
        ship(tmp_path / "out", "--port --precision fp32 --model", tmp_path / "base")
    assert not (tmp_path / "out").exists()
    info = ship(tmp_path / "out", "--precision fp32 --model", tmp_path / "base")
    assert ("prompt" in info["contract"]) == (not template)


# As an app asks

INSTRUCTION = "Is it so? Say yes or no.\n"
TASKS = {"one": {"choices": CHOICES, "instruction": INSTRUCTION},
         "two": {"choices": ["yes", "perhaps"], "instruction": ""}}
QUESTIONS = [f"Is {a} less than {b}?" for a in range(2, 7) for b in range(2, 6)]


@pytest.fixture
def model(tmp_path: Path, exported: Path) -> Path:
    """A folder of the task that has an instruction and a set."""
    shutil.copytree(exported, tmp_path / "model")
    return tasked(tmp_path / "model", {"one": TASKS["one"]})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ported(tmp_path_factory.mktemp("model"), "--precision fp32")


@pytest.fixture(scope="session")
def library(build: Callable[..., Path]) -> Path:
    return build(PORT / "answer.c", "-fPIC", "-shared", "-DANSWER_LIBRARY")


def test_a_task_is_asked_as_it_was_judged(model: Path, build: Callable[..., Path],
                                          library: Path) -> None:
    """With its instruction, once, and from its set; as the runtime answers the same lines."""
    program = build(PORT / "answer.c", *SANITIZED)
    questions = [*QUESTIONS, *("x" * (9 * n) for n in range(1, 21))]
    spaced = "\ufeff" + "\n".join(f" \t{q}\u3000\r" for q in questions)
    for theirs, ours in ("--choices=one", "--choices"), ("--max-tokens=8",) * 2:
        said = lines_of(model, questions, theirs)
        assert len({*said}) > 2
        for text in "\n".join(questions), spaced:
            assert readable(ask(program, model, ours, text=text)) == said
    given, alone = (ask(program, model, text + QUESTIONS[0], "--max-tokens=8")
                    for text in (INSTRUCTION, ""))
    assert readable(alone[:-1].replace("\n", "\\n").replace("\r", "\\r")) == said[:1]
    done = subprocess.run([program, model, "--choices", QUESTIONS[0]], capture_output=True)
    told = re.match(rb"\[log-probability (\S+) \((\S+) %", done.stderr)
    logprob = App(library, model).choose(QUESTIONS[0], 1)[0][1]
    assert told and float(told[1]) == pytest.approx(logprob, abs=1e-4)
    assert float(told[2]) == pytest.approx(100 * math.exp(logprob), abs=0.06)
    assert given == alone != ask(program, tasked(model, {}), QUESTIONS[0], "--max-tokens=8")


def test_each_task_has_its_own_set(model: Path, build: Callable[..., Path]) -> None:
    program = build(PORT / "answer.c", *SANITIZED)
    tasked(model, TASKS)
    assert ask(program, model, "--task=two", "--choices", "Why?") in ("yes\n", "perhaps\n")
    assert "one, two" in ask(program, model, "--choices", "Why?", code=1)
    assert "no task three: it has one, two" in ask(program, model, "--task=three", "a", code=1)
    done = subprocess.run([program, model, QUESTIONS[0], "--max-tokens=8"], capture_output=True)
    assert b"--task: one, two" in done.stderr            # asked without an instruction


def test_each_stop_token_ends_an_answer(model: Path, build: Callable[..., Path]) -> None:
    question = [{"role": "user", "content": "Why?"}]
    generator = Generator(model, threads=1)
    ids = [*generator.generate(generator.tokenizer.render(question, True), 24)]
    tasked(model, {}, stop_ids=[*generator.tokenizer.stop_ids, ids[5]])
    said = ask(build(PORT / "answer.c", *SANITIZED), model, "Why?")
    assert readable(said) == readable(
        "".join(generator.text(ids[:ids.index(ids[5])], strip=True)) + "\n")


def test_the_context_is_used_to_its_end(model: Path, library: Path) -> None:
    app = App(library, tasked(model, {}))
    app.ask("x", most=1)
    room = 1024 - app.result.prompt_tokens       # besides an x, each of which is a token
    app.ask("x" * room)
    assert app.result.tokens <= 1 and app.result.prompt_tokens == 1023
    with pytest.raises(ValueError, match="1024 tokens, which leaves no room .* context of 1024"):
        app.ask("x" * (room + 1))
    app.close()
    app = App(library, tasked(model, {"one": TASKS["one"] | {"instruction": ""}}))
    app.choose("x" * (room - 14), 1)         # a space, the 13 bytes of the longest answer, the end
    with pytest.raises(ValueError, match="no room"):
        app.choose("x" * (room - 13), 1)
    assert app.ask("x", most=1) is not None      # and goes on
    app.close()


def test_check_sees_other_files_tokens_and_scores(model: Path, build: Callable[..., Path]) -> None:
    program = build(PORT / "answer.c")
    golden = read_json(model / "export.json")["contract"]["golden"]
    ask(program, model, "--check")
    first, *others = golden["logits"]["values"]
    scores = golden["logits"] | {"values": [first + 0.5 * abs(first), *others]}
    for wrong, says in (({"input_ids": [1, *golden["input_ids"][1:]]}, "tokens of the question"),
                        ({"logits": scores}, "the same text, scores within"),
                        ({"tokens": [1, *golden["tokens"][1:]]}, "another text, scores within")):
        tasked(model, {}, golden=golden | wrong)
        assert says in ask(program, model, "--check", code=1)
    data = bytearray((model / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (model / "model.onnx.data").write_bytes(data)
    assert "not those of the export" in ask(program, model, "--check", code=1)


def test_drafts_save_steps_and_change_nothing(model: Path, library: Path) -> None:
    generator = Generator(tasked(model, {}), threads=1)
    prompts = [generator.tokenizer.render([{"role": "user", "content": q}], True)
               for q in QUESTIONS]
    ids = [[*generator.generate(prompt, 24)] for prompt in prompts]
    plain = App(library, model)
    said = [plain.ask(q, most=24) for q in QUESTIONS]
    assert plain.result.steps == plain.result.tokens - 1
    write_drafts(model, make_drafts([(generator.encoded(p), i) for p, i in zip(prompts, ids)]))
    generator, app, steps = Generator(tasked(model, {}), threads=1), App(library, model), 0
    for question, asked, text in zip(QUESTIONS, prompts, said):
        assert app.ask(question, most=24) == text
        answer = generator.generate(asked, 24)
        assert len([*answer]) == app.result.tokens and answer.steps == app.result.steps
        steps += answer.steps
    assert steps < 20 * 15
    plain.close()
    app.close()


def test_python_asks_two_folders_at_once(model: Path, exported: Path, library: Path,
                                         tmp_path: Path) -> None:
    """By ctypes. An open that fails holds nothing, and can be tried again; after an error a folder
    answers; errors are one line."""
    with pytest.raises(ValueError, match="cannot read"):
        App(library, tmp_path / "none")
    shutil.copytree(model, tmp_path / "broken")
    (tmp_path / "broken/model.onnx").write_bytes(b"none")
    for _ in range(2):
        with pytest.raises(ValueError, match="^onnxruntime: [^\n]*$"):
            App(library, tmp_path / "broken")
    apps = [App(library, model), App(library, exported)]
    alone = [[app.ask(q, most=8) for q in QUESTIONS] for app in apps]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda app: [app.ask(q, most=8) for q in QUESTIONS], apps)] == alone
    for wrong in "", "x" * 2000:
        with pytest.raises(ValueError, match="empty|no room"):
            apps[0].ask(wrong)
    assert [apps[0].ask(q, most=8) for q in QUESTIONS] == alone[0]
    generator = Generator(model, threads=1)
    chat = [{"role": "user", "content": INSTRUCTION + QUESTIONS[0]}]
    best = generator.choose(generator.tokenizer.render(chat, True), CHOICES, 5)
    for (text, logprob), right in zip(apps[0].choose(QUESTIONS[0], 5, "one"), best, strict=True):
        assert text == right.text and logprob == pytest.approx(right.logprob, abs=1e-4)
    for app in apps:
        app.close()


RUN = r"""
import app.Answer;
import java.nio.file.*;
public class Run {
    static String failed(Answer model, String text) {
        try { return (model == null ? new Answer(text, 1) : model).ask(text, null, true); }
        catch (IllegalStateException e) { return e.getMessage(); }
    }
    static long resident() throws Exception {
        String pages = Files.readString(Path.of("/proc/self/statm")).split(" ")[1];
        return Long.parseLong(pages) * 4;
    }
    public static void main(String[] args) throws Exception {
        System.out.println(failed(null, "/none"));
        Answer model = new Answer(args[0], 1);
        String[] lines = new String(System.in.readAllBytes(), "UTF-8").split("\n");
        for (String line : lines) System.out.println(model.ask(line, null, true));
        long before = 0;
        for (int i = 0; i < Integer.parseInt(args[1]); i++) {
            if (i == 300) before = resident();
            model.ask(lines[i % lines.length], null, true);
            if (i % 50 == 0) failed(model, "long".repeat(25000));
        }
        System.out.println(resident() - before);
        model.close();
    }
}"""


@pytest.mark.skipif(not shutil.which("javac"), reason="no Java compiler")
@pytest.mark.parametrize("count", [600, pytest.param(5000, marks=pytest.mark.slow)])
def test_java_asks(count: int, model: Path, tmp_path: Path, build: Callable[..., Path]) -> None:
    """By Answer.java: answers of the runtime, an exception with the error's line, and flat memory,
    with questions of 100 kB among them."""
    java = Path(shutil.which("javac") or "").resolve().parents[1]
    program = build(PORT / "answer.c", PORT / "answer_jni.c", *STRICT, "-fPIC", "-shared",
                    "-DANSWER_LIBRARY", f"-I{java}/include", f"-I{java}/include/linux")
    (tmp_path / "libanswer.so").symlink_to(program)
    (tmp_path / "Run.java").write_text(RUN)
    subprocess.run(["javac", "-d", tmp_path, PORT / "Answer.java", tmp_path / "Run.java"],
                   check=True)
    questions = ["x" * (3 * n) for n in range(4, 64)]
    done = subprocess.run(
        ["java", "-Xms32m", "-Xmx32m", "-XX:+AlwaysPreTouch", "-XX:+UseSerialGC", "-cp", tmp_path,
         f"-Djava.library.path={tmp_path}", "Run", model, str(count)],
        input="\n".join(questions), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, *answers, growth = done.stdout.splitlines()
    assert error.startswith("cannot read /none/answer.bin")
    assert [*answers, ""] == lines_of(model, questions, "--choices=one") and len({*answers}) > 2
    print(f"{growth} kB")
    assert int(growth) < 10_000


# What is wrong

def test_bad_input_ends_in_one_line(exported: Path, tmp_path: Path,
                                    build: Callable[..., Path]) -> None:
    program = build(PORT / "answer.c", *SANITIZED)
    assert "cannot read" in ask(program, tmp_path, "a", code=1)
    assert "no room" in ask(program, exported, "x" * 1024, code=1)
    assert "has no line" in ask(program, exported, code=1)
    half = b"a\nhi\xed\xa0\x80\n\n" + b"x" * 3000 + b"\n\0b\na"     # half of a pair of surrogates
    done = subprocess.run([program, exported, "--max-tokens=4"], input=half, capture_output=True,
                          env=os.environ | QUIET)
    first, *bad, last, end = done.stdout.decode().split("\n")
    assert first == last and (bad, end, done.returncode) == ([""] * 4, "", 1)
    said = done.stderr.decode()
    for line in ("line 2: byte 3 of the question is no UTF-8", "line 3: the question is empty",
                 "line 4: the question has", "line 5: a byte is zero",
                 "error: 4 of 6 lines have no answer"):
        assert line in said
    content = (exported / "answer.bin").read_bytes()
    for head, says in (content[:8], "model.onnx"), (b"answer.1", "not of version 2"):
        (tmp_path / "answer.bin").write_bytes(head + content[8:])        # there is no model.onnx
        assert says in ask(program, tmp_path, "a", code=1)


OLD = r"""
#include <onnxruntime_c_api.h>
static const OrtApi *api(uint32_t number) { (void)number; return NULL; }
static const char *version(void) { return VERSION; }
const OrtApiBase *OrtGetApiBase(void) {
    static const OrtApiBase base = {api, version};
    return &base;
}"""


@pytest.mark.parametrize("version", ["1.21.0", "1.29.3"])
def test_an_old_library_is_named_in_one_line(version: str, exported: Path, tmp_path: Path,
                                             build: Callable[..., Path]) -> None:
    """Linked before the real one: a library that has a version and nothing else."""
    (tmp_path / "old.c").write_text(OLD)
    program = build(PORT / "answer.c", tmp_path / "old.c", f'-DVERSION="{version}"',
                    f"-I{HEADERS.parent}")
    for flags in ["a"], ["--check"]:
        assert ask(program, exported, *flags, code=1) == (
            f"error: onnxruntime {version} is too old: link 1.30 or later\n")


@pytest.mark.parametrize("flag", ["--bogus", "--choicesfoo", "--max-tokens=abc", "--max-tokens=0",
                                  "--threads=100000", "--task", ""])
def test_wrong_usage_is_one_line(flag: str, build: Callable[..., Path]) -> None:
    program = build(PORT / "answer.c")
    said = ask(program, *filter(None, ["folder" if flag else "", flag]), code=2)
    assert said.count("\n") == 1 and flag.partition("=")[0] in said
    assert ask(program, "--help").startswith("usage: answer FOLDER")


@pytest.mark.parametrize("name", ["gemma", "digits"])
def test_long_texts_take_linear_time(name: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    program = build(ROOT / "tests/tools/tokens.c")
    port_of(tokenizer_folder(name, tmp_path))
    times = list[float]()
    for text in b"ab" * 15_000, b"ab" * 150_000:
        start = time.perf_counter()
        ask(program, tmp_path / name, text=struct.pack("<I", len(text)) + text)
        times.append(time.perf_counter() - start)
    assert times[1] < 20 * times[0] + 0.5


def damaged(content: bytes, rng: random.Random, hashed: bool) -> bytes:
    """Bytes changed, cut, repeated or put in; with `hashed`, the hash is that of the rest."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.choice([rng.randrange(16, 200), rng.randrange(16, len(data)),
                         rng.randrange(len(data))])
        word = rng.choice([0, 1, 255, 1 << 31, 0xFFFFFFFF, rng.randrange(1 << 32), len(content)])
        data[at:at + rng.choice([1, 4, 4, 4])] = struct.pack("<I", word)[:rng.choice([1, 4, 4, 4])]
    if rng.random() < 0.1:
        del data[rng.randrange(16, len(data)) & -8:]
    if hashed:
        data = bytearray(content[:12]) + data[12:len(data) & -8 or None]
        data[8:12] = struct.pack("<I", zlib.crc32(data[12:]))
    return bytes(data) if data != content else damaged(content, rng, hashed)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_and_texts(count: int, exported: Path, tmp_path: Path,
                                 build: Callable[..., Path]) -> None:
    """The hash finds any damage. Where it was made anew, nothing is read or written out of place,
    and no memory is lost: whatever is said, the sanitizers are silent."""
    rng, content = random.Random(0), (exported / "answer.bin").read_bytes()
    program = build(ROOT / "tests/tools/damaged.c", *SANITIZED)
    for file in exported.glob("model.onnx*"):
        (tmp_path / file.name).symlink_to(file)
    texts, refused = [text.encode() for text in random_texts(20, CHOICES)], set[str]()
    for _ in range(0, count, 100):
        cases = list[bytes]()
        for number in range(100):
            table = damaged(content, rng, hashed=number >= 30)
            text = bytearray(rng.choice(texts) + b"?")
            text[rng.randrange(len(text))] ^= rng.choice([0, 0, 128, 255])
            cases += [struct.pack("<3I", number % 3, len(table), len(text)), table, text]
        said = ask(program, tmp_path, tmp_path / "answer.bin", text=b"".join(cases)).splitlines()
        assert len(said) == 100 and "answered" not in said[:30]
        refused |= {*said[30:]}
    assert len(refused) > 3 and "answered" in refused


@pytest.mark.slow
def test_it_answers_on_arm(tmp_path: Path, build: Callable[..., Path]) -> None:
    """Cross-compiled for 64-bit ARM, and emulated, with the library of the wheel for it."""
    if lacking := [name for name in ("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
                   if not shutil.which(name)]:
        pytest.skip(f"no compiler or emulator: {', '.join(lacking)}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
           "--platform", "manylinux_2_28_aarch64", f"onnxruntime=={onnxruntime.__version__}"]
    if subprocess.run([*pip, "-d", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("the wheel for ARM cannot be downloaded")
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path / "wheel", "zip")
    library = next(tmp_path.glob("wheel/onnxruntime/capi/libonnxruntime.so.*"))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(library)
    # In floats: kernels of few bits differ by processor, and the untrained toy has close calls.
    ship(tmp_path / "toy", "--port --precision fp32")
    subprocess.run(["aarch64-linux-gnu-gcc", "-O2", tmp_path / "toy/answer.c", "-o",
                    tmp_path / "answer", f"-I{HEADERS.parent}", f"-L{tmp_path}", "-lonnxruntime",
                    "-lm"], check=True)
    questions = [m[0]["content"] for task in toy.tasks() for m in task.test][:20]
    done = subprocess.run(
        ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={tmp_path}",
         tmp_path / "answer", tmp_path / "toy", "--max-tokens=24"], capture_output=True, text=True,
        input="\n".join(questions), timeout=900)
    assert done.returncode == 0, done.stderr
    assert readable(done.stdout) == answers_of(tmp_path / "toy", questions)
