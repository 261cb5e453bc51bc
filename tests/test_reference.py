"""The reference runs by itself, imports nothing of ours, and computes what the package computes."""

import ast
import json
import re
import runpy
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from tiny import edit_tensors, python, randomise, save_bytes_model

from minismoe import reference
from minismoe.data.tasks import Example, collate, encode_all, load_tasks
from minismoe.data.tokenizer import load_tokenizer
from minismoe.io.files import read_json
from minismoe.method.allocate import allocate
from minismoe.method.experts import add_experts, expert_layers, merged
from minismoe.method.freeze import freeze
from minismoe.method.sensitivity import probe
from minismoe.model.checkpoint import load_model
from minismoe.model.decoder import CausalLM
from minismoe.model.quantize import quantize
from minismoe.training.evaluate import generate
from minismoe.training.loop import train
from minismoe.training.plan import TrainConfig, plan_tasks, planned_batches

FILE = Path(reference.__file__)
TOY = FILE.parent / "data" / "toy_base"


# --- the file -----------------------------------------------------------------------------------

def test_the_reference_is_one_file_of_few_lines_that_imports_nothing_of_ours() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 435
    tree, imported = ast.parse(text), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, node.name
    assert imported - set(sys.stdlib_module_names) == {
        "torch", "safetensors", "onnx", "onnxruntime", "tokenizers"}
    assert "tokenizers" not in text[:text.index("def ")]          # a model of bytes needs none


def test_the_lines_beside_the_toy_are_right() -> None:
    for task in ("capitals", "smaller"):
        lines = [json.loads(line) for line in (TOY / f"{task}.jsonl").read_text().splitlines()]
        assert len({line["prompt"] for line in lines}) == 200
        for line in lines:
            words = re.findall(r'"(\w+)"', line["prompt"]) or re.findall(r"\d+", line["prompt"])
            assert line["completion"] == min(words).upper()


@pytest.mark.slow
def test_the_toy_learns_and_its_graph_answers_as_it_does(tmp_path: Path) -> None:
    done = python(FILE, folder=tmp_path, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    answers = re.findall(r"training: +(.*)\n +trained: +(.*)\n +onnxruntime: +(.*)\n",
                         done.stdout)
    assert [right for _, *right in answers] == [["KEB", "KEB"], ["29", "29"]]
    assert {before for before, *_ in answers}.isdisjoint({"KEB", "29"})
    assert (tmp_path / "reference.onnx").stat().st_size < 1 << 20


# --- bad input ----------------------------------------------------------------------------------

def refusal(folder: Path, *files: Path) -> str:
    """What the command says as it ends."""
    before, sys.argv = sys.argv, ["reference", str(folder), *map(str, files)]
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(FILE), run_name="__main__")
    finally:
        sys.argv = before
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gemma3_text"}, "not {'model_type': 'gemma3_text'}"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"), ({"mlp_bias": True}, "mlp_bias"),
    ({"num_hidden_layers": 3}, "config.json"), ({"num_hidden_layers": 1}, "config.json"),
    ({"hidden_size": 64}, "config.json"), ({}, "rows of 32"),
    ({"vocab_size": 260}, "tokenizer.json")])
