"""Quantise the float32 folder of genai's model builder with onnxruntime's own tools.

    python tests/benchmarks/fourbits_ort.py METHOD BLOCK GRAPH_FOLDER CALIBRATION_JSON OUT

METHOD is rtn or gptq. GPTQ reads the calibration file, a list of texts, each a list of tokens. It
leaves the embedding, which is quantised by rtn.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)


class Texts(CalibrationDataReader):
    """Each text as the inputs of the graph, with an empty past."""

    def __init__(self, folder: Path, texts: list[list[int]]):
        sizes = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        none = torch.zeros(1, sizes["num_key_value_heads"], 0, sizes["head_size"]).numpy()
        self.texts, self.past = list(texts), {
            f"past_key_values.{layer}.{part}": none for part in ("key", "value")
            for layer in range(sizes["num_hidden_layers"])}

    def get_next(self) -> dict[str, Any] | None:
        """The inputs of the next text; None after the last one."""
        if not self.texts:
            return None
        ids = torch.tensor([self.texts.pop(0)])
        return {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy(),
                **self.past}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_next, None)


def main(method: str, block: str, graph: str, calibration: str, out: str) -> None:
    size, source, folder = int(block), Path(graph), Path(out)
    model = onnx.load(str(source / "model.onnx"))
    config = {
        "rtn": lambda: DefaultWeightOnlyQuantConfig(size, accuracy_level=4),
        "gptq": lambda: GPTQWeightOnlyQuantConfig(
            Texts(source, json.loads(Path(calibration).read_text())))}[method]()
    quantizer = MatMulNBitsQuantizer(model, block_size=size, accuracy_level=4, algo_config=config)
    quantizer.process()
    model = quantizer.model.model
    config = DefaultWeightOnlyQuantConfig(size, op_types_to_quantize=("Gather",))
    MatMulNBitsQuantizer(model, algo_config=config).process()            # in place
    folder.mkdir()
    for file in source.iterdir():
        if not file.name.startswith("model.onnx"):
            shutil.copy(file, folder)
    onnx.save_model(model, str(folder / "model.onnx"), save_as_external_data=True,
                    location="model.onnx.data")


if __name__ == "__main__":
    main(*sys.argv[1:])
