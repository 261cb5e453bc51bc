"""Plugin providers, on software where there is no device: the CPU's texts, and what ran where."""

import os
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import onnxruntime as ort
import pytest
import torch
from accelerators import needs
from exported import KINDS, command, export
from tiny import BYTES, FAMILIES, random_hf

from export import main
from minismoe import generate, load_model
from minismoe.export.check import logits, stop_rounding
from minismoe.io import process
from minismoe.io.files import read_json
from minismoe.method.experts import ExpertLinear, linear_layers
from minismoe.runtime import Generator, providers
from minismoe.runtime import __main__ as terminal
from minismoe.runtime.providers import CPU, Device, find_device, open_session

PROVIDERS = [pytest.param(name, marks=needs(name)) for name in ("webgpu", "openvino")]
# The second is longer than what WebGPU reads at once on Vulkan.
PROMPTS = [b"some words", b"longer: the quick brown fox jumps"]
TOLERANCES = {"fp32": 1e-5, "int8": 1e-5, "int4": 1e-5, "fp16": 3e-2}     # of the largest logit
# What onnxruntime's own operators need of attention, and sizes without which families are alike.
SIZES = {"vocab_size": BYTES["vocab_size"], "hidden_size": 64, "head_dim": 16, "eos_token_id": 257,
         "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_those_of_torch(model, folders, kind, provider) -> None:
    generator = Generator(folders[kind], provider, threads=1)
    expected = generate(model, PROMPTS, 12, generator.tokenizer.stop_ids)
    assert [list(generator.generate(p, 12)) for p in PROMPTS] == expected
    assert generator.batch(PROMPTS, 12) == expected
    longer = [*PROMPTS[1], *expected[1][:3], *b"xyz"]                    # from what is cached
    assert list(generator.generate(longer, 8)) == generate(
        model, [longer], 8, generator.tokenizer.stop_ids)[0]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama_tied", "smollm2")])
def test_each_family_says_what_torch_says(tmp_path, family, provider) -> None:
    gated = {"head_dim": 64} if family.startswith("qwen3_5") else {}     # 16 numbers turn
    random_hf(family, **SIZES | gated).save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    generator = Generator(export(model, tmp_path / "onnx"), provider, threads=1)
    expected = generate(model, PROMPTS, 8, generator.tokenizer.stop_ids)
    assert [list(generator.generate(p, 8)) for p in PROMPTS] == expected
    left = {"GroupQueryAttention", *(["LinearAttention", "LinearAttentionGate"] if gated else [])}
    assert {*re.findall(r"\w*(?:Attention|MatMul|Gemm)\w*", generator.nodes.get(CPU, ""))} == (
        left if provider == "openvino" else set())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind, precision", [*(("ort", p) for p in TOLERANCES), ("static", "fp32")])
def test_logits_are_those_of_the_cpu(model, tmp_path, kind, precision, provider) -> None:
    """With experts beside the matrices, without the rounding of activations to 8 bits that the CPU
    does in few bits."""
    torch.manual_seed(0)
    experts = {name: ExpertLinear(layer, 1 + n % 4, 4, 8.0, 2)
               for n, (name, layer) in enumerate(linear_layers(model).items())}
    for layer in experts.values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    folder = export(model, tmp_path / "f", kind, precision=precision, **experts)
    if (provider, precision) == ("openvino", "fp16"):
        with pytest.raises(ValueError, match="on openvino: .*com.microsoft.QuickGelu; if it refuses"
                                             " operators, export with another --precision or --t"):
            Generator(folder, provider)
        return
    exact, generator = (Generator(folder, name, threads=1) for name in (None, provider))
    stop_rounding(exact)
    for prompt in PROMPTS:
        text = list(exact.generate(prompt, 12))
        wanted, found = (logits(g, [list(prompt)], [text])[0] for g in (exact, generator))
        assert (found - wanted).abs().max() < TOLERANCES[precision] * wanted.abs().max()


@needs("webgpu")
def test_a_cache_stays_on_the_gpu(folders) -> None:
    """One buffer for the whole context, or the one that the step before gave."""
    shared, fed_back = (Generator(folders[k], "webgpu", threads=1) for k in ("ort", "portable"))
    before = {name: id(value) for name, value in shared.cache.past.items()}
    for generator in (shared, fed_back):
        list(generator.generate(PROMPTS[0], 4))
        assert {value.device_name() for value in generator.cache.past.values()} == {"webgpu"}
    assert {name: id(value) for name, value in shared.cache.past.items()} == before


@needs("openvino")
def test_what_takes_long_on_the_cpu_is_said_in_any_case(folders, capsys) -> None:
    said = r"\[OpenVINO.*: \d+ nodes \(.*\); CPU.*: 2 nodes \(2 GroupQueryAttention\)\]\n"
    for kind, expected in ("portable", ""), ("ort", said):
        terminal.main([str(folders[kind]), "hello", "--max-tokens", "2", "--provider", "openvino"])
        assert re.fullmatch(expected, capsys.readouterr().err)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_an_export_is_checked_there_as_well(tmp_path, monkeypatch, capsys, precision, provider,
                                            ) -> None:
    """The built-in toy."""
    monkeypatch.chdir(tmp_path)
    main(["--precision", precision, "--provider", provider, "--out", "out"])
    said = capsys.readouterr().out
    assert re.search(rf"{provider}: logits within \S+ of the CPU's largest, 3 of 3 texts the", said)
    assert said.endswith(f"python -m minismoe.runtime out --provider {provider} --chat\n")
    seen = read_json(tmp_path / "out" / "export.json")["checked"]["providers"][provider]
    assert seen["logits_error"] < (0.05 if precision == "int4" else 1e-5)


@pytest.mark.parametrize("asked, message", [
    ("nowhere", r"no provider nowhere; here are .*cpu.*; pip install onnxruntime-gpu or '"),
    ("cpu:1", "no device cpu:1, or its driver is missing: onnxruntime finds CPU"),
    ("cpu:fast", "no device cpu:fast, or its driver is missing: onnxruntime finds CPU"),
    ("openvino:1:GPU", "no provider openvino:1:GPU; here are "),
    pytest.param("qnn:fast", "no device qnn:fast,.* onnxruntime-qnn finds ", marks=needs("qnn")),
    pytest.param("webgpu:7", "no device webgpu:7,.* onnxruntime-ep-webgpu finds [CG]PU",
                 marks=needs("webgpu")),
    pytest.param("openvino:NPU", "no device openvino:NPU.*finds CPU", marks=needs("openvino"))])
def test_what_is_not_here_is_named(asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        find_device(asked)


def test_devices_are_chosen_by_kind_and_number(monkeypatch) -> None:
    devices = [SimpleNamespace(ep_name="OpenVINOExecutionProvider", device=SimpleNamespace(
        type=SimpleNamespace(name=kind))) for kind in ("CPU", "GPU", "GPU", "NPU")]
    monkeypatch.setattr(providers, "_load", lambda *names: None)
    monkeypatch.setattr(ort, "get_ep_devices", lambda: devices)
    for asked, number in (("openvino", 1), ("openvino:1", 2), ("OpenVINO:gpu:1", 2),
                          ("openvino:NPU", 3), ("openvino:CPU", 0), ("openvino:2", 3)):
        assert find_device(asked).plugin is devices[number]
    with pytest.raises(ValueError, match="no device openvino:GPU:2,.* finds CPU, GPU, GPU, NPU"):
        find_device("openvino:GPU:2")


def test_two_threads_that_are_silent_give_the_output_back(capfd) -> None:
    first = threading.Event()

    def other() -> None:
        with providers.captured():
            first.wait(10)                   # it ends last
            os.write(1, b"second")

    thread = threading.Thread(target=other)
    with providers.captured() as written:
        thread.start()
        thread.join(0.2)
        os.write(2, b"first")
    first.set()
    thread.join()
    os.write(1, b"third")
    assert capfd.readouterr() == ("third", "") and written == ["first"]


def test_threads_are_those_that_a_control_group_grants(tmp_path, monkeypatch) -> None:
    """As of a container with 2 of 64 processors."""
    monkeypatch.setattr(process, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    read, counts = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda file, *a, **k: "0::/a/b\n" if (
        str(file) == "/proc/self/cgroup") else read(file, *a, **k))
    (tmp_path / "a" / "b").mkdir(parents=True)
    for group, quota in (("", "max 100000"), ("a/b", "350000 100000"), ("a", "150000 100000"),
                         ("", "1000 100000")):
        (tmp_path / group / "cpu.max").write_text(quota + "\n")
        counts.append(process.processors())
    assert counts == [48, 4, 2, 1]
    monkeypatch.setattr(process, "CGROUPS", Path("/nowhere"))
    monkeypatch.delattr(os, "sched_getaffinity")         # as on macOS
    for known, found in (64, 64), (None, 1):
        monkeypatch.setattr(os, "cpu_count", lambda known=known: known)
        assert process.processors() == found


def test_a_session_gets_the_threads_of_the_processors_that_it_may_use(
        folders, monkeypatch) -> None:
    """Of eight; 0 lets onnxruntime take all physical cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for allowed, asked, given in (3, None, 3), (3, 2, 2), (8, None, 0), (8, 100_000, 64):
        monkeypatch.setattr(providers, "processors", lambda allowed=allowed: allowed)
        session = open_session(folders["ort"] / "model.onnx", Device(), asked)
        assert session.get_session_options().intra_op_num_threads == given


def test_a_missing_package_is_named_with_its_command(monkeypatch) -> None:
    for name, (module, package, _) in providers.PLUGINS.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"needs pip install {package}, and Py"):
            find_device(name)


def test_a_library_that_does_not_load_is_one_line(tmp_path, monkeypatch, folders) -> None:
    """As one that lacks a driver's libraries."""
    (tmp_path / "onnxruntime_ep_cuda.py").write_text("def get_library_path(): return __file__")
    run = command(folders["ort"], "hello", "--provider", "cuda", PYTHONPATH=str(tmp_path))
    assert run.returncode == 1 and re.fullmatch(
        "error: onnxruntime cannot load onnxruntime-gpu: .*_ep_cuda.py.*\n", run.stderr), run.stderr


@needs("webgpu")
@pytest.mark.parametrize("settings, message", [
    ({"VK_DRIVER_FILES": "/nowhere"}, "model.onnx on webgpu: .*Failed to get a WebGPU adapter"),
    ({"ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "0"}, "no device webgpu, or its driver is mis")])
def test_a_broken_driver_is_one_line(folders, monkeypatch, settings, message) -> None:
    if find_device("webgpu").plugin.device.type.name != "CPU":
        pytest.skip("a GPU is here")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    run = command(folders["ort"], "hello", "--provider", "webgpu")
    assert run.returncode == 1 and re.fullmatch(f"error: .*{message}.*\n", run.stderr), run.stderr


@needs("qnn")
def test_a_graph_that_is_not_for_an_npu_is_refused_in_one_line(folders) -> None:
    run = command(folders["ort"], "hello", "--provider", "qnn")
    assert run.returncode == 1 and re.fullmatch(
        "error: .* on qnn: .*; if it refuses operators, .* \\(for qnn: npu\\)\n", run.stderr)


def test_one_of_onnxruntime_itself_that_does_not_start_is_named(folders, monkeypatch) -> None:
    """It would print a warning, and go on with the CPU."""
    monkeypatch.setitem(providers.OWN, "cuda", "CUDAExecutionProvider")
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    for asked, number, options in ("cuda", 0, {}), ("cuda:1", 1, {"device_id": "1"}):
        assert find_device(asked) == Device(
            "cuda", "CUDAExecutionProvider", None, ("cuda", number), options)
    with pytest.warns(UserWarning, match="CUDA"), pytest.raises(
            ValueError, match="cuda takes no node of .*model.onnx: a library or the device is mis"):
        Generator(folders["ort"], "CUDAExecutionProvider")
