"""The figures of compare.py, made of the pieces of minismoe/io/drawing.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minismoe.io import drawing


def accuracy_svg(record: Mapping[str, Any]) -> str:
    """Mean exact match over trainable parameters, with error bars; equal sizes side by side."""
    names = list(dict.fromkeys(row["strategy"] for row in record["rows"]))
    rows = sorted(record["rows"], key=lambda row: (row["parameters"], names.index(row["strategy"])))
    ends = [100 * x for row in rows for x in row["accuracy"]["intervals"]["mean"]]
    low, high = math.floor(min(ends)) - 1, math.floor(max(ends)) + 1      # room for numbers
    first, last = rows[0]["parameters"], rows[-1]["parameters"]
    width, height = max(420.0, 110 + 16.0 * len(rows)), 200.0
    left = 60 + 6.0 * len(rows)                  # room for all rows side by side

    def across(parameters: float) -> float:
        return left + (width - left - 80) * (parameters - first) / max(1, last - first)

    out = []
    for i in range(5):
        value, y = low + (high - low) * i / 4, height - 170 * i / 4
        out += [f'<path d="M42 {y:.1f}H{width:.1f}" stroke="#ddd"/>',
                drawing._text(38, y + 3, f"{value:.4g}", "end")]
    for size in sorted({first, last, *record["targets"].values()}):
        if all(abs(across(size) - across(other)) > 45 or size <= other for other in (first, last)):
            out += [f'<path d="M{across(size):.1f} {height}v4" stroke="#000"/>',
                    drawing._text(across(size), height + 15, f"{size / 1e6:.3g} M")]
    for row, x in zip(rows, spread([across(row["parameters"]) for row in rows], 12.0)):
        number = names.index(row["strategy"])
        color = hue(number, len(names))
        mean, bottom, top = (height - 170 * (100 * v - low) / (high - low)
                             for v in row["accuracy"]["intervals"]["mean"])
        out.append(f'<g><title>{drawing.escape(row["strategy"])}, {row["parameters"]:,} parameters'
                   f'</title><path d="M{x:.1f} {bottom:.1f}V{top:.1f}m-3 0h6M{x - 3:.1f} '
                   f'{bottom:.1f}h6" stroke="{color}"/><circle cx="{x:.1f}" cy="{mean:.1f}" r="3" '
                   f'fill="{color}"/>' + drawing._text(x, bottom + 10, str(number + 1)) + "</g>")
    for i, name in enumerate(names):
        x, y = 46 + 125.0 * (i % 3), height + 34 + 13 * (i // 3)
        out.append(f'<circle cx="{x:g}" cy="{y - 3}" r="3" fill="{hue(i, len(names))}"/>'
                   + drawing._text(x + 7, y, f"{i + 1} {name}", "start"))
    return figure(width, height + 34 + 13 * math.ceil(len(names) / 3),
                  f"{record['name']}: mean exact match (%) and trainable parameters", out)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to `wanted`, ascending and at least `gap` apart (least squares).

    Neighbours that are too near are pooled (pool adjacent violators).
    """
    pools: list[tuple[float, int]] = []
    for i, x in enumerate(wanted):
        pools.append((x - i * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [x + i * gap for i, x in enumerate(x for x, n in pools for _ in range(n))]


def hue(i: int, count: int) -> str:
    red, green, blue = drawing._color(drawing.VIRIDIS[:8], i / max(1, count - 1))
    return f"#{red:02x}{green:02x}{blue:02x}"


def allocations_svg(record: Mapping[str, Any]) -> str:
    """Experts of each matrix at the first seed, for the rules that are not uniform."""
    rows = [row for row in record["rows"] if len(set(row["allocation"].split())) > 1]
    layers, projections, _ = drawing.grid(dict.fromkeys(record["modules"], 0))
    wide, step = max(170.0, 46 + 9.0 * len(layers)), 34 + drawing.ROW * len(projections)
    columns = 4 if len(layers) <= 12 else 2
    out = []
    for i, row in enumerate(rows):
        cells = drawing.grid(dict(zip(record["modules"], map(int, row["allocation"].split()))))[2]
        most = max(cells.values())
        drawn = {at: (drawing._color(drawing.BLUES, (n - 1) / max(1, most - 1)) if n
                      else drawing.ABSENT, f"{n}") for at, n in cells.items()}
        budget = row["budget"] if row["budget"] == "paper" else f"x{row['budget']}"
        out += drawing._panel((i % columns) * (wide + drawing.GAP), 18 + i // columns * step, wide,
                             f"{row['strategy']} {budget}", layers, projections, drawn)
    height = 18 + math.ceil(len(rows) / columns) * step
    return figure(columns * (wide + drawing.GAP), height,
                  f"{record['name']}: experts per matrix", out)


def figure(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """An SVG in the style of drawing.py, with its title at the top."""
    return drawing._svg(width, height, title, [
        drawing._text(0, 11, drawing.clean(title), "start", drawing.BOLD), *parts])
