#!/usr/bin/env python3
"""Valid files, spoilt in ways that follow a seed, given to what reads them.

    python tests/tools/fuzz.py --cases 20000      some minutes; prints each failure with its case
    python tests/tools/fuzz.py --first 1234 --cases 1   that one alone, with what it says

A case passes if it works, or is refused by an exception of the allowed types in one line; if it
takes less than 2 s; and if memory grows by no more than 256 MB.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import exported  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny import BYTES, CHATML, LLAMA3  # noqa: E402

from minismoe.cli import probing  # noqa: E402
from minismoe.cli.flags import RunConfig  # noqa: E402
from minismoe.data.tasks import encode_all, load_tasks  # noqa: E402
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer  # noqa: E402
from minismoe.export.layouts import byte_level  # noqa: E402
from minismoe.io.files import sha256  # noqa: E402
from minismoe.io.process import peak_resident  # noqa: E402
from minismoe.io.text import error_line  # noqa: E402
from minismoe.method.allocate import Allocation  # noqa: E402
from minismoe.method.experts import add_experts  # noqa: E402
from minismoe.model.checkpoint import load_adapter, load_model, save_adapter  # noqa: E402
from minismoe.model.decoder import CausalLM, Config  # noqa: E402
from minismoe.runtime import Generator  # noqa: E402

SECONDS, MEGABYTES = 2.0, 256
ALLOWED = (ArithmeticError, OSError, ValueError)
CONFIG = BYTES | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
                  "hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": None,
                  "rope_parameters": LLAMA3 | {"rope_theta": 1e4}}
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
ALLOCATION = Allocation({Q: 3, UP: 1}, rank=4, alpha=8, top_k=2)
LINES = [{"prompt": "2 + 2", "completion": "4"},
         {"instruction": "Say it.", "input": "it", "output": "it"},
         {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                       {"role": "assistant", "content": "b 🙂"}]},
         {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
             {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": [1]}}}]},
                       {"role": "tool", "tool_call_id": "1", "content": "2"},
                       {"role": "assistant", "content": "b"}],
          "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}]
CALLING = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}"
NUMBERS = [-1, 0, 1, 3, 7, 40, 1000, 2 ** 31, 2 ** 63, 10 ** 12, 10 ** 400, -10 ** 12]
ODD = [None, True, False, "", "x", [], {}, [[]], -0.5, 1.5, 1e308, math.nan, math.inf, -math.inf,
       "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "\ud83d", "\x1b[31m\r\n", "con",
       "a" * 100_000, [0] * 10_000, {"a": {"b": [1, {"c": None}]}}, "\u202e", "1e9", *NUMBERS]


class Rng(random.Random):
    """Random choices about JSON values and bytes."""

    def json(self, value: Any) -> Any:
        """A copy with one to three places spoilt: replaced, removed, renamed, doubled, swapped."""
        value = copy.deepcopy(value)
        for _ in range(self.randint(1, 3)):
            holders = [h for h in walk(value) if h]
            if not holders:
                return self.choice(ODD)
            holder = self.choice(holders)
            key = self.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            other = self.choice(holders)
            match self.randrange(6):
                case 0 | 1:
                    holder[key] = copy.deepcopy(self.choice(ODD))
                case 2:
                    del holder[key]
                case 3 if isinstance(holder, dict):
                    holder[self.choice(["", "x", "\x1b[0m", key.upper(), key + " "])] = holder[key]
                case 4:
                    holder[key] = copy.deepcopy(other)
                case _ if type(holder[key]) in (int, float):
                    holder[key] *= self.choice([-1, 0.5, 2, 3, 1024, 2 ** 40])
        return value

    def text(self, value: Any) -> bytes:
        """A spoilt value as JSON, one in six times spoilt once more as bytes."""
        text = json.dumps(self.json(value)).encode()
        if self.random() < 0.02:
            deep = self.choice([100, 100_000])
            text = text.replace(b": ", b": " + b"[" * deep, 1)
        return self.bytes(text) if self.random() < 1 / 6 else text

    def bytes(self, data: bytes) -> bytes:
        """Bits flipped, parts cut out, doubled, filled in, or all cut off."""
        out = bytearray(data)
        for _ in range(self.randint(1, 3)):
            at, some = self.randrange(len(out) + 1), self.randint(1, 8)
            match self.randrange(6):
                case 0 if out:
                    out[at % len(out)] ^= 1 << self.randrange(8)
                case 1:
                    del out[at:at + some]
                case 2:
                    out[at:at] = out[at:at + some] * self.choice([1, 2, 1000])
                case 3:
                    out[at:at] = self.choice([b"\0", b"\xff", b"\n", b"{", b"[[", b'"', b"9" * 30,
                                              b"\xed\xa0\x80", b"\xef\xbb\xbf", b"NaN"])
                case 4:
                    out[at:at + some] = self.randbytes(some)
                case 5 if self.random() < 0.3:
                    del out[at:]
        return bytes(out)


def walk(value: Any) -> list[Any]:
    """The lists and objects in a JSON value, itself among them."""
    inner = list(value.values() if isinstance(value, dict) else value
                 if isinstance(value, list) else [])
    return [value] * isinstance(value, (dict, list)) + [h for v in inner[:50] for h in walk(v)]


class Fuzz:
    """Valid originals in one folder, and a way to spoil and to read each kind of them."""

    def __init__(self, root: Path):
        self.case, self.base = root / "case", root / "base"
        torch.manual_seed(0)
        model = CausalLM(Config.from_dict(CONFIG)).eval()
        exported.export(model, self.base, "portable", context=64,
                        files={"config.json": json.dumps(CONFIG)})
        save_file(dict(model.named_parameters()), self.base / "model.safetensors")
        add_experts(model, ALLOCATION)
        model.fingerprint, model.name = load_model(self.base).fingerprint, "base"
        save_adapter(model, self.base / "adapter", ALLOCATION, ["t"])
        self.kinds: list[Callable[[Rng], Any]] = [
            self.config, self.adapter, self.allocation, self.lines, self.weights,
            self.adapter_weights, self.tokenizer, self.export]

    def config(self, rng: Rng) -> Any:
        (self.case / "config.json").write_bytes(rng.text(CONFIG))
        self.keep("model.safetensors")
        load_model(self.case)

    def adapter(self, rng: Rng) -> Any:
        file = self.base / "adapter" / "adapter.json"
        (self.case / "adapter.json").write_bytes(rng.text(json.loads(file.read_text())))
        self.keep("adapter/adapter.safetensors")
        load_adapter(load_model(self.base), self.case)

    def allocation(self, rng: Rng) -> Any:
        whole = ALLOCATION.to_json()
        (self.case / "a.json").write_bytes(rng.text(rng.choice([whole, whole["experts"]])))
        allocation = probing.read_allocation(
            RunConfig(rank=4, allocation=str(self.case / "a.json")))
        add_experts(load_model(self.base), allocation)

    def lines(self, rng: Rng) -> Any:
        lines = [rng.text(line) if rng.random() < 0.3 else json.dumps(line).encode()
                 for line in rng.choices(LINES, k=4)]
        (self.case / "t.jsonl").write_bytes(rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines))
        tokenizer = Tokenizer(ByteTokenizer(), rng.choice([None, CALLING]), "<|bos|>", "<|end|>")
        for task in load_tasks(self.case):
            encode_all(task, tokenizer, 64)

    def weights(self, rng: Rng) -> Any:
        self.keep("config.json")
        self.spoil_header(rng, self.base / "model.safetensors")
        load_model(self.case)

    def adapter_weights(self, rng: Rng) -> Any:
        self.spoil_header(rng, self.base / "adapter" / "adapter.safetensors")
        meta = json.loads((self.base / "adapter" / "adapter.json").read_text())
        meta["sha256"] = sha256(self.case / "adapter.safetensors")       # as an attacker would
        (self.case / "adapter.json").write_text(json.dumps(meta))
        load_adapter(load_model(self.base), self.case)

    def spoil_header(self, rng: Rng, file: Path) -> None:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, rest = data[8:8 + length], data[8 + length:]
        entries = json.loads(header)
        if rng.random() < 0.4:                   # a valid file, of other tensors
            name = rng.choice([n for n in entries if n != "__metadata__"])
            match rng.randrange(3):
                case 0:
                    entries[rng.choice(["", "../x", "\x1b[0m"])] = entries.pop(name)
                case 1:
                    entries[name]["dtype"] = rng.choice(["I32", "U32", "F32", "C64", "F8_E4M3"])
                case 2:
                    entries[name]["shape"] = rng.choice([[1, 2], [], [rng.choice(NUMBERS), 0]])
            header = json.dumps(entries).encode()
        else:
            header = rng.text(entries) if rng.random() < 0.7 else rng.bytes(header)
        told = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2 ** 40, 2 ** 64 - 1, 100])
        rest = rest if rng.random() < 0.9 else rng.bytes(rest)
        (self.case / file.name).write_bytes(told.to_bytes(8, "little") + header + rest)

    def tokenizer(self, rng: Rng) -> Any:
        settings = {"chat_template": rng.choice([CHATML, [
            {"name": "default", "template": CHATML}, {"name": "x", "template": "y"}]]),
            "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
        (self.case / "tokenizer.json").write_text(json.dumps(byte_level()))      # without merges
        (self.case / "tokenizer_config.json").write_bytes(rng.text(settings))
        (self.case / "generation_config.json").write_bytes(rng.text({"eos_token_id": [1, 2]}))
        (self.case / "config.json").write_bytes(rng.text({"vocab_size": 400, "eos_token_id": 1}))
        tokenizer = load_tokenizer(self.case)
        tokenizer.encode(tokenizer.render([{"role": "user", "content": "a"}], True))

    def export(self, rng: Rng) -> Any:
        (self.case / "export.json").write_bytes(
            rng.text(json.loads((self.base / "export.json").read_text())))
        self.keep("config.json", "model.onnx", "model.onnx.data", "sampler.onnx")
        Generator(self.case, threads=1)

    def keep(self, *names: str) -> None:
        """Put originals into the case's folder."""
        for name in names:
            os.link(self.base / name, self.case / Path(name).name)


