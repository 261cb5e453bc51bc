"""What is exported and how: the settings of export.py, and the model that they are applied to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.tasks import Example, Task
from ..data.tokenizer import Tokenizer
from ..io.flags import flag, positive, text
from ..model.decoder import CausalLM
from ..model.quantize import BLOCK, BLOCKS
from ..runtime.drafts import DRAFTED
from .weights import PRECISIONS, GraphFormat


def static_sizes(text: str) -> tuple[int, int, int]:
    """An argparse type: 1xTxP."""
    one, T, P = (positive(part) for part in text.lower().split("x"))
    if one != 1:
        raise ValueError("a graph reads one prompt")
    return one, T, P


static_sizes.__name__ = "1xTxP"              # as argparse calls it in a message


@dataclass(frozen=True)
class ExportConfig:
    """What the exported folder holds of a run. Without run and model: the built-in toy."""

    run: str | None = None                   # folder of train.py
    prompts: str | None = flag(
        None, "calibrate on these prompts, one a line, and not on the run's data", text,
        metavar="FILE")
    limit_test: int | None = flag(None, "test lines a task (default: 300, and 8 of free text)",
                                  positive, metavar="N")
    device: str = flag("auto", "for calibrating: cpu, cuda, mps, or auto (default)")
    dtype: str = flag("auto", "for calibrating. auto (default): that of the run's "
                      "training, or float32 for a base", choices=("auto", "float32", "bfloat16"))
    model: str | None = flag(
        None, "instead of RUN: a checkpoint folder or hub name, without adapters", text)
    out: str | None = flag(None, "folder to make (default: one in RUN/export)", text, metavar="DIR")
    routing: str = flag("merge", "merge (default): experts into the weights; freeze: a LoRA beside "
                        "them; dynamic: routers that choose token by token, for a run of train.py "
                        "--routing dynamic", choices=("merge", "freeze", "dynamic"))
    port: bool = flag(False, "also write answer.c, which answers questions from the folder on any "
                      "device that has onnxruntime's C library, and its table answer.bin")
    layout: str = flag("onnx", "for onnxruntime (default), onnxruntime-genai, transformers.js with "
                       "a page to chat in a browser, peft, or transformers",
                       choices=("onnx", "genai", "web", "peft", "hf"))
    precision: str = flag("auto", "how weights are stored. int4-8: 4 bits, embedding and head 8. "
                          "int4, int8: all alike. q8: 8 bits with a scale a row, for browsers; "
                          "q4f16: int4 with float16 activations, for WebGPU in browsers. w8a16, "
                          "w4a16: for NPUs. auto (default): int4-8; q8 for --layout web",
                          choices=("auto", *PRECISIONS))
    block: int | None = flag(
        None, "weights that share a scale, in 8 or 4 bits (default: 32; 64 is smaller and faster, "
        "and loses more)", int, choices=BLOCKS)
    vocab: int | None = flag(
        None, "keep N tokens alone: those of the run's lines or of --prompts, and those that the "
        "model expects in such texts; a smaller, faster file for a narrow task (default: all)",
        positive, metavar="N")
    target: str = flag("ort", "onnxruntime's fused operators (default), standard ONNX operators "
                       "only, or static graphs for NPUs, in fp16, w8a16 (their default) or w4a16",
                       choices=("ort", "portable", "npu"))
    static: tuple[int, int, int] | None = flag(
        None, "fixed sizes for accelerators: one prompt, tokens a step, past positions; needs "
        "--target portable, or npu (default there: 1x64x512)", static_sizes, metavar="1xTxP")
    provider: list[str] | None = flag(
        None, "check the folder on this provider of onnxruntime as well, such as webgpu, cuda or "
        "openvino (may be repeated); qnn:SOC compiles --target npu for a chip, by Qualcomm's "
        "number: 60 is Snapdragon X Elite, 43 8 Gen 2, 57 8 Gen 3", str.lower, action="append")
    context: int | None = flag(
        None, "positions of the graph (default: what the model was made for, at most 2048, or "
        "what the test lines need)", positive, metavar="TOKENS")

    @property
    def graph(self) -> bool:
        """Whether the folder holds an ONNX graph, not safetensors."""
        return self.layout not in ("peft", "hf")

    @property
    def form(self) -> GraphFormat:
        """How the graph is written."""
        drafts = self.layout == "onnx" and self.target == "ort"
        return GraphFormat(self.target, self.precision, self.context or 0, self.block or BLOCK,
                           self.static, 1 + DRAFTED if drafts else 1)

    @property
    def chip(self) -> int | None:
        """Qualcomm's number of the chip to compile for: that of --provider qnn[:npu]:NUMBER."""
        numbers = [name.rpartition(":")[2] for name in self.provider or ()
                   if name.startswith("qnn")]
        return next((int(number) for number in numbers if number.isdigit()), None)


@dataclass(frozen=True)
class Source:
    """What is exported: a model with the experts of a run, or a base alone.

    Of `trained`, `reference_fp32` is the same in float32, and `Part.shipped` what the folder holds.
    """

    run: Path                                # folder of the run; for a base, a name in runs
    base: Path                               # folder of the base checkpoint
    name: str                                # of the base, as it was given
    trained: CausalLM                        # in the dtype of the run; with --vocab, trimmed
    tokenizer: Tokenizer
    tasks: Sequence[Task] = ()
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)      # by task
    system: str | None = None                # system prompt that training added to lines
    # Of the trained model with all tokens, by task: whether each test line is right, where known.
    judged: Mapping[str, list[int]] = field(default_factory=dict)
    froze: bool = False          # whether mixtures were frozen after it was trained and judged
