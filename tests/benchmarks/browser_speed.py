"""The page of layout web in headless Chromium, as a user sees it: load time, first token, tokens a
second, the tab's memory and, with --data, exact match on test lines.

    python export.py RUN --layout web --out WEB
    MINISMOE_NODE_MODULES=... python tests/benchmarks/browser_speed.py WEB --data DATA --tasks trec

A folder without vendor/ gets the files of MINISMOE_NODE_MODULES. Figures are those that the page
prints; load time runs from the first request to the line "Ready", and once more when the page is
loaded again. Measure speed on an export of a base, whose answers are long: they are stopped after
--seconds.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser, vendor

from minismoe.data.tasks import load_tasks

WARM = 5                                 # answers during which the browser still compiles WASM
PROMPT = "What is the capital of France, and why is it so well known?"


def ask(tab: Browser, text: str, seconds: float, anew: bool = True, task: str = "",
        ) -> tuple[str, str]:
    """The answer to a message, stopped after some seconds, and the figures below it.

    anew: the message begins a chat. task: the page answers from its set, or writes on if it has
    none; "" is a chat.
    """
    tab.js(f"document.querySelector('#task').value = '{task}'")
    if anew:
        tab.js("document.querySelector('#anew').click()")
    tab.js("document.querySelector('#text').focus()")
    tab.type(text)
    tab.press("Enter", 13)
    end = time.monotonic() + seconds
    while tab.text("#status") == "Answering" and time.monotonic() < end:
        time.sleep(0.5)                      # asking more often would slow the two cores down
    tab.press("Escape", 27)
    figures = tab.wait_status("First token after", "Answered after", seconds=120)
    return tab.text(".assistant"), figures


def loading(tab: Browser, address: str) -> float:
    """Seconds until the page is ready."""
    start = time.perf_counter()
    tab.open(address)
    tab.wait_status("Loading")
    print(tab.wait_status("Ready", seconds=300))
    return time.perf_counter() - start


def peak(pid: int) -> float:
    """The most GB that the process or one of its descendants has held: of a browser's, the tab."""
    process = Path(f"/proc/{pid}")
    held = re.search(r"VmHWM:\s*(\d+)", (process / "status").read_text())
    children = " ".join(file.read_text() for file in process.glob("task/*/children")).split()
    return max(int(held[1]) / 976562.5 if held else 0, *map(peak, map(int, children)), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an export with --layout web")
    parser.add_argument("--rounds", type=int, default=10, help="answers measured (default: 10)")
    parser.add_argument("--seconds", type=float, default=4, help="of an answer (default: 4)")
    parser.add_argument("--data", type=Path, help="folder of task folders with test.jsonl")
    parser.add_argument("--tasks", default="trec,clinc,banking77", help="of --data, a comma list")
    parser.add_argument("--lines", type=int, default=50, help="of each task (default: 50)")
    args = parser.parse_args()
    if not (args.folder / "vendor").exists():
        vendor(args.folder)
    server = subprocess.Popen([sys.executable, "-m", "minismoe.runtime", str(args.folder),
                               "--serve"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        address = server.stdout.readline().split()[0]
        with Browser() as tab:
            loads = [loading(tab, address) for _ in range(2)]
            print(f"load: {loads[0]:.1f} s, again {loads[1]:.1f} s")
            print(f"memory of the tab at most: {peak(tab.process.pid):.2f} GB")
            found = [ask(tab, PROMPT, args.seconds)[1].split() for _ in range(WARM + args.rounds)]
            first, rate = ([float(words[i]) for words in found] for i in (3, 5))
            at_once, first, rate = first[0], first[WARM:], rate[WARM:]
            print(f"first token {at_once:.2f} s at once, then {statistics.median(first):.2f} s, "
                  f"{statistics.median(rate):.1f} tokens/s ({min(rate):.1f} to {max(rate):.1f})")
            chat = [ask(tab, PROMPT, args.seconds, anew=i == 0)[1].split()[3] for i in range(3)]
            print(f"first token of the messages of a chat: {', '.join(chat)} s")
            for task in load_tasks(args.data, args.tasks.split(",")) if args.data else ():
                lines = task.test[:args.lines]
                instruction = task.instruction or ""     # the page puts it before the message
                right = sum(ask(tab, question["content"].removeprefix(instruction), 60,
                                task=task.name)[0].strip() == answer["content"].strip()
                            for question, answer in lines)
                print(f"{task.name}: {right} of {len(lines)} exact", flush=True)
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
