"""Flags of a command line as fields of a frozen dataclass, and what their values may be.

Each field that `flag` makes becomes a command-line flag of the same name.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from typing import Any, NoReturn, TypeVar

from .text import clean

Config = TypeVar("Config")
LARGEST = sys.float_info.max              # a whole number of JSON may be larger


def flag(default: Any, help: str, kind: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A dataclass field that a flag sets. `kind` reads its text; `more` goes to add_argument."""
    reads = {"action": "store_true"} if default is False else {"type": kind}
    return field(default=default, metadata={"help": help, **reads, **more})


def option(name: str) -> str:
    """The flag of a field: batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, clean(f"{self.prog}: error: {message} (--help explains the flags)") + "\n")


def new_parser(description: str | None, groups: Mapping[str, type]) -> Parser:
    """A parser with --debug and the flags of the configurations in `groups`, {title: class}."""
    parser = Parser(description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show a traceback on failure")
    for title, config in groups.items():
        group = parser.add_argument_group(title)
        for f in fields(config):
            if f.metadata and f.name in vars(config):    # `flag` made it, and no class above
                group.add_argument(option(f.name), default=f.default, **f.metadata)
    return parser


def from_flags(config: Callable[..., Config], values: Mapping[str, Any]) -> Config:
    """A configuration of the parsed flags `values`, as vars(args)."""
    names = [f.name for f in fields(config)]             # type: ignore[arg-type]
    return config(**{name: values[name] for name in names if name in values})


def as_flags(config: Any) -> dict[str, Any]:
    """{name: value} of the flags of a configuration."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata}


class Checked:
    """An argparse type: the value that `kind` reads, if `good` accepts it."""

    def __init__(self, kind: type, good: Callable[[Any], bool], wrong: str):
        self.kind, self.good, self.wrong = kind, good, wrong
        self.__name__ = kind.__name__        # argparse names it in the error if `kind` raises

    def __call__(self, text: str) -> Any:
        if not self.good(value := self.kind(text)):
            raise argparse.ArgumentTypeError(f"{text or 'it'} {self.wrong}")
        return value


def wrong_value(f: Field[Any], value: Any) -> str:
    """What is wrong with a value, as JSON or a caller has it, of a field that `flag` made; "" if
    nothing is."""
    check = f.metadata.get("type") or (bool if f.default is False else str)
    kind = check.kind if isinstance(check, Checked) else check
    if value is None and f.default is None:
        return ""
    if type(value) is not kind and (type(value), kind) != (int, float):
        return f"{value!r} is no {kind.__name__}"
    if isinstance(check, Checked) and not check.good(value):
        return f"{value!r} {check.wrong}"
    choices = f.metadata.get("choices", [value])
    return "" if value in choices else f"{value!r} is none of {', '.join(map(str, choices))}"


positive = Checked(int, lambda n: n >= 1, "is not at least 1")
natural = Checked(int, lambda n: n >= 0, "is below 0")
seed = Checked(int, lambda n: -1 << 63 <= n < 1 << 63, "has more than 64 bits")
text = Checked(str, bool, "is empty")          # an unset variable of a shell
two_names = Checked(str, lambda t: len([*filter(str.strip, t.split(","))]) == t.count(",") + 1 == 2,
                    "is not two names with a comma between them")
number = Checked(float, lambda x: 0 <= x <= LARGEST, "is no number of at least 0")
fraction = Checked(float, lambda x: 0 < x <= 1, "is not in (0, 1]")
