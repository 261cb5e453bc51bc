"""The NPU target: its graphs beside PyTorch and transformers, and compiled for an emulated HTP."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exported
import onnx
import onnxruntime as ort
import pytest
import torch
from exported import CONFIG, command, describe, stored
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from minismoe.export.npu import compile_npu, write_npu
from minismoe.export.ranges import Range, activation_ranges
from minismoe.export.sampler import write_sampler
from minismoe.export.weights import GraphFormat
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator, providers
from minismoe.runtime.npu import NpuSteps
from minismoe.runtime.providers import find_device, open_session

T, P = 8, 64
# Whole blocks of 32, which QNN wants; and an epsilon that makes a difference.
SIZES = CONFIG | {"intermediate_size": 96, "rms_norm_eps": 0.01}
needs_qnn = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None,
                               reason="onnxruntime-qnn is not installed")
random_model = partial(exported.random_model, **SIZES)
TOLERANCE = 5e-3                                     # beside the same rounded weights


def texts(vocab: int, count: int = 12, length: int = 21) -> list[list[int]]:
    """Random texts."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (count, length), generator=generator).tolist()


def write(model: CausalLM, folder: Path, precision: str, **ranges: Any) -> Path:
    """An exported folder of target npu."""
    folder.mkdir()
    c, form = model.config, GraphFormat("npu", precision, context=P, static=(1, T, P))
    write_npu(folder, stored(model, form), form, ranges or (
        {} if precision == "fp16" else activation_ranges(model, texts(c.vocab_size))))
    write_sampler(folder / "sampler.onnx", c.vocab_size)
    (folder / "config.json").write_text(json.dumps(SIZES))
    describe(folder, target="npu", context=P, static=(1, T, P), layers=c.num_hidden_layers,
             kv_heads=c.num_key_value_heads, head_dim=c.head_dim, vocab_size=c.vocab_size,
             cache_type="float16", contract={"cache": "slots"}, format="minismoe.export/1")
    return folder


def logits(folder: Path, text: list[int], provider: str | None = None) -> Tensor:
    """Logits (4, V) after all but three tokens, read in chunks of T, and after each of the rest."""
    info = json.loads((folder / "export.json").read_text())
    steps = NpuSteps(folder, info, provider, 1)
    shape = [1, info["kv_heads"], P, info["head_dim"]]
    cache = {f"past_key_values.{i}.{part}": ort.OrtValue.from_dlpack(
        torch.zeros(shape, dtype=torch.float16))
        for i in range(info["layers"]) for part in ("key", "value")}
    first, found = text[:-3], []
    seen = 0
    for end in range((len(first) - 1) % T + 1, len(first) + 1, T):
        got = steps.step(first[seen:end], seen, cache)
        seen = end
    for token in [None, *text[-3:]]:
        if token is not None:
            got = steps.step([token], seen, cache)
            seen += 1
        found.append(torch.from_dlpack(got).clone().flatten())
    return torch.stack(found)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def agree(folder: Path, text: list[int], model: Any) -> None:
    """Assert that a folder's logits are those of a model in PyTorch."""
    assert error(logits(folder, text), model(torch.tensor([text]))[0, -4:]) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "llama_biases", "smollm2", "qwen2", "qwen3"])
@pytest.mark.parametrize("provider", [None, pytest.param("qnn", marks=needs_qnn)])
def test_graphs_compute_what_transformers_does(checkpoint: Any, tmp_path: Path, family: str,
                                               provider: str | None) -> None:
    hf, saved = checkpoint(family)
    folder = write(load_model(saved), tmp_path / "npu", "fp16")
    text = texts(97)[0]
    with torch.no_grad():
        wanted = hf(torch.tensor([text])).logits[0, -4:]
    found = logits(folder, text, provider)
    assert error(found, wanted) < (1e-2 if provider else TOLERANCE)


@pytest.mark.parametrize("sizes", [
    {"model_type": "mistral", "sliding_window": T + P},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100,
     "max_window_layers": 1}], ids=["all layers", "one layer"])
def test_a_window_longer_than_the_cache_changes_nothing(tmp_path: Path, sizes: dict[str, Any],
                                                        ) -> None:
    model, text = random_model(**sizes), texts(259)[0]
    folder = write(model, tmp_path / "npu", "fp16")
    agree(folder, text, model)


