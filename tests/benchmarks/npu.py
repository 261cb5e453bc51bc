"""What an NPU folder answers on the CPU and on the emulated HTP, and what else reads its graphs.

    python export.py RUN --out FOLDER --target npu --static 1x64x128 --limit-test 50
    python tests/benchmarks/npu.py FOLDER --data DATA --tasks trec,clinc,banking77 --lines 7

Prints exact match as the export measured it on the CPU; then for the first test lines of each task
whether the HTP's text is the CPU's, and seconds (of the emulation: no device's); then the logits of
OpenVINO beside onnxruntime's, and what onnxruntime's checker says about phones. Needs the extras
accelerators and test. --lines 0 leaves the HTP out.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import onnxruntime as ort
import torch

from minismoe.data.tasks import load_tasks
from minismoe.data.tokenizer import load_tokenizer
from minismoe.io.text import clean, table
from minismoe.runtime import Generator
from minismoe.runtime.npu import EXACT
from minismoe.training.evaluate import questions

TYPES = {"tensor(int64)": torch.int64, "tensor(float)": torch.float32,
         "tensor(float16)": torch.float16}


def on_cpu(folder: Path) -> str:
    """Exact match by task, of the trained model and of the folder, as export.json holds it."""
    found = json.loads((folder / "export.json").read_text())["checked"][""]["exact_match"]
    columns = list(next(iter(found.values())))
    rows = [[name, *(f"{row[c]:.3f}" for c in columns)] for name, row in found.items()]
    mean = [f"{sum(row[c] for row in found.values()) / len(found):.4f}" for c in columns]
    return table(["CPU, exact match", *columns], [*rows, ["mean", *mean]])


def on_htp(folder: Path, data: str, tasks: list[str], lines: int) -> None:
    """Print, line by line, whether the HTP answers as the CPU does."""
    start = time.perf_counter()
    sides = Generator(folder, threads=1), Generator(folder, "qnn")
    print(f"opened for the HTP in {time.perf_counter() - start:.0f} s", flush=True)
    tokenizer, total = sides[0].tokenizer, [0, 0, 0]
    for n in range(lines):
        for task in load_tasks(data, tasks):
            asked = questions(tokenizer, task, sides[0].context)
            prompt, wanted, limit = asked.prompts[n], asked.answers[n], asked.limits[n]
            texts, times = [], [time.perf_counter()]
            for side in sides:
                texts.append(list(side.generate(prompt, limit)))
                times.append(time.perf_counter())
            right = [tokenizer.decode(t).strip() == tokenizer.decode(wanted).strip()
                     for t in texts]
            total = [a + b for a, b in zip(total, (texts[0] == texts[1], *right))]
            print(f"{clean(task.name)} {n}: {len(prompt)} tokens read, {len(texts[1])} written, "
                  f"{'the same' if texts[0] == texts[1] else 'ANOTHER TEXT'}; CPU "
                  f"{times[1] - times[0]:.1f} s, HTP {times[2] - times[1]:.0f} s", flush=True)
    print("HTP: {0} of {count} texts are the CPU's; right: {1} on the CPU, {2} on the HTP".format(
        *total, count=lines * len(tasks)))


def in_openvino(folder: Path, ids: list[int]) -> str:
    """How far OpenVINO's logits of a step are from onnxruntime's, on the CPU in float32."""
    import openvino

    options = ort.SessionOptions()
    for entry in EXACT:
        options.add_session_config_entry(*entry)
    look, session = (ort.InferenceSession(str(folder / f"{name}.onnx"), options, providers=[
        "CPUExecutionProvider"]) for name in ("embed", "prompt"))
    feeds = {i.name: torch.zeros(i.shape, dtype=TYPES[i.type]) for i in session.get_inputs()}
    T = feeds["position_ids"].shape[1]
    ids = ids[:T] + [0] * (T - len(ids))
    values = {name: x.numpy() for name, x in feeds.items()}
    values["hidden"] = look.run(None, {"input_ids": torch.tensor([ids]).numpy()})[0]
    values["attention_mask"][:, -T:] = 1
    values["position_ids"][:] = range(T)
    wanted = torch.from_numpy(session.run(["logits"], values)[0])
    model = openvino.compile_model(str(folder / "prompt.onnx"), "CPU", {
        "INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(model(values)["logits"])
    error = (found - wanted).abs().max() / wanted.abs().max()
    return (f"OpenVINO {openvino.__version__[:8]}: logits within {error:.1e} of onnxruntime's "
            f"largest, likeliest tokens {int(wanted.argmax())} and {int(found.argmax())}")


def on_phones(file: Path) -> str:
    """The sums of onnxruntime's mobile usability checker."""
    done = subprocess.run(
        [sys.executable, "-m", "onnxruntime.tools.check_onnx_model_mobile_usability",
         "--log_level", "info", str(file)], capture_output=True, text=True)
    return "\n".join(line.removeprefix("INFO:").strip() for line in (
        done.stdout + done.stderr).splitlines() if "partitions with" in line or "Unsupported ops"
        in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", default="trec,clinc,banking77")
    parser.add_argument("--lines", type=int, default=7, help="of each task, on the HTP")
    args = parser.parse_args()
    print(on_cpu(args.folder))
    tasks, tokenizer = args.tasks.split(","), load_tokenizer(args.folder)
    prompt = questions(tokenizer, load_tasks(args.data, tasks)[0], 1 << 20).prompts[0]
    print(in_openvino(args.folder, prompt))
    print(on_phones(args.folder / "model.onnx"))
    if args.lines:
        on_htp(args.folder, args.data, tasks, args.lines)


if __name__ == "__main__":
    main()
