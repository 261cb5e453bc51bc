"""Flags of a command line as fields of a frozen dataclass, and what their values may be.

Each field that `flag` makes becomes a command-line flag of the same name.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

Config = TypeVar("Config")


def flag(default: Any, help: str, kind: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A dataclass field that a flag sets. `kind` reads its text; `more` goes to add_argument."""
    reads = {"action": "store_true"} if default is False else {"type": kind}
    return field(default=default, metadata={"help": help, **reads, **more})


def option(name: str) -> str:
    """The flag of a field: budget_experts -> --budget-experts."""
    return f"--{name.replace('_', '-')}"


def new_parser(description: str | None, groups: Mapping[str, type]) -> argparse.ArgumentParser:
    """A parser with --debug and the flags of the configurations in `groups`, {title: class}."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show a traceback on failure")
    for title, config in groups.items():
        group = parser.add_argument_group(title)
        for f in fields(config):
            if f.metadata:                   # `flag` made the field
                group.add_argument(option(f.name), default=f.default, **f.metadata)
    return parser


def from_flags(config: Callable[..., Config], values: Mapping[str, Any], **changes: Any) -> Config:
    """A configuration of the parsed flags `values`, as vars(args), with some fields changed."""
    names = [f.name for f in fields(config)]             # type: ignore[arg-type]
    return config(**{name: values[name] for name in names if name in values} | changes)


def as_flags(*configs: Any) -> dict[str, Any]:
    """{name: value} of the flags of configurations."""
    return {f.name: getattr(config, f.name) for config in configs for f in fields(config)
            if f.metadata}


def checked(kind: Callable[[str], Any], good: Callable[[Any], bool], wrong: str,
            ) -> Callable[[str], Any]:
    """An argparse type: the value that `kind` reads, if `good` accepts it."""
    def read(text: str) -> Any:
        if not good(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text or 'it'} {wrong}")
        return value
    read.__name__ = kind.__name__            # argparse names it in the error if `kind` raises
    return read


positive = checked(int, lambda n: n >= 1, "is not at least 1")
natural = checked(int, lambda n: n >= 0, "is below 0")
seed = checked(int, lambda n: -1 << 63 <= n < 1 << 63, "has more than 64 bits")
text = checked(str, bool, "is empty")          # an unset variable of a shell
two_names = checked(str, lambda t: len([*filter(str.strip, t.split(","))]) == t.count(",") + 1 == 2,
                    "is not two names with a comma between them")
number = checked(float, lambda x: 0 <= x < math.inf, "is no number of at least 0")
fraction = checked(float, lambda x: 0 < x <= 1, "is not in (0, 1]")
fraction_or_zero = checked(float, lambda x: 0 <= x <= 1, "is not in [0, 1]")
above_zero = checked(float, lambda x: 0 < x < math.inf, "is not above 0, or no number")
