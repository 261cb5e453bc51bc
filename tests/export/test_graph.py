"""The graph against our decoder: families, targets, precisions, and what stands beside matrices."""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnxruntime as ort
import pytest
import torch
from exported import Runner, stored
from mixture import merge
from tiny import FAMILIES, LLAMAS, random_hf
from torch import Tensor, nn

from minismoe.export import graph as graphs
from minismoe.export.graph import DecoderBuilder, write_decoder
from minismoe.export.plan import refuse
from minismoe.export.sampler import write_sampler
from minismoe.export.weights import PRECISIONS, GraphFormat
from minismoe.method.experts import ExpertLinear, expert_layers, linear_layers
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM
from minismoe.model.quantize import ROW, dequantize, quantize
from minismoe.model.tokens import Cache
from minismoe.runtime.drafts import SHORT

LENGTH = 17
NEW = [family for family in FAMILIES if family not in LLAMAS]
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CausalLM]:
    """A random model of a family, with a head size that onnxruntime's attention takes."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> CausalLM:
        changes = {"num_attention_heads": 4, "num_key_value_heads": 2, **changes} if (
            family == "smollm2" and "hidden_size" in changes) else changes
        key = f"{family}{changes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            size = FAMILIES[family][1].get("head_dim", 8)
            size = {"head_dim": size if size % 16 == 0 else 16}
            if FAMILIES[family][0] == "lfm2":        # its head size is always D / H
                size = {"hidden_size": 64}
            random_hf(family, **{**size, **changes}).save_pretrained(made[key])
        return load_model(made[key])

    return make


def on_targets(*families: str) -> list[tuple[str, str]]:
    """Each family with each target that can hold it: only `ort` has delta nets."""
    return [(family, target) for target in ("ort", "portable") for family in families
            if target == "ort" or FAMILIES[family][0] != "qwen3_5_text"]


class EveryToken(DecoderBuilder):
    """A graph whose logits are those of all tokens, (1, T, V)."""

    def last(self, x: str) -> str:
        return self.node("Reshape", "every", x, [-1, self.config.hidden_size])

    def declare(self) -> None:
        super().declare()
        self.graph.outputs[0].type.tensor_type.shape.dim[1].dim_param = "tokens"


def write(file: Path, model: CausalLM, beside: Mapping[str, Any] | None = None,
          all_logits: bool = False, **options: Any) -> Path:
    form = GraphFormat(**{"target": "ort", "precision": "fp32", "context": 64, **options})
    with mock.patch.object(graphs, "DecoderBuilder", EveryToken if all_logits else DecoderBuilder):
        write_decoder(file, stored(model, form, beside or {}), form)
    return file


def random_ids(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(97, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def compare(file: Path, model: CausalLM, tolerance: float, exact: bool = False) -> None:
    """Three prompts, each with a chunk of three, then tokens one by one; by the spread of logits.
    """
    found = list[tuple[Tensor, Tensor]]()
    for length in (LENGTH, 9, 1):
        run, cache = Runner(file, exact=exact), Cache(model, 1, 64)
        for ids in (random_ids(length), random_ids(3, 1), *(random_ids(1, s) for s in range(2, 8))):
            found.append((run(ids)[0], model(ids, cache=cache)[0]))
    got, want = map(torch.cat, zip(*found))
    error = (got - want).square().mean().sqrt() / want.std()
    assert error <= tolerance, f"relative error {error:.2e}"


# Families

@pytest.mark.parametrize(("family", "target", "adapted"), [
    *((*pair, False) for pair in on_targets(*FAMILIES)),
    *((*pair, True) for pair in on_targets(*NEW))])
def test_logits_equal_the_decoder(model: Callable[..., CausalLM], tmp_path: Path, family: str,
                                  target: str, adapted: bool) -> None:
    m = model(family)
    beside = mixed(m, lambda i, part: (i + len(part) % 3, 2) if adapted else (-1, 0), scale=0.1)
    compare(write(tmp_path / "m.onnx", m, beside, target=target, all_logits=True), m, 1e-4)


@torch.no_grad()
def test_logits_of_the_last_tokens(model: Callable[..., CausalLM], tmp_path: Path) -> None:
    m, ids = model("llama"), random_ids(SHORT)
    want = m(ids)
    for target, options, last in (("ort", {}, 1), ("portable", {}, 1), ("ort", {"last": 3}, 3),
                                  ("ort", {"last": 3, "precision": "int8"}, 3)):
        file, exact = write(tmp_path / "m.onnx", m, target=target, **options), len(options) < 2
        got = Runner(file)(ids)
        assert got.shape == (1, last, 97)
        assert [Runner(file)(random_ids(n)).shape[1] for n in (2, SHORT + 1)] == [min(last, 2), 1]
        torch.testing.assert_close(got, want[:, -last:], rtol=1e-4 if exact else 1,
                                   atol=1e-4 if exact else 0.5)
    assert Runner(write(tmp_path / "m.onnx", model("lfm2"), last=3))(random_ids()).shape[1] == 1


# Beside the matrices

def mixed(m: CausalLM, experts: Callable[[int, str], tuple[int, int]], scale: float = 0.3,
          ) -> dict[str, Any]:
    """Put random experts on `m`, (E, k) of each matrix; E = 0 are 3 frozen ones, E < 0 none."""
    g, beside = torch.Generator().manual_seed(0), {}
    for name, linear in linear_layers(m).items():
        _, _, i, part = name.split(".", 3)
        E, k = experts(int(i), part)
        if E < 0:
            continue
        layer = ExpertLinear(linear, E or 3, 2, 8.0 if E else 3.0, k)
        layer.router = layer.router if E else None
        for p in (layer.lora_A, layer.lora_B, layer.router):
            if p is not None:
                p.data = torch.randn(p.shape, generator=g) * scale
        m.set_submodule(name, layer)
        beside[name] = layer
    return beside


@pytest.mark.parametrize(("E", "k"), [(E, k) for E in range(9) for k in range(1, max(E, 1) + 1)])
def test_experts(model: Callable[..., CausalLM], tmp_path: Path, E: int, k: int) -> None:
    """The same experts on all matrices; E = 0 stands for frozen ones."""
    for target in ("ort", "portable"):
        m = model("llama_biases", num_hidden_layers=1)
        beside = mixed(m, lambda i, part: (E, k))
        compare(write(tmp_path / "m.onnx", m, beside, target=target, all_logits=True), m, 1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", ["ort", "portable"])
def test_every_matrix_its_own_experts(model: Callable[..., CausalLM], tmp_path: Path, target: str,
                                      seed: int) -> None:
    """As an allocation has them: uneven, absent, and frozen beside routed."""
    m, g = model("qwen2"), torch.Generator().manual_seed(seed)
    counts = torch.randint(-1, 6, (2, len(PARTS)), generator=g)
    beside = mixed(m, lambda i, part: (int(counts[i, PARTS.index(part)]), seed % 3 + 1))
    compare(write(tmp_path / "m.onnx", m, beside, target=target, all_logits=True), m, 1e-4)


@torch.no_grad()
def test_frozen_experts_beside_a_weight_do_what_merged_ones_do(
        model: Callable[..., CausalLM], tmp_path: Path) -> None:
    m, joined = model("llama_biases"), model("llama_biases")
    beside = mixed(m, lambda i, part: (0, 1), scale=0.1)
    mixed(joined, lambda i, part: (0, 1), scale=0.1)
    merge(joined)
    for one, experts in ((m, beside), (joined, {})):
        compare(write(tmp_path / "m.onnx", one, experts, all_logits=True), joined, 1e-4)
    bare = model("llama_biases")(random_ids())
    assert (joined(random_ids()) - bare).abs().max() > 0.1 * bare.abs().max()


@torch.no_grad()
def test_equal_router_logits_choose_k_experts(model: Callable[..., CausalLM], tmp_path: Path,
                                              ) -> None:
    """Not every expert that ties with the k-th: those that tie are alike, so any one will do."""
    for target in ("ort", "portable"):
        m = model("llama")
        beside = mixed(m, lambda i, part: (4, 2))
        for layer in expert_layers(m).values():          # which `beside` holds
            layer.router.data[1:] = 0
            for p in (layer.lora_A, layer.lora_B):
                p.data[1:] = p.data[1:2].clone()
        compare(write(tmp_path / "m.onnx", m, beside, target=target, all_logits=True), m, 1e-4)


# Precisions

@torch.no_grad()
def rounded(m: CausalLM, bits: int, table_bits: int, size: int = 32) -> CausalLM:
    """The model that quantised weights stand for."""
    for name, part in m.named_modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            blocks = quantize(part.weight, bits if ".layers." in name else table_bits, size)
            part.weight = nn.Parameter(dequantize(blocks))
    for layer in expert_layers(m).values():
        blocks = quantize(layer.lora_A.flatten(0, 1), 8, size)
        layer.lora_A.data = dequantize(blocks).view_as(layer.lora_A)
    if m.config.tie_word_embeddings:
        m.lm_head.weight = m.model.embed_tokens.weight
    return m


@pytest.mark.parametrize(("family", "target", "precision"), [
    *((*pair, precision) for precision in ("int4", "int8") for pair in on_targets(
        "llama", "smollm2", "qwen3", "llama_biases", "gemma3", "lfm2_long", "qwen3_5")),
    *((*pair, "int4-8") for pair in on_targets("llama", "smollm2", "gemma3")),
    *((*pair, "fp16") for pair in on_targets(
        "llama", "qwen3", "smollm2", "gemma3", "lfm2", "qwen3_5")),
    *((family, "ort", "q8") for family in ("llama", "smollm2", "qwen3", "llama_biases")),
    ("smollm2", "ort", "q4f16")])
def test_few_bits(model: Callable[..., CausalLM], tmp_path: Path, family: str, target: str,
                  precision: str) -> None:
    """Blocks, floats of 16 bits, and both; q8, for browsers, has a byte a weight.

    onnxruntime rounds what it multiplies with blocks to int8 too: hence the tolerance.
    """
    m = model(family, **{"hidden_size": 64, "intermediate_size": 192} if precision == "q8" else {})
    beside = mixed(m, lambda i, part: (2, 2) if "q" in part else (0, 1), scale=0.1)
    file = write(tmp_path / "m.onnx", m, beside, target=target, precision=precision,
                 all_logits=True)
    caches = {i.type for n, i in Runner(file).kinds.items() if "past" in n and "recurrent" not in n}
    assert caches == {"tensor(float16)" if "f" in precision else "tensor(float)"}
    amplifies = family == "qwen3_5"          # what activations lose
    if precision == "fp16":
        compare(file, m, 0.05 if amplifies else 0.02)
    elif precision == "q8":
        compare(file, rounded(m, 8, 8, ROW), 2e-5)
    else:
        bits = PRECISIONS[precision][:2]
        exact = amplifies and precision != "q4f16"
        compare(file, rounded(m, *bits), 1e-3 if exact else 0.06, exact)


@torch.no_grad()
@pytest.mark.parametrize(("target", "precision", "block"), [
    ("ort", "int4", 128), ("ort", "int8", 64), ("portable", "int4", 32), ("portable", "int8", 32)])
@pytest.mark.parametrize("k", [2, 3])
def test_adapters_beside_blocks(model: Callable[..., CausalLM], tmp_path: Path, target: str,
                                precision: str, block: int, k: int) -> None:
    """A of experts is in 8-bit blocks, and changes little.

    A weight moves by half a step at most, 1/510 of its block's range. A range is about 4 standard
    deviations, so this is 0.5 % of the weights, and the base carries part of the output. It holds
    if all 3 experts are active: else a token near a tie may choose another expert.
    """
    m = model("smollm2")
    beside = mixed(m, lambda i, part: (3, k) if i else (0, 1), scale=0.1)
    floats = {name: (layer.lora_A.data, layer.lora_B.data) for name, layer in beside.items()}
    got = Runner(write(tmp_path / "m.onnx", m, beside, target=target, precision=precision,
                       block=block, all_logits=True), exact=True)(random_ids())
    want = rounded(m, *PRECISIONS[precision][:2], block)(random_ids())
    for name, layer in beside.items():
        layer.lora_A.data, layer.lora_B.data = floats[name]
    without = m(random_ids())
    near, far = ((got - other).square().mean().sqrt() / other.std() for other in (want, without))
    assert near <= 1e-5
    assert far > 1e-4 and (k == 2 or far < 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_residual_stream_beyond_float16(model: Callable[..., CausalLM], tmp_path: Path,
                                          target: str) -> None:
    """As that of Gemma 3 270M, which reaches 104,000."""
    m, largest = copy.deepcopy(model("gemma3")), list[float]()
    for layer in m.model.layers:
        layer.post_feedforward_layernorm.weight.fill_(60_000)
        layer.register_forward_hook(lambda _, args, y: largest.append(float(y.abs().max())))
    m(random_ids(8))
    assert max(largest) > 70_000
    compare(write(tmp_path / "m.onnx", m, target=target, precision="fp16", all_logits=True), m,
            0.02)


# Form

@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4-8", "int4"])
@pytest.mark.parametrize("family", ["smollm2", "qwen3_window", "llama_biases", "gemma3", "lfm2"])
@pytest.mark.parametrize("static", [None, (1, 4, 12)])
def test_portable_graphs_are_standard(model: Callable[..., CausalLM], tmp_path: Path, family: str,
                                      precision: str, static: Any) -> None:
    m = model(family)
    beside = mixed(m, lambda i, part: (3, 2) if i == 0 else (0, 1))
    file = write(tmp_path / "m.onnx", m, beside, target="portable", precision=precision,
                 static=static)
    graph = onnx.load(file, load_external_data=False)
    assert graph.ir_version == 10
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 21)]
    assert {n.domain for n in graph.graph.node} == {""}
    onnx.checker.check_model(str(file), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in inferred.graph.value_info}
    assert all(o in shapes or o in {v.name for v in graph.graph.output}
               for n in graph.graph.node for o in n.output)
    if static:
        assert all(size > 0 for shape in shapes.values() for size in shape), "a size is not fixed"


@torch.no_grad()
@pytest.mark.parametrize(("adapted", "P", "chunks"), [
    (True, 16, (2, 4, 4, 4, 4)), (False, 40, (3, 1, 1, 4, 1, 2, 1, 1, 2))])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen2_window", "qwen3", "gemma3",
                                    "lfm2", "lfm2_long"])
def test_static_shapes(model: Callable[..., CausalLM], tmp_path: Path, family: str, adapted: bool,
                       P: int, chunks: tuple[int, ...]) -> None:
    """More tokens than the past holds; and as in generation, where each chunk holds a few tokens
    behind pads, which no window counts."""
    m, T, seen = model(family), 4, 0
    beside = mixed(m, lambda i, part: (3, 2) if adapted else (-1, 0), scale=0.1)
    run = Runner(write(tmp_path / "m.onnx", m, beside, target="portable", static=(1, T, P),
                       all_logits=True))
    ids = random_ids(sum(chunks))
    want = m(ids)
    for new in chunks:
        got = run(ids[:, seen:seen + new])
        error = (got[0] - want[0, seen:seen + new]).abs().max()
        assert error <= 1e-4 * want.abs().max(), f"{error:.2e} after {seen}"
        seen += new


SHARES = {"fp32": 1.0, "fp16": 1 / 2, "int8": 0.3, "int4-8": 0.3, "int4": 0.18, "q8": 0.26,
          "q4f16": 0.15}


@pytest.mark.parametrize(("target", "precision"), [
    (target, precision) for target in ("ort", "portable") for precision in SHARES
    if target == "ort" or not precision.startswith("q")])                # q: for browsers
def test_a_tied_table_is_stored_once(model: Callable[..., CausalLM], tmp_path: Path, target: str,
                                     precision: str) -> None:
    m = model("smollm2", vocab_size=4001, hidden_size=64)
    file = write(tmp_path / "m.onnx", m, target=target, precision=precision)
    others = sum(p.numel() for n, p in m.named_parameters() if "embed" not in n)
    share = SHARES[precision]
    table = 4 * m.lm_head.weight.numel() * share
    assert table * 0.95 < Path(f"{file}.data").stat().st_size < table + 4 * others * share + 100_000


def test_external_data_and_names(model: Callable[..., CausalLM], tmp_path: Path) -> None:
    m = model("llama", vocab_size=4099, hidden_size=128)
    file = write(tmp_path / "m.onnx", m, mixed(m, lambda i, part: (3, 2)))
    graph = onnx.load(file, load_external_data=False).graph
    names = [n.name for n in graph.node]
    assert len(names) == len(set(names))
    for name in ("/model/layers.0/self_attn/qkv_proj/MatMul", "/model/layers.1/mlp/QuickGelu",
                 "/model/embed_tokens/Gather", "/lm_head/Gemm"):
        assert name in names
    assert all(len(tensor.raw_data) <= 1024 for tensor in graph.initializer)
    stored = [{e.key: e.value for e in t.external_data} for t in graph.initializer
              if t.external_data]
    assert {where["location"] for where in stored} == {"m.onnx.data"}
    places = [(int(where["offset"]), int(where["length"])) for where in stored]
    for (start, length), end in zip(places, [0, *map(sum, places)]):
        assert start >= end and start % (1 << 16 if length >= 1 << 20 else 1 << 12) == 0
    assert sum(places[-1]) == os.path.getsize(tmp_path / "m.onnx.data")
    assert sum(length >= 1 << 20 for _, length in places) == 2


# Limits

@pytest.mark.parametrize("family, changes, target, block, says", [
    ("llama", {"head_dim": 8}, "ort", 32, "head size 8: onnxruntime's attention takes .* of 16"),
    ("qwen3_5", {"rotary_size": 8}, "ort", 32, "8 numbers of a head turn: .* of 16 only"),
    ("llama", {"intermediate_size": 96}, "portable", 64, "rows of .. weights are no whole blocks"),
    ("qwen3_5", {}, "portable", 32, "target portable has no gated delta nets: only"),
    ("qwen3_5", {}, "npu", 32, "target npu has no gated delta nets: only"),
    ("lfm2", {}, "npu", 32, "npu has no convolutions: take --target portable --static"),
    ("mistral_window", {}, "npu", 32, "window of 5 tokens .*--static 1x4xP with a smaller P"),
    ("qwen3_5", {}, "ort", 32, ""), ("llama", {"intermediate_size": 96}, "ort", 64, "")])
def test_what_a_target_cannot_do_is_refused(model: Callable[..., CausalLM], family: str, says: str,
                                            changes: Any, target: str, block: int) -> None:
    config = replace(model(family).config, **changes)
    with pytest.raises(ValueError, match=says) if says else nullcontext():
        refuse(config, target, block, (1, 4, 64))


# Sampler

@pytest.mark.parametrize("vocab", [7, 300])
def test_sampler(tmp_path: Path, vocab: int) -> None:
    write_sampler(tmp_path / "s.onnx", vocab)
    session = ort.InferenceSession(str(tmp_path / "s.onnx"))
    logits = torch.randn(1, 1, vocab)
    values, indices, logprobs = map(torch.from_numpy, session.run(None, {"logits": logits.numpy()}))
    want = logits[:, 0].topk(min(64, vocab))
    assert torch.equal(values, want.values)
    assert torch.equal(indices, want.indices)
    torch.testing.assert_close(logprobs, logits[:, 0].log_softmax(-1).gather(1, indices))
