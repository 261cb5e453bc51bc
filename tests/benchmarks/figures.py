"""Draw the README's pictures that show figures as SVG, from the records in results/.

    python tests/benchmarks/figures.py

method.svg    probe, vote, experts, merge: the toy's sensitivity.json (toy.json) and its vote
lines.svg     exact match by lines of training, beside peers (few.jsonl)
shipped.svg   exact match, size and speed of exports with fewer bits and tokens (shipped.jsonl)

Every picture stands on a white card of its own, so that it reads on light and on dark pages. It
holds no script and no font: GitHub shows an SVG as an image. layer.svg shows no figure: edit it.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from few import means

from minismoe.io.files import read_json, replacing
from minismoe.method.allocate import allocate

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH = 860.0                                # about the width of a README on GitHub
INK, GREY, LINE, PALE = "#1f2328", "#59636e", "#d0d7de", "#f3f5f7"
BLUE, LIGHT_BLUE, ORANGE = "#0a5cbf", "#d6e6f7", "#b3500b"
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
SHOWN = {"MB": "megabytes", "rate": "tokens/s"}
CURVES = {"SmolLM2-135M": (BLUE, 3.0), "Gemma 3 270M": (ORANGE, 3.0),
          "MiniLM embeddings": (GREY, 1.4), "TF-IDF": ("#9aa4ae", 1.4)}
Parts = list[str]


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13,
         color: str = INK, bold: bool = False) -> str:
    """A line of text whose baseline is y."""
    weight = ' font-weight="600"' if bold else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{color}"{weight}>{escape(words)}</text>')


note = partial(text, size=12, color=GREY)


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = "none",
        corner: float = 4) -> str:
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="{corner:g}" fill="{fill}" stroke="{edge}"/>')


def line(path: str, color: str = INK, width: float = 1.4, arrow: bool = False) -> str:
    """A path, with a head at its end if `arrow`."""
    head = ' marker-end="url(#head)"' if arrow else ""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{head}/>'


def dot(x: float, y: float, radius: float, fill: str, edge: str = "none") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" stroke="{edge}"/>'


def card(height: float, title: str, parts: Sequence[str]) -> str:
    """The SVG: a white card with `parts` on it; `title` is for screen readers."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" '
            f'width="{WIDTH:g}" height="{height:g}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif"><title>{escape(title)}</title>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>'
            "</defs>\n" + box(0.5, 0.5, WIDTH - 1, height - 1, "#fff", LINE, 8) + "\n"
            + "\n".join(parts) + "\n</svg>\n")


def shade(share: float) -> str:
    """From nearly white, 0, to dark blue, 1."""
    ends = ((0xEE, 0xF4, 0xFB), (0x08, 0x3E, 0x86))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def cells(x: float, y: float, wide: float, fills: Mapping[tuple[int, str], str]) -> Parts:
    """A heatmap of one colour for each (layer, projection), 16 high each."""
    return [box(x + layer * wide, y + 16 * KINDS.index(kind), wide - 1, 15, fill, corner=1)
            for (layer, kind), fill in fills.items()]


def place(module: str) -> tuple[int, str]:
    """"model.layers.2.self_attn.q_proj" is (2, "q")."""
    parts = module.split(".")
    return int(parts[2]), parts[-1].removesuffix("_proj")


def method(probed: Mapping[str, Any]) -> str:
    """The steps side by side, on the 28 matrices and five tasks of the toy."""
    scores = {task: found["scores"] for task, found in probed["tasks"].items()}
    experts = allocate(scores, keep=0.6, min_experts=1).experts
    top, wide, step = 92.0, 9.0, 48.0
    left, vote, count, merge = 56.0, 330.0, 588.0, 722.0
    parts: Parts = []
    for x, name, says in ((left, "1  Probe", "squared gradient norm of each matrix"),
                          (vote, "2  Vote", "each task: its top 60 %"),
                          (count, "3  Experts", "votes, at least one"),
                          (merge, "4  Merge", "one matrix ships")):
        parts += [text(x, 30, name, size=15, bold=True), text(x, 50, says, color=GREY)]
    parts += [note(left - 7, top + 12 + 16 * i, kind, anchor="end")
              for i, kind in enumerate(KINDS)]
    for i, (task, values) in enumerate(scores.items()):
        ranked = sorted(values, key=values.__getitem__)
        parts += cells(left + step * i, top, wide, {
            place(m): shade(n / (len(ranked) - 1)) for n, m in enumerate(ranked)})
        chosen = allocate({task: values}, keep=0.6).experts
        parts += cells(vote + step * i, top, wide, {
            place(m): BLUE if m in chosen else "#e6eaef" for m in values})
        for x in (left, vote):
            parts.append(text(x + step * i + 2 * wide, top - 9, task, anchor="middle", size=11))
    most = len(scores)
    parts += cells(count, top, 22, {place(m): shade(experts.get(m, 0) / most)
                                    for m in next(iter(scores.values()))})
    for module in next(iter(scores.values())):
        layer, kind = place(module)
        number = experts.get(module, 0)
        parts.append(text(count + 22 * layer + 10.5, top + 12 + 16 * KINDS.index(kind),
                          str(number), anchor="middle", size=12,
                          color="#fff" if number > most / 2 else INK))
    parts += [text(count + 22 * n + 10.5, top - 9, str(n), anchor="middle", size=11)
              for n in range(4)]
    parts += [line(f"M{x} {top + 55}h20", arrow=True) for x in (300, 561, 689)]
    parts += [box(merge, top - 2, 42, 42, PALE, GREY), text(merge + 21, top + 24, "W",
              anchor="middle"), text(merge + 53, top + 24, "+", anchor="middle"),
              *(box(merge + 66 + 9 * i, top - 2 + 5 * i, 30, 32, LIGHT_BLUE, BLUE)
                for i in range(3)),
              text(merge + 99, top + 29, "BA", anchor="middle", color=BLUE),
              line(f"M{merge + 61} {top + 48}v20", arrow=True),
              box(merge + 40, top + 74, 42, 42, LIGHT_BLUE, BLUE),
              text(merge + 61, top + 100, "W′", anchor="middle")]
    bottom = top + 7 * 16 + 22
    parts += [note(left, bottom, "darker: higher rank within the task"),
              note(vote, bottom, "blue: gets this task’s vote"),
              note(count, bottom, "columns: layers"), note(merge, bottom, "same shape as W")]
    y = bottom + 46
    parts += [text(left, y, "5  Ship", size=15, bold=True),
              text(left, y + 20, "few bits, few tokens", color=GREY)]
    for x, high, kept, words in (
            (vote, (8, 9, 22, 23), 24, "heights: 4 or 8 bits a weight"),
            (count, range(24), 6, "blue: rows of tokens that are needed")):
        parts += [box(x + 9 * n, y + 5 - (18 if n in high else 9), 8, 18 if n in high else 9,
                      BLUE if n < kept else "#e6eaef", corner=1) for n in range(24)]
        parts.append(note(x, y + 24, words))
    return card(y + 38, "Probe, vote, experts, merge, ship", parts)


