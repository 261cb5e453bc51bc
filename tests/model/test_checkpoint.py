"""Checkpoints in, adapters out and in again, and what happens to broken ones."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cut, edit_tensors, python, randomise
from torch import Tensor

from minismoe.io.files import read_json, write_json
from minismoe.method.allocate import Allocation
from minismoe.method.experts import add_experts, drop_routers, expert_layers
from minismoe.model.checkpoint import (
    fingerprint,
    load_adapter,
    load_model,
    save_adapter,
    stored_tensors,
)
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM, meta_model

Checkpoint = Callable[[str], tuple[Any, Path]]
IDS = torch.arange(24).view(2, 12)
Q, V, DOWN = (f"model.layers.{name}" for name in (
    "0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.down_proj"))
ALLOCATION = Allocation({Q: 3, V: 1, DOWN: 2}, rank=4, alpha=12, top_k=2, strategy="votes",
                        group="all", keep=0.5, trainable_parameters=1234)


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint of one file that a test may spoil."""
    return Path(shutil.copytree(checkpoint("llama")[1], tmp_path / "llama"))


@torch.no_grad()
def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    edit_tensors(folder / "model.safetensors", change)


# Reading

@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@torch.no_grad()
def test_shards_load_as_one_file_does(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    hf, folder = checkpoint(family)
    hf.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    sharded, single = load_model(tmp_path), load_model(folder)
    assert torch.equal(sharded(IDS), single(IDS))
    assert sharded.fingerprint == single.fingerprint


@torch.no_grad()
def test_a_tied_head_stays_tied_and_all_is_frozen(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = load_model(checkpoint("llama_tied")[1])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    # Some tied checkpoints store the head as well. Another than the embedding is a contradiction.
    twice = Path(shutil.copytree(checkpoint("llama_tied")[1], tmp_path / "twice"))
    edit(twice, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    again = load_model(twice)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(IDS), model(IDS))
    for table, head in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
                        (torch.float32, torch.float16)):        # but for its rounding
        edit(twice, lambda t, a=table, b=head: t.update({
            "model.embed_tokens.weight": model.lm_head.weight.to(a).clone(),
            "lm_head.weight": model.lm_head.weight.to(b).clone()}))
        for dtype in (torch.float32, torch.bfloat16):
            again = load_model(twice, dtype)
            assert torch.equal(again.lm_head.weight, model.lm_head.weight.to(table).to(dtype))
    for other in (torch.zeros(97, 32), torch.zeros(90, 32)):
        edit(twice, lambda t, x=other: t.update({"lm_head.weight": x}))
        with pytest.raises(ValueError, match="twice holds a head of its own, .*tie_word_embedd"):
            load_model(twice)


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_any_stored_dtype_loads_as_any_other(
        folder: Path, stored: torch.dtype, asked: torch.dtype) -> None:
    edit(folder, lambda t: t.update({name: x.to(stored) for name, x in t.items()}))
    wanted = load_file(folder / "model.safetensors")
    model = load_model(folder, dtype=asked)
    for name, p in model.named_parameters():
        assert p.dtype == asked
        assert torch.equal(p, wanted[name].to(asked)), name
    assert model(IDS).dtype == asked


@pytest.mark.parametrize("form", [
    {"dtype": torch.bfloat16}, {"base_bits": 8}, {"base_bits": 4, "dtype": torch.bfloat16},
    {"device": "meta"}], ids=str)
def test_fingerprint_knows_a_checkpoint_in_every_form(folder: Path, form: dict[str, Any]) -> None:
    first = load_model(folder).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert load_model(folder, **form).fingerprint == first


@torch.no_grad()
def test_fingerprint_stays_if_a_later_version_has_more_settings(folder: Path) -> None:
    later = make_dataclass("Later", [("new", int, 0)], bases=(Config,), frozen=True)
    model, tensors = load_model(folder), stored_tensors(folder)
    config = later(**vars(model.config))
    assert fingerprint(config, tensors) == model.fingerprint
    assert fingerprint(replace(config, new=1), tensors) != model.fingerprint


def test_fingerprint_knows_every_tensor_and_setting(folder: Path) -> None:
    """Rows from the first to the last, and any of those between."""
    file, found = folder / "model.safetensors", {load_model(folder).fingerprint}
    whole, names = file.read_bytes(), list(load_file(file))
    for name, rows in product(names, (slice(1), slice(10, 20), slice(-1, None))):
        edit(folder, lambda t, name=name, rows=rows: t[name][rows].neg_())
        found.add(load_model(folder).fingerprint)
        file.write_bytes(whole)
    edit(folder, lambda t: t.update({names[0]: t[names[0]].bfloat16()}))
    found.add(load_model(folder).fingerprint)
    file.write_bytes(whole)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "rms_norm_eps": 1e-3})
    found.add(load_model(folder).fingerprint)
    assert len(found) == 3 * len(names) + 3


