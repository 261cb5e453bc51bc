"""Text from an exported folder, by onnxruntime alone: neither torch nor numpy is imported here.

    python -m minismoe.runtime FOLDER "a prompt"      or --chat, or a prompt on standard input

Keys and values stay where the session computes, in bound OrtValues, and are never copied by us.
How they are kept depends on the graph:

    ort        one buffer of the whole context a row, bound as past and as present; the system
               hands out its pages as they are written. Prompts are padded at their end.
    portable   what a step gives as present is the next step's past. Prompts are padded in front.
    static     like portable, of fixed sizes: T tokens a step, and a past of the last P positions.

Letters: B prompts, T new tokens, P past positions, S = P + T, K key/value heads, C head size,
V vocabulary.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..data.tokenizer import load_tokenizer
from ..io.text import clean

FORMAT = "minismoe.export/1"
FLOAT, INT64 = 1, 7                          # onnx.TensorProto's numbers
CACHE_TYPES = {"float32": FLOAT, "float16": 10}
DEVICES = {"CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}         # else the CPU
CHUNK = 512                                  # prompt tokens a step: bounds what activations need

Row = Sequence["int | None"]                 # new tokens of a prompt; None is padding


class Generator:
    """A model that `export.py --layout onnx` wrote, with its tokenizer.

    provider: a name of onnxruntime's, as "CUDAExecutionProvider" or "cuda"; threads: default, the
    physical cores; task: an adapter of the folder; verify: compare hashes, besides sizes. `ended`
    says why the last generation did: "stop" (a stop token), "max_tokens" or "context".
    FileNotFoundError and ValueError say what is missing, broken or refused.
    """

    def __init__(self, folder: str | Path, provider: str | None = None,
                 threads: int | None = None, task: str | None = None, verify: bool = False):
        enough_onnxruntime()
        self.folder = Path(folder)
        self.info = read_info(self.folder, verify)
        self.static: list[int] | None = self.info.get("static")              # B, T, P
        self.context: int = min([self.info["context"], *(self.static or [])[2:]])
        self.tasks: dict[str, str] = self.info.get("adapters") or {}
        self.tokenizer = load_tokenizer(self.folder)
        self.ended, self._turn = "", 0       # of a generation: another one takes its cache
        self.prompt_tokens = 0               # that the last generation read: not in the cache yet
        self._shared = self.info["target"] == "ort" and not self.static
        name = _provider(provider)
        self._device = DEVICES.get(name, "cpu")
        if self._shared and self._device == "cuda" and self.info["cache_type"] == "float32":
            self._device = "cpu"             # where it attends: CUDA's own takes 16 bits alone
        self._session = _session(self.folder / "model.onnx", name, threads)
        self._sampler = _session(self.folder / "sampler.onnx", "CPUExecutionProvider", 1)
        best = self._sampler.get_outputs()[0].shape
        self.candidates: int = best[1] if len(best) == 2 else 0              # tokens to draw from
        self._positions = any(i.name == "position_ids" for i in self._session.get_inputs())
        self._fits()
        self.use(task)

    def _fits(self) -> None:
        """ValueError where export.json says other than the graphs."""
        info, found = self.info, {i.name: i for i in self._session.get_inputs()}
        layers = sum(name.startswith("past_key_values.") for name in found) / 2
        past = found.get("past_key_values.0.key")
        logits = self._session.get_outputs()[0]
        kind = {"float32": "tensor(float)", "float16": "tensor(float16)"}[info["cache_type"]]
        if (layers != info["layers"] or past is None or logits.shape[-1:] != [info["vocab_size"]]
                or (past.type, *past.shape[1::2]) != (kind, info["kv_heads"], info["head_dim"])
                or self._positions == (info["target"] == "ort")
                or not (isinstance(self.candidates, int) and self.candidates)):
            raise ValueError(f"{self.folder / 'export.json'} is not of this model.onnx and "
                             "sampler.onnx: export again")

    def use(self, task: str | None) -> None:
        """Switch to the adapter of a task, or to the model without any."""
        if task is not None and task not in self.tasks:
            raise ValueError(f"{self.folder} has no adapter {task!r}; present: "
                             f"{', '.join(self.tasks) or 'none'}")
        # Parameters are graph inputs: bound as such, since adapters of RunOptions need run().
        self._file = None if task is None else _opened(        # which owns the parameters' memory
            ort.AdapterFormat.read_adapter, _inside(self.folder, self.tasks[task]))
        self._adapter = self._file.get_parameters() if self._file else {}
        self.reset()

    def reset(self, rows: int = 1, capacity: int | None = None) -> None:
        """Forget all that was read, and make ready for `rows` prompts of `capacity` tokens."""
        rows, _, P = self.static or (rows, 0, (capacity or self.context) if self._shared else 0)
        self._seen: list[int] = []                               # what was read, of a single row
        self._masks = [array("q") for _ in range(rows)]
        self._io = self._session.io_binding()
        for name, value in self._adapter.items():
            self._io.bind_ortvalue_input(name, value)
        self._io.bind_output("logits")                           # the first, as step expects it
        shape = [rows, self.info["kv_heads"], P, self.info["head_dim"]]
        self._past = {f"{i}.{part}": ort.OrtValue.ortvalue_from_shape_and_type(
            shape, CACHE_TYPES[self.info["cache_type"]], self._device if self._shared else "cpu")
            for i in range(self.info["layers"]) for part in ("key", "value")}
        for name, value in self._past.items():
            if self._shared:
                self._io.bind_ortvalue_input(f"past_key_values.{name}", value)
                self._io.bind_ortvalue_output(f"present.{name}", value)
            elif P:                                              # masked, but 0 * nan is nan
                ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())

    def step(self, rows: Sequence[Row]) -> ort.OrtValue:
        """Read T more tokens of each row (B, T), and give the logits as the graph does.

        Rows of different lengths are padded by None: at their end for target ort, and then only in
        the first step after `reset`, in front otherwise. A static graph fixes B and T.
        """
        B, T, io = len(rows), len(rows[0]), self._io
        positions = array("q")
        for mask, row in zip(self._masks, rows):
            at = mask.count(1) - 1
            positions.extend(max(0, at := at + (token is not None)) for token in row)
            mask.extend(int(t is not None) for t in row if t is not None or not self._shared)
        S = sum(self.static[1:]) if self.static else max(map(len, self._masks))
        inputs = {"input_ids": (array("q", [t or 0 for row in rows for t in row]), T),
                  "attention_mask": (self._mask(S), S)}
        if self._positions:
            inputs["position_ids"] = positions, T
        for name, (values, length) in inputs.items():
            io.bind_input(name, "cpu", 0, INT64, [B, length], values.buffer_info()[0])
        io.bind_output("logits")
        if not self._shared:
            for name, value in self._past.items():
                io.bind_ortvalue_input(f"past_key_values.{name}", value)
                io.bind_output(f"present.{name}", self._device)
        self._session.run_with_iobinding(io)
        outputs = io.get_outputs_as_ortvaluevector()
        if not self._shared:
            self._past = {name: ort.OrtValue(outputs[i])
                          for i, name in enumerate(self._past, start=1)}
        self._seen += [t for t in rows[0] if t is not None]
        return ort.OrtValue(outputs[0])

    def _mask(self, S: int) -> array[int]:
        """attention_mask (B, S): what each row has read, and zeros on its padded side."""
        flat, zero = array("q"), array("q", [0])
        for mask in self._masks:
            gap = zero * (S - len(mask))
            flat += mask + gap if self._shared else gap + mask[-S:]
        return flat

    def _pad(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of one length, a multiple of a static graph's T, and of its number."""
        B, T, _ = self.static or (len(rows), 1, 0)
        longest = -(-max(map(len, rows)) // T) * T
        gaps = [[None] * (longest - len(row)) for row in rows]
        rows = [[*row, *gap] if self._shared else [*gap, *row] for row, gap in zip(rows, gaps)]
        return rows + rows[-1:] * (B - len(rows))

    def _read(self, prompts: Sequence[Sequence[int]], new: int) -> ort.OrtValue:
        """Read prompts, to be followed by `new` tokens, and give their last logits.

        A single prompt that begins as the last one, as a chat's does, is read from where it
        differs; a cache that cannot be cut is kept where the prompt goes on from all of it.
        """
        kept = 0
        if len(prompts) == len(self._masks) == 1 and not self.static:
            pairs = zip(self._seen, prompts[0][:-1])
            kept = next((i for i, (a, b) in enumerate(pairs) if a != b),
                        min(len(self._seen), len(prompts[0]) - 1))
        if kept and (self._shared or kept == len(self._seen)):
            del self._seen[kept:], self._masks[0][kept:]
        else:
            kept = 0
            self.reset(len(prompts), None if len(prompts) == 1 else max(map(len, prompts)) + new)
        self.prompt_tokens = sum(map(len, prompts)) - kept
        rows = self._pad([prompt[kept:] for prompt in prompts])
        T = self.static[1] if self.static else CHUNK if len(rows) == 1 else len(rows[0])
        for start in range(0, len(rows[0]), T):
            logits = self.step([row[start:start + T] for row in rows])
        return logits

    def _choose(self, logits: ort.OrtValue, rng: random.Random, temperature: float, top_p: float,
                top_k: int) -> list[int]:
        """A token of each row from logits (B, 1, V)."""
        B, size = logits.shape()[0], self.candidates
        best, ids = (ctypes.c_float * (B * size))(), (ctypes.c_int64 * (B * size))()
        io = self._sampler.io_binding()
        io.bind_ortvalue_input("logits", logits)
        io.bind_output("values", "cpu", 0, FLOAT, [B, size], ctypes.addressof(best))
        io.bind_output("indices", "cpu", 0, INT64, [B, size], ctypes.addressof(ids))
        self._sampler.run_with_iobinding(io)
        if math.isnan(sum(best)):
            raise ArithmeticError("the model's logits are not numbers")
        if temperature == 0:
            return ids[::size]
        return [ids[n + _draw(best[n:n + (top_k or size)], rng, temperature, top_p)]
                for n in range(0, B * size, size)]

    def _tokens(self, prompts: Sequence[Sequence[int]], max_tokens: int | None, *,
                temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
                seed: int | None = None) -> Iterator[list[Any]]:
        """The next token of each prompt, step by step, and None once it has stopped."""
        if not (0 <= temperature < math.inf and 0 < top_p <= 1 and isinstance(top_k, int)
                and 0 <= top_k <= self.candidates):
            raise ValueError(f"temperature {temperature}, top-p {top_p}, top-k {top_k}: expected "
                             f"at least 0, above 0 up to 1, and 0 to {self.candidates}")
        longest, vocab = max(map(len, prompts), default=0), self.info["vocab_size"]
        if not all(prompts) or not prompts:
            raise ValueError("a prompt is empty")
        if not all(0 <= min(prompt) <= max(prompt) < vocab for prompt in prompts):
            raise ValueError(f"a prompt has tokens outside of the model's {vocab}")
        if (room := self.room(longest)) < 1:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in the context of "
                             f"{self.context}: shorten it, or export with a longer --context or, "
                             "of a static graph, past")
        steps = room if max_tokens is None else min(room, max_tokens)
        rng, stops = random.Random(seed), set(self.tokenizer.stop_ids)
        running, self.ended = [True] * len(prompts), "stop"
        self._turn = turn = self._turn + 1
        try:
            logits = self._read(prompts, steps)
            for n in range(1, steps + 1):
                chosen = self._choose(logits, rng, temperature, top_p, top_k)
                running = [r and token not in stops for r, token in zip(running, chosen)]
                if not any(running):
                    return
                yield [token if r else None for r, token in zip(running, chosen)]
                if self._turn != turn:
                    raise RuntimeError("another generation began before this one ended")
                if n < steps:
                    logits = self.step(self._pad([[token] for token in chosen]))
            self.ended = "max_tokens" if steps == max_tokens else "context"
        except (Exception, KeyboardInterrupt):
            if self._turn == turn:
                self.reset()                 # a step that was broken off left half of a cache
            raise

    def room(self, length: int) -> int:
        """How many tokens may follow a prompt of `length` tokens."""
        return (self.context - length) // (self.static[1] if self.static else 1)

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[ort.OrtValue]:
        """Logits (1, 1, V) after a prompt, and after each of the tokens that follow it."""
        self.reset()
        yield self._read([prompt], len(tokens))
        for token in tokens:
            yield self.step(self._pad([[token]]))

    def generate(self, prompt: str | Sequence[int], max_tokens: int | None = None,
                 **sampling: Any) -> Iterator[int]:
        """Tokens that follow a prompt, one by one, up to and without a stop token.

        prompt: text, read as it is (`tokenizer.render` makes that of a chat), or token ids;
        sampling: temperature (default 0: greedy), top_p, top_k (0: `candidates`), and a seed.
        ValueError where the prompt is empty or too long.
        """
        ids = self.tokenizer.encode(prompt)[0] if isinstance(prompt, str) else list(prompt)
        for token, in self._tokens([ids], max_tokens, **sampling):
            yield token

    def batch(self, prompts: Sequence[str | Sequence[int]], max_tokens: int | None = None,
              **sampling: Any) -> list[list[int]]:
        """The tokens that follow each prompt, all read together; arguments as of `generate`."""
        rows = [self.tokenizer.encode(p)[0] if isinstance(p, str) else list(p) for p in prompts]
        size = self.static[0] if self.static else max(1, len(rows))
        found: list[list[int]] = []
        for start in range(0, len(rows), size):
            part = rows[start:start + size]
            steps = list(self._tokens(part, max_tokens, **sampling))
            found += [[s[i] for s in steps if s[i] is not None] for i in range(len(part))]
        return found

    def text(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text of tokens as it becomes certain: never a half of a character."""
        ids: list[int] = []
        # ids[start:] give `told`, the context of what comes: the whole piece before, as the end of
        # a character alone may decode to nothing.
        start, read, told = 0, 0, ""
        for token in tokens:
            ids.append(token)
            text = self.tokenizer.decode(ids[start:])
            if len(text) > len(told) and not text.endswith("\ufffd"):
                yield text[len(told):]
                start, read = read, len(ids)
                told = self.tokenizer.decode(ids[start:])
        if rest := self.tokenizer.decode(ids[start:])[len(told):]:
            yield rest


def _draw(logits: Sequence[float], rng: random.Random, temperature: float, top_p: float) -> int:
    """A place among logits, best first, by their softmax and within the nucleus top_p."""
    weights = [math.exp((value - logits[0]) / temperature) for value in logits]
    mass, total = 0.0, sum(weights)
    for n, weight in enumerate(weights):
        mass += weight
        if mass >= top_p * total:
            del weights[n + 1:]
            break
    return rng.choices(range(len(weights)), weights)[0]


def _inside(folder: Path, name: object) -> Path:
    """The file of that plain name in a folder; ValueError for a name that could lead out of it."""
    if not isinstance(name, str) or Path(name).name != name or set(name) & set("/\\:\0"):
        raise ValueError(f"{folder / 'export.json'} names {name!r}, which is no plain file name")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} lacks {name}, which its export.json names: export again")
    if (folder / name).resolve().parent != folder.resolve():
        raise ValueError(f"{folder / name} is a link that leads out of its folder")
    return folder / name


def enough_onnxruntime() -> None:
    """ImportError for an onnxruntime that is too old to share memory, which would crash."""
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 30):
        raise ImportError(f"onnxruntime {ort.__version__} is too old: 1.30 is needed, which has "
                          "Python 3.11 and later")


def read_info(folder: Path, verify: bool = False) -> dict[str, Any]:
    """export.json of a folder, once its files' sizes, and with `verify` hashes, were compared."""
    file = folder / "export.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no export.json; export.py --layout onnx writes one")
    info = None
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        sizes = [info[key] for key in ("context", "layers", "kv_heads", "head_dim", "vocab_size")]
        sizes += info.get("static") or []
        if info["format"] != FORMAT or info["cache_type"] not in CACHE_TYPES or (
                info["target"] not in ("ort", "portable")):
            raise ValueError(f"format {info['format']!r}, cache type {info['cache_type']!r}, "
                             f"target {info['target']!r}")
        if not all(type(size) is int and 0 < size <= 1 << 24 for size in sizes) or len(
                sizes) not in (5, 8) or not isinstance(info.get("adapters") or {}, dict):
            raise ValueError(f"sizes {sizes}")
        for name in os.listdir(folder):      # what no list names is read as well, if it is there
            if (folder / name).is_symlink():
                _inside(folder, name)
        files = {_inside(folder, name): (entry["bytes"], entry["sha256"])
                 for name, entry in info["files"].items()}
        if odd := [e for e in files.values() if (type(e[0]), type(e[1])) != (int, str)]:
            raise ValueError(f"size and hash {odd[0]}")
        if lacking := {"model.onnx", "sampler.onnx"} - info["files"].keys():
            raise ValueError(f"it names no {' and no '.join(sorted(lacking))}")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
        layout = info.get("layout") if isinstance(info, dict) else None
        hint = "" if layout in (None, "onnx") else (f"; it is of layout {clean(layout)}, and this "
                                                    "reads --layout onnx")
        raise ValueError(f"{file} is not understood: {type(e).__name__} {e}{hint}") from None
    for path, (size, digest) in files.items():
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: it was "
                             "cut or changed; export again")
        if verify and sha256(path) != digest:
            raise ValueError(f"{path} is not what was exported: its hash differs")
    return info


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _provider(name: str | None) -> str:
    present = ort.get_available_providers()
    wanted = (name or "cpu").lower().removesuffix("executionprovider")
    for provider in present:
        if provider.lower() == f"{wanted}executionprovider":
            return provider
    raise ValueError(f"onnxruntime has no provider {name!r} here; present: {', '.join(present)}")


def _session(file: Path, provider: str, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if threads is None:                      # 0: all physical cores, unless we may not use them
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        threads = allowed if allowed and allowed < (os.cpu_count() or 1) else 0
    options.intra_op_num_threads = threads
    options.log_severity_level = 3           # errors alone
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: export again")
    providers = [provider, *["CPUExecutionProvider"] * (provider != "CPUExecutionProvider")]
    return _opened(lambda name: ort.InferenceSession(name, options, providers=providers), file)


def _opened(read: Callable[[str], Any], file: Path) -> Any:
    try:
        return read(str(file))
    except Exception as e:                   # onnxruntime's own are bare Exceptions
        raise ValueError(f"onnxruntime cannot open {file}: {str(e).splitlines()[0]}") from None
