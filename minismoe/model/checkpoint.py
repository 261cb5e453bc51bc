"""Loading Hugging Face checkpoints; saving and loading adapters."""

import ctypes
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..io.files import inside, naming, read_json, replacing, sha256, write_json
from ..io.hub import resolve
from ..io.text import clean
from ..method.allocate import Allocation
from ..method.experts import (
    adaptable,
    add_experts,
    drop_routers,
    expert_parameters,
    linear_layers,
    routed,
)
from .config import MODULES, Config, renamed, text_part
from .decoder import CausalLM, meta_model
from .quantize import BlockLinear, BlockWeight, WideWeight, quantize

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS = 8                                 # of each tensor, that the fingerprint of a base reads
ADAPTER_FORMAT = "minismoe.adapter/1"
# Tensors of images, and of heads that predict several tokens.
LEFT_OUT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|visual)\.|mtp\.")
MERGED = "minismoe_merged"               # in config.json: the base that adapters were merged into


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, which is mapped into memory and stays open with it."""

    file: Path
    name: str                # in that file
    content: Any             # has get_dtype() and get_shape(); content[:n] is the first n rows

    def read(self, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
        """The tensor; without a conversion, it shares the mapped file's memory.

        One to convert, here or by the caller (dtype None), is read through a mapping of its own,
        which is closed at once: pages that `content` has read stay in memory.
        """
        if DTYPES[self.content.get_dtype()] == dtype and torch.device(device).type == "cpu":
            return self.content[:]
        return _open(self.file).get_tensor(self.name).to(device=device, dtype=dtype)


def load_model(path: str | Path, dtype: torch.dtype | None = torch.float32,
               device: str | torch.device = "cpu", base_bits: int | None = None) -> CausalLM:
    """A frozen decoder from a folder or hub name, its weights as `dtype` (None: each as it is
    stored) on `device`.

    With base_bits, 8 or 4, all linear layers but the head are quantised; with 16, they stay as they
    are stored, and are converted where they are needed. Weights are memory-mapped, or converted one
    at a time, so peak memory is one copy of the weights in their final form.
    Raises FileNotFoundError; ValueError lists up to 20 wrong tensors, or all unsupported settings.
    """
    if base_bits not in (None, 4, 8, 16):
        raise ValueError(f"base_bits is {base_bits!r}: give 16, 8, 4 or None")
    folder = resolve(path)
    cfg, config = read_config(folder)
    model = meta_model(cfg)
    tensors = _fitting(folder, config, model)
    model.name, model.fingerprint = str(path), fingerprint(cfg, tensors)
    model.stored_dtype = ", ".join(sorted({
        str(DTYPES[t.content.get_dtype()])[6:] for t in tensors.values()}))
    model.merged, model.base_bits = str(config.get(MERGED, "")), base_bits
    _fill(model, tensors, dtype, device)
    if cfg.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _fitting(folder: Path, config: Mapping[str, Any], model: CausalLM) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, by the model's names; ValueError if they are not the model's.

    Some checkpoints hold more, which is left out: rotary buffers, heads that predict several
    tokens, images' part of a model with images, and a tied head, which must equal the embedding.
    """
    stored, head = stored_tensors(folder), "lm_head.weight"
    names = {name: model.config.name(name) for name, _ in model.named_parameters()}
    shapes = {names[name]: p.shape for name, p in model.named_parameters()}
    images, tied = text_part(config) != config, head not in shapes
    _check_fit(f"{folder} does not fit its config.json", shapes, {
        name: tensor for name, tensor in stored.items()
        if not (name.endswith("rotary_emb.inv_freq") or tied and name == head
                or (images or name.startswith("mtp.")) and LEFT_OUT.match(name))})
    if any(name.startswith("mtp.") for name in stored):
        print(f"{folder}: mtp.*, heads that predict several tokens, is left out", file=sys.stderr)
    if tied and head in stored:              # one may be rounded to another dtype
        a, b = (stored[name].read(None, "cpu") for name in (head, "model.embed_tokens.weight"))
        if not (torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)):
            raise ValueError(f"{folder} holds a head of its own, and its config.json ties it to "
                             "the embedding: set tie_word_embeddings to false")
    return {ours: stored[its] for ours, its in names.items()}


