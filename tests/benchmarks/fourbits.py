"""One merged model in four bits: our exports beside onnxruntime's and genai's own tools.

    python tests/benchmarks/fourbits.py --run RUN RUN RUN --out FOLDER
    python tests/benchmarks/fourbits.py --readme tests/benchmarks/results/fourbits.json

Merges the mixture of a run once by the linear fit, in float32, and gives that checkpoint to every
tool. Prints size, exact match of the exported
folder, decoding speed (a process each, the rows in turn, medians over rounds) and the seconds that
making the folder took.

FOLDER keeps what was made, and fourbits.json the results: the same command goes on where it was.
The peers come with `pip install 'minismoe[bench]'`; a row that cannot be made is left out.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import decode_speed
from compare_report import machine, table
from safetensors.torch import save_file
from tqdm import tqdm

import export
from minismoe.cli import flags, script
from minismoe.data.tasks import Task
from minismoe.export.calibration import shuffled_samples
from minismoe.export.layouts import copy_base_files
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.tree import ship
from minismoe.io.files import new_folder, read_json, write_json
from minismoe.io.text import clean
from minismoe.method.freeze import merge
from minismoe.model.checkpoint import load_adapter, load_model, versions
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator
from minismoe.training.evaluate import evaluate, exact_match, questions

MERGED = "export.py --model {merged} --out {out}"
RUN = "export.py {run} --limit-test 2 --out {out}"                 # they are scored here instead
BUILDER = "-m onnxruntime_genai.models.builder -i {merged} -o {out} -c {cache} -e cpu"
TOOLS = Path(__file__).with_name("fourbits_ort.py")
CALIBRATION = 8                             # training lines of each task, for GPTQ


@dataclass(frozen=True)
class Row:
    """A way to store the merged model: the arguments of python that make its folder."""

    name: str
    side: str                                # what opens the folder: ours, genai or torch
    table: str                               # bits of embedding and head
    command: str


def genai(algorithm: str, block: int, bits: str = "4") -> Row:
    """A row of genai's model builder, which can store embedding and head once."""
    return Row(f"genai {algorithm}, blocks of {block}", "genai", bits,
               f"{BUILDER} -p int4 --extra_options shared_embeddings=true accuracy_level=4 "
               f"block_size={block} algo_config={algorithm}")


def ort(method: str, block: int) -> Row:
    """A row of onnxruntime's quantizer, which reads the builder's float32 graph."""
    return Row(f"onnxruntime {method}, blocks of {block}", "genai", "4, stored twice",
               f"{TOOLS} {method} {block} {{graph}} {{calibration}} {{out}}")


ROWS = [
    Row("mixture, float32 in PyTorch", "torch", "32", ""),
    Row("merged, float32", "ours", "32", f"{MERGED} --precision fp32"),
    *(Row(f"minismoe int4, blocks of {block}", "ours", "4",
          f"{RUN} --precision int4 --block {block}") for block in (32, 128)),
    Row("minismoe int4-8, bits chosen", "ours", "as chosen", f"{RUN} --size 88"),
    Row("minismoe int4-8, blocks of 32", "ours", "8", f"{MERGED} --precision int4-8 --block 32"),
    genai("default", 32), genai("rtn", 32), genai("k_quant", 32), genai("rtn_last", 32, "8"),
    genai("k_quant_last", 32, "8"), genai("k_quant_mixed", 32, "8, as some layers"),
    genai("default", 128), genai("k_quant", 128),        # 0.18 has no k_quant if 128 does not
    *(ort(method, block) for block in (32, 128) for method in ("rtn", "gptq"))]
Answer = Callable[[list[int], int], list[int]]          # prompt, most tokens -> tokens, no stop id


