"""Warn of what has grown: lines of the package and the tests, long files and long functions.

    python tests/tools/sizes.py

A reader has to read every line: whoever adds some looks for others that can leave. Nothing fails.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE, FUNCTION = 320, 50                 # lines, above which a reader is warned
EXCEPT = ("reference.py",)               # all of the method in one file


def long_functions(file: Path) -> Iterator[str]:
    """Functions of more than FUNCTION lines, with their length."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION:
                yield f"{node.name} in {file.relative_to(ROOT)} has {lines} lines"


def main() -> None:
    package = sorted([*ROOT.glob("*.py"), *(ROOT / "minismoe").rglob("*.py")])
    tests = sorted((ROOT / "tests").rglob("*.py"))
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in package + tests}
    for name, files in ("package and scripts", package), ("tests", tests):
        print(f"{name}: {sum(lines[file] for file in files):,} lines in {len(files)} files")
    for file in package:
        if lines[file] > FILE and file.name not in EXCEPT:
            print(f"{file.relative_to(ROOT)} has {lines[file]} lines")
        for text in long_functions(file):
            print(text)


if __name__ == "__main__":
    main()