def run(fuzz: Fuzz, seed: int, number: int, debug: bool = False) -> tuple[str, bool, str]:
    """(kind, was it refused, what is wrong) of one case; "" where nothing is."""
    rng = Rng(f"{seed} {number}")
    kind = fuzz.kinds[number % len(fuzz.kinds)]
    shutil.rmtree(fuzz.case, ignore_errors=True)
    fuzz.case.mkdir()
    memory, problem, refused = peak_resident(), "", True
    start, cpu = time.monotonic(), time.process_time()
    try:
        kind(rng)
        refused = False
    except ALLOWED as e:
        said = str(e)
        if debug:
            print(error_line(e))
        if not said or "\n" in said.strip() or not error_line(e).isprintable():
            problem = f"says {said[:300]!r}"
    except Exception as e:
        if debug:
            raise
        problem = f"{type(e).__name__}: {str(e)[:300]}"
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    if cpu > SECONDS or seconds > 10 * SECONDS:  # others may keep the machine busy
        problem += f" took {cpu:.1f} s, {seconds:.1f} by the clock"
    if (grown := (peak_resident() - memory) >> 20) > MEGABYTES:
        problem += f" took {grown} MB"
    return kind.__name__, refused, problem


def main(argv: Sequence[str]) -> int:
    """Run the cases; gives the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    failed, refusals = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        fuzz, start = Fuzz(Path(root)), time.monotonic()
        for number in range(args.first, args.first + args.cases):
            kind, refused, problem = run(fuzz, args.seed, number, args.cases == 1)
            refusals[kind] += refused
            if problem:
                failed += 1
                print(f"case {number}, {kind}: {problem}", flush=True)
    for kind, count in refusals.items():         # each kind is to have cases that are taken
        if args.cases >= 400 and count == args.cases // len(fuzz.kinds):
            failed += 1
            print(f"every case of {kind} was refused")
    print(f"{args.cases} cases, {failed} failed, {time.monotonic() - start:.0f} s; refused: "
          + ", ".join(f"{kind} {count}" for kind, count in refusals.items()))
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
