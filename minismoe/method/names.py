"""Names of modules: their order, their layer and projection, and which are ranked together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

GROUPS = ("attention_mlp", "kind", "all")


def natural(module: str) -> tuple[list[Any], str]:
    """Sort key in which layer 10 follows layer 9; the name itself keeps "01" apart from "1"."""
    parts = re.split(r"(\d+)", module)  # every second part holds digits, so numbers meet numbers
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], module


def place(module: str) -> tuple[int | None, str, str]:
    """model.layers.3.self_attn.q_proj -> (3, "self_attn", "q_proj"); None without a number."""
    *parents, kind = module.split(".")
    at = next((i for i, part in enumerate(parents) if part.isdecimal()), None)
    if at is None:
        return None, ".".join(parents), kind
    return int(parents[at]), ".".join(parents[at + 1:]), kind


def select(modules: Iterable[str], targets: Iterable[str] | str | None) -> list[str]:
    """In natural order, the modules whose last component is a target or whose name matches one, or
    all for None. Raises ValueError with the targets that match nothing."""
    everything = sorted(modules, key=natural)
    if targets is None:
        return everything
    words = [word.strip() for word in (targets.split(",") if isinstance(targets, str) else targets)]
    hits = {word: {m for m in everything if place(m)[2] == word or fnmatchcase(m, word)}
            for word in words}
    if not words or not all(hits.values()):
        raise ValueError(f"no module matches targets {[w for w in words if not hits[w]]}; "
                         f"projections present: {sorted({place(m)[2] for m in everything})}")
    return [module for module in everything if module in set().union(*hits.values())]


def grouped(modules: list[str], group: str) -> list[list[str]]:
    """Modules that are ranked together: attention and MLP apart, each projection apart, or all."""
    groups = defaultdict(list)
    for module in modules:
        _, parent, kind = place(module)
        attention = re.search("attn|attention|conv", parent.lower()) is not None     # mixes tokens
        groups[{"attention_mlp": attention, "kind": kind, "all": ""}[group]].append(module)
    return list(groups.values())
