"""The bits of an export: sizes, what is listed and stored, and which matrices get them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported import CONFIG, part_of, random_model, ship, stored
from safetensors.torch import save_file
from tiny import padded, save_bytes_model
from torch import Tensor

from minismoe.export.part import sharing_copy
from minismoe.export.plan import with_precision
from minismoe.export.rounding import choose_bits, harm_of
from minismoe.export.settings import ExportConfig
from minismoe.export.ship import freeze_and_round
from minismoe.export.weights import GraphFormat
from minismoe.method import bits
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM
from minismoe.model.quantize import Blocks, dequantize, quantize

CHOOSES = GraphFormat("ort", "int4-8", 64, chooses=True)
STORAGES = CHOOSES.options_of("")
Batches = Mapping[str, list[tuple[Tensor, ...]]]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(0)


@pytest.fixture(scope="module")
def batches(model: CausalLM) -> Batches:
    return {task: [padded([24, 20, 16, 22], seed=seed, vocabulary=model.config.vocab_size)]
            for seed, task in enumerate("ab")}


@pytest.fixture(scope="module")
def options(model: CausalLM, batches: Any) -> dict[str, list[Blocks]]:
    return options_of(model, batches)


def options_of(model: CausalLM, batches: Batches) -> dict[str, list[Blocks]]:
    """The matrices in 4 bits, in blocks of 128 and of 32."""
    part = part_of(model, CHOOSES)
    freeze_and_round([part], model, batches, {})
    return part.in_4_bits


def size_of(chosen: Mapping[str, int], model: CausalLM) -> int:
    """Bytes of what is chosen for some modules: {module: number of its storage}."""
    return sum(STORAGES[number].nbytes(model.get_submodule(name).weight.shape)
               for name, number in chosen.items())


def divergence(model: CausalLM, options: Mapping[str, list[Blocks]], chosen: Mapping[str, int],
               batches: Any) -> float:
    """KL(model || model with these weights) a token."""
    rounded, total, tokens = sharing_copy(model), 0.0, 0
    for name, number in chosen.items():
        of_name, weight = options[name], model.get_submodule(name).weight
        weight = torch.nn.Parameter(dequantize(
            of_name[number] if number < 2 else quantize(weight, *STORAGES[number])))
        rounded.get_submodule(name).weight = weight
        if name == "model.embed_tokens":
            rounded.lm_head.weight = weight
    with torch.no_grad():
        for ids, mask in (batch for of_task in batches.values() for batch in of_task):
            p, q = (m(ids, mask)[mask.bool()].log_softmax(-1) for m in (model, rounded))
            total, tokens = total + (p.exp() * (p - q)).sum().item(), tokens + len(p)
    return total / tokens


def test_each_matrix_is_rounded_in_every_way_of_4_bits(options: Any) -> None:
    assert len(options) == 15 and STORAGES == [(4, 128), (4, 32), (8, 128)]  # the head is tied
    for ways in options.values():                    # 8 bits are rounded once chosen
        for storage, blocks in zip(STORAGES, ways, strict=False):
            assert (blocks.bits, blocks.size) == storage
            assert storage.nbytes(blocks.shape) == blocks.data.nbytes + blocks.scales.nbytes


def test_an_embedding_beside_a_head_of_its_own_is_rounded_to_the_nearest(batches: Any) -> None:
    """Its harm in 4 bits is measured as that of the others."""
    torch.manual_seed(0)
    model = CausalLM(Config.from_dict(CONFIG | {"tie_word_embeddings": False})).eval()
    options = options_of(model, batches)
    for blocks in options["model.embed_tokens"]:
        plain = quantize(model.model.embed_tokens.weight, 4, blocks.size)
        assert torch.equal(blocks.data, plain.data)
    assert all(harm > 0 for ways in harm_of(options, model, model, batches).values()
               for harm in ways)


def test_a_size_is_kept_and_well_spent(model: CausalLM, options: Any, batches: Any,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    """It loses less than as many bytes that the other matrices have."""
    smallest, largest = ({name: pick(range(3), key=lambda n: STORAGES[n].nbytes(
        model.get_submodule(name).weight.shape)) for name in options} for pick in (min, max))
    size = (0.7 * size_of(smallest, model) + 0.3 * size_of(largest, model)) / 1e6
    storages = dict.fromkeys(options, STORAGES)
    chosen = choose_bits(storages, options, model, model, batches, size)
    assert size * 1e6 - 3000 < size_of(chosen, model) <= size * 1e6
    assert "bits a weight" in (said := capsys.readouterr().out)
    assert f"{size_of(chosen, model) / 1e6:.1f} MB of weights" in said
    opposite = {name: largest[name] if chosen[name] == smallest[name] else smallest[name]
                for name in options}
    assert size_of(opposite, model) > size_of(chosen, model)
    assert divergence(model, options, chosen, batches) < divergence(
        model, options, opposite, batches)


def test_texts_are_taken_in_turn_and_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "AT_ONCE", 29)
    monkeypatch.setattr(bits, "TOKENS", 95)
    ones, twos = (torch.full((3, 10), n) for n in (1, 2))
    batches = {"a": [(ones, torch.ones_like(ones))] * 9, "b": [(twos, torch.ones_like(twos))]}
    parts = [(int(ids[0, 0]), len(ids)) for ids, _ in bits.few_tokens(batches)]
    assert parts == [(1, 2), (1, 1), (2, 2), (2, 1), (1, 2), (1, 1), (1, 2)]


# --- export.py ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and beside it a file of prompts."""
    folder = save_bytes_model(tmp_path_factory.mktemp("bits") / "model", **CONFIG)
    save_file(dict(random_model(0).named_parameters()), folder / "model.safetensors")
    (folder.parent / "lines").write_text("".join(f"say {i}\n" for i in range(99)))
    return folder


