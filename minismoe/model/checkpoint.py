"""Loading Hugging Face checkpoints; saving and loading adapters."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..io.files import inside, naming, read_json, replacing, sha256, write_json
from ..io.hub import resolve
from ..io.text import clean
from ..method.allocate import Allocation
from ..method.experts import adaptable, add_experts, expert_layers, linear_layers
from .config import Config, text_part
from .decoder import CausalLM, meta_model
from .quantize import BlockLinear, BlockWeight, quantize

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADAPTER_FORMAT = "minismoe.adapter/1"
IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")   # tensors of images
MERGED = "minismoe_merged"               # in config.json: the base that adapters were merged into


def load_model(path: str | Path, dtype: torch.dtype = torch.float32,
               device: str | torch.device = "cpu", base_bits: int | None = None) -> CausalLM:
    """A frozen decoder from a folder or hub name, its weights as `dtype` on `device`.

    With base_bits, 8 or 4, all linear layers but the head are quantised. Weights are memory-mapped,
    or converted one at a time, so peak memory is one copy of the weights in their final form.
    Raises FileNotFoundError; ValueError lists up to 20 wrong tensors, or all unsupported settings.
    """
    if base_bits not in (None, 4, 8):
        raise ValueError(f"base_bits is {base_bits!r}: give 8, 4 or None")
    folder = resolve(path)
    cfg, config = read_config(folder)
    model = meta_model(cfg)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    files = {file: _headers(file) for file in weight_files(folder)}
    found = {text_name(n): header for headers in files.values() for n, header in headers.items()}
    tied = cfg.tie_word_embeddings
    _check_fit(f"{folder} does not fit its config.json", wanted, {
        name: header for name, header in found.items()
        if not (name == "lm_head.weight" and tied or name.endswith("rotary_emb.inv_freq")
                or text_part(config) != config and IMAGES.match(name))})
    quantised = linear_layers(model) if base_bits else {}
    for file, headers in files.items():
        with _opened(file) as f:
            for stored in [n for n in headers if text_name(n) in wanted]:
                parent, _, child = (name := text_name(stored)).rpartition(".")
                if child == "weight" and base_bits and parent in quantised:
                    weight = _tensor(f, file, stored, None, device)
                    blocks = BlockWeight(quantize(weight, base_bits), dtype)
                    model.set_submodule(parent, BlockLinear(blocks, quantised[parent].bias))
                else:
                    parameter = nn.Parameter(_tensor(f, file, stored, dtype, device), False)
                    setattr(model.get_submodule(parent), child, parameter)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        if "lm_head.weight" in found:        # it may be the embedding, rounded to another dtype
            a, b = map(weights(folder), ("lm_head.weight", "model.embed_tokens.weight"))
            if not (torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)):
                raise ValueError(f"{folder} holds a head of its own, and its config.json ties it "
                                 "to the embedding: set tie_word_embeddings to false")
    model.fingerprint, model.name = fingerprint(cfg, wanted, files), str(path)
    model.merged, model.base_bits = str(config.get(MERGED, "")), base_bits
    return model.eval()


def fingerprint(cfg: Config, names: Collection[str], files: Iterable[Path]) -> str:
    """A hash of the configuration and of each tensor's name, dtype, shape and first row, as stored:
    it tells one base from another, whatever dtype and device they are loaded to."""
    found = {}
    for file in files:
        with _opened(file) as f:
            for stored, header in _headers(file).items():
                if (name := text_name(stored)) in names:
                    row = f.get_slice(stored)[:1].flatten().view(torch.uint8)
                    found[name] = header, bytes(row.tolist())
    return hashlib.sha256(repr((cfg, sorted(found.items()))).encode()).hexdigest()[:16]


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """config.json of a checkpoint folder: the decoder's Config, and the whole content."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json")
    config = read_json(file)
    with naming(file, ValueError):
        return Config.from_dict(config), config


def weights(folder: Path) -> Callable[[str], Tensor]:
    """A function that reads one tensor of a checkpoint folder by name, in its stored dtype."""
    home = {text_name(n): (file, n) for file in weight_files(folder) for n in _headers(file)}

    def weight(name: str) -> Tensor:
        file, stored = home[name]
        with _opened(file) as f:
            return f.get_tensor(stored)
    return weight


def text_name(stored: str) -> str:
    """Our name of language_model.model.NAME (Gemma 3) or model.language_model.NAME (newer)."""
    return re.sub(r"^language_model\.(?=model\.|lm_head\.)|(?<=^model\.)language_model\.", "",
                  stored)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
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
    return [folder / n for n in names]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading; ValueError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise ValueError(f"{file} is no valid safetensors file: {clean(e)}") from None


