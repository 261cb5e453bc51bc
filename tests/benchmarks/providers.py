"""What exported folders answer on onnxruntime's providers, beside what they answer on the CPU.

    python tests/benchmarks/providers.py FOLDER... [--providers cpu,webgpu,openvino] [--long 1000]

For each folder and provider, in a process of its own: how many of 20 prompts have the CPU's greedy
text, and that of "exact"; how many nodes run on the provider; seconds to load and to the first
token, ms a token, and peak memory. "exact" is the CPU without the rounding of activations to 8 bits
that it does beside weights in few bits, and others do not. --long also reads a text of so many
tokens, and compares logits along it with those of exact: in its first third, and in its last.
Where there is no device, Mesa's software stands in for a GPU, and OpenVINO runs on any processor:
the seconds of software say nothing about a device.
"""

import argparse
import ctypes
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Import no torch here: this file is also the child that measures memory.

QUESTIONS = (
    "What is the capital of France?", "Write a haiku about the sea.", "Count from one to ten.",
    "Who wrote Hamlet?", "What is 17 + 25?", "Name three fruits.", "Why is the sky blue?",
    "Translate 'good morning' to Spanish.", "What is photosynthesis?", "Give a synonym of happy.",
    "How many days has a week?", "What does a compiler do?", "Tell me a joke.",
    "What is the largest planet?", "How do I boil an egg?", "What is the opposite of cold?",
    "Explain gravity to a child.", "Which colours has a rainbow?", "What is the square of 12?",
    "Finish the proverb: an apple a day")
TOKENS = 8                                   # of each answer
STEP = 31                                    # tokens of the long text a step


def child(folder: Path, provider: str, prompts: int, long: int) -> None:
    """Measure one provider in this process, and print the result as JSON."""
    import accelerators

    from minismoe.io.process import peak_resident
    from minismoe.runtime import Generator

    if provider != "exact" and (why := accelerators.missing(provider)):
        print(json.dumps({"missing": why}))
        return
    start = time.perf_counter()
    try:
        generator = Generator(folder, None if provider == "exact" else provider)
        if provider == "exact":
            from minismoe.export.compare import stop_rounding
            stop_rounding(generator)
    except ValueError as e:
        print(json.dumps({"missing": str(e)}))
        return
    nodes = {ep: int(said.split()[0]) for ep, said in generator.nodes.items()}
    found: dict[str, Any] = {
        "load": time.perf_counter() - start, "nodes": nodes, "texts": [], "logits": []}
    gaps, firsts = [], []
    for question in QUESTIONS[:prompts]:
        prompt = generator.tokenizer.render([{"role": "user", "content": question}], True)
        times, tokens = [time.perf_counter()], []
        for token in generator.generate(prompt, TOKENS):
            tokens.append(token)
            times.append(time.perf_counter())
        gaps += [b - a for a, b in zip(times[1:], times[2:])]
        firsts.append(times[1] - times[0])
        found["texts"].append(tokens)
    found |= {"first": sorted(firsts)[len(firsts) // 2], "gap": sorted(gaps)[len(gaps) // 2],
              "peak": peak_resident() / 1e6}
    if long:
        ids = generator.tokenizer.encode((ROOT / "README.md").read_text())[0][:long]
        generator.reset()
        for at in range(0, len(ids), STEP):
            logits = generator.read(ids[at:at + STEP])
            found["logits"].append(ctypes.cast(
                logits.data_ptr(), ctypes.POINTER(ctypes.c_float))[:logits.shape()[-1]])
    print(json.dumps(found))


def measured(folder: Path, provider: str, prompts: int, long: int) -> dict[str, Any]:
    """What `child` prints in a process of its own."""
    done = subprocess.run([sys.executable, __file__, str(folder), "--child", provider, "--prompts",
                           str(prompts), "--long", str(long)], capture_output=True, text=True)
    if done.returncode:
        return {"missing": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def apart(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> list[float]:
    """The largest difference of logits in each step, as a share of the largest logit."""
    return [max(abs(x - y) if math.isfinite(x) else math.inf for x, y in zip(a, b)) / max(
        map(abs, b)) for a, b in zip(found, wanted, strict=True)]


def row(folder: Path, provider: str, seen: dict[str, Any], cpu: dict[str, Any],
        exact: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "missing" in seen:
        return [folder.name, provider, seen["missing"]]
    same = [sum(map(list.__eq__, seen["texts"], other["texts"])) for other in (cpu, exact)]
    total, on_cpu = sum(seen["nodes"].values()), seen["nodes"].get("CPUExecutionProvider", 0)
    cells = [folder.name, provider, *(f"{n} of {len(cpu['texts'])}" for n in same),
             f"{total if provider == 'cpu' else total - on_cpu} of {total}", f"{seen['load']:.1f}",
             f"{seen['first']:.2f}", f"{1000 * seen['gap']:.0f}", f"{seen['peak']:.0f}"]
    if steps := apart(seen["logits"], exact["logits"]):
        third = len(steps) // 3 or 1
        cells += [f"{max(steps[:third]):.1e}", f"{max(steps[-third:]):.1e}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--providers", default="cpu,webgpu,openvino", help="comma list")
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--long", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.folders[0], args.child, args.prompts, args.long)
        return
    from minismoe.io.text import table

    header = ["folder", "provider", "texts as cpu", "as exact", "nodes", "load s", "first s",
              "ms a token", "MB"]
    header += [f"logits, {args.long} tokens: first third", "last third"] if args.long else []
    rows = []
    for folder in args.folders:
        cpu, exact = (measured(folder, side, args.prompts, args.long) for side in ("cpu", "exact"))
        for provider in args.providers.split(","):
            seen = cpu if provider == "cpu" else measured(folder, provider, args.prompts, args.long)
            rows.append(row(folder, provider, seen, cpu, exact))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(table(header, [r + [""] * (len(header) - len(r)) for r in rows]))


if __name__ == "__main__":
    main()
