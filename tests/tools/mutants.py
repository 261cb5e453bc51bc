"""Change one place of the package at a time, and see whether a test fails.

    python tests/tools/mutants.py --seed 1 --count 20 [--room export]

The room's tests, and those that name the module, run in a copy of the tree, quickest first.
A survivor that means the same stands in equivalent_mutants.txt, above the reason.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAIRS = "Add Sub Mult Div BitAnd BitOr Lt LtE Gt GtE Eq NotEq In NotIn Is IsNot And Or".split()
SWAPS = dict(zip(PAIRS[::2], PAIRS[1::2])) | dict(zip(PAIRS[1::2], PAIRS[::2])) | {
    "Mod": "Mult", "FloorDiv": "Mult", "Pow": "Mult", "LShift": "RShift", "RShift": "LShift"}
PYTEST = [sys.executable, *"-m pytest -xq -n 0 -p no:cacheprovider --basetemp ../tmp".split()]
DRIVES = {own: (f"tests/{own}/", "tests/cli/", "tests/test_")       # of scripts, or of all
          for own in ("scripts", "cli", "io", "data", "training", "export", "runtime")}


def variants(node: Any) -> Iterator[dict[str, Any]]:
    """Fields of a node, as they may be changed."""
    kind, value = type(node).__name__, getattr(node, "value", None)
    operator = getattr(node, "op", [*getattr(node, "ops", ()), None][0])
    if swapped := SWAPS.get(type(operator).__name__):
        new = getattr(ast, swapped)()
        yield {"ops": [new, *node.ops[1:]]} if kind == "Compare" else {"op": new}
    elif kind == "Constant" and isinstance(value, bool | int | float):
        yield {"value": not value if isinstance(value, bool) else value + 1}
    elif kind == "Constant" and isinstance(value, str) and value.isidentifier():
        yield {"value": value + "_"}                     # a key or a name, and no message
    elif kind in ("If", "IfExp", "While"):
        yield {"test": ast.UnaryOp(ast.Not(), node.test)}
    elif kind == "Call":
        for name, parts in ("args", node.args), ("keywords", node.keywords):
            yield from ({name: parts[:i] + parts[i + 1:]} for i in range(len(parts)))
        yield {"args": node.args[1::-1] + node.args[2:]}
    elif kind in ("Return", "Expr") and not isinstance(value, ast.Constant | ast.Yield):
        yield {"value": ast.Constant(None)}              # a call by itself is left out


def mutants(tree: ast.AST) -> Iterator[str]:
    """All changes of a tree, described; the tree holds a change while it is the one given."""
    for node in ast.walk(tree):
        for fields in variants(node):
            before, old = ast.unparse(node), {name: getattr(node, name) for name in fields}
            vars(node).update(fields)
            if (after := ast.unparse(node)) != before:
                yield " -> ".join(" ".join(text.split())[:90] for text in (before, after))
            vars(node).update(old)


def room(file: str) -> str:
    return file.split("/")[1] if file.count("/") > 1 else "scripts"


def passes(tree: Path, files: list[str], limit: float) -> bool:
    """Whether test files pass in a tree within so many seconds: a hang is seen, too."""
    process = subprocess.Popen([*PYTEST, *files], cwd=tree, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:                                             # also where SIGTERM ends this tool
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def survives(file: str, source: str, tree: Path, seconds: dict[str, Any]) -> bool:
    """Whether all tests pass with the source in place of a file's; seconds: of each test file."""
    places, before = DRIVES.get(room(file), (f"tests/{room(file)}/",)), (tree / file).read_text()
    files = [f for path in tree.rglob("test_*.py")
             if (f := path.relative_to(tree).as_posix()).startswith(places)
             or file[:-3].replace("/", ".") in path.read_text()]
    for f in {*files} - seconds.keys():                  # what fails unchanged is left out
        begun = time.monotonic()
        seconds[f] = passes(tree, [f], 3600) * (time.monotonic() - begun)
    files = sorted((f for f in files if seconds[f]), key=seconds.__getitem__)
    (tree / file).write_text(source)
    passed = passes(tree, files, 30 + 5 * sum(seconds[f] for f in files))
    (tree / file).write_text(before)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--room", help="of minismoe, or scripts (default: all)")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SHARE", help="exit with 1 "
                        "if fewer of those that are not equivalent are killed (default: 0)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    files = [f.relative_to(ROOT).as_posix() for f in sorted(
        [*ROOT.glob("*.py"), *ROOT.glob("minismoe/**/*.py")])]
    places = [(f, n) for f in files if args.room in (None, room(f))
              for n, _ in enumerate(mutants(ast.parse((ROOT / f).read_text())))]
    same = (ROOT / "tests/tools/equivalent_mutants.txt").read_text().splitlines()
    kept = Path(tempfile.gettempdir()) / f"mutants-{args.seed}-{args.count}-{args.room}.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    ends = Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(ROOT, f"{folder}/tree", ignore=shutil.ignore_patterns(
            ".git", "runs", "__pycache__")))
        for file, number in sorted(random.Random(args.seed).sample(places, args.count)):
            parsed = ast.parse((ROOT / file).read_text())
            changes = islice(mutants(parsed), number, None)
            name = f"{file}: {next(changes)}"            # `parsed` is changed from now on
            if name not in known:
                known[name] = survives(file, ast.unparse(parsed), tree, known)
                kept.write_text(json.dumps(known))
            end = "equivalent" if name in same else ("killed", "survived")[known[name]]
            ends[room(file), end] += 1
            print(f"{end:10} {name}", flush=True)
    for own in [*sorted({own for own, _ in ends}), ""]:  # at last, of all rooms
        of = Counter(end for (r, end) in ends.elements() if r.startswith(own))
        print(f"{own} killed {of['killed']} of {of.total()}, {of['equivalent']} equivalent".strip())
    if of["killed"] < args.at_least * (of.total() - of["equivalent"]):
        sys.exit(f"fewer than {args.at_least:.0%} were killed")


if __name__ == "__main__":
    main()