@torch.no_grad()
def test_old_rotary_buffers_are_left_out(folder: Path) -> None:
    before = load_model(folder)(IDS)
    edit(folder, lambda t: t.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(load_model(folder)(IDS), before)


# Broken checkpoints

def test_all_tensors_that_do_not_fit_are_named_at_once(folder: Path) -> None:
    norm, gate, up, q = ("model.norm.weight", *(f"model.layers.0.{n}.weight" for n in (
        "mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj")))

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[norm]
        tensors["model.extra"] = torch.zeros(2)
        tensors[gate] = tensors[gate].T.contiguous()
        tensors[up] = tensors[up].to(torch.int8)
        tensors[q + "_scale"] = torch.zeros(1)

    edit(folder, spoil)
    with pytest.raises(ValueError) as e:
        load_model(folder)
    for named in (f"{norm} is missing", "model.extra is surplus", f"{q}_scale is surplus",
                  f"{gate} is [32, 48] instead of [48, 32]", f"{up} is I8"):
        assert named in str(e.value)
    assert str(folder) in str(e.value)
    assert str(e.value).count(";") == 4, "a tensor that fits was named"


def overwrite(file: Path, place: int, new: bytes) -> None:
    content = bytearray(file.read_bytes())
    place %= len(content)
    content[place:place + len(new)] = new
    file.write_bytes(content)


@pytest.mark.parametrize(("spoil", "error", "named"), [
    (lambda f: shutil.rmtree(f), FileNotFoundError, "no such model folder"),
    (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
    (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
    (lambda f: (f / "config.json").write_text("[" * 10**6), ValueError, "is not valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), ValueError, "holds no JSON object"),
    (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), ValueError,
     "config.json: this model is not implemented: model_type 'gpt2'"),
    (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError,
     "neither model.safetensors nor model.safetensors.index.json"),
    (lambda f: cut(f / "model.safetensors"), ValueError, "no valid safetensors file"),
    (lambda f: overwrite(f / "model.safetensors", 8, b"not json"), ValueError, "no valid safetens"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ValueError,
     "no valid safetensors file")])
def test_broken_folders_are_refused(
        folder: Path, spoil: Callable[[Path], object], error: type[Exception], named: str) -> None:
    load_model(folder)
    spoil(folder)
    with pytest.raises(error, match=re.escape(named)) as e:
        load_model(folder)
    assert str(folder) in str(e.value)


@pytest.mark.parametrize(("index", "error", "named"), [
    *(({"weight_map": {"a": place}}, ValueError, "points out of its folder") for place in (
        "../secret.safetensors", "/etc/passwd", "..", "file:///etc/passwd")),
    ({"weight_map": {"a": "sub/x.safetensors", "b": "x.safetensors"}}, ValueError, "sub/x"),
    ({"weight_map": {"a": ["x"]}}, ValueError, "weight_map"),
    ({"weight_map": ["x.safetensors"]}, ValueError, "weight_map"),
    ({}, ValueError, "weight_map"),
    ([], ValueError, "no JSON object"),
    ({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}, FileNotFoundError,
     "lacks model-2.safetensors, named in model.safetensors.index.json"),
])
def test_a_broken_shard_index_is_refused(
        folder: Path, index: Any, error: type[Exception], named: str) -> None:
    """A real file waits where "../secret" points, so only the check keeps it from being read."""
    shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(error, match=re.escape(named)):
        load_model(folder)


# Memory

PEAK = """
import json, re, sys, torch
from minismoe.model.checkpoint import load_model
# Not ru_maxrss: a child process inherits its parent's there, and pytest's own peak would hide ours.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
bits = int(sys.argv[3])
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]), base_bits=bits or None)
weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
touched = sum(float(p.sum()) for p in model.parameters())        # mapped pages count once read
print(json.dumps({"weights": weights, "peak": peak() - before}))
"""


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 185 MB in bfloat16."""
    folder, config = tmp_path_factory.mktemp("large"), {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 5, "num_attention_heads": 8, "tie_word_embeddings": True}
    write_json(folder / "config.json", config)
    save_file({name: torch.ones(p.shape, dtype=torch.bfloat16)
               for name, p in meta_model(Config.from_dict(config)).named_parameters()},
              folder / "model.safetensors")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 0), ("float32", 0), ("bfloat16", 8)])
def test_peak_memory_is_one_copy_of_the_weights(large: Path, dtype: str, bits: int) -> None:
    run = python("-c", PEAK, large, dtype, bits)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["weights"] > (100e6 if bits else 180e6)
    assert found["peak"] <= 1.3 * found["weights"], found
    assert found["peak"] > 0.5 * found["weights"], f"the weights were not measured: {found}"


def test_weights_that_need_no_conversion_share_one_mapping(folder: Path) -> None:
    """One for each would reserve the file's size many times, where memory is not overcommitted."""
    def spread(dtype: torch.dtype) -> int:
        places = [p.data_ptr() for p in load_model(folder, dtype).parameters()]
        return max(places) - min(places)

    assert spread(torch.float32) < (folder / "model.safetensors").stat().st_size


# Adapters

@pytest.fixture
def trained(folder: Path) -> CausalLM:
    """`folder` with experts as training leaves them; a fresh lora_B is 0, and would hide every
    mistake."""
    return randomise(add_experts(load_model(folder), ALLOCATION))


@pytest.fixture
def adapter(trained: CausalLM, tmp_path: Path) -> Path:
    """A saved adapter of `folder`."""
    save_adapter(trained, tmp_path / "adapter", ALLOCATION, ["trec", "sst2"])
    return tmp_path / "adapter"


def rewrite(adapter: Path, *without: str, **changes: str) -> None:
    """Change what adapter.json says, or leave it out."""
    meta = read_json(adapter / "adapter.json") | changes
    write_json(adapter / "adapter.json", {k: v for k, v in meta.items() if k not in without})


@torch.no_grad()
def test_a_saved_adapter_loads_unchanged(folder: Path, trained: CausalLM, adapter: Path) -> None:
    again, base = load_model(folder), load_model(folder)
    assert load_adapter(again, adapter) == ALLOCATION
    assert torch.equal(again(IDS), trained(IDS))
    assert relative(trained(IDS), base(IDS)) > 1e-2


@torch.no_grad()
def test_frozen_experts_are_saved_without_routers(folder: Path, trained: CausalLM, adapter: Path,
                                                  tmp_path: Path) -> None:
    """adapter.json says so; an adapter of before, without the key, has them."""
    assert read_json(adapter / "adapter.json")["routing"] == "dynamic"
    routed, again, of_before = trained(IDS), load_model(folder), load_model(folder)
    drop_routers(trained)
    save_adapter(trained, tmp_path / "frozen", ALLOCATION)
    assert read_json(tmp_path / "frozen" / "adapter.json")["routing"] == "frozen"
    assert load_adapter(again, tmp_path / "frozen") == ALLOCATION
    assert expert_layers(again)[Q].router is None
    assert torch.equal(again(IDS), trained(IDS))
    assert relative(trained(IDS), routed) > 1e-2
    rewrite(adapter, "routing")
    load_adapter(of_before, adapter)
    assert torch.equal(of_before(IDS), routed)


@pytest.mark.parametrize("name", ["frozen", "dynamic"])
def test_routers_that_contradict_the_routing_are_refused(
        folder: Path, trained: CausalLM, tmp_path: Path, name: str) -> None:
    if name == "dynamic":
        drop_routers(trained)
    save_adapter(trained, tmp_path / "adapter", ALLOCATION)
    rewrite(tmp_path / "adapter", routing=name)
    with pytest.raises(ValueError, match=f"{Q}.router is " + (
            "surplus" if name == "frozen" else "missing")):
        load_adapter(load_model(folder), tmp_path / "adapter")


@torch.no_grad()
def test_a_saved_adapter_loads_onto_a_transformers_model(
        checkpoint: Checkpoint, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint("llama")[1]
    ours, theirs, again = load_model(folder), *(
        AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    for model in (ours, theirs):
        assert load_adapter(model, adapter) == ALLOCATION
    assert relative(theirs(IDS).logits, ours(IDS)) <= 1e-5
    save_adapter(theirs, tmp_path / "from_hf", ALLOCATION)
    load_adapter(again, tmp_path / "from_hf")
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_adapter_files_hold_what_loading_needs(folder: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{Q}.lora_A": (3, 4, 32), f"{Q}.lora_B": (3, 4, 32), f"{Q}.router": (3, 32),
        f"{V}.lora_A": (1, 4, 32), f"{V}.lora_B": (1, 4, 16),        # E = 1: no router
        f"{DOWN}.lora_A": (2, 4, 48), f"{DOWN}.lora_B": (2, 4, 32), f"{DOWN}.router": (2, 48)}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    meta = read_json(adapter / "adapter.json")
    assert meta["format"] == "minismoe.adapter/1"
    assert meta["base_model"] == str(folder)
    assert meta["fingerprint"] == load_model(folder).fingerprint
    assert meta["tasks"] == ["trec", "sst2"]
    assert meta["versions"]["torch"] == torch.__version__
    assert Allocation.from_json(meta["allocation"]) == ALLOCATION
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_an_adapter_of_another_base_is_refused(checkpoint: Checkpoint, folder: Path, adapter: Path,
                                               ) -> None:
    """Weights that are stored in another dtype are rounded otherwise, so the dtype is named."""
    other, first = load_model(checkpoint("llama_biases")[1]), load_model(folder).fingerprint
    with pytest.raises(ValueError, match="another base") as e:
        load_adapter(other, adapter)
    assert all(named in str(e.value) for named in (other.fingerprint, first, str(folder)))
    assert not expert_layers(other)
    edit(folder, lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))
    with pytest.raises(ValueError, match="stored then, in float32: here it is in bfloat16$"):
        load_adapter(load_model(folder, torch.float32), adapter)


def test_an_adapter_whose_tensors_do_not_fit_is_refused(folder: Path, adapter: Path) -> None:
    file = adapter / "adapter.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.lora_A"] = torch.zeros(3, 4, 31)
    tensors[f"{V}.router"] = torch.zeros(1, 32)
    del tensors[f"{DOWN}.lora_B"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit") as e:
        load_adapter(load_model(folder), adapter)
    for named in (f"{Q}.lora_A is [3, 4, 31] instead of [3, 4, 32]", f"{V}.router is surplus",
                  f"{DOWN}.lora_B is missing", str(file)):
        assert named in str(e.value)


@pytest.mark.parametrize(("spoil", "error", "named"), [
    (lambda f: (f / "adapter.json").unlink(), FileNotFoundError, "holds no adapter.json"),
    (lambda f: (f / "adapter.json").write_text("{}"), ValueError, "not of the form"),
    (lambda f: (f / "adapter.json").write_text("[]"), ValueError, "no JSON object"),
    (lambda f: (f / "adapter.json").write_text('{"format": "minismoe.adapter/1"}'), ValueError,
     "allocation"),
    (lambda f: (f / "adapter.json").write_text(
        '{"format": "minismoe.adapter/1", "fingerprint": "0123"}'), ValueError, "0123"),
    (lambda f: cut(f / "adapter.safetensors"), ValueError, "no valid safetensors"),
    (lambda f: (f / "adapter.safetensors").unlink(), FileNotFoundError, "adapter.safetensors"),
    (lambda f: overwrite(f / "adapter.safetensors", -9, b"\1"), ValueError, "is damaged: its hash"),
    (lambda f: (f / "adapter.json").write_text(re.sub('"sha256": ".*?",', "", (
        f / "adapter.json").read_text())), ValueError, "its hash is not"),
    (lambda f: (f / "adapter.json").rename(f.parent / "a.json") and (f / "adapter.json").symlink_to(
        f.parent / "a.json"), ValueError, "leads out of"),
])
def test_broken_adapters_are_refused(folder: Path, adapter: Path, spoil: Callable[[Path], object],
                                     error: type[Exception], named: str) -> None:
    model = load_model(folder)
    spoil(adapter)
    with pytest.raises(error, match=re.escape(named)):
        load_adapter(model, adapter)
    assert not expert_layers(model)
