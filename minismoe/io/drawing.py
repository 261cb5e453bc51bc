"""A heat map in text of a value for each weight matrix, and the losses of a run as an SVG."""

from bisect import bisect_left
from collections.abc import Mapping
from html import escape

from .text import clean

WIDTH = 80                               # columns of a terminal
SHADES = "·░▒▓█"
COLOURS = ("#105ba4", "#c44e00", "#2f8132", "#8a3a8f", "#7a6200", "#007d86")


def terminal_heatmap(title: str, values: Mapping[str, float], digits: bool = False) -> str:
    """One row for each projection, one column for each layer, in blocks of at most 80 columns.

    values: by the name of a matrix, such as "model.layers.2.self_attn.q_proj". A shade says in
    which fifth of all values one is, whatever their scale; with `digits`, each is written as a
    whole number, and 0 as a dot. A cell without a matrix is empty.
    """
    cells, ordered = dict[tuple[str, str], str](), sorted(values.values())
    for name, value in values.items():
        layer, kind = name.split(".")[2], name.rpartition(".")[2].removesuffix("_proj")
        fifth = 5 * bisect_left(ordered, value) // len(ordered)
        cells[layer, kind] = (f"{value:.0f}" if value else "·") if digits else SHADES[fifth]
    layers = [*dict.fromkeys(layer for layer, _ in cells)]
    kinds = [*dict.fromkeys(kind for _, kind in cells)]
    cell = 1 + max(map(len, [*layers, *cells.values()]))
    gutter = max(map(len, ["layer", *kinds]))
    count = (WIDTH - gutter) // cell

    lines = [clean(title)]
    for block in (layers[i:i + count] for i in range(0, len(layers), count)):
        for kind in kinds:
            row = "".join(cells.get((layer, kind), "").rjust(cell) for layer in block)
            lines.append(f"{kind:{gutter}}{row}".rstrip())
        lines.append(f"{'layer':{gutter}}" + "".join(layer.rjust(cell) for layer in block))
    if not digits:
        lines.append(f"from the lowest fifth {' '.join(SHADES)} to the highest")
    return "\n".join(lines)


def loss_svg(losses: Mapping[str, Mapping[int, float]], mark: int | None = None) -> str:
    """A picture of the losses of each task by step, a line a task, on white. A dashed line stands
    at the step `mark`."""
    last = max(step for line in losses.values() for step in line)
    top = max(loss for line in losses.values() for loss in line.values()) or 1.0
    shapes = ['<path d="M40,10V210H440" fill="none" stroke="#000"/>']
    for y, label in (14, f"{top:.3g}"), (210, "0"), (224, "loss"):
        shapes.append(f'<text x="36" y="{y}" text-anchor="end">{label}</text>')
    shapes.append(f'<text x="440" y="224" text-anchor="end">step {last}</text>')
    if mark is not None:
        x = 40 + 400 * mark / last
        shapes.append(f'<path d="M{x:.1f},10V210" stroke="#000" stroke-dasharray="4"/>')
    for number, (task, line) in enumerate(losses.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{40 + 400 * step / last:.1f},{210 - 200 * loss / top:.1f}"
                          for step, loss in line.items())
        shapes += [f'<polyline points="{points}" fill="none" stroke="{colour}"/>',
                   f'<text x="446" y="{20 + 14 * number}" fill="{colour}">'
                   f'{escape(clean(task))}</text>']
    height = max(230, 20 + 14 * len(losses))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 {height}" font-size="11" '
            'font-family="sans-serif"><title>loss of training lines</title>\n'
            '<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(shapes) + "\n</svg>\n")
