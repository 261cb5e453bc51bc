"""Answers from a set against plain greedy ones.

    python tests/benchmarks/answers.py --folder EXPORTED --data DATA --tasks clinc,banking77

Each task's set is that of its training lines. One process asks the same questions in turns: plain
and from the set. Prints medians over rounds, and ratios within a round. A plain answer is valid if
it is one of the set.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minismoe.data.tasks import Task, closed_answers, load_tasks
from minismoe.io.text import table
from minismoe.runtime import Generator

Ask = Callable[[Sequence[list[int]]], list[str]]         # prompts -> answers
WARM_UP = 16                                 # prompts


def ways(generator: Generator, choices: Sequence[str]) -> dict[str, Ask]:
    """Ways to answer. A plain answer may be 4 tokens longer than the longest of the set. The first
    token alone is no answer: its time is the least that any way to answer takes."""
    encode, decode = generator.tokenizer.encode, generator.tokenizer.decode
    limit = max(len(encode(choice)[0]) for choice in choices) + 4
    return {
        "plain": lambda prompts: [decode(list(generator.generate(p, limit))).strip()
                                  for p in prompts],
        "first token": lambda prompts: [decode(list(generator.generate(p, 1))).strip()
                                        for p in prompts],
        "choices": lambda prompts: [generator.choose(p, choices)[0].text for p in prompts]}


def measure(generator: Generator, task: Task, args: argparse.Namespace) -> list[list[object]]:
    """Rows of the table on one task: the ways, and then their ratios."""
    choices, lines = closed_answers(task.train), task.test[:args.lines]
    render, encode = generator.tokenizer.render, generator.tokenizer.encode
    prompts = [encode(render(messages[:-1], add_generation_prompt=True))[0] for messages in lines]
    wanted = [messages[-1]["content"].strip() for messages in lines]
    sides, seconds, given = ways(generator, choices), {}, {}
    for number in range(args.rounds + 1):
        for side, ask in sides.items():
            start = time.perf_counter()
            given[side] = ask(prompts if number else prompts[:WARM_UP])
            if number:                       # the first round warms up
                seconds.setdefault(side, []).append(time.perf_counter() - start)
    rows: list[list[object]] = []
    for side, answers in given.items():
        exact = sum(a == b for a, b in zip(answers, wanted)) / len(wanted)
        valid = sum(answer in choices for answer in answers) / len(answers)
        rows.append([task.name, side, f"{len(prompts) / statistics.median(seconds[side]):.1f}",
                     f"{100 * exact:.1f}", f"{100 * valid:.1f}"])
    for side in ("first token", "choices"):
        ratio = statistics.median(b / a for a, b in zip(seconds[side], seconds["plain"]))
        rows.append([task.name, f"{side} / plain", f"{ratio:.2f} x", "", ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="an exported folder of layout onnx")
    parser.add_argument("--data", required=True, help="the tasks' folder")
    parser.add_argument("--tasks", default="clinc,banking77", help="comma list")
    parser.add_argument("--lines", type=int, default=150, help="test lines a task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    generator = Generator(args.folder, threads=args.threads)
    rows = []
    for task in load_tasks(args.data, args.tasks.split(",")):
        rows += measure(generator, task, args)
    print(f"{args.lines} test lines, {args.threads} threads, median of {args.rounds} rounds")
    print(table(["task", "way", "answers/s", "exact match", "valid"], rows))


if __name__ == "__main__":
    main()