def _headers(file: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of each tensor in a file."""
    with _opened(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (it is no dict)
        return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}


def _check_fit(complaint: str, wanted: Mapping[str, Sequence[int]],
               found: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise ValueError with up to 20 tensors that are surplus, misshapen or missing."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    for name, (dtype, shape) in found.items():
        if name not in wanted:
            problems.append(f"{name} is surplus")
        elif dtype not in DTYPES:
            problems.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
        elif shape != list(wanted[name]):
            problems.append(f"{name} is {shape} instead of {list(wanted[name])}")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{complaint}: " + "; ".join(problems[:20]) + more)


def _tensor(f: Any, file: Path, name: str, dtype: torch.dtype | None, device: str | torch.device,
            ) -> Tensor:
    """One tensor of the open file `f`; without a conversion, it shares the mapped file's memory.

    One that is converted, here or by the caller (dtype None), is read through a mapping of its own
    that is closed at once: pages read through `f` stay in memory until `f` is closed.
    """
    if DTYPES[f.get_slice(name).get_dtype()] == dtype and torch.device(device).type == "cpu":
        return f.get_tensor(name)
    with _opened(file) as own:
        return own.get_tensor(name).to(device=device, dtype=dtype)


def save_adapter(model: nn.Module, folder: str | Path, allocation: Allocation,
                 tasks: Sequence[str] = ()) -> None:
    """Write the experts of `model`, and all that loading them needs, to `folder`."""
    file = Path(folder) / "adapter.safetensors"
    with replacing(file) as tmp:
        save_file({name: p.detach().contiguous() for name, p in _expert_parameters(model).items()},
                  tmp, metadata={"format": "pt"})
    write_json(Path(folder) / "adapter.json", {
        "format": ADAPTER_FORMAT, "sha256": sha256(file),
        "base_model": getattr(model, "name", getattr(model, "name_or_path", None)),
        "fingerprint": getattr(model, "fingerprint", None),
        "base_bits": getattr(model, "base_bits", None), "tasks": list(tasks),
        "allocation": allocation.to_json(), "versions": versions()})


def load_adapter(model: nn.Module, folder: str | Path) -> Allocation:
    """Add the experts of `folder` to `model`, in place, and return their allocation.

    Raises FileNotFoundError, or ValueError if a file is damaged, if the model has adapters merged
    into it, if the adapter was trained on another base (by the fingerprints of `load_model`;
    `transformers` models have none), or if its tensors do not fit the allocation or the model.
    """
    record, file = (Path(folder) / name for name in ("adapter.json", "adapter.safetensors"))
    for part in (record, file):
        if not inside(part.parent, part.name).is_file():
            raise FileNotFoundError(f"{folder} holds no {part.name}")
    meta = read_json(record)
    if meta.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{record} is not of the form {ADAPTER_FORMAT}")
    _check_base(model, meta)
    with naming(record, ValueError):
        allocation = Allocation.from_json(meta.get("allocation"))
    layers = adaptable(model, allocation)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, E in allocation.experts.items():
        (out, in_), r = layers[name].weight.shape, allocation.rank
        shapes |= {f"{name}.lora_A": (E, r, in_), f"{name}.lora_B": (E, r, out)}
        if E > 1:
            shapes[f"{name}.router"] = E, in_
    _check_fit(f"{file} does not fit", shapes, _headers(file))
    if meta.get("sha256") != sha256(file):
        raise ValueError(f"{file} is damaged: its hash is not that of adapter.json")
    add_experts(model, allocation)       # after all checks: a refusal leaves the model unchanged
    with _opened(file) as f:
        for name, parameter in _expert_parameters(model).items():
            parameter.data.copy_(f.get_tensor(name))
    return allocation


def _check_base(model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Raise ValueError if `meta`, an adapter.json, is of another base than `model`."""
    ours, its = getattr(model, "fingerprint", None), meta.get("fingerprint")
    if getattr(model, "merged", "") and ours != its:
        raise ValueError(f"{model.name} has adapters merged into it, which can't be taken out "
                         f"again: load this adapter onto {model.merged}")
    if ours and its and ours != its:
        raise ValueError(f"the adapter was trained on another base: {clean(its)} "
                         f"({clean(meta.get('base_model'))}), and this one is {ours} "
                         f"({getattr(model, 'name', '?')})")


def _expert_parameters(model: nn.Module) -> dict[str, Tensor]:
    """lora_A (E, r, in), lora_B (E, r, out) and router (E, in) of all experts, by full name."""
    return {f"{name}.{part}": parameter for name, layer in expert_layers(model).items()
            for part in ("lora_A", "lora_B", "router")
            if (parameter := getattr(layer, part)) is not None}


def versions() -> dict[str, str]:
    """Library versions that a result depends on."""
    return {"torch": str(torch.__version__), "safetensors": version("safetensors")}