@pytest.mark.parametrize("flags", ["", "--layout genai", "--target npu"])
def test_export_json_lists_the_bits_that_the_graph_has(base: Path, tmp_path: Path, flags: str,
                                                       ) -> None:
    """Each folder passes its check beside PyTorch with the same rounded weights."""
    size = 0.055 if flags == "--target npu" else 0.09
    info = ship(tmp_path / "out", "--model", base, flags, "--prompts", base.parent / "lines",
                "--size", size)
    of_layers = {tuple(each) for name, each in info["bits"].items() if ".layers." in name}
    assert of_layers <= ({(4, 32), (8, 64), (8, 48)} if "npu" in flags else
                         {(4, 128), (4, 32), (8, 128)}) and {b for b, _ in of_layers} == {4, 8}
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    of_graph = {(a["bits"].i, a["block_size"].i) for a in (
        {a.name: a for a in node.attribute} for node in graph.node
        if node.op_type == "MatMulNBits")}
    assert "npu" in flags or of_graph == {tuple(each) for each in info["bits"].values()}
    stored = sum(t.ByteSize() for t in graph.initializer if t.name.endswith((
        ".weight", ".scales")) and "norm" not in t.name)
    assert 0.8 * size * 1e6 < stored < size * 1.1e6


def test_without_texts_embedding_and_head_get_8_bits(base: Path, tmp_path: Path) -> None:
    info = ship(tmp_path / "out", "--model", base)
    assert {(".layers." in name, *each) for name, each in info["bits"].items()} == {
        (True, 4, 32), (False, 8, 32)}
    with pytest.raises(ValueError, match="--size chooses bits by what texts show"):
        with_precision(ExportConfig(model=str(base), size=1.0), False)


def test_settings_without_bits_of_their_own_store_as_before(model: CausalLM) -> None:
    tree = stored(model, GraphFormat("ort", "int4-8", 64))
    assert tree.lm_head.weight is tree.model.embed_tokens.weight
    assert {(m.weight.bits, m.weight.size) for name, m in tree.named_modules()
            if name.endswith("_proj")} == {(4, 32)}
