"""Allocation: what `allocate` decides, how it is written to allocation.json, and its checks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

Counts = dict[str, int]  # {module: experts}
Sensitivities = Mapping[str, Mapping[str, float]]  # {task: {module: sensitivity}}
FORMAT = "minismoe.allocation/1"
MOST = 1 << 10  # experts of one matrix: bounds the memory that a file can ask for


def is_whole(value: Any, least: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**50


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


@dataclass(frozen=True)
class Allocation:
    """The content of allocation.json: each module's experts, and how they are built."""

    experts: Counts  # only modules with >= 1
    rank: int = 8  # of each expert
    alpha: float = 16  # an expert's output is scaled by alpha / rank
    top_k: int = 2  # experts active a token, in modules that have more
    strategy: str = "custom"
    group: str | None = None
    keep: float | None = None  # share of its group that a task votes for
    trainable_parameters: int | None = None  # None if the shapes are unknown

    def __str__(self) -> str:
        return (f"{self.strategy}: {sum(self.experts.values())} experts of rank {self.rank} on "
                f"{len(self.experts)} matrices")

    def check_rank(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError with the modules whose smaller side of (out, in) is below the rank."""
        if small := [f"{module} {[*shapes[module]]}" for module in self.experts
                     if self.rank > min(shapes[module])]:
            raise ValueError(f"rank {self.rank} is more than the matrix itself has: "
                             f"{', '.join(small)}; give a smaller rank, or targets without them")

    def trainable(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Trainable parameters (lora_A, lora_B, router) on weights of these shapes, (out, in)."""
        return sum(E * self.rank * sum(shapes[module]) + (E * shapes[module][1] if E > 1 else 0)
                   for module, E in self.experts.items())

    def problems(self) -> list[str]:
        """One message for each wrong value; a count of 0 is allowed."""
        keep, trainable = self.keep, self.trainable_parameters
        checks = [
            ("rank", is_whole(self.rank, 1), "a whole number >= 1"),
            ("alpha", is_number(self.alpha) and self.alpha > 0, "a number > 0"),
            ("top_k", is_whole(self.top_k, 1), "a whole number >= 1"),
            ("strategy", isinstance(self.strategy, str), "text"),
            ("group", self.group is None or isinstance(self.group, str), "text or null"),
            ("keep", keep is None or is_number(keep) and 0 < keep <= 1, "in (0, 1]"),
            ("trainable_parameters", trainable is None or is_whole(trainable, 0), "a whole number")]
        return [f"{name} must be {what}, got {getattr(self, name)!r}"
                for name, good, what in checks if not good] + [
            f"experts must map names to whole numbers from 0 to {MOST}, got {module!r}: {count!r}"
            for module, count in self.experts.items()
            if not (isinstance(module, str) and module and is_whole(count, 0) and count <= MOST)]

    def to_json(self) -> dict[str, Any]:
        """The form of allocation.json, for `json.dump`."""
        settings = asdict(self)
        experts = settings.pop("experts")
        return {"format": FORMAT, **settings, "experts": experts}

    @classmethod
    def from_json(cls, value: object) -> "Allocation":
        """Read `to_json`'s form, or a bare {module: count}, the form of the paper's published code.

        A count of 0 means no adapter. Raises one ValueError that names everything wrong.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"an allocation is a JSON object, got {value!r}")
        settings: dict[str, Any] = dict(value) if "format" in value else {"experts": value}
        form, experts = settings.pop("format", FORMAT), settings.pop("experts", None)
        known = {f.name: settings.pop(f.name) for f in fields(cls) if f.name in settings}
        problems = [f"format must be {FORMAT!r}, got {form!r}"] if form != FORMAT else []
        problems += [f"unknown field {name!r}" for name in settings]
        if not isinstance(experts, Mapping) or not any(experts.values()):
            problems.append(f"experts must give some module an expert, got {experts!r}")
            experts = {}
        problems += cls(dict(experts), **known).problems()
        if problems:
            raise ValueError("not an allocation: " + "; ".join(problems))
        known.setdefault("alpha", 2 * known.get("rank", cls.rank))  # as allocate() does
        return cls({module: count for module, count in experts.items() if count}, **known)