class Bench:
    """One run: its merged model, and the folders that are made of both."""

    def __init__(self, run: Path, home: Path, threads: int):
        self.home, self.threads = home, threads
        self.run = once(home / "run", lambda folder: copy_run(run, folder))
        self.source = export.load_run(ExportConfig(run=str(self.run)))
        self.merged = once(home / "merged", lambda f: write_merged(self.source, f))
        calibration = [example.ids for examples in self.source.examples.values()
                       for example in examples[:CALIBRATION]]
        write_json(home / "calibration.json", calibration)

    def made(self, row: Row) -> Path:
        """The folder of a row, made now if it is not there yet; ChildProcessError if it fails."""
        def make(folder: Path) -> None:
            graph = self.made(GRAPH) if "{graph}" in row.command else None
            start = time.perf_counter()
            call(row.command, folder / "log.txt", run=self.run, merged=self.merged, graph=graph,
                 cache=folder / "cache", calibration=self.home / "calibration.json",
                 out=folder / "model")
            shutil.rmtree(folder / "cache", ignore_errors=True)
            write_json(folder / "seconds.json", {"seconds": time.perf_counter() - start})
        return once(self.home / row.name.replace(", ", " ").replace(" ", "-"), make) / "model"

    def mixture(self) -> CausalLM:
        """The routed mixture in float32."""
        load_adapter(model := load_model(self.source.base), self.run / "adapter")
        return model

    def scored(self, row: Row, task: Task) -> float:
        """Exact match of a row on the test lines of a task, a prompt at a time, 0 to 1."""
        tokenizer = self.source.tokenizer
        asked = questions(tokenizer, task, decode_speed.CONTEXT)
        with tqdm(total=len(task.test), desc=f"{row.name}: {clean(task.name)}", unit="answer",
                  leave=False) as bar:
            if row.side == "torch":
                return evaluate(self.mixture(), tokenizer, asked, progress=bar.update).share
            answer = OPEN[row.side](self.made(row), self.threads, tokenizer.stop_ids)

            def complete(prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
                answers = []
                for prompt, limit in zip(prompts, limits):
                    answers.append(answer(prompt, limit))
                    bar.update()
                return answers
            return exact_match(tokenizer, asked, complete).share

    def rate(self, row: Row) -> float:
        """Tokens/s decoded, in a process of its own."""
        seen = subprocess.run(
            [sys.executable, decode_speed.__file__, "--model", str(self.merged), "--threads",
             str(self.threads), "--side", row.side, "--child", str(self.made(row))],
            stdout=subprocess.PIPE, check=True, env={**os.environ, "STARTED": str(time.time())})
        return float(json.loads(seen.stdout.splitlines()[-1])["rate"])


def open_ours(folder: Path, threads: int, stop_ids: Sequence[int]) -> Answer:
    """A folder of ours, which knows its stop ids, in our runtime."""
    generator = Generator(folder, threads=threads)
    return lambda prompt, limit: [*generator.generate(prompt, limit)]


def open_genai(folder: Path, threads: int, stop_ids: Sequence[int]) -> Answer:
    """A folder of genai in genai. Like ours, it keeps what a prompt and the last one begin with."""
    import onnxruntime_genai as og
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {
        "intra_op_num_threads": threads}}}}))
    params = og.GeneratorParams(model := og.Model(config))
    params.set_search_options(max_length=decode_speed.CONTEXT, do_sample=False)
    generator, seen = og.Generator(model, params), list[int]()

    def answer(prompt: list[int], limit: int) -> list[int]:
        kept = len(os.path.commonprefix([seen, prompt[:-1]]))
        generator.rewind_to(kept)
        generator.append_tokens(prompt[kept:])
        seen[:] = prompt
        tokens: list[int] = []
        while len(tokens) < limit:
            generator.generate_next_token()
            if (token := int(generator.get_next_tokens()[0])) in stop_ids:
                break
            tokens.append(token)
        return tokens
    return answer


