"""export.py as a user runs it, on a tiny run of train.py."""

import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from string import printable
from types import SimpleNamespace
from typing import Any

import onnx
import onnx.numpy_helper
import pytest
import torch
from exported import answer_of, ship
from safetensors.torch import load_file, save_file
from tiny import edit_tensors, randomise, save_bytes_model, write_lines

import export
import train
from minismoe.cli import inputs as cli_inputs
from minismoe.cli.export_flags import parse
from minismoe.data.tokenizer import load_tokenizer
from minismoe.export import answers, calibration, check, layouts, plan, ranges, write
from minismoe.export import ship as shipping
from minismoe.export.calibration import shuffled_samples
from minismoe.export.settings import ExportConfig
from minismoe.export.ship import sharing_copy
from minismoe.io import progress
from minismoe.io.files import read_json, write_json
from minismoe.method.allocate import Allocation
from minismoe.method.experts import ExpertLinear, add_experts, expert_layers
from minismoe.method.sensitivity import shapes_of
from minismoe.model.checkpoint import load_adapter, load_model, save_adapter
from minismoe.model.decoder import CausalLM
from minismoe.model.quantize import BlockLinear
from minismoe.runtime import Generator
from minismoe.runtime.cache import SharedCache
from minismoe.runtime.folder import known_tasks, read_info
from minismoe.training.evaluate import generate

PROMPT = [256, *b"User: say 3\nAssistant:"]


