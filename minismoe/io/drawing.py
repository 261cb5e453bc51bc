"""Heatmaps of a value for each weight matrix, for the terminal, and the losses of a run as an SVG.

Names come from files of others, so they are cleaned of control characters.
"""

import math
import re
from collections.abc import Mapping
from typing import Literal, TypeVar

from .text import clean, clip, in_colour

Value = TypeVar("Value")
Cell = tuple[str, str]  # (layer label, projection label)

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
TERMINAL_WIDTH = 80
LOG_DEPTH = 1e-4  # a log scale ends at this share of its maximum: one dead matrix cannot flatten it
SHADES = " ░▒▓█"
# Viridis in 256 colours: it looks even in steps, in grey and to colour-blind readers too.
XTERM = (53, 54, 60, 24, 30, 36, 72, 71, 77, 113, 149, 148, 184, 220)


def grid(values: Mapping[str, Value]) -> tuple[list[str], list[str], dict[Cell, Value]]:
    """Layer labels and projection labels, both in order, and the value of each cell.

    "model.layers.12.self_attn.q_proj" is cell ("12", "q"). A name without a layer number gets
    layer "-", the last. If a cell is taken, the whole path becomes the projection label.
    """
    cells: dict[Cell, Value] = {}
    for name, value in values.items():
        number = re.search(r"(?:^|\.)([0-9]{1,6})(?:\.|$)", name)
        layer = number[1] if number else "-"
        at = layer, clean(name.rsplit(".", 1)[-1].removesuffix("_proj"))
        cells[(layer, clean(name.replace(f".{layer}.", ".*.", 1))) if at in cells else at] = value
    layers = sorted({layer for layer, _ in cells}, key=lambda n: (n == "-", len(n), n))
    projections = sorted(dict.fromkeys(projection for _, projection in cells),
                         key=lambda name: (*PROJECTIONS, name).index(name))
    return layers, projections, cells


def terminal_heatmap(title: str, values: Mapping[str, float], *, digits: bool = False,
                     scale: Literal["linear", "log"] = "linear", color: bool | None = None) -> str:
    """One row for each projection, one column for each layer, in blocks of at most 80 columns.

    `digits` writes the values as integers. `color` defaults to `in_colour()`. A '·' stands for an
    absent or infinite value and, with `digits`, for 0.
    """
    color = in_colour() if color is None else color
    layers, projections, cells = grid(values)
    used = [v for v in cells.values() if math.isfinite(v) and (scale == "linear" or v > 0)]
    low, high = min(used, default=0.0), max(used, default=0.0)
    if scale == "log":
        low = max(low, high * LOG_DEPTH)
    f = math.log if scale == "log" else float
    texts = {at: f"{v:.0f}" if digits else "" for at, v in cells.items() if math.isfinite(v)}
    gutter = 1 + min(max(map(len, ["layer", *projections])), 24)
    cell = 1 + max([1, *map(len, texts.values())])
    if len(layers) * cell > TERMINAL_WIDTH - gutter:
        cell -= 1                        # no space between cells
    per_block = max(1, (TERMINAL_WIDTH - gutter) // cell)

    def draw(at: Cell) -> str:
        if at not in texts or texts[at] in ("0", "-0"):
            return "·".rjust(cell)
        if low < high:
            place = (f(min(max(cells[at], low), high)) - f(low)) / (f(high) - f(low))
        else:                            # all values are equal: draw them full, or empty if 0
            place = float(cells[at] >= high > 0)
        if color:
            return _paint(texts[at].rjust(cell), place)
        return texts[at].rjust(cell) if digits else SHADES[min(int(place * 5), 4)] * cell

    lines = [clip(clean(title), TERMINAL_WIDTH)]
    for start in range(0, len(layers), per_block):
        block = layers[start:start + per_block]
        lines += [clip(name, gutter - 1).ljust(gutter) + "".join(draw((n, name)) for n in block)
                  for name in projections]
        step, axis = 1 if max(map(len, block)) < cell else 5, ""
        for n in [n for n in block if n == "-" or int(n) % step == 0] or block[:1]:
            axis = axis.ljust((block.index(n) + 1) * cell - len(n)) + n
        lines.append("layer".ljust(gutter) + axis)
    ramp = "".join(_paint(" ", i / 14) for i in range(14)) if color else "" if digits else SHADES
    clipped = "<=" if any(value < low for value in cells.values()) else ""
    lines.append(f"{'':{gutter}}min {clipped}{low:.3g} {ramp and ramp + ' '}max {high:.3g}"
                 + (", log scale" if scale == "log" else ""))
    return "\n".join(lines)


def _paint(text: str, place: float) -> str:
    """A text on the colour of a place in the scale, from 0 to 1."""
    level = min(int(place * len(XTERM)), len(XTERM) - 1)
    return f"\x1b[48;5;{XTERM[level]};38;5;{16 if level > 5 else 231}m{text}\x1b[0m"


def loss_svg(training: Mapping[int, float], validation: Mapping[int, float], kept: int) -> str:
    """A figure of the losses by step, as wide as a paper's column, on white: of training lines in
    grey, of validation lines in blue, and a mark at the step whose experts were kept."""
    values = [v for v in (*training.values(), *validation.values()) if math.isfinite(v)]
    top, last = max(values, default=1.0) or 1.0, max(training, default=1)

    def at(step: int, value: float) -> tuple[float, float]:
        y = 160 * (1 - min(value, top) / top) if math.isfinite(value) else 0
        return round(30 + 310 * step / last, 1), round(y, 1)

    def text(x: float, y: float, text: str, more: str = 'text-anchor="end"') -> str:
        return f'<text x="{x}" y="{y}" {more}>{text}</text>'

    shapes = ['<path d="M30,0V160H340" fill="none" stroke="#000"/>']
    for losses, color, width in (training, "#999", 0.7), (validation, "#105ba4", 1.5):
        points = " ".join("{},{}".format(*at(*point)) for point in losses.items())
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{color}" '
                      f'stroke-width="{width}"/>')
    shapes += [text(26, 8, f"{top:.3g}"), text(26, 160, "0"), text(340, 172, f"step {last}"), text(
        30, 172, "loss of training lines (grey), of validation lines (blue)", 'font-size="8"')]
    if kept in validation:
        x, y = at(kept, validation[kept])
        shapes += [f'<circle cx="{x}" cy="{y}" r="3" fill="#105ba4"/>',
                   text(30, 184, f"dot: step {kept}, kept", 'font-size="8"')]
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="-3 -3 346 194" width="692" '
            'height="388" font-size="10" font-family="Helvetica, Arial, sans-serif">'
            '<title>loss</title>\n<rect x="-3" y="-3" width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(shapes) + "\n</svg>\n")
