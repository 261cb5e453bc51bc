"""probe.py --bits, which prints what few bits cost."""

import re

import probe
from minismoe.cli.flags import InputConfig
from minismoe.cli.inputs import load_inputs
from minismoe.data.tasks import collate
from minismoe.method.bits import harms
from minismoe.model.quantize import dequantize, quantize


def test_bits_prints_the_harm_of_each_matrix_and_makes_no_folder(inputs, tmp_path, succeed) -> None:
    out = succeed(probe.main, *inputs, "--bits", "--samples", "4", "--dtype", "float32", "--out",
                  tmp_path / "run")
    assert not (tmp_path / "run").exists()
    printed = dict(re.findall(r"4 bits in blocks of (\d+): (\S+) nats a token in all", out))
    read = load_inputs(InputConfig(model=inputs[1], data=inputs[3], device="cpu", dtype="float32"))
    layer = read.model.get_submodule(name := "model.layers.0.mlp.down_proj")
    batches = [collate(sorted(examples[:4], key=lambda e: len(e.ids)), 0)
               for examples in read.encoded.values()]
    (harm,) = harms(read.model, {name: [
        lambda: dequantize(quantize(layer.weight, 4, 128)) - layer.weight]}, batches)[name]
    largest = re.search(r"max (\S+), log", out)
    assert printed.keys() == {"128", "32"} and largest is not None
    assert 0 < harm <= float(largest[1]) * 1.01 < float(printed["128"])
