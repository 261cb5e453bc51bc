"""The NPU target: its graphs beside PyTorch and transformers, and compiled for an emulated HTP."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from exported import CONFIG, command, describe, random_model
from onnx import TensorProto, helper
from torch import Tensor

from minismoe.export.graph import write_sampler
from minismoe.export.npu import Range, activation_ranges, compile_npu, write_npu
from minismoe.export.scales import round_weights
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator
from minismoe.runtime.generator import _session
from minismoe.runtime.npu import EXACT, NpuSteps, qnn_session

T, P = 8, 64
needs_qnn = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None,
                               reason="onnxruntime-qnn is not installed")
TOLERANCES = {"fp16": 5e-3, "w8a16": 5e-3, "w4a16": 5e-3}      # beside the same rounded weights


def texts(vocab: int, count: int = 12, length: int = 21) -> list[list[int]]:
    """Random texts."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (count, length), generator=generator).tolist()


def write(model: CausalLM, folder: Path, precision: str, **ranges: Any) -> Path:
    """An exported folder of target npu."""
    folder.mkdir()
    weights, c = dict(model.named_parameters()), model.config
    write_npu(folder, c, lambda name: weights[name].detach(), precision=precision, context=P,
              block=32, static=(1, T, P), ranges=ranges or (
                  {} if precision == "fp16" else activation_ranges(model, texts(c.vocab_size))))
    write_sampler(folder / "sampler.onnx", c.vocab_size)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    describe(folder, target="npu", context=P, static=(1, T, P), layers=c.num_hidden_layers,
             kv_heads=c.num_key_value_heads, head_dim=c.head_dim, vocab_size=c.vocab_size,
             cache_type="float16", format="minismoe.export/1", adapters={})
    return folder


def logits(folder: Path, text: list[int], provider: str | None = None) -> Tensor:
    """Logits (4, V) after all but three tokens, read in chunks of T, and after each of the rest."""
    info = json.loads((folder / "export.json").read_text())
    steps = NpuSteps(folder, info, provider, partial(
        _session, provider="CPUExecutionProvider", threads=1, entries=EXACT))
    shape = [1, info["kv_heads"], P, info["head_dim"]]
    cache = {f"{i}.{part}": ort.OrtValue.from_dlpack(torch.zeros(shape, dtype=torch.float16))
             for i in range(info["layers"]) for part in ("key", "value")}
    first, found = text[:-3], []
    rows: list[Any] = [[None] * (-len(first) % T) + first][0]
    seen = 0
    for start in range(0, len(rows), T):
        got = steps.step(rows[start:start + T], seen, cache)
        seen += sum(t is not None for t in rows[start:start + T])
    for token in [None, *text[-3:]]:
        if token is not None:
            got = steps.step([token], seen, cache)
            seen += 1
        found.append(torch.from_dlpack(got).clone().flatten())
    return torch.stack(found)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("family", ["llama", "llama_biases", "smollm2", "qwen2", "qwen3"])
def test_graphs_compute_what_transformers_does(checkpoint: Any, tmp_path: Path, family: str,
                                               ) -> None:
    hf, saved = checkpoint(family)
    folder = write(load_model(saved), tmp_path / "npu", "fp16")
    text = texts(97)[0]
    with torch.no_grad():
        wanted = hf(torch.tensor([text])).logits[0, -4:]
    assert error(logits(folder, text), wanted) < TOLERANCES["fp16"]


@pytest.mark.parametrize("precision", ["w8a16", "w4a16"])
def test_graphs_in_few_bits_compute_what_the_rounded_model_does(tmp_path: Path, precision: str,
                                                                ) -> None:
    model, text = random_model(0), texts(259)[0]
    folder = write(model, tmp_path / "npu", precision)
    round_weights(model, precision, 32)
    with torch.no_grad():
        wanted = model(torch.tensor([text]))[0, -4:]
    assert error(logits(folder, text), wanted) < TOLERANCES[precision]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = {t.data_type for t in graph.initializer if t.name.endswith("_proj.weight")}
    assert kinds == {TensorProto.INT8 if precision == "w8a16" else TensorProto.INT4}
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == [1, 1, 259]


def test_both_graphs_read_one_file_of_weights(tmp_path: Path) -> None:
    folder = write(random_model(0), tmp_path / "npu", "fp16")
    places = [{t.name: tuple(e.value for e in t.external_data) for t in onnx.load(
        folder / f"{name}.onnx", load_external_data=False).graph.initializer if t.external_data}
        for name in ("model", "prompt", "embed")]
    names = places[0].keys() & places[1].keys()
    assert len(names) > 8 and all(places[0][n] == places[1][n] for n in names)
    assert places[2].items() <= places[0].items()


