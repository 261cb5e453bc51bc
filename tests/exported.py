"""Tiny exported folders, written by export.py or without it, and the runtime in a bare process."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from tiny import BYTES, ROOT, python
from torch import Tensor, nn

import export as script
from minismoe.data.tools import Message
from minismoe.export import graph, sampler
from minismoe.export.calibration import Samples
from minismoe.export.mixture import round_experts
from minismoe.export.settings import ExportConfig
from minismoe.export.ship import Part, place_and_round, sharing_copy
from minismoe.export.weights import GraphFormat
from minismoe.io.files import read_json
from minismoe.model.decoder import CausalLM, Config
from minismoe.runtime import Generator
from minismoe.runtime.drafts import DRAFTED

CONFIG = BYTES | {"hidden_size": 64, "max_position_embeddings": 96}
UP = "model.layers.0.mlp.up_proj"
KINDS = {"ort": ("ort", None), "portable": ("portable", None),
         "static": ("portable", (1, 1, 96)), "chunks": ("portable", (1, 4, 96))}


def random_model(seed: int = 0, **changes: Any) -> CausalLM:
    """A model of CONFIG whose answers vary: its weights are larger than usual."""
    torch.manual_seed(seed)
    model = CausalLM(Config.from_dict(CONFIG | changes))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)
    return model.eval()


def part_of(model: CausalLM, form: GraphFormat) -> Part:
    """A graph of that form, which holds the model in floats; experts stay beside."""
    return Part(ExportConfig(routing="dynamic", target=form.target, precision=form.precision,
                             block=form.block), sharing_copy(model))


def stored(model: CausalLM, form: GraphFormat, beside: Mapping[str, nn.Linear] = {}) -> CausalLM:
    """A copy of a model as a graph stores it, with other modules in place of some."""
    tree = sharing_copy(model)
    for name, layer in beside.items():
        tree.set_submodule(name, layer)
    tree = rounded(tree, form)
    round_experts(tree, form)
    return tree


def rounded(tree: CausalLM, form: GraphFormat, model: CausalLM | None = None,
            samples: Samples | None = None) -> CausalLM:
    """A copy of a tree in few bits, rounded for what a model reads on samples."""
    part = part_of(tree, form)
    source: Any = SimpleNamespace(trained=model or tree, tokenizer=SimpleNamespace(pad_id=0))
    place_and_round(part, source, samples or {})
    return part.shipped


class Watched(Generator):
    """A generator that notes in `sizes` how many tokens each step reads."""

    def __init__(self, *args: Any, **options: Any):
        self.sizes: list[int] = []
        super().__init__(*args, **options)

    def step(self, tokens: Sequence[int]) -> Any:
        self.sizes.append(len(tokens))
        return super().step(tokens)


def export(model: CausalLM, folder: Path, kind: str = "ort", context: int = 96,
           precision: str = "fp32", files: Mapping[str, str] = {}, **beside: nn.Linear) -> Path:
    """An exported folder of layout onnx, with these files. Without a tokenizer.json among them, its
    tokens are bytes."""
    target, static = KINDS[kind]
    c, form = model.config, GraphFormat(target, precision, context, static=static,
                                        last=1 + DRAFTED if kind == "ort" else 1)
    folder.mkdir()
    graph.write_decoder(folder / "model.onnx", stored(model, form, beside), form)
    sampler.write_sampler(folder / "sampler.onnx", c.vocab_size)
    for name, text in ({"config.json": json.dumps(CONFIG)} | dict(files)).items():
        (folder / name).write_text(text)
    describe(folder, target=target, context=context, static=static, layers=len(c.attention_layers),
             kv_heads=c.num_key_value_heads, head_dim=c.head_dim, vocab_size=c.vocab_size,
             cache_type="float16" if precision == "fp16" else "float32",
             contract={"cache": {"ort": "shared", "portable": "growing"}.get(kind, "fixed")},
             format="minismoe.export/1")
    return folder


class Runner:
    """A graph, and the mask and cache of what it has seen. A static one reads at most `most` tokens
    at once, behind pads, which take places in the cache too: so the mask remembers them."""

    def __init__(self, file: Path, exact: bool = False,
                 run: Callable[[dict[str, Any]], dict[str, Any]] | None = None):
        """exact: round no activations beside weights in blocks. run: another program than
        onnxruntime, from arrays of inputs to those of outputs."""
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        if exact:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
            model = onnx.load(file, load_external_data=False)
            for attribute in (a for node in model.graph.node for a in node.attribute):
                if attribute.name == "accuracy_level":
                    attribute.i = 0
            onnx.save(model, str(file))
        self.session = ort.InferenceSession(str(file), options)
        self.kinds = {i.name: i for i in self.session.get_inputs()}
        self.past = {name: torch.zeros(
            [d if isinstance(d, int) else 0 for d in i.shape], dtype=(
                torch.float16 if "float16" in i.type else torch.float32)).numpy()
            for name, i in self.kinds.items() if name.startswith("past")}
        self.most, self.size = (n if isinstance(n, int) else 0 for n in (      # 0: of any length
            self.kinds[name].shape[1] for name in ("input_ids", "attention_mask")))
        self.mask, self.read = [0] * (self.size - self.most), 0
        self.run = run or self.in_onnxruntime

    def in_onnxruntime(self, feed: dict[str, Any]) -> dict[str, Any]:
        return dict(zip((o.name for o in self.session.get_outputs()), self.session.run(None, feed)))

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (1, ., V) after the next ids (1, n)."""
        new, T = ids.shape[1], self.most or ids.shape[1]
        self.mask += [0] * (T - new) + [1] * new
        self.read += new
        feed = {"input_ids": F.pad(ids, (T - new, 0)),
                "attention_mask": torch.tensor([self.mask[-self.size:]]),
                "position_ids": torch.arange(self.read - T, self.read).clamp(min=0)[None]}
        found = self.run(self.past | {
            name: value.numpy() for name, value in feed.items() if name in self.kinds})
        self.past = {name: found[name.replace("past_key_values", "present").replace(
            "past_", "present_")] for name in self.past}
        return torch.from_numpy(found["logits"])[:, -new:]


