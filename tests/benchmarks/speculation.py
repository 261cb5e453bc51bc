"""Decoding with and without speculation, on texts that copy their prompt and on others.

    python tests/benchmarks/speculation.py --folder EXPORTED --data DATA [--genai FOLDER]

Copies repeat or correct the passages of a file (--passages: JSON lines with a passage and a
question, as of BoolQ) or the longest instructions in DATA/piqa; answers quote them or answer from
them. Other texts answer the questions of DATA/boolq and the requests of DATA/clinc by themselves.
Each prompt is answered with and without speculation in turn, greedily, from an empty
cache; times are of the tokens after the first. --genai is a folder of onnxruntime-genai's own
builder (`python -m onnxruntime_genai.models.builder -i MODEL -o FOLDER -p int4 -e cpu`), which
answers the same prompts with and without its own speculation by n-grams. At the end: what a step
costs that reads several tokens, which bounds what drafts can win, and whether tokens change.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHORT = 8                                    # tokens of an answer that says nothing of speed
REACH = {"copies": 1.3, "answers": 1.3, "others": 0.97}
# What speculation by n-grams may do in onnxruntime-genai 0.18, everything on.
THEIRS = {"ngram_size": 3, "max_draft_tokens": 8, "min_adaptive_k": 2, "cooldown": True,
          "ngram_chained_lookup": True}
ASKED = {"copies": ("Repeat this text word for word:\n\n{passage}",
                    "Correct the spelling of this paragraph, and write it out again:\n\n{passage}"),
         "answers": ("{passage}\n\nQuestion: {question}? Quote the sentence that answers it.",
                     "{passage}\n\nQuestion: {question}?")}
# A prompt, the most tokens, whether to speculate -> the tokens, then how many steps there were.
Answer = Callable[[list[int], int, bool], Iterator[int]]


class Run(NamedTuple):
    """One answer: its tokens, and the seconds and steps that those after the first took."""

    tokens: list[int]
    seconds: float
    steps: int


def ours(generator: Any) -> tuple[Answer, Callable[[], int]]:
    def answer(prompt: list[int], most: int, speculate: bool) -> Iterator[int]:
        generator.reset()
        return generator.generate(prompt, most, speculate=speculate)
    return answer, lambda: generator.steps


def genai(folder: Path, threads: int) -> tuple[Answer, Callable[[], int]]:
    import onnxruntime_genai as og
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {
        "intra_op_num_threads": threads}}}}))
    model, steps = og.Model(config), [0]
    stop = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    stops = stop if isinstance(stop, list) else [stop]

    def answer(prompt: list[int], most: int, speculate: bool) -> Iterator[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + most, do_sample=False)
        if speculate:
            params.set_speculative_options(**THEIRS)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        count = 0
        while not generator.is_done():
            generator.generate_next_token()
            count += 1
            if (token := int(generator.get_next_tokens()[0])) not in stops:
                yield token
        if speculate:                        # but for those accepted, a step wrote each token
            steps[0] = count - 1 - int(generator.get_speculative_stats()["draft_tokens_accepted"])
    return answer, lambda: steps[0]


def timed(answer: Answer, steps: Callable[[], int], prompt: list[int], most: int, speculate: bool,
          clock: Callable[[], float]) -> Run:
    running = answer(prompt, most, speculate)
    tokens = [next(running)]
    start = clock()
    tokens += running
    seconds = clock() - start
    return Run(tokens, seconds, steps() if speculate else len(tokens) - 1)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def questions(data: Path, count: int) -> list[str]:
    """Questions and requests without a passage."""
    asked = [line["instruction"].partition("question: ")[2].partition("\n")[0]
             for line in lines(data / "boolq/test.jsonl")[:count]]
    return [q[:1].upper() + q[1:] for q in asked] + [
        line["input"] for line in lines(data / "clinc/test.jsonl")[:count]]


def passages(data: Path, file: str | None, count: int) -> list[dict[str, str]]:
    if file:
        return [x for x in lines(Path(file)) if 250 < len(x["passage"]) < 1000][:count]
    found = []
    for line in lines(data / "piqa/test.jsonl"):
        goal, _, rest = line["instruction"].partition("question: ")[2].partition("\n")
        solution = rest.partition("Solution1: ")[2].partition("Solution2: ")[0].strip()
        found.append({"passage": solution, "question": goal.strip(" ?")})
    return sorted(found, key=lambda x: -len(x["passage"]))[:count]


def report(side: str, kind: str, runs: Sequence[tuple[list[Run], list[Run]]]) -> float:
    """Print one row; returns the ratio of tokens a second. runs: without and with, by prompt.

    Without runs, as where all answers are short, there is no ratio: it is nan.
    """
    if not runs:
        print(f"{side:7} {kind:8} no answer of more than {SHORT} tokens")
        return math.nan

    def rate(which: int) -> float:
        return sum(len(pair[which][0].tokens) - 1 for pair in runs) / sum(
            statistics.median(run.seconds for run in pair[which]) for pair in runs)

    ratios = [statistics.median(a.seconds / b.seconds for a, b in zip(*pair))
              * (len(pair[1][0].tokens) - 1) / (len(pair[0][0].tokens) - 1) for pair in runs]
    same = sum(len({tuple(run.tokens) for which in pair for run in which}) == 1 for pair in runs)
    written = sum(len(pair[1][-1].tokens) - 1 for pair in runs)
    print(f"{side:7} {kind:8} {len(runs):5} {written:7} {rate(0):8.1f} {rate(1):8.1f} "
          f"{written / max(1, sum(pair[1][-1].steps for pair in runs)):7.2f} "
          f"{rate(1) / rate(0):7.2f} {statistics.median(ratios):7.2f} {min(ratios):7.2f} "
          f"{same:5} of {len(runs)}", flush=True)
    return rate(1) / rate(0)


def print_rows(generator: Any, prompt: list[int], clock: Callable[[], float]) -> None:
    """Print the time of a step by the tokens that it reads, and whether its logits are exact."""
    from minismoe.runtime.speculate import ROWS, read_rows, rows_are_exact
    generator.reset()
    generator.step([prompt])
    times: list[list[float]] = [[] for _ in range(ROWS)]
    for n in [*range(ROWS)] * 20:
        start = clock()
        if n:
            read_rows(generator, prompt[:n + 1], range(len(prompt), len(prompt) + n + 1))
        else:
            generator.step([prompt[:1]])
        times[n].append(clock() - start)
        generator.cut(len(prompt))
    one, *several = map(statistics.median, times)
    drafts = [(seconds / one - 1) / n for n, seconds in enumerate(several, start=1)]
    print(f"after {len(prompt)} tokens, a step that reads 1 token takes {1000 * one:.1f} ms; each "
          f"of {len(drafts)} drafts adds {min(drafts):.2f} to {max(drafts):.2f} of that")
    print("rows of a step have the logits of plain steps: "
          + ("yes" if rows_are_exact(generator, *prompt[:2]) else "no, so nothing is drafted"))


def print_changes(generator: Any, prompts: Sequence[list[int]], most: int) -> None:
    """Print how many tokens would be others if plain decoding read ROWS of them at once."""
    from minismoe.runtime.speculate import ROWS, read_rows
    compared = changed = 0
    for prompt in prompts:
        generator.reset()
        text = list(generator.generate(prompt, most, speculate=False))
        generator.cut(len(prompt))
        for start in range(0, len(text) - 1, ROWS):
            part, seen = text[start:start + ROWS], len(prompt) + start
            logits = read_rows(generator, part, range(seen, seen + len(part)))
            found = generator._choose(logits, random.Random(0), 0.0, 1.0, 0)
            pairs = list(zip(text[start + 1:], found))
            compared += len(pairs)
            changed += sum(a != b for a, b in pairs)
    print(f"read {ROWS} at once, {changed} of {compared} tokens would be others")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="of export.py, layout onnx")
    parser.add_argument("--data", required=True, type=Path, help="folder with piqa, boolq, clinc")
    parser.add_argument("--genai", type=Path, help="the same model for onnxruntime-genai")
    parser.add_argument("--passages", help="a file of JSON lines to copy from; default: DATA/piqa")
    parser.add_argument("--count", type=int, default=8, help="passages, and questions of each task")
    parser.add_argument("--tokens", type=int, default=128, help="an answer's most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="count seconds of the CPU, not of the "
                        "clock: with --threads 1, where other programs run")
    args = parser.parse_args()
    from minismoe.runtime import Generator
    mine = Generator(args.folder, threads=args.threads)
    tokenizer = mine.tokenizer
    sides = {"ours": ours(mine)}
    if args.genai:
        sides["genai"] = genai(args.genai, args.threads)
    texts = {kind: [tokenizer.encode(tokenizer.render([{"role": "user", "content": text}], True))[0]
                    for text in found] for kind, found in {
        **{kind: [ask.format(**x) for ask in asked
                  for x in passages(args.data, args.passages, args.count)]
           for kind, asked in ASKED.items()},
        "others": questions(args.data, args.count)}.items()}
    clock = time.process_time if args.cpu else time.perf_counter
    print("tokens/s without and with speculation, tokens a step; ratio of all texts, their median "
          "and least; texts that stay the same\n"
          "side    kind     texts  tokens  without     with  a step   ratio  median   least  same")
    for side, (answer, steps) in sides.items():
        list(answer(texts["copies"][0], 16, True))           # warm
        for kind, prompts in texts.items():
            runs = []
            for prompt in prompts:
                pair: tuple[list[Run], list[Run]] = ([], [])
                for n in range(2 * args.rounds):
                    which = (n + 1) // 2 % 2                 # 0 1 1 0 0 1: drift meets both
                    pair[which].append(timed(answer, steps, prompt, args.tokens, bool(which),
                                             clock))
                if len(pair[0][0].tokens) > SHORT:
                    runs.append(pair)
            ratio = report(side, kind, runs)
            if side == "ours" and runs:
                print(f"        to reach: {REACH[kind]}" + ("" if ratio >= REACH[kind] else
                                                            ": not reached"))
    print_rows(mine, texts["copies"][0], clock)
    print_changes(mine, [p for prompts in texts.values() for p in prompts], args.tokens)


if __name__ == "__main__":
    main()
