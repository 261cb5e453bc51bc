"""What is drawn is where it belongs, fits, and lets no control character through.

drawings.txt holds pictures that were looked at; `PYTHONPATH=. python tests/io/test_drawing.py`
writes it anew after a change that is meant.
"""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minismoe.io.drawing import grid, loss_svg, terminal_heatmap
from minismoe.io.text import clean

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DRAWINGS = Path(__file__).with_name("drawings.txt")


def model(layers: int) -> dict[str, float]:
    return {f"model.layers.{i}.{kind}": 1.0 + i for i in range(layers) for kind in KINDS}


def test_grid_orders_layers_as_numbers_and_keeps_modules_apart_that_end_alike():
    layers, projections, found = grid({
        "lm_head": 9.0, "model.layers.10.mlp.down_proj": 1.0, "model.layers.2.mlp.fc1": 3.0,
        "model.layers.2.self_attn.o_proj": 2.0, "model.layers.2.self_attn.q_proj": 4.0,
        "model.layers.2.experts.1.fc1": 5.0})
    assert layers == ["2", "10", "-"]
    assert projections == ["q", "o", "down", "lm_head", "fc1", "model.layers.*.experts.1.fc1"]
    assert found == {("-", "lm_head"): 9.0, ("10", "down"): 1.0, ("2", "o"): 2.0,
                     ("2", "fc1"): 3.0, ("2", "q"): 4.0,
                     ("2", "model.layers.*.experts.1.fc1"): 5.0}


@pytest.mark.parametrize("layers", [1, 4, 30, 37, 38, 80, 126])
@pytest.mark.parametrize("digits", [False, True])
def test_heatmap_never_exceeds_80_columns_and_loses_no_cell(layers, digits):
    counts = {name: 1 + i % 12 for i, name in enumerate(model(layers))}
    for color in (False, True):
        text = terminal_heatmap("t" * 100, counts, digits=digits, color=color)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert max(map(len, plain.splitlines())) <= 80
        assert digits or plain.count("layer") == (1 if layers <= 74 else 2)  # blocks
        painted = text.count("\x1b[48;5;") - 14  # less the legend's own
        assert painted == (7 * layers if color else -14)


def test_color_follows_the_terminal_and_no_color(monkeypatch):
    for terminal, no_color, seen in (True, "", True), (True, "1", False), (False, "", False):
        monkeypatch.setattr("sys.stdout.isatty", lambda t=terminal: t, raising=False)
        monkeypatch.setenv("NO_COLOR", no_color)
        assert ("\x1b" in terminal_heatmap("", model(2))) == seen


ANY = st.text(st.characters(codec=None, exclude_categories=()))        # surrogates, too


@given(ANY, ANY, st.floats(), st.sampled_from(["linear", "log"]))
def test_no_name_or_value_breaks_a_drawing(task, name, value, scale):
    for values in ({f"layers.3.{name}": value, name: value, "layers.4.q_proj": 1.0},
                   dict.fromkeys(model(3), value), {}):
        text = terminal_heatmap(task, values, scale=scale, color=False)
        assert text == clean(text, "\n")
        assert text.count("\n") == (len(grid(values)[1]) + 2 if values else 1)
        assert terminal_heatmap(task, values, scale=scale, color=True)


def drawings() -> str:
    """Small pictures of each kind; escapes are readable."""
    many = {f"layers.{i}.q_proj": 1.0 + i for i in range(26)} | {
        f"layers.3.{'long_' * 9}projection": 0.5}
    zero = {f"layers.{i}.{kind}": 10.0 ** i for i in range(4) for kind in KINDS[3:]} | {
        "layers.4.mlp.up_proj": 0.0}
    shades = (terminal_heatmap("t" * 90, many, scale=scale, color=color).replace("\x1b", "ESC")
              for scale, color in (("linear", False), ("log", True)))
    return "\n\n".join([
        loss_svg({1: 4.0, 2: 2.0, 3: 1.0}, {2: 3.0}, 2), *shades,
        terminal_heatmap("a zero", zero, scale="log", color=False),
        terminal_heatmap("counts", dict.fromkeys(many, 12), digits=True, color=False)]) + "\n"


def test_drawings_are_those_that_were_looked_at() -> None:
    assert drawings() == DRAWINGS.read_text(encoding="utf-8")


if __name__ == "__main__":
    DRAWINGS.write_text(drawings(), encoding="utf-8")