def trained(root: Path, *flags: str) -> Path:
    """A run of train.py on the model and the data of a folder, with two experts a matrix."""
    shapes = shapes_of(load_model(root / "model"))
    write_json(root / "two.json", Allocation(dict.fromkeys(shapes, 2), 2, 4).to_json())
    train.main(["--model", str(root / "model"), "--data", str(root / "data"), "--allocation",
                str(root / "two.json"), "--epochs", "4", "--lr", "0.02", "--batch-size", "16",
                "--seed", "1", *flags])
    return Path(flags[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two experts on each matrix of a random byte-level model, for two tasks, whose
    routing was frozen while it was trained."""
    root = tmp_path_factory.mktemp("export")
    save_bytes_model(root / "model", head_dim=16, max_position_embeddings=128)
    for name, answer in (("number", "N{}"), ("twice", "{0} {0}")):
        write_lines(root / "data" / f"{name}.jsonl",
                    ((f"say {i}", answer.format(i)) for i in range(45)))
    return trained(root, "--out", str(root / "run"))


@pytest.fixture(scope="module")
def routed_run(run: Path) -> Path:
    """The same, with routers to the end."""
    return trained(run.parent, "--routing", "dynamic", "--out", str(run.with_name("routed")))


def copied(run: Path, folder: Path, **arguments: object) -> Path:
    """A copy of a run that was begun with other arguments."""
    shutil.copytree(run, folder)
    saved = read_json(folder / "config.json")
    saved["arguments"] |= arguments
    write_json(folder / "config.json", saved)
    return folder


def in_bfloat16(run: Path, folder: Path) -> Path:
    """A copy of a run whose base is stored in bfloat16."""
    base = Path(shutil.copytree(run.parent / "model", folder / "model"))
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}))
    other = copied(run, folder / "run", model=str(base))
    settings = read_json(other / "adapter" / "adapter.json")
    write_json(other / "adapter" / "adapter.json", settings | {
        "fingerprint": load_model(base).fingerprint})
    return other


@pytest.mark.parametrize("flags", [
    "", "ROUTED", "ROUTED --routing dynamic", "--routing freeze", "--precision fp16",
    "--precision int4 --block 128 --prompts", "--static 1x1x64 --target portable",
    "--layout genai --precision int8", "--layout genai --target portable",
    "--layout web --precision int4", "--layout peft --routing freeze", "ROUTED --layout peft",
    "--layout hf"])
def test_every_way_out(run: Path, routed_run: Path, tmp_path: Path, flags: str,
                       capsys: pytest.CaptureFixture[str]) -> None:
    """Each passes its own check against PyTorch, and says what it holds. Mixtures are frozen here
    only if they were trained with routers to the end, and these do not ship."""
    made = routed_run if "ROUTED" in flags else run
    out, args = tmp_path / "out", flags.replace("ROUTED", "").split()
    if "--prompts" in args:
        (tmp_path / "lines").write_text("say 5\nsay 77\nsing\n\nwhat?\nsay 6\nsay 1\n")
        args += [str(tmp_path / "lines")]
    if not {"--precision", "peft", "hf"} & set(args) and flags:
        args += ["--precision", "fp32"]
    info = ship(out, made, *args)
    lost = re.findall(r"froze 14 mixtures, which were trained with their routers: the median LoRA "
                      r"misses \d+\.\d% of", capsys.readouterr().out)
    assert len(lost) == (made == routed_run and "dynamic" not in args)
    for file in out.rglob("model*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        blocks = {node.op_type for node in graph.node} & {"MatMulNBits", "DequantizeLinear"}
        assert bool(blocks) == info["arguments"]["precision"].startswith("int")
        stored = [t.name for t in graph.initializer if ".lora_A" in t.name]
        assert bool(stored) == bool({"freeze", "dynamic"} & set(args))
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {*info["files"], "export.json"}
    assert ("tasks.json" in files) == bool([*out.rglob("model*.onnx")])
    if "hf" in args:                     # no path of this machine goes out
        assert read_json(out / "config.json")["minismoe_merged"] == "model"
    if "peft" in args:
        assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "model"
    assert info["checked"] and not list(tmp_path.glob(".*.tmp"))
    if "--layout" in args:
        opened = {"genai": "genai_config.json", "web": "onnx/model_q4.onnx",
                  "peft": "adapter_model.safetensors", "hf": "model.safetensors"}
        assert opened[args[1]] in files
        assert ("sampler.onnx" in files) == (args[1] in ("genai", "web"))
        if args[1] != "genai":
            return
    read_info(out, verify=True)
    if info["precision"] == "fp32" and not lost and "--prompts" not in args:
        model = load_model(run.parent / "model")
        load_adapter(model, made / "adapter")
        (expected,) = generate(model, [PROMPT], 20, [257])
        assert len(expected) > 3
        assert list(Generator(out, threads=1).generate(PROMPT, 20)) == expected


def test_a_run_is_judged_as_it_ships(run: Path, tmp_path: Path) -> None:
    """What a run says of its answers is said of the frozen model, so that an export in floats
    answers the same, wrong answers included."""
    info, generator = ship(tmp_path / "out", run, "--precision fp32"), Generator(tmp_path / "out")
    results, after = (read_json(run / f"{name}.json") for name in ("results", "after"))
    for task, judged in after.items():
        count = len(judged["right"])
        assert info["checked"]["exact_match"][task]["fp32"] == pytest.approx(
            sum(judged["right"]) / count, abs=1e-4)
        assert results["tasks"][task]["after"] == round(sum(judged["right"]) / count, 4)
        assert any(line["given"].strip() for line in judged["wrong"])
        for line in judged["wrong"]:
            asked = [{"role": "user", "content": line["prompt"]}]
            assert answer_of(generator, asked, 20).startswith(line["given"].strip())


def test_routers_that_training_froze_are_not_exported(
        run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "ship", lambda *_: pytest.fail("it was rounded"))
    with pytest.raises(ValueError, match=f"{run} has no routers, as its routing was frozen while "
                       "it was trained: leave out --routing dynamic, or train with --routing dyn"):
        ship(tmp_path / "out", run, "--routing dynamic")
    assert not [*tmp_path.iterdir()]


def test_every_long_stage_counts_to_its_end(run: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Bars that would be printed every ten seconds are printed at once."""
    monkeypatch.setattr(progress, "SECONDS", 0)
    train.main(["--model", str(run.parent / "model"), "--data", str(run.parent / "data"), "--out",
                str(tmp_path / "run"), "--epochs", "1", "--limit-test", "3"])
    ship(tmp_path / "out", tmp_path / "run")
    counts, seen = re.compile(r"(.*?): +\d+%.* (\d+/\d+) .*?([a-z]+)/s"), dict[str, str]()
    for line in capsys.readouterr().err.splitlines():
        if found := counts.match(line):
            seen[f"{found[1]}, {found[3]}"] = found[2]               # at last
    assert seen == {
        "probe, sample": "64/64", "evaluate before, line": "6/6", "train, step": "11/11",
        "evaluate after, line": "6/6", "round, layer": "2/2",
        "evaluate number, line": "3/3", "evaluate twice, line": "3/3"}


@pytest.mark.parametrize("pays", [True, False])
def test_drafts_ship_if_they_save_steps(run: Path, tmp_path: Path, pays: bool, monkeypatch,
                                        ) -> None:
    """Answers of the run are made of few tokens; the same are written with and without drafts."""
    monkeypatch.setattr(check, "PAYS", 1.0 if pays else 0.0)
    info = ship(tmp_path / "out", run, "--precision fp32")
    assert ("drafts.json" in info["files"]) == pays == ("drafts" in info["contract"])
    assert "drafts" not in info["checked"]
    generator = Generator(tmp_path / "out", threads=1)
    assert bool(generator.drafts) == pays
    if pays:
        said = info["contract"]["drafts"]
        assert (said["file"], said["tokens"]) == ("drafts.json", 3)
        assert 0 < said["steps"] < said["steps_without"]
        drafted = [*generator.generate(PROMPT, 20)]
        generator.drafts = {}
        assert [*generator.generate(PROMPT, 20)] == drafted


def test_of_long_answers_8_are_checked(run: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Of free text, hardly any answer is the same to its end."""
    draw = random.Random(0)
    for name, length in ("number", 0), ("story", 60):
        for split, numbers in (("train", range(20)), ("valid", range(20, 30)),
                               ("test", range(30, 42))):
            write_lines(tmp_path / "data" / name / f"{split}.jsonl",
                        ((f"say {i}", f"N{i}" + "".join(draw.choices(printable[:90], k=length)))
                         for i in numbers))
    other = copied(run, tmp_path / "run", data=str(tmp_path / "data"))
    match, answered = answers.exact_match, []
    monkeypatch.setattr(answers, "exact_match", lambda tokenizer, asked, complete: answered.append(
        len(asked.lines)) or match(tokenizer, asked, complete))
    ship(tmp_path / "out", other)
    assert answered == [12, 8]
    ship(tmp_path / "ten", other, "--limit-test 10")
    assert answered[2:] == [10] * 2


@pytest.mark.parametrize("flags", ["", "--precision fp16 --static 1x8x64",
                                   "--precision w4a16 --prompts"])
def test_an_npu_folder(run: Path, tmp_path: Path, flags: str,
                       capsys: pytest.CaptureFixture[str]) -> None:
    out, args = tmp_path / "out", flags.split()
    if "--prompts" in args:
        (tmp_path / "lines").write_text("".join(f"say {i}\nsing {i}?\n" for i in range(40)))
        args += [str(tmp_path / "lines")]
    else:                                # QNN takes whole blocks of 4 bits only
        args += ["--provider", "qnn:60" if find_spec("onnxruntime_qnn") else "cpu"]
    export.main([str(run), "--out", str(out), "--target", "npu", *args])
    assert ("; --precision fp16 keeps floats" in capsys.readouterr().out) == ("fp16" not in flags)
    info = read_info(out, verify=True)
    assert info["static"] == ([1, 8, 64] if "--static" in args else [1, 64, 128])
    assert info["precision"] == (args[1] if "--precision" in args else "w8a16")
    seen = info["checked"]
    assert seen["graph_error"] < 0.02 and set(seen["exact_match"]) == {"number", "twice"}
    assert ("providers" in seen) == ("--provider" in args)
    compared = seen.get("providers", {}).get("cpu", {"texts": 1, "texts_equal": 1})
    assert compared["texts"] == compared["texts_equal"] == 1
    assert info.get("soc") == (60 if (out / "model.qnn.onnx").exists() else None)
    assert ("soc" in info) == ("qnn:60" in args)
    assert list(Generator(out, threads=1).generate(PROMPT, 4))


def test_a_folder_knows_answers_and_instructions(run: Path, tmp_path: Path) -> None:
    """Those of all training lines, however few of them the run used."""
    data = Path(shutil.copytree(run.parent / "data", tmp_path / "data"))
    (data / "number.jsonl").write_text("".join(
        json.dumps({"instruction": "Say it.\nNow:", "input": f"say {i}", "output": f"N{i % 5}"})
        + "\n" for i in range(40)))
    few = copied(run, tmp_path / "run", data=str(data), limit_train=2)
    assert "tasks.json" in ship(tmp_path / "out", few)["files"]
    read_info(tmp_path / "out", verify=True)
    assert known_tasks(tmp_path / "out") == {
        "number": {"choices": ["N0", "N1", "N2", "N3", "N4"], "instruction": "Say it.\nNow:\n"},
        "twice": {"choices": [], "instruction": ""}}


def test_a_merged_folder_tells_no_path_and_takes_no_adapter(run: Path, tmp_path: Path) -> None:
    """It tells what it was made of, by hashes and versions. An adapter cannot be added twice, nor
    taken out again: the weights are no longer those of the base."""
    (tmp_path / "lines").write_text("say 5\nsay 6\n")
    info = ship(tmp_path / "out", run, "--layout hf --prompts", tmp_path / "lines")
    text = (tmp_path / "out" / "export.json").read_text()
    assert str(tmp_path) not in text and str(run.parent) not in text
    assert info["versions"].keys() == {"torch", "safetensors", "onnx", "onnxruntime"}
    saved = read_json(run / "adapter" / "adapter.json")
    assert (info["base"], info["adapter"]) == (saved["fingerprint"], saved["sha256"])
    assert [info["arguments"][name] for name in ("run", "prompts", "out")] == [
        "run", "lines", "out"] and info["model"] == "model"
    with pytest.raises(ValueError, match="merged into it, which can't be taken out again"):
        load_adapter(load_model(tmp_path / "out"), run / "adapter")
    model = load_model(tmp_path / "out")                 # but it can be trained again
    allocation = Allocation({"model.layers.0.mlp.up_proj": 2}, rank=2)
    save_adapter(add_experts(model, allocation), tmp_path / "second", allocation)
    load_adapter(load_model(tmp_path / "out"), tmp_path / "second")


def test_other_data_than_in_training_are_told(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run.parent / "data", tmp_path / "data")
    config = ExportConfig(run=str(copied(run, tmp_path / "run", data=str(tmp_path / "data"))))
    for says in "", "not what the run was trained on: task twice":
        export.load_run(config)
        told = capsys.readouterr().err
        assert ("trained on" in told) == bool(says) and told.startswith(says)
        (tmp_path / "data" / "twice.jsonl").unlink(missing_ok=True)


def test_a_place_that_cannot_be_written_is_seen_before_the_work(
        run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "ship", lambda *_: pytest.fail("it was rounded"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place, flags, error, says in (
            ("file/out", "", PermissionError, "out cannot be written: .*file is no folder"),
            ("file/new/out", "--vocab 64", PermissionError, "file is no folder"),
            ("dangling", "", FileExistsError, "exists already"),
            (".", "", FileExistsError, "exists already")):
        with pytest.raises(error, match=says):
            ship(tmp_path / place, run, flags)
    assert (tmp_path / "file").read_text() == "mine" and len([*tmp_path.iterdir()]) == 2


def test_the_path_of_a_web_folder_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    source: Any = SimpleNamespace(tasks=[])
    assert repr(str(tmp_path / "out")) in export.next_commands(
        ExportConfig(layout="web"), source, Path("out"))


def test_activations_are_not_rounded_without_texts(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --prompts FILE, or take --precision fp16"):
        ship(tmp_path / "out", "--model", run.parent / "model", "--target npu --precision w8a16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["qnn:60", "qnn:npu:60", "qnn"])
def test_a_chip_is_the_number_of_its_provider(name: str) -> None:
    assert ExportConfig(provider=["cpu", name]).chip == (None if name == "qnn" else 60)


def test_the_newest_run_is_taken_and_named(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """One that has not finished is named: the untrained toy would go out in its place."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("mine", "a", "z")):
        shutil.copytree(run, tmp_path / "runs" / name)
        for file in "config.json", "adapter/adapter.json":
            os.utime(tmp_path / "runs" / name / file, (9 - age, 9 - age))
    with pytest.raises(ValueError, match="has no routers"):
        export.main(["--routing", "dynamic"])
    assert capsys.readouterr().out.startswith("exports runs/mine\n")
    for name in ("mine", "a", "z"):
        shutil.rmtree(tmp_path / "runs" / name / "adapter")
    with pytest.raises(FileNotFoundError, match="no run in runs has finished; .*--out runs/mine"):
        export.main([])


def test_flags_that_are_not_given_have_their_defaults(run: Path, tmp_path: Path) -> None:
    """And nothing is written into the run, which may lie where nothing can be."""
    before = {f: f.stat().st_mtime_ns for f in (run, *run.rglob("*"))}
    arguments = ship(tmp_path / "out", run)["arguments"]
    wanted = ExportConfig(
        run="run", out=arguments["out"], context=128, precision="int4-8", block=32, device="cpu",
        dtype=read_json(run / "config.json")["arguments"]["dtype"])
    assert arguments == asdict(wanted)
    assert before == {f: f.stat().st_mtime_ns for f in (run, *run.rglob("*"))}


@pytest.mark.parametrize("machine", [False, True])
def test_the_dtype_is_the_runs_whatever_the_machine(run: Path, tmp_path: Path, machine: bool,
                                                    monkeypatch) -> None:
    """A base, which no run has computed in, is read in float32."""
    monkeypatch.setattr(cli_inputs, "_multiplies_bfloat16", lambda device: machine)
    for saved in "float32", "bfloat16":
        other = copied(run, tmp_path / saved, dtype=saved)
        for dtype, wanted in ("auto", saved), ("float32", "float32"), ("bfloat16", "bfloat16"):
            model = export.load_run(ExportConfig(run=str(other), dtype=dtype)).trained
            assert model.model.norm.weight.dtype == getattr(torch, wanted)
    info = ship(tmp_path / "out", other, "--precision fp32")
    assert (info["arguments"]["dtype"], info["arguments"]["device"]) == ("bfloat16", "cpu")
    base = export.load_base(ExportConfig(model=str(run.parent / "model"))).trained
    assert base.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(("flags", "wanted"), [
    ("--model base", ("int4-8", 32)), ("", ("int4-8", 32)), ("--block 64", ("int4-8", 64)),
    ("--layout web --precision int4-8", ("int4-8", 32)), ("--precision int8", ("int8", 32)),
    ("--precision int4 --block 128", ("int4", 128)), ("--precision fp32", ("fp32", None)),
    ("--precision fp16", ("fp16", None)), ("--layout hf", ("fp32", None)),
    ("--target npu", ("w8a16", None)), ("--target npu --model base", ("fp16", None)),
    ("--target npu --precision w4a16", ("w4a16", 32))])
def test_what_auto_becomes(flags: str, wanted: tuple[str, int | None]) -> None:
    args = flags.split() if "--model" in flags else ["run", *flags.split()]
    config = parse(args, "")
    assert isinstance(config, ExportConfig)
    resolved = plan.with_precision(config, bool(config.run or config.prompts))
    assert (resolved.precision, resolved.block) == wanted


def test_a_base_is_rounded_for_its_prompts_or_to_the_nearest(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In 4 bits without prompts, it is said."""
    (tmp_path / "lines").write_text("".join(f"say {i}\n" for i in range(32)))
    tensors = []
    for name, more, said in (("a", "int4", True), ("b", "int4 --prompts", False),
                             ("c", "int8", False)):
        more += f" {tmp_path / 'lines'}" * more.endswith("prompts")
        ship(tmp_path / name, "--model", run.parent / "model", "--precision", more)
        assert ("each number rounded to the nearest (--prompts" in capsys.readouterr().out) == said
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        tensors.append({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer})
    for name, before in tensors[0].items():
        same = (before == tensors[1][name]).all()
        assert name.endswith(".scales") or bool(same) == (before.dtype != "uint8"), name


def test_prompts_come_from_the_whole_file(run: Path, tmp_path: Path) -> None:
    """It may be sorted, and calibration reads its first lines only."""
    (tmp_path / "lines").write_text("".join(f"say {i:03}\n" for i in range(99)))
    config = ExportConfig(run=str(run), prompts=str(tmp_path / "lines"))
    (lines,) = shuffled_samples(config, source := export.load_run(config)).values()
    numbers = [int(source.tokenizer.decode(e.ids).split("say ")[1][:3]) for e in lines]
    assert sorted(numbers) == [*range(99)] and max(numbers[:20]) > 80


def test_activations_of_prompts_are_those_of_their_answers_too(
        run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines").write_text("say 5\nsay 77\n" + "x" * 999)
    seen: list[Any] = []
    monkeypatch.setattr(shipping, "activation_ranges", lambda *given: seen.append(given) or {})
    config = ExportConfig(run=str(run), prompts=str(tmp_path / "lines"), precision="w8a16",
                          target="npu", dtype="float32")
    source = export.load_run(config)
    samples = shuffled_samples(config, source)
    shipping.ship(config, source, source.trained, samples)
    ((model, found),) = seen
    prompts = [e.ids[:128 - ranges.ANSWER] for e in samples["prompts"]]
    answers = generate(model, prompts, ranges.ANSWER, source.tokenizer.stop_ids)
    assert found == [[*p, *a] for p, a in zip(prompts, answers)] and any(answers)


def test_sizes_that_nobody_asked_for(run: Path) -> None:
    """The model's whole length would cost memory that few texts need; an NPU's cache ends within an
    attention window."""
    source = export.load_run(config := ExportConfig(run=str(run)))
    source.trained.config = replace(source.trained.config, max_position_embeddings=8192)
    assert plan.sizes_of(config, source)[0] == 2048
    source.trained.config = replace(
        source.trained.config, max_position_embeddings=128, windows=(127, None))
    npu = replace(config, target="npu", precision="fp16")
    assert plan.sizes_of(npu, source)[1] == (1, 64, 63)


def test_a_static_graph_is_checked_as_far_as_its_past_reaches(run: Path, tmp_path: Path, capsys,
                                                              ) -> None:
    flags = run, "--target portable --static"
    for sizes in "1x80x64 --context 64", "1x16x30":           # the least of the two
        with pytest.raises(ValueError, match=r"--static with \d+ past .* need \d+$") as said:
            ship(tmp_path / "out", *flags, sizes)
    assert "--static with 30 past positions" in str(said.value)
    least = int(str(said.value).split()[-1])
    assert least >= len(PROMPT) + 16
    assert ship(tmp_path / "out", *flags, f"1x16x{least}")["checked"]    # room for one token alone
    capsys.readouterr()
    assert ship(tmp_path / "a", *flags, "1x8x40")["checked"]["exact_match"] == {}
    assert capsys.readouterr().out.count("no exact match, as an answer may have") == 2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_is_measured_beside_the_model_as_it_was_trained(
        routed_run: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str],
        ) -> None:
    """Test lines have the answers of mixtures that no linear map follows, whatever its bits."""
    base = routed_run.parent
    allocation = load_adapter(model := load_model(base / "model"), routed_run / "adapter")
    for layer in expert_layers(randomise(model, 1)).values():
        layer.lora_B.data *= 3
        layer.router.data *= 10                          # nearly one expert a token
    other = copied(routed_run, tmp_path / "run", data=str(tmp_path / "data"))
    save_adapter(model, other / "adapter", allocation, ["number", "twice"])
    tokenizer = load_tokenizer(base / "model")
    prompts = {f"say {i}": tokenizer.encode(tokenizer.render(
        [{"role": "user", "content": f"say {i}"}], True))[0] for i in range(50, 90)}
    answers = [tokenizer.decode(ids).strip() if len(ids) < 12 else "" for ids in generate(
        model, [*prompts.values()], 12, tokenizer.stop_ids)]             # "": it did not end
    for name in ("number", "twice"):
        folder = tmp_path / "data" / name
        write_lines(folder / "test.jsonl", ((p, a) for p, a in zip(prompts, answers) if a))
        shutil.copy(base / "data" / f"{name}.jsonl", folder / "train.jsonl")
    checked = ship(tmp_path / "out", other, "--dtype float32 --precision", precision)["checked"]
    assert checked["graph_error"] < 1e-4
    said, warned = capsys.readouterr()
    assert "This is more than chance explains. Right answers: trained " in warned
    assert ("Most are lost where the model is frozen: train with --routing frozen, or export with "
            "--routing dynamic") in warned
    names = ["trained", "frozen", precision]
    assert re.search(f"exact match +{' +'.join(names)}", said)
    for shares in checked["exact_match"].values():
        assert [*shares] == names and shares["trained"] == 1 > max([*shares.values()][1:])


@pytest.mark.parametrize("precision, layout, ends", [
    ("fp16", "onnx", True), ("q4f16", "web", True), ("fp32", "onnx", False)])
def test_what_float16_does_not_hold_is_refused_before_the_work(
        run: Path, tmp_path: Path, precision: str, layout: str, ends: bool, monkeypatch) -> None:
    """The same function, whose MLP multiplies larger numbers: a CPU would compute it with casts."""
    base = Path(shutil.copytree(run.parent / "model", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    for part, factor in (("gate_proj", 3e3), ("up_proj", 4e2), ("down_proj", 3e-5)):
        tensors[f"model.layers.1.mlp.{part}.weight"] *= factor
    save_file(tensors, base / "model.safetensors")
    args = "--model", base, "--precision", precision, "--layout", layout
    if not ends:
        ship(tmp_path / "out", *args)
        return
    monkeypatch.setattr(write, "ship", lambda *_: pytest.fail("it was rounded"))
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj reads or writes .*e\+.*65504"):
        ship(tmp_path / "out", *args)


@pytest.mark.parametrize("flags", ["--precision fp32", "--precision int4"])
def test_a_base_of_16_bits_is_exported_without_a_copy_in_float32(run: Path, tmp_path: Path,
                                                                 flags: str) -> None:
    base = in_bfloat16(run, tmp_path).with_name("model")
    model = export.load_base(ExportConfig(model=str(base), dtype="float32")).trained
    assert sum(w.nbytes for w in model.parameters()) < 1.1 * sum(
        w.nbytes for w in load_file(base / "model.safetensors").values())
    (tmp_path / "lines").write_text("say 5\nsay 6\n")
    prompts = f"--prompts {tmp_path / 'lines'}" if "int4" in flags else ""
    ship(tmp_path / "out", "--model", base, "--dtype float32", flags, prompts)
    given = torch.from_dlpack(next(Generator(tmp_path / "out").forced(PROMPT, [])))[0, -1]
    wanted = load_model(base)(torch.tensor([PROMPT]))[0, -1]
    assert (given - wanted).abs().max() < (0.2 if "int4" in flags else 1e-4) * wanted.abs().max()


def test_calibration_takes_a_share_of_the_tokens(run: Path, monkeypatch) -> None:
    """Of each task; at least two texts, of which the last tokens count; shared ones count once."""
    source = export.load_run(ExportConfig(run=str(run)))
    samples = shuffled_samples(ExportConfig(), source)
    whole = calibration.calibration_batches(samples, source)
    assert {task: sum(len(b[0]) for b in batches) for task, batches in whole.items()} == {
        task: len(examples) for task, examples in samples.items()}
    shared = len(source.tokenizer.encode(source.tokenizer.render([{"role": "user", "content": (
        "say ")}]))[0])
    for tokens, of_task, longest in (
            (400, 999, 512), (1, 999, 512), (400, 999, 5), (999, 200, 512)):
        for name, value in ("TOKENS", tokens), ("OF_TASK", of_task), ("LONGEST", longest):
            monkeypatch.setattr(calibration, name, value)
        for task, batches in calibration.calibration_batches(samples, source).items():
            rows = [ids[real.bool()].tolist() for b in batches for ids, real in zip(*b[:2])]
            assert {*map(tuple, rows)} <= {tuple(e.ids[-longest:]) for e in samples[task]}
            own = sum(map(len, rows)) - (len(rows) - 1) * min(shared, longest) * (longest > 5)
            assert own - len(rows) <= max(min(of_task, tokens / 2), 99)      # a digit is shared
            assert len(rows) >= 2 and (tokens == 1 or len(rows) > 5)


def test_a_page_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = ship(tmp_path / "web", run, "--layout web")
    said = capsys.readouterr().out
    assert "writes q8; --precision" in said
    assert f"python -m minismoe.runtime {tmp_path / 'web'} --serve" in said
    assert {"index.html", "onnx/model_quantized.onnx_data"} <= {*info["files"]}
    assert known_tasks(tmp_path / "web").keys() == {"number", "twice"}
    assert read_info(tmp_path / "web", verify=True)["precision"] == "q8"


# --- Broken exports ------------------------------------------------------------------------------

def in_graph(change: Callable[[CausalLM], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A decoder that is written from a changed copy of the model that ships."""
    def broken(patch: pytest.MonkeyPatch) -> None:
        for writer in layouts.write_decoder, layouts.write_npu:
            patch.setattr(layouts, writer.__name__, lambda file, model, *rest, writer=writer: (
                writer(file, change(sharing_copy(model)), *rest)))
    return broken


def after(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """After a function of check.py, half of the weights become zeros, in a file that only sessions
    that open from now on read."""
    def broken(patch: pytest.MonkeyPatch) -> None:
        checked = getattr(check, name)

        def damaging(*args: Any) -> Any:
            figures = checked(*args)
            (file,) = next(getattr(given, "folder", given) for given in args if isinstance(
                given, Path | Generator)).rglob("*.onnx*data")
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content[:len(content) // 2] + bytes(-(-len(content) // 2)))
            return figures
        patch.setattr(check, name, damaging)
    return broken


def in_weights(change: Callable[[Path], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A folder of layout hf or peft that is changed."""
    def broken(patch: pytest.MonkeyPatch) -> None:
        write = layouts.write_weights
        patch.setattr(layouts, "write_weights", lambda *args: (write(*args), change(args[-1])))
    return broken


def in_placing(patch: pytest.MonkeyPatch) -> None:
    """Experts of a layer that are lost where they should be merged."""
    place = shipping.place

    def lost(part: Any, names: list[str]) -> None:
        for name in names:
            layer = part.shipped.get_submodule(name)
            if "layers.1." in name and isinstance(layer, ExpertLinear):
                layer.lora_B = torch.nn.Parameter(0 * layer.lora_B)
        place(part, names)
    patch.setattr(shipping, "place", lost)


def other_norm(model: CausalLM) -> CausalLM:
    model.model.norm.weight = torch.nn.Parameter(1.5 * model.model.norm.weight)
    return model


def without_experts_of_q(model: CausalLM) -> CausalLM:
    for name, layer in expert_layers(model).items():
        if "q_proj" in name:
            model.set_submodule(name, BlockLinear(layer.weight, layer.bias))
    return model


def wider_windows(model: CausalLM) -> CausalLM:
    model.config = replace(model.config, windows=(112, 112))
    return model


def keep_one_too_many(patch: pytest.MonkeyPatch) -> None:
    """Of a long prompt, the cache keeps a token that the next prompt does not have."""
    def cut(cache: SharedCache, n: int) -> bool:
        del cache.tokens[n + (n > 96):]
        return True
    patch.setattr(SharedCache, "cut", cut)


def another_bit(folder: Path) -> None:
    edit_tensors(next(folder.glob("*.safetensors")), lambda tensors: next(
        t for name, t in tensors.items() if "layers.1.mlp.up_proj" in name).view(
            torch.uint8)[0, 0].bitwise_xor_(1))


def without_a_target(folder: Path) -> None:
    settings = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", settings | {
        "target_modules": settings["target_modules"][1:]})


STORED, OFF = "with the weights that it stores", "PyTorch computes: its logits are off by"
BROKEN: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    *((in_graph(other_norm), flags, STORED) for flags in (
        "--precision fp32", "--precision int4", "--precision fp16", "--target portable",
        "ROUTED --precision fp16 --routing dynamic", "--target npu")),
    *((in_graph(without_experts_of_q), f"{flags} --precision {precision}",
       f"{STORED}: .* explains 0.0001") for precision in ("int4", "int8") for flags in (
           "ROUTED --routing dynamic", "--routing freeze --target portable")),
    *((after("check_exact"), flags, OFF) for flags in (
        "", "--precision int8 --target portable", "--precision fp32",
        "--layout web --precision q4f16")),
    *((after("check_shipped"), f"{flags} --provider cpu", f"cpu does not compute what the CPU does"
       f"{hint}: its logits are off") for flags, hint in (
           ("--precision fp32", ""), ("--target npu", " .try another T in --static 1xTxP."))),
    *((in_placing, flags, "placing the experts changed the model that was trained: its logits")
      for flags in ("--precision int4", "--layout hf", "ROUTED --precision fp32")),
    (in_graph(wider_windows), "MISTRAL --precision fp32", STORED),
    (keep_one_too_many, "MISTRAL --precision fp32", "not what PyTorch computes"),
    *((in_weights(another_bit), f"{bits} --layout {layout}", "1 tensors are not the merged ones")
      for layout in ("hf", "peft") for bits in ("", "BFLOAT16")),
    (in_weights(without_a_target), "--layout peft", "2 tensors are not the merged ones")]


@pytest.mark.parametrize("damage, flags, says", BROKEN)
def test_what_differs_from_pytorch_is_not_kept(
        run: Path, routed_run: Path, tmp_path: Path,
        damage: Callable[[pytest.MonkeyPatch], None], flags: str, says: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is kept if nothing differs: `test_every_way_out`."""
    if "MISTRAL" in flags:                   # only a long prompt shows what is wrong
        save_bytes_model(tmp_path / "model", model_type="mistral", sliding_window=96, head_dim=16,
                         max_position_embeddings=256)
        flags = flags.replace("MISTRAL", f"--model {tmp_path / 'model'}")
    elif "BFLOAT16" in flags:
        flags = flags.replace("BFLOAT16", str(in_bfloat16(run, tmp_path / "16")))
    elif "ROUTED" in flags:
        flags = flags.replace("ROUTED", str(routed_run))
    else:
        flags = f"{run} {flags}"
    damage(monkeypatch)
    with pytest.raises(ValueError, match=says):
        ship(tmp_path / "out", flags)
    assert not [*tmp_path.glob("*out*")]


@pytest.mark.parametrize("flags", ["", "--precision int4 --block 128",
                                   "--precision int8 --target portable", "--routing dynamic"])
def test_a_session_may_differ_as_far_as_rounded_activations_explain(
        run: Path, routed_run: Path, tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch,
        ) -> None:
    """However sensitive the model is to them, and no further."""
    made = routed_run if "dynamic" in flags else run
    monkeypatch.setattr(check, "BITS8", 1e-6)
    seen = ship(tmp_path / "out", made, flags)["checked"]
    assert seen["graph_error"] < 1e-5 < seen["shipped_error"]
    monkeypatch.setattr(check, "EXPLAINED", 0.01)
    with pytest.raises(ValueError, match=OFF):
        ship(tmp_path / "again", made, flags)


@pytest.mark.parametrize("settings, ships, exact", [
    ("fp32", 1e-4, 1e-4), ("q8", 1e-4, 1e-4), ("int8", 0.1, 1e-4), ("q4f16", 0.1, 3e-2),
    ("fp16", 3e-2, 3e-2), ("fp16 dynamic", 6e-2, 6e-2), ("w8a16 npu", 0.1, 2e-2)])
def test_how_far_logits_may_be_from_pytorch(settings: str, ships: float, exact: float) -> None:
    """q8 stores 8 bits, of which a session makes floats as it loads: it rounds no activations."""
    precision, *more = settings.split()
    config = ExportConfig(precision=precision, target="npu" if "npu" in more else "ort",
                          routing="dynamic" if "dynamic" in more else "merge")
    assert (check.tolerance(config), check.tolerance(config, exact=True)) == (ships, exact)


@pytest.mark.parametrize("tolerance", [check.FLOAT32, math.inf])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_refused(tolerance: float, wrong: float) -> None:
    """In all texts, and in one."""
    wanted = [torch.eye(5)[:n] for n in (3, 2, 4)]
    check.compare(wanted, wanted, tolerance)
    for broken in (0, 1, 2), (1,):
        with pytest.raises(ValueError, match="not what PyTorch computes"):
            check.compare(wanted, [text * wrong if n in broken else text
                                   for n, text in enumerate(wanted)], tolerance)


@pytest.mark.parametrize("flags, reason", [
    ("--context 4096", "--context 4096: .* ends at 128$"),
    ("--context 32", "--context 32: .* need 4[0-9], "),
    ("--prompts nowhere.txt", "nowhere.txt"), ("--prompts EMPTY", "empty.txt holds no prompt"),
    ("--target npu --static 1x8x32", "--static with 32 past positions: .* need 4[0-9]"),
    ("--target portable --block 128", "--block 128: rows of 32 weights are no whole blocks"),
    ("--target npu --provider qnn:60", "needs pip install onnxruntime-qnn, and Python"),
    ("--provider nowhere", "no provider nowhere; here are .*cpu"),
])
def test_errors_come_before_the_work(run: Path, flags: str, reason: str, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    flags = flags.replace("EMPTY", str(tmp_path / "empty.txt"))
    monkeypatch.setattr(write, "replacing", lambda *_, **__: pytest.fail("there is no folder yet"))
    if "--prompts" not in flags:                               # which rounding reads
        monkeypatch.setattr(write, "ship", lambda *_: pytest.fail("it was rounded"))
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)  # as if it were not installed
    with pytest.raises((ValueError, OSError, ImportError), match=reason):
        export.main([str(run), *flags.split()])


@pytest.mark.parametrize("name", ["model", "data"])
def test_a_run_whose_inputs_moved_says_how_to_name_them(run, tmp_path, name) -> None:
    moved = copied(run, tmp_path / "run", **{name: str(tmp_path / "elsewhere")})
    with pytest.raises(ValueError, match=f"--{name} FOLDER .*no such {name} folder: .*elsewhere"):
        export.main([str(moved)])


def test_every_task_is_checked_until_there_are_enough_prompts() -> None:
    def task(name: str, count: int) -> SimpleNamespace:
        return SimpleNamespace(test=[[{"content": f"{name}{i}"}, {}] for i in range(count)])
    source = SimpleNamespace(tasks=[task("a", 1), task("b", 5)], tokenizer=SimpleNamespace(
        encode_chat=lambda chat, _: SimpleNamespace(ids=chat[0]["content"])))
    assert plan.check_prompts(source, 4) == ["a0", "b0", "b1", "b2"]
