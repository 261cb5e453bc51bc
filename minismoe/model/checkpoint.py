"""Models in and out: Hugging Face checkpoints, hub names, and adapters.

The checkpoints of a training run are in resume.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..io.files import inside, read_json, replacing, sha256, write_json
from ..io.hub import resolve
from ..io.text import clean
from ..method.allocate import Allocation
from ..method.experts import adaptable, add_experts, expert_layers, linear_layers
from .config import Config
from .decoder import CausalLM
from .lowbit import QuantizedLinear, QuantizedWeight

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADAPTER_FORMAT = "minismoe.adapter/1"
MERGED = "minismoe_merged"               # in config.json: the base that adapters were merged into


def load_model(path: str | Path, dtype: torch.dtype = torch.float32,
               device: str | torch.device = "cpu", base_bits: int | None = None) -> CausalLM:
    """A frozen decoder from a folder or hub name, its weights as `dtype` on `device`.

    With base_bits, 8 or 4, linear layers but the head are held in blocks of such integers. Weights
    are memory-mapped, or converted one at a time: the peak is one copy of them, as they are held.
    Raises ValueError that lists every missing, surplus and misshapen tensor, and all that
    config.json asks for and is not implemented.
    """
    folder = resolve(path)
    cfg, config = read_config(folder)
    with torch.device("meta"):
        model = CausalLM(cfg)
    digest = hashlib.sha256(repr(cfg).encode())
    wanted = {name: p.shape for name, p in model.named_parameters()}
    ignored = {"lm_head.weight"} if cfg.tie_word_embeddings else set()
    problems: list[str] = []
    seen: set[str] = set()
    layers = linear_layers(model)
    for file in weight_files(folder):
        digest.update(_start(file))
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 (it is no dict)
                    seen.add(name)
                    if name in ignored or name.endswith("rotary_emb.inv_freq"):
                        continue
                    if problem := _mismatch(name, f.get_slice(name), wanted.get(name)):
                        problems.append(problem)
                    elif problems:
                        continue
                    elif base_bits and (linear := layers.get(name.removesuffix(".weight"))):
                        weight = _tensor(f, file, name, None, device)
                        model.set_submodule(name.removesuffix(".weight"), QuantizedLinear(
                            linear, QuantizedWeight(weight, base_bits, dtype)))
                    else:
                        _assign(model, name, _tensor(f, file, name, dtype, device))
        except SafetensorError as e:
            raise ValueError(f"{file} is no valid safetensors file: {clean(e)}") from None
    problems += [f"{name} is missing" for name in wanted if name not in seen]
    if problems:
        raise ValueError(f"{folder} does not fit its config.json: " + _listed(problems))
    if cfg.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
        stored = weights(folder)
        if "lm_head.weight" in seen and not _same(*map(stored, (
                "lm_head.weight", "model.embed_tokens.weight"))):
            raise ValueError(f"{folder} holds a head of its own, and its config.json ties it to "
                             "the embedding: set tie_word_embeddings to false")
    model.fingerprint, model.name = digest.hexdigest()[:16], str(path)
    model.merged, model.base_bits = str(config.get(MERGED, "")), base_bits
    return model.eval()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other, but for the rounding of its dtype."""
    return torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """config.json of a checkpoint folder: what the decoder needs of it, and all that it says."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} holds no JSON object")
    try:
        return Config.from_dict(config), config
    except ValueError as e:
        raise ValueError(f"{folder / 'config.json'}: {e}") from None


def weights(folder: Path) -> Callable[[str], Tensor]:
    """Reads single tensors of a checkpoint folder by name, as they are stored."""
    home: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as f:
            home |= dict.fromkeys(f.keys(), file)

    def weight(name: str) -> Tensor:
        with safe_open(home[name], framework="pt") as f:
            return f.get_tensor(name)
    return weight


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}")
    content = read_json(index)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(n, str) for n in weights.values()):
        raise ValueError(f"{index} holds no weight_map of tensors to files")
    names = set(weights.values())
    if bad := sorted(n for n in names if Path(n).name != n or n == ".."):
        raise ValueError(f"{index} points out of its folder: {bad}")
    if absent := [n for n in sorted(names) if not (folder / n).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {index.name}")
    return [folder / n for n in sorted(names)]


def _start(file: Path) -> bytes:
    """The header (names, types, shapes) and the first 64 KiB of weights, to know a file again."""
    with open(file, "rb") as f:
        length = f.read(8)
        return length + f.read(min(int.from_bytes(length, "little"), 1 << 26) + (1 << 16))


def _tensor(f: Any, file: Path, name: str, dtype: torch.dtype | None, device: str | torch.device,
            ) -> Tensor:
    """One tensor of the open file `f`; as it is, it stays a part of the mapped file.

    What is converted (or will be: no dtype) comes from a mapping of its own, which ends with it:
    pages of `f` that were read would stay in memory, beside copies, for as long as `f` is open.
    """
    if DTYPES[f.get_slice(name).get_dtype()] == dtype and torch.device(device).type == "cpu":
        return f.get_tensor(name)
    with safe_open(file, framework="pt") as own:
        return own.get_tensor(name).to(device=device, dtype=dtype)


def _listed(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    return "; ".join(problems[:20]) + more


def _mismatch(name: str, found: Any, wanted: Sequence[int] | None) -> str | None:
    if wanted is None:
        return f"{name} is surplus"
    if found.get_dtype() not in DTYPES:
        return f"{name} is {found.get_dtype()}, not one of {', '.join(DTYPES)}"
    if found.get_shape() != list(wanted):
        return f"{name} is {found.get_shape()} instead of {list(wanted)}"
    return None


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


def save_adapter(model: nn.Module, folder: str | Path, allocation: Allocation,
                 tasks: Sequence[str] = ()) -> None:
    """Write the experts of `model`, and all that loading them needs, to `folder`."""
    tensors = {f"{name}.{part}": parameter.detach().contiguous()
               for name, layer in expert_layers(model).items()
               for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B),
                                       ("router", layer.router)) if parameter is not None}
    file = Path(folder) / "adapter.safetensors"
    with replacing(file) as tmp:
        save_file(tensors, tmp, metadata={"format": "pt"})
    write_json(Path(folder) / "adapter.json", {
        "format": ADAPTER_FORMAT, "sha256": sha256(file),
        "base_model": getattr(model, "name", getattr(model, "name_or_path", None)),
        "fingerprint": getattr(model, "fingerprint", None),
        "base_bits": getattr(model, "base_bits", None), "tasks": list(tasks),
        "allocation": allocation.to_json(), "versions": versions()})


def load_adapter(model: nn.Module, folder: str | Path) -> Allocation:
    """Add the experts of `folder` to `model`, in place, and give back their allocation.

    Raises ValueError where the adapter was trained on another base, naming both fingerprints,
    where adapters are merged into the model already, or where tensors do not fit the allocation.
    Fingerprints are of `load_model`: those of a `transformers` model are not known, nor compared.
    """
    folder = Path(folder)
    for name in ("adapter.json", "adapter.safetensors"):
        if not inside(folder, name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}")
    meta = read_json(folder / "adapter.json")
    if not isinstance(meta, dict) or meta.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{folder / 'adapter.json'} is not of the form {ADAPTER_FORMAT}")
    if getattr(model, "merged", ""):
        raise ValueError(f"{model.name} has adapters merged into it, which can't be taken "
                         f"out again: this one onto {model.merged}")
    ours, its = getattr(model, "fingerprint", None), meta.get("fingerprint")
    if ours and its and ours != its:
        raise ValueError("the adapter was trained on another base: "
                         f"{clean(its)} ({clean(meta.get('base_model'))}), and this one is {ours} "
                         f"({getattr(model, 'name', '?')})")
    try:
        allocation = Allocation.from_json(meta.get("allocation"))
    except ValueError as e:
        raise ValueError(f"{folder / 'adapter.json'}: {e}") from None
    layers = adaptable(model, {name: allocation.rank_of(name) for name in allocation.experts})
    shapes: dict[str, tuple[int, ...]] = {}
    for name, E in allocation.experts.items():
        out, in_ = layers[name].weight.shape
        shapes[f"{name}.lora_A"] = E, allocation.rank_of(name), in_
        shapes[f"{name}.lora_B"] = E, allocation.rank_of(name), out
        if E > 1:
            shapes[f"{name}.router"] = E, in_
    file = folder / "adapter.safetensors"
    with _experts(file, shapes) as f:                                # before any is allocated
        if meta.get("sha256", digest := sha256(file)) != digest:
            raise ValueError(f"{file} is damaged: its hash is not that of adapter.json")
        add_experts(model, allocation)
        for name, parameter in _parameters(model).items():
            parameter.data.copy_(f.get_tensor(name))
    return allocation


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters()
            if name.rpartition(".")[2] in ("lora_A", "lora_B", "router")}


@contextmanager
def _experts(file: Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[Any]:
    """The open file, once it was seen to hold tensors of those names and shapes, and no others."""
    try:
        with safe_open(file, framework="pt") as f:
            found = set(f.keys())
            problems = [f"{n} is surplus" for n in sorted(found - set(shapes))]
            problems += [f"{n} is missing" for n in shapes if n not in found]
            problems += [m for n in shapes if n in found
                         and (m := _mismatch(n, f.get_slice(n), shapes[n]))]
            if problems:
                raise ValueError(f"{file} does not fit: " + _listed(problems))
            yield f
    except SafetensorError as e:
        raise ValueError(f"{file} is no valid safetensors file: {clean(e)}") from None


def versions() -> dict[str, str]:
    """Library versions that a result depends on."""
    return {"torch": str(torch.__version__), "safetensors": version("safetensors")}