def lines_needed(means: Mapping[tuple[str, str, int, str], Mapping[str, Any]]) -> str:
    """Exact match over the number of training lines, a panel for each task: of trained models, of
    the exports (dots), and of the peers."""
    top, height, width, parts = 62.0, 210.0, 225.0, Parts()
    low, high = 0.1, 1.0
    for left, task in ((52.0, "trec"), (325.0, "clinc"), (598.0, "banking77")):
        parts.append(text(left, 30, task, size=15, bold=True))
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            y = top + height * (high - share) / (high - low)
            parts += [line(f"M{left} {y:.1f}h{width}", LINE, 1),
                      note(left - 7, y + 4, f"{100 * share:.0f}", anchor="end")]

        def at(lines: int, share: float, left: float = left) -> tuple[float, float]:
            return (left + width * math.log(lines / 50) / math.log(20),
                    top + height * (high - max(share, low)) / (high - low))

        parts += [note(at(lines, 1)[0], top + height + 18, str(lines), anchor="middle")
                  for lines in (50, 100, 200, 400, 1000)]
        for base, (color, wide) in CURVES.items():
            found = sorted((lines, mean) for (name, tasks, lines, flags), mean in means.items()
                           if (name, tasks, flags) == (base, task, ""))
            curve = [at(lines, mean["exact"][task]) for lines, mean in found]
            if curve:
                path = "L".join(f"{x:.1f} {y:.1f}" for x, y in curve)
                parts.append(line("M" + path, color, wide))
            parts += [dot(x, y, wide, color) for x, y in curve]
            parts += [dot(*at(lines, mean["shipped"][task]), 3.5, "#fff", color)
                      for lines, mean in found if "shipped" in mean]
    y = top + height + 44
    for x, (base, (color, wide)) in zip((52.0, 195.0, 325.0, 622.0), CURVES.items()):
        parts += [line(f"M{x} {y - 4}h14", color, wide), text(x + 20, y, base + (
            "" if wide > 2 else " + logistic regression"), size=12)]
    parts.append(note(52, y + 20, "exact match in % on test lines, over lines of training, mean of "
                      "the draws; circles: the default export"))
    return card(y + 36, "Exact match by lines of training", parts)


def shipped(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each export's exact match, and bars of its size and speed; blue: with fewer tokens."""
    parts, y, wide = Parts(), 52.0, 190
    left = {key: 330.0 + 280 * i for i, key in enumerate(SHOWN)}
    parts += [note(260, 30, "exact match", anchor="end"),
              *(note(left[key], 30, says) for key, says in SHOWN.items())]
    for i, row in enumerate(rows):
        if i == 0 or row["base"] != rows[i - 1]["base"]:
            y += 14 * (i > 0)
            parts.append(text(24, y + 4, row["base"], size=15, bold=True))
            y += 26
        parts += [text(24, y + 4, f"{row['tokens']:,} tokens" if row["tokens"] else "all tokens"),
                  text(260, y + 4, f"{100 * row['exact']:.1f}", anchor="end")]
        for key, x in left.items():
            end = x + wide * row[key] / max(other[key] for other in rows)
            parts += [box(x, y - 7, end - x, 14, BLUE if row["tokens"] else GREY, corner=2),
                      text(end + 8, y + 4, f"{row[key]:.0f}", size=12)]
        y += 24
    return card(y + 4, "Exact match, size and speed of exports", parts)


PICTURES: dict[str, Callable[[], str]] = {
    "method": lambda: method(read_json(RESULTS / "toy.json")),
    "lines": lambda: lines_needed(means()),
    "shipped": lambda: shipped([*map(
        json.loads, (RESULTS / "shipped.jsonl").read_text("utf-8").splitlines())])}


def main() -> None:
    for name, draw in PICTURES.items():
        with replacing(RESULTS / f"{name}.svg") as tmp:
            tmp.write_text(draw(), encoding="utf-8")
    print(f"wrote {', '.join(f'{name}.svg' for name in PICTURES)} to {RESULTS}")


if __name__ == "__main__":
    main()
