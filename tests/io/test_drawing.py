"""What is drawn is where it belongs, fits, parses, and lets no control character through.

drawings.txt holds pictures that were looked at; `PYTHONPATH=. python tests/io/test_drawing.py`
writes it anew after a change that is meant.
"""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minismoe.io.drawing import grid, loss_svg, terminal_heatmap
from minismoe.io.text import clean, table

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DRAWINGS = Path(__file__).with_name("drawings.txt")
EVIL = "tr\x1b[31mec\r\n\x07\x9b\u202e<&>\""  # colours, newlines, a bell, C1, right-to-left, markup


def model(layers: int, value: float = 1.0) -> dict[str, float]:
    return {f"model.layers.{i}.{kind}": value * (1 + i) for i in range(layers) for kind in KINDS}


def rows(heatmap: str) -> dict[str, str]:
    """Each projection's row without its label and the space after it."""
    lines = [line for line in heatmap.splitlines()[1:-1] if not line.startswith(" ")]
    return {line.split(" ")[0]: line[len("layer "):] for line in lines}


def test_grid_orders_layers_as_numbers_and_projections_canonically():
    layers, projections, found = grid({
        "lm_head": 9.0, "model.layers.10.mlp.down_proj": 1.0, "model.layers.2.mlp.fc1": 3.0,
        "model.layers.2.self_attn.o_proj": 2.0, "model.layers.2.self_attn.q_proj": 4.0})
    assert layers == ["2", "10", "-"]
    assert projections == ["q", "o", "down", "lm_head", "fc1"]
    assert found == {("-", "lm_head"): 9.0, ("10", "down"): 1.0, ("2", "o"): 2.0,
                     ("2", "fc1"): 3.0, ("2", "q"): 4.0}


def test_grid_keeps_modules_apart_that_end_alike():
    names = [f"layers.0.mlp.experts.{e}.up_proj" for e in range(3)] + ["layers.0.self_attn.q_proj"]
    layers, projections, found = grid({name: i for i, name in enumerate(names)})
    assert layers == ["0"] and len(found) == 4
    assert projections[0] == "q" and "layers.*.mlp.experts.1.up_proj" in projections


@pytest.mark.parametrize("layers", [1, 4, 30, 37, 38, 80, 126])
@pytest.mark.parametrize("digits", [False, True])
def test_heatmap_never_exceeds_80_columns_and_loses_no_cell(layers, digits):
    counts = {name: 1 + i % 12 for i, name in enumerate(model(layers))}
    for color in (False, True):
        text = terminal_heatmap("t" * 100, counts, digits=digits, color=color)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert max(map(len, plain.splitlines())) <= 80
        assert ("\x1b" in text) == color
        assert digits or plain.count("layer") == (1 if layers <= 74 else 2)  # blocks
        painted = text.count("\x1b[48;5;") - 14  # less the legend's own
        assert painted == (7 * layers if color else -14)


def test_color_follows_the_terminal_and_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b" in terminal_heatmap("", model(2))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in terminal_heatmap("", model(2))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert "\x1b" not in terminal_heatmap("", model(2))


def test_control_characters_do_not_reach_the_terminal():
    values = {f"model.layers.0.{EVIL}": 1.0, "model.layers.1.q_proj": 2.0}
    drawn = terminal_heatmap(EVIL, values, color=False), table([EVIL], [[EVIL]])
    for text in drawn:
        assert all(char.isprintable() for char in text.replace("\n", ""))
    assert len(drawn[0].splitlines()) == 5 and len(drawn[1].splitlines()) == 3
    assert clean("naïve 試験 ✓") == "naïve 試験 ✓"


ANY = st.text(st.characters(codec=None, exclude_categories=()))        # surrogates, too


@given(ANY, ANY, st.floats(), st.booleans())
def test_no_name_or_value_breaks_a_drawing(task, name, value, color):
    values = {f"model.layers.3.{name}": value, name: value, "model.layers.4.q_proj": 1.0}
    for scale in ("linear", "log"):
        text = terminal_heatmap(task, values, scale=scale, color=color)
        assert "\ud800" not in text and "\r" not in text


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf, -1.0, 5e-324])
def test_constant_values_are_drawn(value):
    values = dict.fromkeys(model(3), value)
    for scale in ("linear", "log"):
        assert len(rows(terminal_heatmap("t", values, scale=scale, color=False))) == 8


def test_nothing_is_drawn_as_nothing():
    assert terminal_heatmap("none", {}, color=False).startswith("none\n")


def drawings() -> str:
    """Small pictures of each kind; escapes are readable."""
    many = {f"layers.{i}.q_proj": 1.0 + i for i in range(26)} | {
        f"layers.3.{'long_' * 9}projection": 0.5}
    zero = {f"layers.{i}.{kind}": 10.0 ** i for i in range(4) for kind in KINDS[3:]} | {
        "layers.4.mlp.up_proj": 0.0}
    shades = (terminal_heatmap("t" * 90, many, scale=scale, color=color).replace("\x1b", "ESC")
              for scale in ("linear", "log") for color in (False, True))
    return "\n\n".join([
        loss_svg({1: 4.0, 2: 2.0, 3: 1.0}, {2: 3.0}, 2), *shades,
        terminal_heatmap("a zero", zero, scale="log", color=False),
        terminal_heatmap("counts", dict.fromkeys(many, 12), digits=True, color=False)]) + "\n"


def test_drawings_are_those_that_were_looked_at() -> None:
    assert drawings() == DRAWINGS.read_text(encoding="utf-8")


if __name__ == "__main__":
    DRAWINGS.write_text(drawings(), encoding="utf-8")
