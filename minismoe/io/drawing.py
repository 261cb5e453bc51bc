"""Heatmaps of a value for each weight matrix: for the terminal, and as an SVG figure for a paper.

Names come from files of others, so they are cleaned of control characters. The figure has a white
background, so that it reads well on dark pages too.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar
from xml.sax.saxutils import escape

from .text import clean, clip, in_colour

Value = TypeVar("Value")
Cell = tuple[str, str]  # (layer label, projection label)
Drawn = tuple[bytes, str]  # a cell's colour (red, green, blue) and the text in it

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
TERMINAL_WIDTH = 80
LOG_DEPTH = 1e-4  # a log scale ends at this share of its maximum: one dead matrix cannot flatten it
# Colours to interpolate. Viridis looks even in steps, in grey and to colour-blind readers too.
VIRIDIS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725".split()
SHADES = " ░▒▓█"
XTERM = (53, 54, 60, 24, 30, 36, 72, 71, 77, 113, 149, 148, 184, 220)  # viridis in 256 colours
BLUES = "d6e6f4 abd0e6 6aaed6 3787c0 105ba4 08306b".split()
ABSENT = bytes.fromhex("ececec")
# SVG. One unit is a hundredth of an inch in a column 3.4 inches wide: a font of 10 is 7.2 pt.
WIDTH, SIZE, ROW, GAP = 340.0, 10.0, 11.0, 12.0
BOLD = ' font-weight="bold"'


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


def _scaled(values: Iterable[float], scale: Literal["linear", "log"],
            ) -> tuple[float, float, Callable[[float], float]]:
    """The ends of a scale of the finite values, and the place of a value in it, from 0 to 1."""
    used = [v for v in values if math.isfinite(v) and (scale == "linear" or v > 0)]
    low, high = min(used, default=0.0), max(used, default=0.0)
    if scale == "log":
        low = max(low, high * LOG_DEPTH)

    def place(value: float) -> float:
        if low >= high:                  # all values are equal: draw them full, or empty if 0
            return float(value >= high > 0)
        f = math.log if scale == "log" else float
        return (f(min(max(value, low), high)) - f(low)) / (f(high) - f(low))

    return low, high, place


def _color(ramp: Sequence[str], position: float) -> bytes:
    i = min(int(position * (len(ramp) - 1)), len(ramp) - 2)
    weight = position * (len(ramp) - 1) - i
    left, right = bytes.fromhex(ramp[i]), bytes.fromhex(ramp[i + 1])
    return bytes(round(a + weight * (b - a)) for a, b in zip(left, right))


def _paint(text: str, position: float) -> str:
    level = min(int(position * len(XTERM)), len(XTERM) - 1)
    return f"\x1b[48;5;{XTERM[level]};38;5;{16 if level > 5 else 231}m{text}\x1b[0m"


def terminal_heatmap(title: str, values: Mapping[str, float], *, digits: bool = False,
                     scale: Literal["linear", "log"] = "linear", color: bool | None = None) -> str:
    """One row for each projection, one column for each layer, in blocks of at most 80 columns.

    `digits` writes the values as integers. `color` defaults to `in_colour()`. A '·' stands for an
    absent or infinite value and, with `digits`, for 0.
    """
    color = in_colour() if color is None else color
    layers, projections, cells = grid(values)
    low, high, place = _scaled(cells.values(), scale)
    texts = {at: f"{v:.0f}" if digits else "" for at, v in cells.items() if math.isfinite(v)}
    gutter = 1 + min(max(map(len, ["layer", *projections])), 24)
    cell = 1 + max([1, *map(len, texts.values())])
    if len(layers) * cell > TERMINAL_WIDTH - gutter:
        cell -= 1                        # no space between cells
    per_block = max(1, (TERMINAL_WIDTH - gutter) // cell)

    def draw(at: Cell) -> str:
        if at not in texts or texts[at] in ("0", "-0"):
            return "·".rjust(cell)
        text, position = texts[at].rjust(cell), place(cells[at])
        if color:
            return _paint(text, position)
        return text if digits else SHADES[min(int(position * 5), 4)] * cell

    lines = [clip(clean(title), TERMINAL_WIDTH)]
    for start in range(0, len(layers), per_block):
        block = layers[start:start + per_block]
        lines += [clip(name, gutter - 1).ljust(gutter) + "".join(draw((n, name)) for n in block)
                  for name in projections]
        step, axis = 1 if max(map(len, block)) < cell else 5, ""
        for n in [n for n in block if n == "-" or int(n) % step == 0] or block[:1]:
            axis = axis.ljust((block.index(n) + 1) * cell - len(n)) + n
        lines.append("layer".ljust(gutter) + axis)
    ramp = "".join(_paint(" ", i / 14) for i in range(14)) + " " if color else (
        "" if digits else SHADES + " ")
    clipped = "<=" if any(value < low for value in cells.values()) else ""
    lines.append(f"{'':{gutter}}min {clipped}{low:.3g} {ramp}max {high:.3g}"
                 + (", log scale" if scale == "log" else ""))
    return "\n".join(lines)


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    text = escape(clean(text))
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"{style}>{text}</text>'


def _square(x: float, y: float, width: float, rgb: bytes, text: str) -> str:
    """One cell with its number in black or white, whichever is easier to read."""
    ink = "#000" if 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 125 else "#fff"
    rect = (f'<rect class="cell" x="{x:.2f}" y="{y:.2f}" width="{width - 0.5:.2f}" '
            f'height="{ROW - 0.5}" fill="#{rgb.hex()}"/>')
    size = min(SIZE, width / (0.65 * max(1, len(text))))
    style = f' font-size="{size:.2f}" fill="{ink}"'
    return rect + (_text(x + width / 2, y + 9, text, style=style) if text else "")


def _panel(x: float, y: float, width: float, title: str, layers: Sequence[str],
           projections: Sequence[str], cells: Mapping[Cell, Drawn]) -> list[str]:
    """One heatmap with its title: projection names on the left, layer numbers below."""
    left = x + 6 + 6.2 * min(max(map(len, ["layer", *projections])), 14)
    size = (x + width - left) / max(1, len(layers))
    step = 1 if size >= 16 else 5        # layer numbers that fit
    out = [f"<g><title>{escape(clean(title))}</title>",
           _text(left, y + 10, clip(title, int((x + width - left) / 6.8)), "start", BOLD)]
    for row, label in enumerate([*projections, "layer"]):
        top = y + 14 + ROW * row
        out.append(_text(left - 4, top + 9, clip(label, 14), "end"))
        out += [_square(left + i * size, top, size, *cells[n, label])
                for i, n in enumerate(layers) if (n, label) in cells]
    out += [_text(left + (i + 0.5) * size, top + 9, layer) for i, layer in enumerate(layers)
            if layer == "-" or int(layer) % step == 0]
    return [*out, "</g>"]


def allocation_svg(scores: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> str:
    """A figure as wide as a paper's column: each task's sensitivities, and the allocated experts.

    Sensitivities are drawn as shares of their task's maximum, on one log scale for all tasks; grey
    means not measured. Up to 12 layers go in two columns; many layers widen the figure.
    """
    names = dict.fromkeys(name for values in (*scores.values(), counts) for name in values)
    layers, projections, _ = grid(names)
    shares = {}
    for task, values in scores.items():
        top = _scaled(values.values(), "log")[1] or 1.0
        shares[task] = {name: v / top for name, v in values.items() if math.isfinite(v)}
    all_shares = [v for of_task in shares.values() for v in of_task.values()]
    low, _, place = _scaled([0.1, 1.0, *all_shares], "log")
    panels = [(task, dict.fromkeys(names, (ABSENT, "")) | {
        name: (_color(VIRIDIS, place(v)), "") for name, v in of_task.items()})
        for task, of_task in shares.items()]
    most = max(counts.values(), default=0)
    panels.append((f"{sum(counts.values())} experts", dict.fromkeys(names, (ABSENT, "0")) | {
        name: (_color(BLUES, (n - 1) / max(1, most - 1)), str(n))
        for name, n in counts.items() if n}))
    columns = 2 if len(layers) <= 12 else 1
    width = max(WIDTH, 46 + 9.0 * len(layers))
    wide, step = (width + GAP) / columns - GAP, 32 + ROW * len(projections)
    out = []
    for i, (title, drawn) in enumerate(panels):
        out += _panel(i % columns * (wide + GAP), i // columns * step, wide, title, *grid(drawn))
    y = step * math.ceil(len(panels) / columns)
    return _svg(width, y + 38, "sensitivity and experts", out + _legend(y, low))


def loss_svg(training: Mapping[int, float], validation: Mapping[int, float], kept: int) -> str:
    """A figure of the losses by step, as wide as a paper's column: of training lines in grey, of
    validation lines in blue, and a mark at the step whose experts were kept."""
    values = [v for v in (*training.values(), *validation.values()) if math.isfinite(v)]
    top, last, height = max(values, default=1.0) or 1.0, max(training, default=1), 160.0

    def at(step: int, value: float) -> str:
        y = height * (1 - min(value, top) / top) if math.isfinite(value) else 0
        return f"{30 + (WIDTH - 30) * step / last:.1f},{y:.1f}"

    shapes = [f'<path d="M30,0V{height}H{WIDTH}" fill="none" stroke="#000"/>']
    for losses, color, width in (training, "#999", 0.7), (validation, "#105ba4", 1.5):
        points = " ".join(at(step, value) for step, value in losses.items())
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{color}" '
                     f'stroke-width="{width}"/>')
    caption = ["loss of training lines (grey), of validation lines (blue)"]
    if kept in validation:
        caption.append(f"dot: step {kept}, kept")
        x, y = at(kept, validation[kept]).split(",")
        shapes.append(f'<circle cx="{x}" cy="{y}" r="3" fill="#105ba4"/>')
    shapes += [_text(26, 8, f"{top:.3g}", "end"), _text(26, height, "0", "end"),
               _text(WIDTH, height + 12, f"step {last}", "end"),
               *(_text(30, height + 12 * line, text, "start", ' font-size="8"')
                 for line, text in enumerate(caption, 1))]
    return _svg(WIDTH, height + 28, "loss", shapes)


def _legend(y: float, low: float) -> list[str]:
    """The Viridis colours as a bar, with a log scale from `low` to 1."""
    stops = (f'<stop offset="{i / 8}" stop-color="#{hue}"/>' for i, hue in enumerate(VIRIDIS))
    return [f'<linearGradient id="shares">{"".join(stops)}</linearGradient>',
            f'<rect x="37" y="{y + 14}" width="260" height="8" fill="url(#shares)"/>',
            _text(37, y + 10, "sensitivity (share of the maximum)", "start"),
            *(_text(x, y + 34, tick) for x, tick in (
                (37, f"≤{low:.2g}"), (167, f"{low ** 0.5:.2g}"), (297, "1")))]


def _svg(width: float, height: float, title: str, shapes: Sequence[str]) -> str:
    """A figure of this size with a margin of 3 around it, on white."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-3 -3 {width + 6:g} {height + 6:g}" '
            f'width="{2 * width + 12:g}" height="{2 * height + 12:g}" font-size="{SIZE}" '
            f'font-family="Helvetica, Arial, sans-serif"><title>{escape(clean(title))}</title>\n'
            '<rect x="-3" y="-3" width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(shapes) + "\n</svg>\n")
