"""Generation speed and memory of int4 exports, against onnxruntime-genai and llama.cpp.

Merged experts are also compared with frozen ones beside the base and with routed ones.

    python tests/benchmarks/decode_speed.py --model SMOLLM2_135M \
        [--beside SMOLLM2_135M.Q4_0.gguf SMOLLM2_135M.Q4_K_M.gguf EXPORTED]

All sides get the same prompt and number of threads. int4-8 is the default of exports, which
stores embedding and head in 8 bits; int4 stores all in 4, in blocks of 32, as genai's does.
Each measurement runs in a process of its own, the sides in turn. Prints medians over rounds, and
ratios within a round. Peers come with `pip install 'minismoe[bench]'`: onnxruntime-genai with
onnx_ir (its model builder), left out if it is not installed, and llama-cpp-python. --beside takes
GGUF files, which llama.cpp's convert_hf_to_gguf.py and llama-quantize write, and folders that
export.py wrote, as with --vocab 32768.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Import neither torch nor numpy here: this file is also the child that measures start and memory.
from minismoe.io.process import peak_resident

EXPERTS, RANK, TOP_K = 3, 8, 2
CONTEXT = 2048
MERGED = {"int4": ("int4", 32), "int4-64": ("int4", 64), "int4-128": ("int4", 128),
          "int4-8": ("int4-8", 32)}              # precision and block
OURS = (*MERGED, "frozen", "dynamic")
TEXT = "The quick brown fox jumps over the lazy dog, and the dog asks why it should be. " * 40
REACH = [("int4", "int4-8", "rate", 1.1), ("int4", "genai", "rate", 1.0),
         ("frozen", "int4", "rate", 0.80),
         ("dynamic", "int4", "rate", 0.60),
         ("int4", "genai", "prefill28", 1.0), ("int4", "genai", "prefill512", 1.0)]

Read = Callable[[list[int]], Iterator[int]]      # a prompt, from an empty cache -> the next tokens


def ours(folder: Path, threads: int) -> tuple[list[int], Read]:
    from minismoe.runtime import Generator
    generator = Generator(folder, threads=threads)
    generator.tokenizer.stop_ids = []

    def read(ids: list[int]) -> Iterator[int]:
        generator.reset()
        return generator.generate(ids)
    return generator.tokenizer.encode(TEXT)[0], read


def genai(folder: Path, threads: int) -> tuple[list[int], Read]:
    import onnxruntime_genai as og
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {
        "intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def read(ids: list[int]) -> Iterator[int]:
        params = og.GeneratorParams(model)
        # A stop token ends nothing. The cache may not be shorter than an attention window.
        length = min(CONTEXT, max(512, len(ids) + 256))
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])
    return og.Tokenizer(model).encode(TEXT).tolist(), read


def llama(file: Path, threads: int) -> tuple[list[int], Read]:
    import llama_cpp
    with contextlib.redirect_stderr(None):
        model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, n_threads=threads, n_batch=512,
                                n_threads_batch=threads, verbose=False)
    return (model.tokenize(TEXT.encode(), add_bos=False),
            lambda ids: model.generate(ids, top_k=1, temp=0.0, reset=True))


def child(side: str, folder: Path, threads: int, tokens: int) -> None:
    """Measure one side in this process and print the result as JSON."""
    measured = llama if folder.suffix == ".gguf" else genai if side == "genai" else ours
    ids, read = measured(folder, threads)
    times: list[float] = []
    for _, _ in zip(range(tokens), read(ids[:28])):
        times.append(time.time())
    gaps = [b - a for a, b in zip(times, times[1:])]
    result = {"first": times[0] - float(os.environ["STARTED"]), "peak": peak_resident() / 1e6,
              "rate": 1 / statistics.median(gaps), "tokens": len(times)}
    for length, repeats in ((28, 7), (512, 3)):
        seconds = []
        for n in range(repeats):             # a new first token, so that no prompt cache helps
            prompt, start = [*ids[n + 1:n + length], 28 + n], time.perf_counter()
            next(read(prompt))
            seconds.append(time.perf_counter() - start)
        result[f"prefill{length}"] = length / statistics.median(seconds)
    print(json.dumps(result))


def export(model: Path, folder: Path, side: str) -> None:
    """Write one of OURS, with random adapters on all matrices."""
    import torch

    from minismoe import load_model
    from minismoe.export import graph, steps
    from minismoe.export.layouts import copy_base_files
    from minismoe.export.mixture import round_experts
    from minismoe.export.part import Part
    from minismoe.export.settings import ExportConfig
    from minismoe.export.ship import freeze_and_round
    from minismoe.method.experts import ExpertLinear, linear_layers
    base = load_model(model, torch.float32)
    config = base.config
    for name, module in linear_layers(base).items():
        if side not in MERGED:
            experts, rank = (1, EXPERTS * RANK) if side == "frozen" else (EXPERTS, RANK)
            layer = ExpertLinear(module, experts, rank, 2.0 * rank, TOP_K)
            torch.nn.init.normal_(layer.lora_B, std=1e-3)
            base.set_submodule(name, layer)
    folder.mkdir()
    precision, block = MERGED.get(side, MERGED["int4"])
    part = Part(ExportConfig(precision=precision, routing="dynamic", context=CONTEXT,
                             block=block), base, {})
    freeze_and_round([part], base, {}, {})
    round_experts(part.shipped, part.config.form)
    graph.write_decoder(folder / "model.onnx", part.shipped, part.config.form)
    steps.write_sampler(folder / "sampler.onnx", config.vocab_size)
    copy_base_files(model, folder)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": ""} for file in folder.iterdir()}
    (folder / "export.json").write_text(json.dumps({
        "format": "minismoe.export/1", "target": "ort", "context": CONTEXT, "files": files,
        "layers": config.num_hidden_layers, "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "vocab_size": config.vocab_size, "cache_type": "float32",
        "contract": {"cache": "shared"}}))


def prepare(args: argparse.Namespace, root: Path) -> dict[str, Path]:
    """{side: its folder or file}, for the sides that can be measured here."""
    me = [sys.executable, __file__, "--model", args.model]
    folders = {}
    for side in OURS:
        folders[side] = root / side
        subprocess.run([*me, "--export", str(root / side), "--side", side], check=True)
    made = subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", args.model, "-o",
         str(root / "genai"), "-p", "int4", "-e", "cpu", "-c", str(root / "cache"),
         "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"], capture_output=True)
    if made.returncode == 0:
        folders["genai"] = root / "genai"
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--beside", nargs="+", default=[], type=Path, metavar="PATH",
                        help="GGUF files for llama.cpp, and folders of exports, to measure too")
    parser.add_argument("--work", help="keep the exported folders here, and reuse them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="decoded a process")
    parser.add_argument("--rounds", type=int, default=5, help="processes a side")
    parser.add_argument("--sides", help="comma list; default: all")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--export", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        export(Path(args.model), Path(args.export), args.side)
    elif args.child:
        child(args.side, Path(args.child), args.threads, args.tokens)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(args.work or temporary)
            listed = root / "sides.json"
            if not listed.is_file():
                root.mkdir(parents=True, exist_ok=True)
                listed.write_text(json.dumps(
                    {side: str(path) for side, path in prepare(args, root).items()}))
            folders = {side: Path(path) for side, path in json.loads(listed.read_text()).items()}
            folders |= {path.stem: path for path in args.beside}
            report(args, {s: p for s, p in folders.items()
                          if not args.sides or s in args.sides.split(",")})


def report(args: argparse.Namespace, folders: dict[str, Path]) -> None:
    seen: dict[str, list[dict]] = {side: [] for side in folders}
    for _ in range(args.rounds):
        for side, results in seen.items():
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side, "--child",
                 str(folders[side])], stdout=subprocess.PIPE, check=True,
                env={**os.environ, "STARTED": str(time.time())})
            results.append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{args.threads} threads, {args.rounds} rounds; tokens/s decoded after a prompt of 28, "
          "and read at 28 and 512; s to the first token; peak MB and model file MB")
    print("side              decode  read 28  read 512  first   peak   file   decode by round")
    for side, results in seen.items():
        middle = {k: statistics.median(r[k] for r in results) for k in results[0]}
        path = folders[side]
        size = sum(f.stat().st_size for f in (path.glob("model.onnx*") if path.is_dir()
                                              else [path])) / 1e6
        print(f"{side:16} {middle['rate']:7.0f} {middle['prefill28']:8.0f} "
              f"{middle['prefill512']:9.0f} {middle['first']:6.2f} {middle['peak']:6.0f} "
              f"{size:6.0f}   " + " ".join(f"{r['rate']:.0f}" for r in results))
    for a, b, key, reach in REACH + [("int4", path.stem, "rate", 1.0) for path in args.beside]:
        if a in seen and b in seen:
            ratio = statistics.median(x[key] / y[key] for x, y in zip(seen[a], seen[b]))
            print(f"{a:9} / {b:16} {key:11} {ratio:5.2f}   (to reach: {reach})")


if __name__ == "__main__":
    main()
