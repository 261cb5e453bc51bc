"""Heatmaps of a value for each weight matrix: for the terminal, and as SVG figures for a paper.

Input: mappings of module name to number. Output: a string. Module and task names come from files
of others, so they are cleaned of control characters before they are drawn. SVG figures have a white
background, so that they read well on dark pages too.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from xml.sax.saxutils import escape

from .text import clean

Scale = Literal["linear", "log"]
RGB = tuple[int, int, int]
Cell = tuple[str, str]  # (layer label, projection label)
Drawn = tuple[RGB, str]  # a cell's colour and the text in it

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
TERMINAL_WIDTH = 80
LOG_DEPTH = 1e-4  # a log scale ends at this share of its maximum: one dead matrix cannot flatten it
# Colours to interpolate. Viridis looks even in steps, in grey and to colour-blind readers too.
VIRIDIS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725".split()
SHADES = " ░▒▓█"
XTERM = (53, 54, 60, 24, 30, 36, 72, 71, 77, 113, 149, 148, 184, 220)  # viridis in 256 colours
BLUES = "d6e6f4 abd0e6 6aaed6 3787c0 105ba4 08306b".split()


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[:max(0, width - 1)] + "…"


def grid(values: Mapping[str, float]) -> tuple[list[str], list[str], dict[Cell, float]]:
    """Layer labels and projection labels, both in order, and the value of each cell.

    "model.layers.12.self_attn.q_proj" is cell ("12", "q"). A name without a layer number gets
    layer "-", the last. Modules that would share a cell get their whole path as projection label.
    """
    found = []
    for name in values:
        number = re.search(r"(?:^|\.)([0-9]{1,6})(?:\.|$)", name)
        layer = number[1] if number else "-"
        short = name.rsplit(".", 1)[-1].removesuffix("_proj")
        found.append((layer, clean(short), clean(name.replace(f".{layer}.", ".*.", 1))))
    times = Counter((layer, short) for layer, short, _ in found)
    crowded = {short for (_, short), count in times.items() if count > 1}
    cells = {(layer, path if short in crowded else short): value
             for (layer, short, path), value in zip(found, values.values(), strict=True)}
    layers = sorted(dict.fromkeys(layer for layer, _ in cells),
                    key=lambda layer: math.inf if layer == "-" else int(layer))
    rank = {projection: i for i, projection in enumerate(PROJECTIONS)}
    projections = sorted(dict.fromkeys(projection for _, projection in cells),
                         key=lambda projection: rank.get(projection, len(rank)))
    return layers, projections, cells


def _span(values: Iterable[float], scale: Scale) -> tuple[float, float]:
    """The ends of a scale, from the finite (on a log scale: finite and positive) values."""
    used = [v for v in values if math.isfinite(v) and (scale == "linear" or v > 0)]
    low, high = min(used, default=0.0), max(used, default=0.0)
    return (max(low, high * LOG_DEPTH) if scale == "log" else low), high


def _position(value: float, low: float, high: float, scale: Scale) -> float:
    """Place of a value between the ends, from 0 to 1."""
    if low >= high:                      # all values are equal: draw them full, or empty if 0
        return float(value >= high > 0)
    f = math.log if scale == "log" else float
    return (f(min(max(value, low), high)) - f(low)) / (f(high) - f(low))


def _color(ramp: Sequence[str], position: float) -> RGB:
    i = min(int(position * (len(ramp) - 1)), len(ramp) - 2)
    part = position * (len(ramp) - 1) - i
    left, right = bytes.fromhex(ramp[i]), bytes.fromhex(ramp[i + 1])
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(left, right, strict=True))
    return red, green, blue


def _paint(text: str, position: float) -> str:
    level = min(int(position * len(XTERM)), len(XTERM) - 1)
    return f"\x1b[48;5;{XTERM[level]};38;5;{16 if level > 5 else 231}m{text}\x1b[0m"


def terminal_heatmap(title: str, values: Mapping[str, float], *, scale: Scale = "linear",
                     digits: bool = False, color: bool | None = None) -> str:
    """One row for each projection, one column for each layer, in blocks of at most 80 columns.

    `digits` writes the values as integers. `color` defaults to True if stdout is a terminal and
    NO_COLOR is unset. A '·' stands for an absent or infinite value and, with `digits`, for 0.
    """
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    layers, projections, cells = grid(values)
    low, high = _span(cells.values(), scale)
    texts = {at: f"{v:.0f}" if digits else "" for at, v in cells.items() if math.isfinite(v)}
    gutter = 1 + min(max(map(len, ["layer", *projections])), 24)
    cell = 1 + max(1, *map(len, texts.values()), 1)
    if len(layers) * cell > TERMINAL_WIDTH - gutter:
        cell -= 1                        # no space between cells
    per_block = max(1, (TERMINAL_WIDTH - gutter) // cell)

    def draw(at: Cell) -> str:
        if at not in texts or texts[at] in ("0", "-0"):
            return "·".rjust(cell)
        text, position = texts[at].rjust(cell), _position(cells[at], low, high, scale)
        if color:
            return _paint(text, position)
        return text if digits else SHADES[min(int(position * 5), 4)] * cell

    lines = [_clip(clean(title), TERMINAL_WIDTH)]
    for start in range(0, len(layers), per_block):
        block = layers[start:start + per_block]
        lines += [_clip(name, gutter - 1).ljust(gutter) + "".join(draw((n, name)) for n in block)
                  for name in projections]
        lines.append("layer".ljust(gutter) + _axis(block, cell))
    ramp = "" if digits and not color else (
        "".join(_paint(" ", i / 14) for i in range(14)) if color else SHADES) + " "
    clipped = "<=" if any(value < low for value in cells.values()) else ""
    lines.append(f"{'':{gutter}}min {clipped}{low:.3g} {ramp}max {high:.3g}"
                 + (", log scale" if scale == "log" else ""))
    return "\n".join(lines)


def _axis(layers: Sequence[str], cell: int) -> str:
    """Layer numbers, each ending where its cell ends; every fifth only, if they do not all fit."""
    every = 1 if max(map(len, layers)) < cell else 5
    axis = ""
    for n in [n for n in layers if n == "-" or int(n) % every == 0] or layers[:1]:
        axis = axis.ljust((layers.index(n) + 1) * cell - len(n)) + n
    return axis


# SVG. One unit is a hundredth of an inch in a column 3.4 inches wide: a font of 10 is 7.2 pt.
WIDTH, SIZE, ROW, GAP = 340.0, 10.0, 11.0, 12.0
BOLD = ' font-weight="bold"'
ABSENT = (236, 236, 236)
BAR = 260.0                              # width of the legend's colour bar, which starts at x = 37


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    text = escape(clean(text))
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"{style}>{text}</text>'


def _square(x: float, y: float, width: float, rgb: RGB, text: str, kind: str = "cell") -> str:
    """One cell with its number in black or white, whichever is easier to read, or grey for 0."""
    is_light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 125
    ink = "#777" if text == "0" else "#000" if is_light else "#fff"
    rect = (f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width - 0.5:.2f}" '
            f'height="{ROW - 0.5}" fill="#{bytes(rgb).hex()}"/>')
    if not text:
        return rect
    size = min(SIZE, width / (0.65 * len(text)))
    return rect + _text(x + width / 2, y + 9, text, style=f' font-size="{size:.2f}" fill="{ink}"')


def _panel(x: float, y: float, width: float, title: str, layers: Sequence[str],
           projections: Sequence[str], cells: Mapping[Cell, Drawn]) -> list[str]:
    """One heatmap with its title: projection names on the left, layer numbers below."""
    left = x + 6 + 6.2 * min(max(map(len, ["layer", *projections])), 14)
    size = (x + width - left) / max(1, len(layers))
    every = next((n for n in (1, 5, 10, 20) if n * size >= 16), 50)
    out = [f"<g><title>{escape(title)}</title>",
           _text(left, y + 10, _clip(title, int(size * len(layers) / 6.8)), "start", BOLD)]
    for row, projection in enumerate(projections):
        top = y + 14 + ROW * row
        out.append(_text(left - 4, top + 9, _clip(projection, 14), "end"))
        out += [_square(left + i * size, top, size, *cells[n, projection])
                for i, n in enumerate(layers) if (n, projection) in cells]
    bottom = y + 24 + ROW * len(projections)
    out.append(_text(left - 4, bottom, "layer", "end"))
    out += [_text(left + (i + 0.5) * size, bottom, layer) for i, layer in enumerate(layers)
            if layer == "-" or int(layer) % every == 0]
    return [*out, "</g>"]


def _panels(panels: Sequence[tuple[str, bool, Mapping[Cell, Drawn]]], width: float, y: float,
            layers: Sequence[str], projections: Sequence[str]) -> tuple[list[str], float]:
    """Heatmaps (title, is_wide, cells) from y down, narrow ones in pairs; and the y below them."""
    half, step = (width - GAP) / 2, 32 + ROW * len(projections)
    x, out = 0.0, []
    for title, is_wide, cells in panels:
        if is_wide and x:
            x, y = 0.0, y + step
        out += _panel(x, y, width if is_wide else half, title, layers, projections, cells)
        x, y = (0.0, y + step) if is_wide or x else (half + GAP, y)
    return out, y + step if x else y


def _bar(y: float, ticks: Sequence[str], title: str) -> list[str]:
    """The legend of the Viridis colours, with its ticks at equal distances."""
    stops = (f'<stop offset="{i / 8}" stop-color="#{hue}"/>' for i, hue in enumerate(VIRIDIS))
    out = [f'<linearGradient id="shares">{"".join(stops)}</linearGradient>',
           f'<rect x="37" y="{y + 14}" width="{BAR:g}" height="8" fill="url(#shares)"/>',
           _text(37, y + 10, title, "start")]
    for i, tick in enumerate(ticks):
        x = 37 + BAR * i / (len(ticks) - 1)
        out += [f'<path d="M{x:.2f} {y + 22}v3" stroke="#000"/>', _text(x, y + 34, tick)]
    return out


def allocation_svg(scores: Mapping[str, Mapping[str, float]], experts: Mapping[str, int], *,
                   measure: str = "sensitivity", what: str = "experts") -> str:
    """A figure as wide as a paper's column: each task's scores and the counts of experts.

    Scores are drawn as shares of their task's maximum, on one log scale for all tasks; grey means
    not measured. `what` names the counts ("ranks" for allocations of one expert with a rank each).
    Many layers widen the figure; few layers, or many tasks, go in two columns.
    """
    names = list(dict.fromkeys(name for part in (*scores.values(), experts) for name in part))
    layers, projections, index = grid(dict(zip(names, range(len(names)), strict=True)))
    modules = {cell: names[int(i)] for cell, i in index.items()}
    tops = {task: _span(values.values(), "log")[1] or 1.0 for task, values in scores.items()}
    shares = {task: {name: v / tops[task] for name, v in values.items() if math.isfinite(v)}
              for task, values in scores.items()}
    everything = [share for task in shares.values() for share in task.values()]
    decades = max(1, math.ceil(-math.log10(_span([*everything, 1.0], "log")[0])))
    low, most = 10.0 ** -decades, max(experts.values(), default=0)

    def share_cell(share: float | None) -> Drawn:
        return (ABSENT if share is None else
                _color(VIRIDIS, _position(share, low, 1.0, "log"))), ""

    counts: dict[int, Drawn] = {0: (ABSENT, "0")} | {
        n: (_color(BLUES, (n - 1) / max(1, most - 1)), str(n)) for n in experts.values() if n > 0}
    few, many = len(layers) <= 12, len(scores) > 4
    panels = [(clean(task), not few and not many, {
        cell: share_cell(of_task.get(name)) for cell, name in modules.items()})
        for task, of_task in shares.items()]
    panels.append((f"{sum(experts.values())} {what}", not few, {
        cell: counts[experts.get(name, 0)] for cell, name in modules.items()}))
    width = max(WIDTH, 40 + 9.0 * len(layers))
    ticks = [f"{10.0 ** (i - decades):g}" for i in range(decades + 1)]
    if any(share < low for share in everything):
        ticks[0] = "≤" + ticks[0]
    out, y = _panels(panels, width, 0.0, layers, projections)
    out += [*_bar(y, ticks, measure + " (share of the maximum)"),
            _text(37, y + 52, f"{what} per matrix", "start")]
    out += [_square(147 + 15 * i, y + 43, 15, *counts[n], "key")
            for i, n in enumerate(sorted(counts)[::math.ceil(len(counts) / 10)])]
    return _svg(width, y + 56, f"{measure} and {what}", out)


def routers_svg(use: Mapping[str, Mapping[str, Any]]) -> str:
    """Heatmaps of `routers.router_use`: the routers' entropy on each task, and the separation."""
    layers, projections, _ = grid(dict.fromkeys(use, 0.0))
    most = max((found["separation"] for found in use.values()), default=0.0) or 1.0
    maps = {f"entropy, {clean(task)}": {m: found["entropy"][task] for m, found in use.items()}
            for task in next(iter(use.values()))["entropy"]}
    maps[f"separation, of {most:.2g}"] = {m: f["separation"] / most for m, f in use.items()}
    panels = [(title, False, {at: (_color(VIRIDIS, min(max(v, 0.0), 1.0)), "")
                              for at, v in grid(values)[2].items()})
              for title, values in maps.items()]
    width = max(WIDTH, 2 * (40 + 9.0 * len(layers))) + GAP
    out, y = _panels(panels, width, 0.0, layers, projections)
    out += _bar(y, ["0", "1"], "entropy, or share of the largest separation")
    return _svg(width, y + 38, "routers", out)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A figure of this size with a margin of 3 around it, on white."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-3 -3 {width + 6:g} {height + 6:g}" '
            f'width="{2 * width + 12:g}" height="{2 * height + 12:g}" font-size="{SIZE}" '
            f'font-family="Helvetica, Arial, sans-serif"><title>{escape(clean(title))}</title>\n'
            '<rect x="-3" y="-3" width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")