def test_a_model_that_is_not_implemented_is_refused_in_one_line(
        tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save_bytes_model(tmp_path / "base", intermediate_size=64 if changes else 48)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | changes))
    said = refusal(folder, TOY / "smaller.jsonl")
    assert message in said and str(folder) in said


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path / "absent", TOY / "smaller.jsonl")
    assert "absent.jsonl" in refusal(TOY, tmp_path / "absent.jsonl")
    (tmp_path / "one.jsonl").write_text('{"prompt": "x", "completion": "y"}')
    assert "two lines" in refusal(TOY) and "two lines" in refusal(TOY, tmp_path / "one.jsonl")
    (tmp_path / "smaller.jsonl").write_text((tmp_path / "one.jsonl").read_text())
    assert "two lines" in refusal(TOY, tmp_path / "smaller.jsonl", TOY / "smaller.jsonl")
    folder = tmp_path / "base"
    shutil.copytree(TOY, folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert str(folder) in refusal(folder, TOY / "smaller.jsonl")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refusal(folder, TOY / "smaller.jsonl")


@pytest.mark.parametrize("line", [
    "", "[]", "{", "1", '{"prompt": "x"}', '{"prompt": 1, "completion": 2}',
    '{"prompt": "x", "completion": ["y"]}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "x", "completion": "y"}\n' + line + "\n" + '{"a": 1}')
    assert f"{file}, line 2" in refusal(TOY, file)


# --- the same as the package --------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of bytes, and two tasks beside it."""
    folder = tmp_path_factory.mktemp("reference")
    save_bytes_model(folder / "base", intermediate_size=64, max_position_embeddings=99,
                     bos_token_id=256)
    edit_tensors(folder / "base/model.safetensors", lambda tensors: [
        tensor.uniform_(0.5, 1.5) for name, tensor in tensors.items() if "norm" in name])
    (folder / "data").mkdir()
    for task in ("capitals", "smaller"):
        lines = (TOY / f"{task}.jsonl").read_text().splitlines()[:24]
        (folder / "data" / f"{task}.jsonl").write_text("\n".join(lines))
    return folder


def both(base: Path) -> tuple[reference.Decoder, CausalLM, dict[str, list[reference.Sample]]]:
    model, encode, _ = reference.load(base / "base")
    return model, load_model(base / "base"), {
        file.stem: reference.read_samples(file, encode, model.config)
        for file in sorted((base / "data").iterdir())}


def example(task: str, sample: reference.Sample, index: int = 0) -> Example:
    ids, prompt = sample
    return Example(task, ids.tolist(), [-100] * prompt + ids.tolist()[prompt:], index)


def start_alike(model: reference.Decoder, ours: CausalLM, experts: dict[str, int]) -> None:
    """Both get the same experts, as training leaves them."""
    reference.add_experts(model, experts)
    randomise(add_experts(ours, {f"model.{name}": E for name, E in experts.items()}))
    for name, layer in model.mixtures.items():
        theirs = ours.get_submodule(f"model.{name}")
        for part in ("lora_A", "lora_B", "router"):
            if getattr(layer, part) is not None:
                getattr(layer, part).data.copy_(0.1 * getattr(theirs, part).data)
                getattr(theirs, part).data.mul_(0.1)


def some_experts(model: reference.Decoder) -> dict[str, int]:
    return {name: 1 + i % 3 for i, name in enumerate(n for n in model.weights if "_proj" in n)}


def test_tokens_and_logits_equal_the_package(base: Path) -> None:
    model, ours, tasks = both(base)
    tokenizer = load_tokenizer(base / "base")
    for task in load_tasks(base / "data"):
        encoded = [(e.ids, e.labels) for split in ("train", "test")
                   for e in encode_all(task, tokenizer, 64, split)]
        for sample in tasks[task.name]:  # the package's template writes a line end after an answer
            e = example(task.name, sample)
            assert ([*e.ids, 10], [*e.labels, -100]) in encoded
    for ids, _ in tasks["capitals"][:4]:
        torch.testing.assert_close(model(ids), ours(ids[None])[0], rtol=1e-4, atol=1e-5)


def test_a_tokenizer_of_its_own_is_taken(tmp_path: Path, bpe: Path) -> None:
    save_bytes_model(tmp_path / "base", intermediate_size=64, vocab_size=330)
    shutil.copy(bpe, tmp_path / "base/tokenizer.json")
    model, encode, decode = reference.load(tmp_path / "base")
    ids = encode("the cat sat")
    assert decode(ids) == "the cat sat" and len(ids) < 11
    assert model(torch.tensor(ids)).shape == (len(ids), 330)


def test_scores_and_votes_equal_the_package(base: Path) -> None:
    model, ours, tasks = both(base)
    weights = {name: W.requires_grad_() for name, W in model.weights.items() if "_proj" in name}
    scores = {task: reference.sensitivity(weights, (
        reference.answer_losses(model, *sample).mean() for sample in samples[:8]))
        for task, samples in tasks.items()}
    theirs = probe(ours, {task: [collate([example(task, s) for s in samples[:8]], 258)]
                          for task, samples in tasks.items()})
    for task in tasks:
        assert {f"model.{n}": s for n, s in scores[task].items()} == pytest.approx(
            theirs[task], rel=1e-3)
    groups = [[name for name in weights if part in name] for part in ("self_attn", "mlp")]
    expected = {f"model.{n}": E for n, E in reference.vote(scores, groups, 0.6).items() if E}
    assert allocate(theirs, keep=0.6).experts == expected


def test_training_equals_the_package(base: Path, tmp_path: Path, monkeypatch) -> None:
    """Which smooths no target here, and has no loss on prompts, as the reference has none."""
    monkeypatch.setattr("minismoe.training.plan.MOST_SMOOTHING", 0.0)
    model, ours, tasks = both(base)
    start_alike(model, ours, some_experts(model))
    samples, cfg = [*chain(*tasks.values())], TrainConfig(epochs=2, lr=4e-3, prompt_loss=0)
    examples = [example("all", s, i) for i, s in enumerate(samples)]
    batches = [[samples[e.index] for e in batch] for batch in planned_batches(
        examples, plan_tasks(examples, [], cfg), cfg)]
    train(ours, examples, cfg, tmp_path, 258)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    curve, residuals = reference.train(model, batches, peak=4e-3)
    assert residuals.keys() == {name for name, m in model.mixtures.items() if len(m.lora_A) > 1}
    assert not any(layer.router is not None for layer in expert_layers(ours).values())
    assert curve == pytest.approx([json.loads(line)["loss"] for line in lines], rel=1e-4)
    assert curve[-1] < curve[0] - 0.5
    for name, layer in expert_layers(ours).items():
        torch.testing.assert_close(model.mixtures[name.removeprefix("model.")].lora_B.data,
                                   layer.lora_B.data, rtol=1e-2, atol=1e-3)


def test_frozen_and_merged_weights_and_greedy_text_equal_the_package(base: Path) -> None:
    model, ours, tasks = both(base)
    start_alike(model, ours, some_experts(model))
    samples = tasks["capitals"] + tasks["smaller"]
    prompts = [ids[:length].tolist() for ids, length in samples[::6]]
    mixed = [reference.greedy(model, prompt, 257) for prompt in prompts]
    assert mixed == generate(ours, prompts, 24, [257])
    found = freeze(ours, collate([example("", s) for s in samples], 258))
    residuals = reference.freeze(model, samples)
    assert {f"model.{name}": residual for name, residual in residuals.items()} == pytest.approx(
        found, rel=0.02, abs=1e-6)
    reference.merge(model)
    for name, W in model.weights.items():
        if "_proj" in name:
            layer = ours.get_submodule(f"model.{name}")
            torch.testing.assert_close(W, merged(layer.weight, layer), rtol=1e-3, atol=1e-4)
    said = [reference.greedy(model, prompt, 257) for prompt in prompts]
    assert said == generate(ours, prompts, 24, [257])
    session = onnxruntime.InferenceSession(reference.Graph(model, {}).decoder().SerializeToString())
    assert said == [reference.greedy(reference.with_cache(session, model.config), prompt, 257)
                    for prompt in prompts]


def test_main_takes_all_steps(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    """The second line of each task is trained on and probed, the first is asked."""
    for file in (base / "data").iterdir():
        (tmp_path / file.name).write_text("\n".join(file.read_text().split("\n")[:9]))
    files = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reference", str(base / "base"), *map(str, files)])
    reference.main()
    said = capsys.readouterr().out
    experts, first, last, residual = map(float, re.search(
        r"vote: (\d+) experts on 14 matrices\n3. train: 6 steps, loss (\S+) to (\S+)\n"
        r"4. freeze, on the way: worst residual (\S+)%\n5 to 7. ONNX", said).groups())
    assert 14 < experts < 28 and last < first and 0 < residual < 20
    assert len(re.findall("User: .*\nAssistant:\n  before training: ", said)) == 2
    onnx.checker.check_model(str(tmp_path / "reference.onnx"))
    (tmp_path / "reference.onnx").write_text("precious")
    with pytest.raises(SystemExit, match="and reference.onnx must be new"):
        reference.main()
    assert (tmp_path / "reference.onnx").read_text() == "precious"


# --- bits ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("b", [4, 8])
def test_rounded_weights_equal_the_package(b: int) -> None:
    W = torch.randn(5, 96)
    W[0, :32] = 0
    q, scale = reference.integers(W, b)
    blocks = quantize(W, b, 32)
    torch.testing.assert_close(scale.flatten(), blocks.scales.flatten())
    expected = blocks.data.flatten(1)
    if b == 4:
        expected = torch.stack([expected & 15, expected >> 4], 2).flatten(1)
    assert torch.equal(q, (expected.int() - 2 ** (b - 1)).to(torch.int8))


def test_a_graph_of_few_bits_computes_the_rounded_weights(base: Path) -> None:
    model, _, tasks = both(base)
    names = [name for name in model.weights if "_proj" in name]
    bits_of = {name: 4 + 4 * (i % 2) for i, name in enumerate(names)}
    graph = reference.Graph(model, bits_of).decoder()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    for name, b in bits_of.items():
        q, scale = reference.integers(model.weights[name], b)
        model.weights[name] = q * scale.repeat_interleave(32, 1)
    ids = tasks["smaller"][0][0].tolist()
    logits_of = reference.with_cache(session, model.config)
    for n in (9, 10, len(ids)):                                   # several tokens, one, several
        torch.testing.assert_close(logits_of(ids[:n])[-1], model(ids[:n])[-1], rtol=1e-3, atol=1e-4)


# --- by hand ------------------------------------------------------------------------------------

def test_half_votes_round_up_as_they_are_written() -> None:
    modules = [str(i) for i in range(100)]         # 0.145 * 100 is a little below 14.5 in floats
    assert sum(reference.vote({"1": dict.fromkeys(modules, 1.0)}, [modules], 0.145).values()) == 15


def test_balance_is_perfect_where_all_experts_are_chosen() -> None:
    loss = reference.balance_loss(torch.randn(5, 3, dtype=torch.float64), k=4)
    assert abs(loss.item() - 1) < 1e-12
