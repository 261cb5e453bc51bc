"""Answers from a set against plain greedy ones, and the first token after a prefix that is kept.

    python tests/benchmarks/answers.py --folder EXPORTED --data DATA --tasks clinc,banking77

Each task's set is that of its training lines. One process asks the same questions in turns: plain
and from the set, one prompt at a time and in batches. Prints medians over rounds, and ratios
within a round. A plain answer is valid if it is one of the set. The prefix is a system prompt of
about 400 tokens, made of training lines.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minismoe.data.tasks import Task, closed_answers, load_tasks
from minismoe.io.text import table
from minismoe.runtime import Generator
from minismoe.runtime.prefix import shared_tokens

Ask = Callable[[Sequence[list[int]]], list[str]]         # prompts -> answers
RATIOS = [("first token, single", "plain, single"), ("choices, single", "plain, single"),
          ("choices, batches", "plain, single"), ("choices, batches", "plain, batches")]


def ways(generator: Generator, choices: Sequence[str], batch: int) -> dict[str, Ask]:
    """Ways to answer. A plain answer may be 4 tokens longer than the longest of the set. The first
    token alone is no answer: its time is the least that any way to answer takes."""
    encode, decode = generator.tokenizer.encode, generator.tokenizer.decode
    limit = max(len(encode(choice)[0]) for choice in choices) + 4

    def batched(ask: Ask) -> Ask:
        return lambda prompts: [answer for start in range(0, len(prompts), batch)
                                for answer in ask(prompts[start:start + batch])]
    return {
        "plain, single": lambda prompts: [decode(list(generator.generate(p, limit))).strip()
                                          for p in prompts],
        "first token, single": lambda prompts: [decode(list(generator.generate(p, 1))).strip()
                                                for p in prompts],
        "choices, single": lambda prompts: [generator.choose(p, choices)[0].text for p in prompts],
        "plain, batches": batched(lambda prompts: [
            decode(tokens).strip() for tokens in generator.batch(prompts, limit)]),
        "choices, batches": lambda prompts: [
            best.text for best, in generator.choose_batch(prompts, choices)]}


def measure(generator: Generator, task: Task, args: argparse.Namespace) -> list[list[object]]:
    """Rows of the table on one task: the ways, and then their ratios."""
    choices, lines = closed_answers(task.train), task.test[:args.lines]
    render, encode = generator.tokenizer.render, generator.tokenizer.encode
    prompts = [encode(render(messages[:-1], add_generation_prompt=True))[0] for messages in lines]
    wanted = [messages[-1]["content"].strip() for messages in lines]
    sides, seconds, given = ways(generator, choices, args.batch), {}, {}
    for number in range(args.rounds + 1):
        for side, ask in sides.items():
            start = time.perf_counter()
            given[side] = ask(prompts if number else prompts[:args.batch])
            if number:                       # the first round warms up
                seconds.setdefault(side, []).append(time.perf_counter() - start)
    rows: list[list[object]] = []
    for side, answers in given.items():
        exact = sum(a == b for a, b in zip(answers, wanted)) / len(wanted)
        valid = sum(answer in choices for answer in answers) / len(answers)
        rows.append([task.name, side, f"{len(prompts) / statistics.median(seconds[side]):.1f}",
                     f"{100 * exact:.1f}", f"{100 * valid:.1f}"])
    for fast, slow in RATIOS:
        ratio = statistics.median(b / a for a, b in zip(seconds[fast], seconds[slow]))
        rows.append([task.name, f"{fast} / {slow}", f"{ratio:.2f} x", "", ""])
    return rows


def first_token(generator: Generator, task: Task, rounds: int) -> list[list[object]]:
    """Milliseconds to the first token of a short question after a system prompt of 400 tokens."""
    tokenizer, shots = generator.tokenizer, ""
    lines = iter(task.train)
    while len(tokenizer.encode(shots)[0]) < 380:
        question, answer = next(lines)[-2:]
        shots += f"{question['content']} -> {answer['content']}\n"

    def write(said: str) -> str:
        return tokenizer.render([{"role": "system", "content": shots},
                                 {"role": "user", "content": said}], True)
    prefix, prompt = shared_tokens(tokenizer, write), tokenizer.encode(write("And this?"))[0]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefix.safetensors"
        for number in range(rounds + 1):
            for side in ("read", "from the file", "in memory"):
                if side == "in memory":
                    generator.keep(prefix, file)
                else:
                    generator.use(None)      # forgets a prefix
                generator.reset()
                start = time.perf_counter()
                if side == "from the file":
                    generator.keep(prefix, file)
                next(generator.generate(prompt))
                if number:                   # the first round warms up, and writes the file
                    seconds.setdefault(side, []).append(time.perf_counter() - start)
        size = file.stat().st_size / 1e6
    name = f"{len(prefix)} of {len(prompt)} tokens, {size:.1f} MB"
    return [[name, side, f"{1000 * statistics.median(times):.0f} ms",
             f"{statistics.median(a / b for a, b in zip(seconds['read'], times)):.1f} x"]
            for side, times in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="an exported folder of layout onnx")
    parser.add_argument("--data", required=True, help="the tasks' folder")
    parser.add_argument("--tasks", default="clinc,banking77", help="comma list")
    parser.add_argument("--lines", type=int, default=150, help="test lines a task")
    parser.add_argument("--batch", type=int, default=16, help="prompts a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    generator = Generator(args.folder, threads=args.threads)
    rows, tasks = [], load_tasks(args.data, args.tasks.split(","))
    for task in tasks:
        rows += measure(generator, task, args)
    print(f"{args.lines} test lines, {args.threads} threads, median of {args.rounds} rounds")
    print(table(["task", "way", "answers/s", "exact match", "valid"], rows))
    print(table(["prefix", "way", "first token", "faster"],
                first_token(generator, tasks[0], args.rounds)))


if __name__ == "__main__":
    main()
