"""How time and memory grow with the model: SmolLM2's shapes of 135M, 360M and 1.7B parameters, and
four layers of Llama's 7B ("7B/4").

    python tests/benchmarks/growth.py --tokenizer SMOLLM2 --data DATA [--sizes 135M,360M]

Makes checkpoints with random weights in bfloat16, which cost what real ones do. Each step is the
command that a user types, in a process of its own, whose time and peak memory the table holds:
training on two tasks, the default export, answering; beside them PEFT's LoRA of equal size and
onnxruntime-genai's model builder, if they are installed. The steps that --work holds already are
not run again, and the table is printed anew. ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 in
the environment has torch compute as on a laptop whose CPU has no AVX-512.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
from safetensors.torch import save_file

from minismoe.cli.flags import InputConfig
from minismoe.cli.inputs import resolve_auto
from minismoe.io.files import new_folder, read_json, write_json
from minismoe.model.config import Config
from minismoe.model.decoder import meta_model

LINES = 64                               # of each task: as many as the export calibrates with
TOKENS = 64                              # decoded
SIZES = {                                # hidden, intermediate, layers, heads, key and value heads
    "135M": (576, 1536, 30, 9, 3), "360M": (960, 2560, 32, 15, 5), "1.7B": (2048, 8192, 24, 32, 32),
    "7B/4": (4096, 11008, 4, 32, 32)}


def make_checkpoint(folder: Path, sizes: Sequence[int], tokenizer: Path) -> None:
    """A checkpoint of Llama's family with random weights, and the files of a tokenizer."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "generation_config.json"):
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, folder / file)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")
    config = read_json(tokenizer / "config.json") | dict(zip(names, sizes)) | {
        "head_dim": sizes[0] // sizes[3]}
    write_json(folder / "config.json", config)
    shapes = {name: tensor.shape for name, tensor in
              meta_model(Config.from_dict(config)).named_parameters()}
    torch.manual_seed(0)
    save_file({name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else
               torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5)
               for name, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"})


def commands(model: Path, work: Path, data: str, tasks: str) -> dict[str, list[str]]:
    """{step: the arguments of python}; steps of ours first, in the order that they need. Both sides
    train in the dtype that train.py chooses for this machine."""
    dtype = resolve_auto(InputConfig(model=str(model))).dtype
    bench = Path(__file__).parent
    given = ["--model", str(model), "--data", data]
    decode = [str(bench / "decode_speed.py"), "--model", str(model), "--threads",
              str(torch.get_num_threads()), "--tokens", str(TOKENS)]
    return {
        "train": ["train.py", *given, "--only-tasks", tasks, "--limit-train", str(LINES),
                  "--limit-test", "4", "--epochs", "1", "--samples", "8", "--dtype", dtype,
                  "--out", str(work / "run")],
        "export": ["export.py", str(work / "run"), "--out", str(work / "ours")],
        "decode": [*decode, "--side", "int4", "--child", str(work / "ours")],
        "PEFT": [str(bench / "train_speed.py"), *given, "--tasks", tasks, "--batch-size", "8",
                 "--experts", "2", "--side", "peft", "--dtype", dtype],
        "builder": ["-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o",
                    str(work / "genai"), "-c", str(work / "cache"), "-p", "int4", "-e", "cpu"],
        "genai": [*decode, "--side", "genai", "--child", str(work / "genai")]}


def measured(command: Sequence[str], log: Path) -> dict[str, float]:
    """Seconds and peak memory (GB) of a process, and what its last line says, if that is JSON.

    Raises RuntimeError with the log's name if it fails.
    """
    begun = time.time()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, cwd=ROOT,
                                   stderr=subprocess.STDOUT,
                                   env={**os.environ, "STARTED": str(begun)})
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.time() - begun
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: see {log}")
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    said = json.loads(last) if last.startswith("{") else {}
    # A child's ru_maxrss begins at that of its parent, which imports torch; decoding is smaller.
    peak = said["peak"] * 1e6 if "first" in said else used.ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak / 1e9, "rate": said.get("rate")}


def measure(size: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The steps of one size; a step that fails is left out, and so is what follows from it."""
    work = args.work / size.replace("/", "-")
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base").exists():
        with new_folder(work / "base") as folder:
            make_checkpoint(folder, SIZES[size], args.tokenizer)
    file = work / "steps.json"
    steps = read_json(file) if file.exists() else {}
    for step, command in commands(work / "base", work, args.data, args.tasks).items():
        if step not in steps and (not args.steps or step in args.steps.split(",")):
            try:
                steps[step] = measured(command, work / f"{step}.txt")
            except RuntimeError as e:
                print(e, file=sys.stderr)
                continue
            if step == "train":
                lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
                steps[step]["rate"] = statistics.median(
                    json.loads(line)["tokens_per_second"] for line in lines)
            write_json(file, steps)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, type=Path,
                        help="checkpoint folder of SmolLM2, for its tokenizer and config.json")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", default="clinc,trec")
    parser.add_argument("--sizes", default="135M,360M,1.7B")
    parser.add_argument("--steps", help="comma list: train, export, decode, PEFT, builder, genai")
    parser.add_argument("--work", type=Path, default=Path("runs/growth"),
                        help="folder of checkpoints, runs and exports (default: %(default)s)")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; tokens/s, time in s, peak memory in GB")
    print("| | train | PEFT | export | genai's builder | decode | genai |\n" + "|---" * 7 + "|")
    for size in args.sizes.split(","):
        steps, cells = measure(size, args), [size]
        for step in ("train", "PEFT", "export", "builder", "decode", "genai"):
            seen = steps.get(step)
            first = seen and (f"{seen['rate']:.0f} tokens/s" if seen["rate"] else
                              f"{seen['seconds']:.0f} s")
            cells.append(f"{first}, {seen['peak']:.1f} GB" if seen else "")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
