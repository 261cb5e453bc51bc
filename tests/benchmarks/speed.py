"""Speed and memory of one kind of work, beside peers: each side in a process of its own, in turn.

    python tests/benchmarks/speed.py train --model SMOLLM2 --data DATA    beside PEFT's LoRA
    python tests/benchmarks/speed.py probe --model SMOLLM2 --data DATA    beside a plain backward
    python tests/benchmarks/speed.py family                               families beside Llama
    python tests/benchmarks/speed.py decode OUT GENAI SMOLLM2.Q4_0.gguf   exports beside others'
    python tests/benchmarks/speed.py answers OUT --data DATA --tasks trec     from a set, or plain
    python tests/benchmarks/speed.py drafts OUT --data DATA --tasks calls     with and without
    python tests/benchmarks/speed.py growth --model SMOLLM2 --data DATA   by size of the model

OUT is a folder of export.py, GENAI one of onnxruntime-genai's model builder, and llama.cpp reads a
.gguf file. Prints the median of each figure over the rounds and, in brackets, the median of its
ratios to the first side within a round. `pip install ".[bench]"` installs the peers.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Import neither torch nor numpy here: start and memory of a side that needs neither are measured.
from minismoe.io.process import peak_resident
from minismoe.io.text import table

STARTED = float(os.environ.get("STARTED") or time.time())    # this process, as its parent says
Figures = dict[str, float]                   # what a side measures, by name and unit
CONTEXT = 2048
TEXT = "The quick brown fox jumps over the lazy dog, and the dog asks why it should be. " * 40
SIZES = {                                    # hidden, intermediate, layers, heads, key-value heads
    "135M": (576, 1536, 30, 9, 3), "360M": (960, 2560, 32, 15, 5), "1.7B": (2048, 8192, 24, 32, 32),
    "7B/4": (4096, 11008, 4, 32, 32)}        # four layers of a 7B
Read = Callable[[list[int]], Iterator[int]]      # a prompt, from an empty cache -> the next tokens


def ours(folder: Path, threads: int) -> tuple[list[int], Read]:
    from minismoe.runtime import Generator
    generator = Generator(folder, threads=threads)
    generator.tokenizer.stop_ids = []

    def read(ids: list[int]) -> Iterator[int]:
        generator.reset()
        return generator.generate(ids)

    return generator.tokenizer.encode(TEXT)[0], read


def genai(folder: Path, threads: int) -> tuple[list[int], Read]:
    import onnxruntime_genai as og
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {
        "intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def read(ids: list[int]) -> Iterator[int]:
        params = og.GeneratorParams(model)
        # A stop token ends nothing. The cache may not be shorter than an attention window.
        length = min(CONTEXT, max(512, len(ids) + 256))
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return og.Tokenizer(model).encode(TEXT).tolist(), read


def llama(file: Path, threads: int) -> tuple[list[int], Read]:
    import llama_cpp
    with contextlib.redirect_stderr(None):
        model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, n_threads=threads, n_batch=512,
                                n_threads_batch=threads, verbose=False)
    return (model.tokenize(TEXT.encode(), add_bos=False),
            lambda ids: model.generate(ids, top_k=1, temp=0.0, reset=True))


def decode(args: argparse.Namespace, side: str) -> Figures:
    """Tokens a second, read and written, memory, and the first token from the process's start."""
    path = Path(side)
    opened = (llama if path.suffix == ".gguf" else
              genai if (path / "genai_config.json").exists() else ours)
    ids, read = opened(path, args.threads)
    times = [time.time() for _ in zip(range(args.count), read(ids[:28]))]
    figures = {"tokens/s": 1 / statistics.median(b - a for a, b in zip(times, times[1:])),
               "first, s": times[0] - STARTED,
               "peak MB": peak_resident() / 1e6}
    for length in (28, 512):
        seconds = []
        for n in range(5):                   # a new first token, so that no prompt cache helps
            prompt, start = [*ids[n + 1:n + length], 28 + n], time.perf_counter()
            next(read(prompt))
            seconds.append(time.perf_counter() - start)
        figures[f"read {length}/s"] = length / statistics.median(seconds)
    files = path.glob("model.onnx*") if path.is_dir() else [path]
    return figures | {"file MB": sum(f.stat().st_size for f in files) / 1e6}


def asked(generator: Any, args: argparse.Namespace) -> tuple[Any, list[list[int]], list[str]]:
    """A task, and the prompts and right answers of its first test lines."""
    from minismoe.data.tasks import load_tasks
    (task,) = load_tasks(args.data, args.tasks)
    lines = task.test[:args.count]
    return (task, [generator.tokenizer.encode_chat(line[:-1], add_generation_prompt=True).ids
                   for line in lines], [str(line[-1].get("content")).strip() for line in lines])


def answers(args: argparse.Namespace, side: str) -> Figures:
    """Test lines of a task. The first token alone is the least that any way to answer takes."""
    from minismoe.data.answers import closed_answers
    from minismoe.runtime import Generator
    generator = Generator(args.paths[0], threads=args.threads)
    task, prompts, wanted = asked(generator, args)
    choices, given = closed_answers(task.train), []
    limit = 1 if side == "first token" else 4 + max(
        len(generator.tokenizer.encode(choice)[0]) for choice in choices)
    start = time.perf_counter()
    for prompt in prompts:
        given.append(generator.choose(prompt, choices)[0].text if side == "from the set" else
                     generator.tokenizer.decode(list(generator.generate(prompt, limit))).strip())
    return {"answers/s": len(prompts) / (time.perf_counter() - start),
            "exact %": 100 * statistics.mean(map(str.__eq__, given, wanted)),
            "valid %": 100 * statistics.mean(text in choices for text in given)}