@pytest.mark.parametrize("precision", ["w8a16", "w4a16"])
def test_graphs_in_few_bits_compute_what_the_rounded_model_does(tmp_path: Path, precision: str,
                                                                ) -> None:
    model, text = random_model(), texts(259)[0]
    folder = write(model, tmp_path / "npu", precision)
    agree(folder, text, stored(model, GraphFormat("npu", precision, P)))
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = {t.data_type for t in graph.initializer if t.name.endswith("_proj.weight")}
    assert kinds == {TensorProto.INT8 if precision == "w8a16" else TensorProto.INT4}
    constants = [numpy_helper.to_array(t) for t in graph.initializer if not t.external_data
                 and t.data_type == TensorProto.FLOAT]
    assert constants and max(abs(c).max() for c in constants) < 65504        # HTP's largest float
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == [1, 1, 259]


def test_both_graphs_read_one_file_of_weights(tmp_path: Path) -> None:
    folder = write(random_model(), tmp_path / "npu", "fp16")
    places = [{t.name: tuple(e.value for e in t.external_data) for t in onnx.load(
        folder / f"{name}.onnx", load_external_data=False).graph.initializer if t.external_data}
        for name in ("model", "prompt", "embed")]
    names = places[0].keys() & places[1].keys()
    assert len(names) > 8 and all(places[0][n] == places[1][n] for n in names)
    assert places[2].items() <= places[0].items()


def massive(model: CausalLM) -> CausalLM:
    """The model with one huge feature in its last MLP, after token 7 only."""
    with torch.no_grad():
        for layer in model.model.layers:                 # hidden feature 0 tells that token alone
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        table, mlp = model.model.embed_tokens.weight, model.model.layers[-1].mlp
        table[:, 0], table[7, 0] = 0, 4
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[0] = 0
            part.weight[0, 0] = 200
    return model


def test_a_layer_whose_activations_no_range_holds_stays_in_floats(tmp_path: Path) -> None:
    model = massive(random_model())
    seen = [[7, *text] for text in texts(259)]
    ranges = activation_ranges(model, seen)
    name = "model.layers.1.mlp.down_proj"
    assert name not in ranges and len(ranges) == 2 * 7 + 1 - 1
    folder = write(model, tmp_path / "npu", "w8a16", **ranges)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert [n.name for n in graph.node if n.op_type == "MatMulNBits"] == [
        "/model/layers.1/mlp/down_proj/MatMulNBits"]
    agree(folder, seen[0], stored(model, GraphFormat("npu", "w8a16", P)))


def test_one_text_gives_ranges() -> None:
    """As a file of --prompts with one line does."""
    ranges = activation_ranges(random_model(), texts(259, count=1))
    assert "lm_head" in ranges and all(r.low < 0 < r.high for pair in ranges.values() for r in pair)


def test_a_range_rounds_as_onnx_does() -> None:
    """Against onnxruntime's QuantizeLinear and DequantizeLinear, also beyond the range."""
    x, found = torch.linspace(-3, 5, 999), Range(-1.3, 3.1)
    scale, zero = found.step()
    step = [helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("z", TensorProto.UINT16, [], [zero])]
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
         helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [999])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [999])], step)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(found.round(x), torch.from_numpy(wanted), rtol=0, atol=1e-6)


def test_the_generator_says_what_pytorch_says(tmp_path: Path) -> None:
    from minismoe.training.evaluate import generate

    model = random_model()
    generator = Generator(write(model, tmp_path / "npu", "fp16"), threads=1)
    prompts = [text[:n] for n, text in zip((1, 7, 8, 9, 20), texts(259))]
    wanted = generate(model, prompts, 12, generator.tokenizer.stop_ids)
    assert [list(generator.generate(p, 12)) for p in prompts] == wanted
    assert generator.batch(prompts, 12) == wanted


def test_a_prompt_that_begins_as_the_last_one_is_read_from_where_it_differs(tmp_path: Path) -> None:
    """A turn of a chat, a question after the same instruction, and parts of a set of answers."""
    folder, text = write(random_model(), tmp_path / "npu", "fp16"), texts(259)[0]
    generator = Generator(folder, threads=1)
    answer = list(generator.generate(text, 8))
    for prompt, read in ((text + answer + [7, 8, 9], 4), (text[:15] + [5] * 4, 4)):
        found = generator.generate(prompt, 6)
        assert list(found) == list(Generator(folder, threads=1).generate(prompt, 6))
        assert len(prompt) - found.reader.cached_tokens == read
    sizes, step = [], generator.step
    generator.step = lambda tokens: sizes.append(len(tokens)) or step(tokens)    # type: ignore
    generator.choose([*text, *b"xyz"], ["a long way", "a long walk", "b"], 3)
    assert len(sizes) < 8                    # each part again from its first token: 9


