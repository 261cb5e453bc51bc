"""Pictures show each value where it belongs, and fit a terminal."""

from xml.etree import ElementTree

import pytest

from minismoe.io.drawing import loss_svg, terminal_heatmap

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_a_shade_tells_the_fifth_of_a_value_and_digits_the_value() -> None:
    values = {f"model.layers.{layer}.{kind}": 10.0 ** (layer + 2 * i)
              for layer in range(5) for i, kind in enumerate(KINDS[:2])}
    del values["model.layers.3.self_attn.k_proj"]
    assert terminal_heatmap("scores\x1b", values).splitlines() == [
        "scores\ufffd", "q     · · ░ ▒ ▓", "k     ░ ▒ ▓   █", "layer 0 1 2 3 4",
        "from the lowest fifth · ░ ▒ ▓ █ to the highest"]
    counts = {f"model.layers.{layer}.mlp.up_proj": 5 * layer for layer in (0, 2, 10)}
    assert terminal_heatmap("experts", counts, digits=True).splitlines() == [
        "experts", "up     · 10 50", "layer  0  2 10"]


@pytest.mark.parametrize("layers, blocks", [(1, 1), (24, 1), (30, 2), (126, 7)])
def test_a_heat_map_fits_a_terminal_and_loses_no_cell(layers: int, blocks: int) -> None:
    counts = {f"model.layers.{i}.{kind}": 3 for i in range(layers) for kind in KINDS}
    text = terminal_heatmap("experts", counts, digits=True)
    numbers = [line.split() for line in text.splitlines()[1:]]
    assert max(map(len, text.splitlines())) <= 80
    assert len([line for line in numbers if line[0] == "layer"]) == blocks
    assert [n for line in numbers if line[0] == "layer" for n in line[1:]] == [
        str(i) for i in range(layers)]
    assert sum(line[1:].count("3") for line in numbers if line[0] != "layer") == 7 * layers


def test_losses_are_a_line_a_task_and_a_dashed_one_at_the_mark() -> None:
    svg = ElementTree.fromstring(loss_svg({"a<b\x1b": {1: 4.0, 2: 2.0, 4: 0.0}, "c": {2: 1.0}}, 2))
    shapes = [(shape.tag.rpartition("}")[2], shape) for shape in svg]
    assert [shape.get("points") for kind, shape in shapes if kind == "polyline"] == [
        "140.0,10.0 240.0,110.0 440.0,210.0", "240.0,160.0"]
    assert [shape.text for kind, shape in shapes if kind == "text"] == [
        "4", "0", "loss", "step 4", "a<b\ufffd", "c"]
    (dashed,) = (shape for _, shape in shapes if shape.get("stroke-dasharray"))
    assert dashed.get("d") == "M240.0,10V210"
    assert "stroke-dasharray" not in loss_svg({"a": {1: 0.0}})       # no mark; a loss of 0