OPEN = {"ours": open_ours, "genai": open_genai}
GRAPH = Row("genai float32", "genai", "32", f"{BUILDER} -p fp32 --extra_options "
            "shared_embeddings=false")              # a tied table would stay in float32


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made by `make` if it is not there yet; it appears whole or not at all."""
    if not folder.exists():
        with new_folder(folder) as tmp:
            make(tmp)
    return folder


def copy_run(run: Path, folder: Path) -> None:
    """Copy what an export reads: an export also writes into its run."""
    shutil.copy(run / "config.json", folder)
    shutil.copytree(run / "adapter", folder / "adapter")


def write_merged(source: Source, folder: Path) -> None:
    """Write the mixture, merged by the linear fit, as a checkpoint in float32."""
    load_adapter(model := load_model(source.base), source.run / "adapter")
    config = ExportConfig(precision="fp32")
    (shipped,) = ship([config], source, model, shuffled_samples(config, source))
    merge(model, shipped.fits[None])
    copy_base_files(source.base, folder)
    settings = read_json(folder / "config.json")
    write_json(folder / "config.json", settings | {"torch_dtype": "float32"})
    save_file(dict(model.named_parameters()), folder / "model.safetensors", {"format": "pt"})


def call(command: str, log: Path, **places: object) -> None:
    """Run python with a command's arguments, in the repository; what it says goes to a file.

    Raises ChildProcessError with the last line that it said if it fails.
    """
    words = [word.format(**places) for word in shlex.split(command)]
    with log.open("wb") as f:
        failed = subprocess.run([sys.executable, *words], stdout=f, stderr=f, cwd=ROOT).returncode
    if failed:
        raise ChildProcessError(log.read_text(errors="replace").strip().rpartition("\n")[2])


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.readme:
        print(report(read_json(args.readme)))
        return
    root = Path(args.out).absolute()
    file = root / "fourbits.json"
    record: dict[str, Any] = read_json(file) if file.exists() else {"runs": {}}
    record |= {"format": "minismoe.fourbits/1", "machine": machine() | {"threads": args.threads},
               "versions": installed()}

    def save() -> None:
        write_json(file, record)

    wanted = [row for row in ROWS if any(part in row.name for part in args.rows.split(";"))]
    for number, run in enumerate(args.run):
        bench = Bench(Path(run), root / Path(run).name, args.threads)
        rows = record["runs"].setdefault(Path(run).name, {})
        there = [row for row in tqdm(wanted, "rows") if measured(bench, row, rows, save)]
        if number == 0:                      # speed does not depend on the seed
            decode(bench, [row for row in there if row.side != "torch"], rows, args.rounds, save)
    print(report(record))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", help="folders of train.py")
    parser.add_argument("--out", default="runs/fourbits", help="(default: %(default)s)")
    parser.add_argument("--rows", default="", metavar="WORDS;WORDS",
                        help="only rows that have some of these words in their name")
    parser.add_argument("--threads", type=flags.positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding (default: %(default)s)")
    parser.add_argument("--readme", metavar="JSON", help="print a record's table, and stop")
    args = parser.parse_args(argv)
    if not (args.readme or args.run):
        parser.error("give --run RUN")
    return args


def installed() -> dict[str, str]:
    """Versions of our libraries, and of the peers that are here."""
    found = dict(versions())
    for name in ("onnxruntime", "onnxruntime-genai", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def measured(bench: Bench, row: Row, rows: dict[str, Any], save: Callable[[], None]) -> bool:
    """Make and score a row, as far as `rows` lacks its results; says why if it cannot be made."""
    seen = rows.setdefault(row.name, {"table": row.table, "tasks": {}})
    try:
        if row.command:
            folder = bench.made(row)
            seen |= {"MB": sum(f.stat().st_size for f in folder.glob("model.onnx*")) / 1e6,
                     **read_json(folder.parent / "seconds.json")}
        for task in bench.source.tasks:
            if task.name not in seen["tasks"]:
                seen["tasks"][task.name] = bench.scored(row, task)
                save()
    except (ChildProcessError, ImportError) as e:
        del rows[row.name]
        tqdm.write(f"left out: {row.name}: {clean(e)[:300]}", file=sys.stderr)
        return False
    return True


def decode(bench: Bench, there: Sequence[Row], rows: dict[str, Any], rounds: int,
           save: Callable[[], None]) -> None:
    """Measure the decoding speed of rows in turn, until each has `rounds` measurements."""
    for n in tqdm(range(rounds), "decode", unit="round"):
        for row in there:
            if len(rates := rows[row.name].setdefault("rates", [])) <= n:
                rates.append(bench.rate(row))
                save()


def report(record: Mapping[str, Any]) -> str:
    """The table of a record, in Markdown."""
    runs, lines = list(record["runs"].values()), []
    tasks = dict.fromkeys(t for rows in runs for row in rows.values() for t in row["tasks"]).keys()
    for name in (row.name for row in ROWS):
        seen = [rows[name] for rows in runs if name in rows and rows[name]["tasks"].keys() >= tasks]
        if not seen:                         # a row that was interrupted is not shown
            continue
        means = [statistics.mean(row["tasks"].values()) for row in seen]
        first = seen[0]
        lines.append([
            name, first["table"], f"{first['MB']:.0f}" if "MB" in first else "",
            *(f"{100 * statistics.mean(row['tasks'][t] for row in seen):.1f}" for t in tasks),
            f"{100 * statistics.mean(means):.1f}", " ".join(f"{100 * m:.1f}" for m in means),
            f"{statistics.median(first['rates']):.0f}" if "rates" in first else "",
            f"{first['seconds']:.0f}" if "seconds" in first else ""])
    head = ["", "bits of embedding and head", "MB", *tasks, "mean", "each run", "tokens/s",
            "made in s"]
    return table(head, lines)


if __name__ == "__main__":
    script.run_script(main)