def test_the_runtime_needs_no_torch_for_an_npu_folder(tmp_path: Path) -> None:
    folder = write(random_model(), tmp_path / "npu", "w8a16")
    done = command(folder, "hello", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    wrong = command(folder, "hello", "--provider", "cuda")
    assert wrong.returncode == 1 and "pip install onnxruntime-gpu" in wrong.stderr


def test_keys_that_do_not_fit_the_cache_are_refused(tmp_path: Path) -> None:
    folder = write(random_model(), tmp_path / "npu", "fp16")
    steps = NpuSteps(folder, json.loads((folder / "export.json").read_text()), None, 1)

    def value(*shape: int) -> Any:
        return ort.OrtValue.from_dlpack(torch.zeros(shape, dtype=torch.float16))
    for present, seen, new in (((1, 2, 8, 17), 0, 8), ((1, 3, 8, 16), 0, 8), ((1, 2, 9, 16), 0, 9),
                               ((1, 2, 4, 16), 0, 8), ((1, 2, 8, 16), 60, 8)):
        with pytest.raises(ValueError, match="export again"):
            steps._append(value(1, 2, P, 16), value(*present), seen, new)
    steps._append(value(1, 2, P, 16), value(1, 2, 8, 16), 56, 8)


@needs_qnn
@pytest.mark.parametrize("precision", ["fp16", "w8a16", "w4a16"])
def test_the_compiled_graphs_compute_what_the_cpu_does(tmp_path: Path, precision: str, capsys,
                                                       ) -> None:
    model, text = random_model(), texts(259)[0]
    ranges = {} if precision == "fp16" else activation_ranges(model, texts(259))
    ranges.pop("model.layers.1.mlp.down_proj", None)     # one layer stays in floats
    folder = write(model, tmp_path / "npu", precision, **ranges)
    wanted = logits(folder, text)
    assert error(logits(folder, text, "qnn"), wanted) < 1e-2
    assert "its speed is not" in capsys.readouterr().err


@needs_qnn
def test_a_context_binary_is_loaded_and_another_chip_refuses_it(tmp_path: Path) -> None:
    folder, text = write(random_model(), tmp_path / "npu", "fp16"), texts(259)[0]
    compile_npu(folder, 60)
    describe(folder, soc=60)
    assert len(list(folder.glob("*.bin"))) == 2
    wanted = logits(folder, text)
    for name in ("model.onnx", "prompt.onnx"):           # they are not read
        (folder / name).write_bytes(b"")
    assert error(logits(folder, text, "qnn"), wanted) < 1e-2
    with pytest.raises(ValueError, match="compiled for the chip 60: .* with --provider qnn:57"):
        logits(folder, text, "qnn:57")
    for file in folder.glob("*.bin"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot open .*model.qnn.onnx on qnn: "):
        logits(folder, text, "qnn")


@needs_qnn
def test_the_command_line_prints_the_answer_alone(tmp_path: Path) -> None:
    """QNN's libraries write a line of their own to standard output."""
    folder = write(random_model(), tmp_path / "npu", "fp16")
    on_cpu, emulated = (command(folder, "hello", "--max-tokens", "8", *more)
                        for more in ((), ("--provider", "qnn")))
    assert emulated.returncode == 0 and emulated.stdout == on_cpu.stdout
    assert len(emulated.stderr.splitlines()) == 1 and "emulated" in emulated.stderr


@needs_qnn
def test_a_refused_operator_is_named_with_its_node(tmp_path: Path) -> None:
    """QNN takes 4 bits in whole blocks only."""
    folder = write(random_model(intermediate_size=48), tmp_path / "npu", "w4a16")
    with pytest.raises(ValueError, match="on qnn: .*name: /model/layers.0/mlp/down_proj/MatMul,"):
        open_session(folder / "model.onnx", find_device("qnn:60"), 1)


def test_a_machine_without_an_npu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(__spec__=True, get_library_path=str, get_qnn_htp_path=str)
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", module)
    monkeypatch.setattr(providers, "load_library", lambda *names: None)
    monkeypatch.setattr(ort, "get_ep_devices", list)
    with pytest.raises(ValueError, match="no device qnn, .*: onnxruntime-qnn finds none"):
        find_device("qnn")