def _fill(model: CausalLM, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None,
          device: str | torch.device) -> None:
    """Give a model on the meta device its weights, one at a time; quantise them for base_bits."""
    linear = linear_layers(model)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if model.base_bits and module in linear and kind == "weight":
            stored, wanted = tensor.read(None, device), dtype or torch.float32
            weight: nn.Module
            if model.base_bits == 16:
                weight = WideWeight(stored, wanted)
            else:
                blocks = quantize(stored, model.base_bits)
                weight = BlockWeight(replace(blocks, scales=blocks.scales.half()), wanted)
            model.set_submodule(module, BlockLinear(weight, linear[module].bias))
        else:
            content = tensor.read(dtype or DTYPES[tensor.content.get_dtype()], device)
            setattr(model.get_submodule(module), kind, nn.Parameter(content, requires_grad=False))


def fingerprint(cfg: Config, tensors: Mapping[str, StoredTensor]) -> str:
    """A hash of the configuration and of each tensor's name, dtype, shape and ROWS of its rows, as
    stored: it tells one base from another, whatever dtype and device they are loaded to."""
    # Without defaults: a later version may have more settings.
    settings = [(f.name, value) for f in fields(cfg)
                if (value := getattr(cfg, f.name)) != f.default]
    content = hashlib.sha256(repr(settings).encode())
    for name, t in sorted(tensors.items()):
        count, *row = t.content.get_shape()
        content.update(repr((name, t.content.get_dtype(), count, row)).encode())
        rows = _open(t.file).get_slice(t.name)       # a mapping of its own: see `StoredTensor.read`
        for number in sorted({(count - 1) * i // (ROWS - 1) for i in range(ROWS)}):
            read = rows[number:number + 1]
            content.update(ctypes.string_at(read.data_ptr(), read.nbytes))
    return content.hexdigest()[:16]


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """config.json of a checkpoint folder: the decoder's Config, and the whole content."""
    file = inside(folder, "config.json")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json")
    config = read_json(file)
    with naming(file, ValueError):
        return Config.from_dict(config), config


def text_name(stored: str) -> str:
    """What a model of text calls language_model.model.NAME (Gemma 3), model.language_model.NAME."""
    return re.sub(r"^language_model\.(?=model\.|lm_head\.)|(?<=^model\.)language_model\.", "",
                  stored)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    single, index = (inside(folder, f"model.safetensors{end}") for end in ("", ".index.json"))
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(n, str) for n in files.values()):
        raise ValueError(f"{index} holds no weight_map of tensors to files")
    names = sorted(set(files.values()))
    if bad := [n for n in names if Path(n).name != n or n == ".."]:
        raise ValueError(f"{index} points out of its folder: {bad}")
    if absent := [n for n in names if not (folder / n).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {index.name}")
    return [inside(folder, n) for n in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder, by the names that transformers gives them."""
    return {text_name(t.name): t for file in weight_files(folder) for t in _tensors(file)}


def _tensors(file: Path) -> list[StoredTensor]:
    opened = _open(file)
    return [StoredTensor(file, name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118


def _open(file: Path) -> Any:
    """A safetensors file, open for reading; ValueError if it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{file} is no valid safetensors file: {clean(e)}") from None


def _check_fit(complaint: str, shapes: Mapping[str, Sequence[int]],
               stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError with up to 20 tensors that are surplus, misshapen or missing."""
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        dtype, shape = tensor.content.get_dtype(), tensor.content.get_shape()
        if name not in shapes:
            problems.append(f"{name} is surplus")
        elif dtype not in DTYPES:
            problems.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
        elif shape != list(shapes[name]):
            problems.append(f"{name} is {shape} instead of {list(shapes[name])}")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{complaint}: " + "; ".join(problems[:20]) + more)


def save_adapter(model: nn.Module, folder: str | Path, allocation: Allocation,
                 tasks: Sequence[str] = ()) -> None:
    """Write the experts of `model`, and all that loading them needs, to `folder`."""
    file = Path(folder) / "adapter.safetensors"
    with replacing(file) as tmp:
        save_file({name: p.detach().contiguous() for name, p in expert_parameters(model).items()},
                  tmp, metadata={"format": "pt"})
    write_json(Path(folder) / "adapter.json", {
        "format": ADAPTER_FORMAT, "sha256": sha256(file),
        "base_model": getattr(model, "name", getattr(model, "name_or_path", None)),
        "fingerprint": getattr(model, "fingerprint", None),
        "stored_dtype": getattr(model, "stored_dtype", None),
        "base_bits": getattr(model, "base_bits", None), "tasks": list(tasks),
        "routing": "dynamic" if routed(model) else "frozen",
        "allocation": allocation.to_json(), "versions": versions()})


def load_adapter(model: nn.Module, folder: str | Path) -> Allocation:
    """Add the experts of `folder` to `model`, in place, and return their allocation.

    Raises FileNotFoundError, or ValueError if a file is damaged, if the model has adapters merged
    into it, if the adapter was trained on another base (by the fingerprints of `load_model`;
    `transformers` models have none), or if its tensors do not fit the allocation or the model.
    """
    settings, file = (inside(Path(folder), f"adapter.{end}") for end in ("json", "safetensors"))
    for path in (settings, file):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {path.name}")
    meta = read_json(settings)
    if meta.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{settings} is not of the form {ADAPTER_FORMAT}")
    _check_base(model, meta)
    with naming(settings, ValueError):
        allocation = Allocation.from_json(meta.get("allocation"))
    # A transformers model has its family's names of modules, where ours has Llama's.
    own = MODULES.get(getattr(getattr(model, "config", None), "model_type", ""))
    allocation = replace(allocation, experts={
        renamed(name, own): E for name, E in allocation.experts.items()})
    layers = adaptable(model, allocation)
    is_frozen = meta.get("routing") == "frozen"          # adapters of before were all dynamic
    shapes: dict[str, tuple[int, ...]] = {}
    for name, E in allocation.experts.items():
        (out, in_), r = layers[name].weight.shape, allocation.rank
        shapes |= {f"{name}.lora_A": (E, r, in_), f"{name}.lora_B": (E, r, out)}
        if E > 1 and not is_frozen:
            shapes[f"{name}.router"] = E, in_
    stored = {renamed(tensor.name, own): tensor for tensor in _tensors(file)}
    _check_fit(f"{file} does not fit", shapes, stored)
    if meta.get("sha256") != sha256(file):
        raise ValueError(f"{file} is damaged: its hash is not that of adapter.json")
    add_experts(model, allocation)       # after all checks: a refusal leaves the model unchanged
    if is_frozen:
        drop_routers(model)
    for name, parameter in expert_parameters(model).items():
        parameter.data.copy_(stored[name].content[:])
    return allocation


def _check_base(model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Raise ValueError if `meta`, an adapter.json, is of another base than `model`."""
    ours, its = getattr(model, "fingerprint", None), meta.get("fingerprint")
    if getattr(model, "merged", "") and ours != its:
        raise ValueError(f"{model.name} has adapters merged into it, which can't be taken out "
                         f"again: load this adapter onto {model.merged}")
    if ours and its and its != ours:
        before, now = meta.get("stored_dtype"), getattr(model, "stored_dtype", "")
        same = "another version of minismoe made the adapter: train again"
        if before and before != now:
            same = f"load it as it was stored then, in {clean(before)}: here it is in {now}"
        raise ValueError(f"the adapter was trained on another base: {clean(its)} "
                         f"({clean(meta.get('base_model'))}), and this one is {ours} "
                         f"({getattr(model, 'name', '?')}); if it is the same one, {same}")


def versions() -> dict[str, str]:
    """Library versions that a result depends on."""
    return {"torch": str(torch.__version__), "safetensors": version("safetensors")}
