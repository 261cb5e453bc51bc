"""The shape of the package: its public names, the arrows between rooms, and its size."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from tiny import ROOT, python

import minismoe

SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted((ROOT / "minismoe").rglob("*.py"))

# Room -> the rooms that its files may import, at the top or inside a function.
ARROWS = {
    "": "",
    "io": "",
    "method": "",
    "reference": "",
    "model": "method io",
    "data": "model method io",
    "training": "data model method io",
    "runtime": "data io",
    "export": "training runtime data model method io",
    "cli": "export training runtime data model method io",
    "scripts": "cli export training runtime data model method io",
}
LINES = 13_556
# What a room may import besides the standard library and ours, if that is restricted.
LIBRARIES = {"method": {"torch"}, "reference": {
    "torch", "safetensors", "onnx", "onnxruntime", "tokenizers"}}
WITHOUT_TORCH = {                            # what the runtime reads
    "minismoe.data.templates", "minismoe.data.tokenizer", "minismoe.data.tools"}


def name_of(file: Path) -> str:
    """minismoe/data/tasks.py -> minismoe.data.tasks"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room of one of our modules; "" is minismoe/__init__.py, which imports on first use."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "minismoe" else "scripts"


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in its text, with their full names."""
    package = name_of(file).split(".")
    if file.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *filter(None, [node.module])])
            for alias in node.names:                 # a name, or a module of that package
                whole = ROOT / Path(*base.split("."), alias.name)
                is_module = whole.is_dir() or whole.with_suffix(".py").is_file()
                yield f"{base}.{alias.name}" if is_module else base


def modules_after(code: str) -> set[str]:
    """Names in sys.modules of a fresh process that has run `code`."""
    code += "\nimport sys; print(*sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_every_public_name_resolves_to_what_it_says() -> None:
    for file in MODULES:                    # a module that is imported must not hide a name
        if file.name != "__main__.py":
            import_module(name_of(file))
    for name in minismoe.__all__:
        assert getattr(minismoe, name).__name__ == name


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not {"torch", "numpy", "onnx", "onnxruntime"} & modules_after("import minismoe")


@pytest.mark.parametrize("code", [
    "from minismoe.runtime import Generator",
    "import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_module('minismoe.runtime', "
    "run_name='__main__')\nexcept SystemExit: pass"], ids=["import", "command line"])
def test_the_runtime_starts_without_torch(code: str) -> None:
    """numpy comes with onnxruntime, which imports it itself."""
    found = modules_after(code)
    assert not {"torch", "onnx", "transformers"} & found
    assert ("onnxruntime" in found) == ("Generator" in code)


def test_numpy_is_never_imported_and_nothing_unpickled() -> None:
    for file in [*MODULES, *SCRIPTS]:
        found = re.findall(r"^\s*(?:import|from)\s+(?:numpy|pickle)|\.numpy\(|torch\.load\(",
                           file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, file


def test_modules_that_windows_lacks_are_imported_in_functions() -> None:
    """The tests, too: there, a file that imports one at its top is not collected."""
    for file in [*MODULES, *SCRIPTS, *(ROOT / "tests").rglob("*.py")]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = {alias.name for alias in getattr(node, "names", ())} | {
                getattr(node, "module", "")}
            assert not names & {"fcntl", "pty", "resource", "termios", "pwd", "grp"}, file


def test_text_is_utf_8_on_every_system() -> None:
    """Where no encoding is named, Windows takes another one. Left out: process.py, which reads
    Linux's /proc, and the other tests, whose files hold ASCII."""
    for file in {*MODULES, *SCRIPTS, Path(__file__)} - {ROOT / "minismoe/io/process.py"}:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                    "read_text", "write_text"):
                assert "encoding" in {k.arg for k in node.keywords}, f"{file}:{node.lineno}"


def test_arrows_of_the_table_run_one_way() -> None:
    seen: set[str] = set()
    for room, allowed in ARROWS.items():
        assert set(allowed.split()) <= seen, f"{room} points to a room below it in the table"
        seen.add(room)
    rooms = {room_of(name_of(file)) for file in MODULES}
    assert rooms <= seen, f"rooms without a row in the table: {rooms - seen}"


def test_imports_between_rooms_follow_the_table() -> None:
    ours = {"minismoe", *(name_of(file) for file in SCRIPTS)}
    wrong = []
    for file in [*MODULES, *SCRIPTS]:
        room = room_of(name_of(file))
        for module in imports(file):
            if module.split(".")[0] not in ours:
                continue
            target = room_of(module)
            allowed = target == room or target in ARROWS[room].split()
            if room == "runtime" and target == "data":
                allowed = module in WITHOUT_TORCH
            if not allowed:
                wrong.append(f"{name_of(file)} imports {module}")
    assert not wrong


def test_the_method_and_the_reference_import_few_libraries() -> None:
    for file in MODULES:
        if (room := room_of(name_of(file))) in LIBRARIES:
            found = {module.split(".")[0] for module in imports(file)}
            strange = found - sys.stdlib_module_names - LIBRARIES[room] - {"minismoe"}
            assert not strange, f"{name_of(file)} imports {strange}"


def test_no_two_public_functions_or_classes_share_a_name() -> None:
    """reference.py aside, whose functions are called as the fast ones that they explain."""
    homes = defaultdict(list)
    for file in MODULES:
        if file.stem in ("reference", "__main__"):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                homes[node.name].append(name_of(file))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_functions_files_and_the_package_are_short() -> None:
    """So that each is read in one sitting. reference.py is one file by design."""
    lines = {name_of(file): file.read_text(encoding="utf-8").count("\n")
             for file in [*MODULES, *SCRIPTS]}
    assert sum(lines.values()) <= LINES, "shorten the package before you raise this"
    assert not [name for name, count in lines.items() if count > 360 and "reference" not in name]
    for file in [*MODULES, *SCRIPTS]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 50, f"{file}:{node.lineno}"
