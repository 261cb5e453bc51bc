"""llama.cpp's Q4_K_M of a run's merged model, without and with an importance matrix.

    python tests/benchmarks/imatrix.py RUN --converter LLAMA_CPP/convert_hf_to_gguf.py --out FOLDER

Merges the mixture of a run, lets llama.cpp's converter write it in float16, and lets llama.cpp
quantize that. The importance matrix is that of llama.cpp's own tool: the mean square of each input
of each matrix, here over the samples that calibrate our exports. Prints, of what llama.cpp then
computes, the same KL from the merged float32 model as bits.py, and the megabytes of the file.
"""

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import llama_cpp
import torch
from bits import Lines, test_lines
from compare_report import table
from fourbits import once, write_merged
from torch import Tensor
from tqdm import tqdm

import export
from minismoe.cli import script
from minismoe.export.calibration import calibration_batches, shuffled_samples
from minismoe.export.settings import ExportConfig
from minismoe.io.flags import positive
from minismoe.method.experts import linear_layers
from minismoe.method.hooks import hooked
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM

NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
         "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}      # llama.cpp's


def importance(model: CausalLM, batches: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """Mean square (in,) of each input, by llama.cpp's name of the matrix."""
    sums: dict[str, Tensor] = {}
    names = {layer: f"blk.{name.split('.')[2]}.{NAMES[name.rpartition('.')[2]]}.weight"
             for name, layer in linear_layers(model).items()}

    def hook(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        rows = args[0].flatten(0, -2)                    # of real tokens alone
        sums[names[layer]] = sums.get(names[layer], 0) + rows.square().sum(0)

    tokens = 0
    with hooked(names, hook):
        for ids, mask, *_ in (batch for of_task in batches.values() for batch in of_task):
            model.model(ids, mask)
            tokens += int(mask.sum())
    return {name: total / tokens for name, total in sums.items()}


def quantize(source: Path, target: Path, matrix: Mapping[str, Tensor]) -> None:
    """Write a GGUF file in Q4_K_M, by an importance matrix unless it is empty."""
    kept = {name: (ctypes.c_float * len(x))(*x.tolist()) for name, x in matrix.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))(*(
        llama_cpp.llama_model_imatrix_data(name.encode(), ctypes.cast(
            data, ctypes.POINTER(ctypes.c_float)), len(data)) for name, data in kept.items()))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, torch.get_num_threads()
    if kept:
        params.imatrix = entries             # the last entry has no name, and ends the list
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp can't quantize {source}")


def divergence(lines: Lines, file: Path) -> tuple[float, float]:
    """As `Lines.divergence`, of a GGUF file in llama.cpp."""
    model = llama_cpp.Llama(str(file), n_ctx=2048, logits_all=True, verbose=False,
                            n_threads=torch.get_num_threads())
    parts = list[Tensor]()
    for (ids, mask, own), hidden in zip(lines.batches, lines.hidden):
        states = iter(hidden.split(own.sum(1).tolist()))
        for row, real, wanted in zip(ids, mask.bool(), own):
            model.reset()
            model.eval(row[real].tolist())
            logits = torch.tensor(model.scores[:int(real.sum())])[wanted[real]]
            p = (next(states) @ lines.head.T).log_softmax(-1)
            parts.append((p.exp() * (p - logits.log_softmax(-1))).sum(-1))
    each = torch.cat(parts)
    return each.mean().item(), each[lines.answers].mean().item()


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of train.py")
    parser.add_argument("--converter", required=True, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--out", required=True, type=Path, help="keeps the GGUF files")
    parser.add_argument("--lines", type=positive, default=24, help="test lines of each task")
    args = parser.parse_args(argv)
    config = ExportConfig(run=args.run)
    source = export.load_run(config)
    merged = once(args.out / "merged", lambda folder: write_merged(source, folder))
    exact = args.out / "f16.gguf"
    if not exact.exists():
        subprocess.run([sys.executable, args.converter, str(merged), "--outfile", str(exact),
                        "--outtype", "f16"], check=True)
    model = load_model(merged, torch.float32).eval().requires_grad_(False)
    batches = calibration_batches(shuffled_samples(config, source), source)
    lines, rows = test_lines(source, args.lines, model), list[list[str]]()
    for way, matrix in {"float16": None, "Q4_K_M": {},
                        "Q4_K_M, importance matrix": importance(model, batches)}.items():
        file = args.out / f"{way.replace(', ', '-').replace(' ', '-')}.gguf"
        if matrix is None:
            file = exact
        else:
            quantize(exact, file, matrix)
        every, answers = divergence(lines, file)
        rows.append([way, f"{file.stat().st_size / 1e6:.1f}", f"{every:.3f}", f"{answers:.4f}"])
        tqdm.write(" ".join(rows[-1]))
    print(table(["llama.cpp", "MB", "KL", "of answers"], rows))


if __name__ == "__main__":
    script.run_script(main)