def massive(model: CausalLM) -> CausalLM:
    """The model with one feature of its last MLP a thousand times as large, after token 7 only."""
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
        model.model.embed_tokens.weight[:, 0] *= 0.01
        model.model.embed_tokens.weight[7, 0] = 8
        mlp = model.model.layers[-1].mlp
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[0] = 0
            part.weight[0, 0] = 100
    return model


def test_a_layer_whose_activations_no_range_holds_stays_in_floats(tmp_path: Path) -> None:
    model = massive(random_model(0))
    seen = [[7, *text] for text in texts(259)]
    ranges = activation_ranges(model, seen)
    name = "model.layers.1.mlp.down_proj"
    assert name not in ranges and len(ranges) == 2 * 7 + 1 - 1
    folder = write(model, tmp_path / "npu", "w8a16", **ranges)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert [n.name for n in graph.node if n.op_type == "MatMulNBits"] == [
        "/model/layers.1/mlp/down_proj/MatMulNBits"]
    round_weights(model, "w8a16", 32)
    with torch.no_grad():
        wanted = model(torch.tensor([seen[0]]))[0, -4:]
    assert error(logits(folder, seen[0]), wanted) < TOLERANCES["w8a16"]


def test_a_range_is_chosen_by_its_worst_token() -> None:
    """Brute force over the same candidates; a layer of one matrix."""
    assert Range(-1.0, 3.0).round(torch.tensor([0.0, 5.0, -2.0])).tolist() == pytest.approx(
        [0.0, 3.0, -1.0], abs=1e-4)


def test_the_generator_says_what_pytorch_says(tmp_path: Path) -> None:
    from minismoe.training.evaluate import generate

    model = random_model(0)
    generator = Generator(write(model, tmp_path / "npu", "fp16"), threads=1)
    prompts = [text[:n] for n, text in zip((1, 7, 8, 9, 20), texts(259))]
    wanted = generate(model, prompts, 12, generator.tokenizer.stop_ids)
    assert [list(generator.generate(p, 12)) for p in prompts] == wanted
    assert generator.batch(prompts, 12) == wanted


def test_the_runtime_needs_no_torch_for_an_npu_folder(tmp_path: Path) -> None:
    folder = write(random_model(0), tmp_path / "npu", "w8a16")
    done = command(folder, "hello", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    wrong = command(folder, "hello", "--provider", "cuda")
    assert wrong.returncode == 1 and "runs on cpu or qnn" in wrong.stderr


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch) -> None:
    folder = write(random_model(0), tmp_path / "npu", "fp16")
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(ImportError, match=r"pip install 'minismoe\[npu\]'"):
        Generator(folder, "qnn")


def test_a_cache_shorter_than_the_graph_says_is_refused(tmp_path: Path) -> None:
    folder = write(random_model(0), tmp_path / "npu", "fp16")
    describe(folder, static=(1, 4, P))                   # a step writes more than it should
    with pytest.raises(ValueError, match="export again"):
        list(Generator(folder, threads=1).generate(texts(259)[0], 2))


@needs_qnn
@pytest.mark.parametrize("precision", ["fp16", "w8a16", "w4a16"])
def test_the_compiled_graphs_compute_what_the_cpu_does(tmp_path: Path, precision: str, capsys,
                                                       ) -> None:
    folder, text = write(massive(random_model(0)), tmp_path / "npu", precision), [7, *texts(259)[1]]
    wanted = logits(folder, text)
    assert error(logits(folder, text, "qnn"), wanted) < 1e-2
    assert "its speed is not" in capsys.readouterr().err


@needs_qnn
def test_a_context_binary_is_loaded_and_another_chip_refuses_it(tmp_path: Path) -> None:
    folder, text = write(random_model(0), tmp_path / "npu", "fp16"), texts(259)[0]
    compile_npu(folder, 60)
    describe(folder, soc=60)
    assert len(list(folder.glob("*.bin"))) == 2
    wanted = logits(folder, text)
    for name in ("model.onnx", "prompt.onnx"):           # they are not read
        (folder / name).write_bytes(b"")
    assert error(logits(folder, text, "qnn"), wanted) < 1e-2
    describe(folder, soc=36)
    with pytest.raises(ValueError, match="chip 36.*export again with --compile"):
        logits(folder, text, "qnn")


@needs_qnn
def test_a_refused_operator_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node("Erf", ["x"], ["y"], "/here/Erf") if 0 else helper.make_node(
        "GatherBlockQuantized", ["w", "i", "s"], ["y"], "/model/embed/Gather",
        domain="com.microsoft", bits=4, block_size=32)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("i", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 32])],
        [helper.make_tensor("w", TensorProto.UINT8, [4, 16], bytes(64), raw=True),
         helper.make_tensor("s", TensorProto.FLOAT, [4, 1], [1.0] * 4)])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]),
        tmp_path / "g.onnx")
    with pytest.raises(ValueError, match="it refuses GatherBlockQuantized of /model/embed/Gather"):
        qnn_session(tmp_path / "g.onnx", 60)