def scripted(folder: Path, *pieces: str, template: str | None = None,
             after: Mapping[str, str] = {}) -> Path:
    """An exported folder that answers each prompt with these pieces, each a token, and ends: the
    next token depends on the last one alone. after: {token: another that follows it}. After the
    token "<nan>", logits are not numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(bytes_)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(pieces))
    tokenizer.add_special_tokens(["<|end|>"])
    size = 4 * (-(-tokenizer.get_vocab_size() // 4))
    model = random_model(vocab_size=size, hidden_size=size, head_dim=16, tie_word_embeddings=False)
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(p)          # so that a layer changes nothing
    follows = dict(zip(pieces, (*pieces[1:], "<|end|>"))) | dict(after)
    torch.nn.init.eye_(model.model.embed_tokens.weight.data)
    torch.nn.init.zeros_(model.lm_head.weight.data)
    for token in range(size):
        next_one = follows.get(tokenizer.id_to_token(token) or "", pieces[0])
        model.lm_head.weight.data[tokenizer.token_to_id(next_one), token] = 1
    if "<nan>" in pieces:
        model.model.embed_tokens.weight.data[tokenizer.token_to_id("<nan>")] = torch.nan
    return export(model, folder, context=512, files={
        "config.json": json.dumps({"vocab_size": size}), "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>", "chat_template": template})})


def user(text: str) -> list[Message]:
    """A chat that asks a question."""
    return [{"role": "user", "content": text}]


def answer_of(generator: Generator, chat: list[Message], limit: int | None = 9,
              **options: Any) -> str:
    """What the runtime itself answers to a chat, without the white space before it."""
    prompt = generator.tokenizer.render(chat, True)
    return "".join(generator.text(generator.generate(prompt, limit, **options))).lstrip()


def ship(out: Path, *flags: object) -> dict[str, Any]:
    """Call export.py with these flags, each a word or several; returns export.json."""
    script.main([*" ".join(map(str, flags)).split(), "--out", str(out)])
    return read_json(out / "export.json")


def describe(folder: Path, **info: object) -> None:
    """Write export.json, or change what it says."""
    file = folder / "export.json"
    old = json.loads(file.read_text()) if file.is_file() else {}
    files = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes())
                      .hexdigest()} for p in folder.iterdir() if p != file}
    file.write_text(json.dumps({"files": files, **old, **info}))


def log_probabilities(answers: Mapping[str, Sequence[int]],
                      logits_after: Callable[[Sequence[int]], torch.Tensor]) -> dict[str, float]:
    """Of each answer if only these may be written, by brute force: at each of its tokens, a softmax
    over those that may stand there. logits_after: (V,) after the beginning of an answer."""
    found = {}
    for text, tokens in answers.items():
        found[text] = 0.0
        for n, token in enumerate(tokens):
            allowed = {other[n] for other in answers.values() if [*other[:n]] == [*tokens[:n]]}
            logits = logits_after(tokens[:n]).double()
            found[text] += (logits[token] - logits[sorted(allowed)].logsumexp(0)).item()
    return found


BARE = """
import re, runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "safetensors", "tokenizers", "tqdm", "jinja2"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
sys.argv = ["runtime", *sys.argv[1:]]
try:
    runpy.run_module("minismoe.runtime", run_name="__main__")
finally:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "minismoe":
            source = open(module.__file__).read()
            assert not re.search(r"^ *(import|from) (numpy|torch)", source, re.M), name
"""


def command(*args: object, input: str = "", **environment: str,
            ) -> subprocess.CompletedProcess[str]:
    """`python -m minismoe.runtime` without the libraries that it must do without."""
    return python("-c", BARE, *args, input=input, **environment)


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[tuple[str, list[str]]]:
    """`--serve` of a folder in a process of its own: its first line and, once Ctrl-C has ended it,
    the lines of its log. The caller needs the fixture `signals`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minismoe.runtime", str(folder), "--serve", *flags], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    line, log = process.stdout.readline(), list[str]()
    try:
        assert line, process.stderr.read()
        yield line, log
    finally:
        process.send_signal(signal.SIGINT)
        log += process.communicate(timeout=30)[1].splitlines()
    assert process.returncode == 130 and log.pop() == "interrupted"