def drafts(args: argparse.Namespace, side: str) -> Figures:
    """Decoding of answers after their first token: plain steps read one token, the others two or
    more, with drafts or without. The ratio of two texts' sums is 1.00 where no token differs."""
    from minismoe.runtime import Generator
    generator = Generator(args.paths[0], threads=args.threads)
    if side != "drafted":
        generator.drafts = None if side == "plain" else {}
    texts, seconds, steps = list[list[int]](), 0.0, 0
    for prompt in asked(generator, args)[1]:
        answer = generator.generate(prompt, 256)
        text, start = [next(answer, -1)], time.perf_counter()
        texts.append([*text, *answer])
        seconds += time.perf_counter() - start
        steps += answer.steps
    tokens = sum(map(len, texts))
    return {"ms an answer": 1e3 * seconds / len(texts), "tokens an answer": tokens / len(texts),
            "tokens a step": tokens / max(steps, 1), "sum": crc32(str(texts).encode())}


def checkpoint(folder: Path, size: str, tokenizer: str) -> None:
    """A checkpoint of a size with random weights in bfloat16, and the files of a tokenizer."""
    import torch
    from safetensors.torch import save_file

    from minismoe.model.config import Config
    from minismoe.model.decoder import meta_model
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")
    config = json.loads((folder / "config.json").read_text()) | dict(zip(names, SIZES[size]))
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {name: p.shape for name, p in meta_model(Config.from_dict(config)).named_parameters()}
    save_file({name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else
               torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5)
               for name, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"})


def growth(args: argparse.Namespace, side: str) -> Figures:
    """A model of a size, by the commands of a user: seconds and peak memory of each."""
    figures = Figures()

    def ran(name: str, *command: object) -> str:
        begun = time.time()
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out, cwd=ROOT)
            _, status, used = os.wait4(process.pid, 0)
            out.seek(0)
            said = out.read()
        if status:
            sys.exit(f"{side}: {name} failed: {said}")
        figures[f"{name}, s"] = time.time() - begun
        figures[f"{name}, GB"] = used.ru_maxrss * 1024 / 1e9
        return said

    with tempfile.TemporaryDirectory() as work:
        base, run, out = (Path(work) / name for name in ("base", "run", "out"))
        maker = get_context("spawn").Process(target=checkpoint, args=(base, side, args.model))
        maker.start()                        # whose memory would count as that of `ran` here
        maker.join()
        ran("train", "train.py", "--model", base, "--data", args.data, "--limit-train", 64,
            "--limit-test", 4, "--epochs", 1, "--out", run)
        steps = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        figures["train, tokens/s"] = statistics.median(s["tokens_per_second"] for s in steps)
        ran("export", "export.py", run, "--out", out)
        found = json.loads(ran("decode", __file__, "decode", out, "--side", out))
        return figures | {"decode, tokens/s": found["tokens/s"]}


def training(work: str) -> Callable[[argparse.Namespace, str], Figures]:
    """A work of speed_training.py, which imports torch when a side begins."""
    return lambda args, side: getattr(import_module("speed_training"), work)(args, side)


WORKS: dict[str, tuple[Callable[[argparse.Namespace, str], Figures], Sequence[str]]] = {
    "train": (training("train"), ("PEFT", "ours")),
    "probe": (training("score"), ("backward", "probe", "published")),
    "family": (training("family"), ("llama", "smollm3", "gemma3_text", "lfm2", "qwen3_5_text")),
    "decode": (decode, ()),                  # the given folders and files
    "answers": (answers, ("plain", "first token", "from the set")),
    "drafts": (drafts, ("plain", "no drafts", "drafted")),
    "growth": (growth, tuple(SIZES))}


def report(seen: dict[str, list[Figures]]) -> str:
    """A row for each side, with its figures of all rounds; the ratios are to the first side."""
    first = next(iter(seen.values()))
    rows = []
    for side, results in seen.items():
        cells = [side]
        for name in first[0]:
            ratio = statistics.median(a[name] / (b[name] or 1) for a, b in zip(results, first))
            cells.append(f"{statistics.median(a[name] for a in results):.4g} ({ratio:.2f})")
        rows.append(cells)
    return table(["", *first[0]], rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("paths", nargs="*", help="folders and files to open")
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--data", help="folder of tasks")
    parser.add_argument("--tasks", default="", help="comma list (default: all of the folder)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=128, help="of timed tokens, lines or batches "
                        "(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of a family (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of an export (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="processes a side (default: 5)")
    parser.add_argument("--sides", help="comma list (default: all)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.tasks = [name for name in args.tasks.split(",") if name]
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    measure, sides = WORKS[args.work]
    if args.side:
        print(json.dumps(measure(args, args.side)))
        return
    seen: dict[str, list[Figures]] = {
        side: [] for side in (args.sides.split(",") if args.sides else sides or args.paths)}
    for _ in range(args.rounds):
        for side, results in seen.items():
            done = subprocess.run([sys.executable, __file__, *argv, "--side", side], check=True,
                                  stdout=subprocess.PIPE,
                                  env={**os.environ, "STARTED": str(time.time())})
            results.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{args.work}: medians of {args.rounds} rounds in turn, and ratios to {next(iter(seen))}")
    print(report(seen))


if __name__ == "__main__":
    main(sys.argv[1:])
