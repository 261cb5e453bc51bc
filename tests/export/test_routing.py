"""What a run's samples and settings decide in its export, and how its answers are scored."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixture import ROUTED, model_of, tasks

import export
import train
from minismoe.data.tasks import Task
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer
from minismoe.export import compare, tree, verify
from minismoe.export.calibration import Calibration, shuffled_samples
from minismoe.export.layouts import copy_base_files, write_genai
from minismoe.export.settings import ExportConfig, Source
from minismoe.method.experts import expert_layers
from minismoe.method.freeze import exact


@pytest.mark.parametrize("task", [None, "a"])
@pytest.mark.parametrize("routing", ["merge", "freeze"])
def test_a_task_is_rounded_on_its_own_samples(task, routing, monkeypatch, tmp_path) -> None:
    """Two graphs share one pass through the layers."""
    model, read = model_of(dtype=torch.float32), []
    monkeypatch.setattr(tree, "calibration_batches", lambda samples, source: {
        name: tasks()[name] for name in samples})
    monkeypatch.setattr(tree, "Calibration", lambda model, batches: read.append(
        [*batches]) or Calibration(model, batches))
    source = Source(tmp_path, tmp_path, "", model, SimpleNamespace(pad_id=0),
                    examples={"a": [], "b": []})
    config = ExportConfig(precision="int4", block=32, task=task, routing=routing)
    trees = tree.ship([config] * 2, source, model)
    assert read == [["a"] if task else ["a", "b"]]
    leaf = trees[0].tree.get_submodule(ROUTED[0])
    assert type(leaf).__name__ == ("BlockLinear" if routing == "merge" else "BlockExperts")


def test_a_copy_shares_every_weight() -> None:
    model = model_of()
    copied = tree.sharing_copy(model)
    assert copied.state_dict().keys() == model.state_dict().keys()
    for (name, ours), (_, theirs) in zip(copied.named_parameters(), model.named_parameters()):
        assert ours is theirs, name
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.model.layers[0] is not model.model.layers[0]


def test_a_base_in_16_bits_is_merged_in_float32() -> None:
    model = model_of(dtype=torch.bfloat16).to(torch.float32)
    fits = {name: exact(layer) for name, layer in expert_layers(model).items()}
    part = tree.Part(ExportConfig(precision="fp32"), model, {None: fits})
    part.place([*fits])
    for name, linear in fits.items():
        merged = part.tree.get_submodule(name).weight
        assert merged.dense().dtype == torch.float32
        torch.testing.assert_close(merged.dense(), merged.base + linear.lora_B @ linear.lora_A)


class Says:
    """A generator that answers "yes" to what holds an x, and "no" to all else."""

    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>", 258, [257])
    context = 99

    def room(self, length: int) -> int:
        return 9

    def batch(self, prompts: Any, limit: int, rows: int | None = None) -> list[list[int]]:
        return [list(b"yes" if ord("x") in p else b"no") for p in prompts]

    def generate(self, prompt: Any, limit: int) -> Any:
        return iter(self.batch([prompt], limit)[0])


def test_answers_are_scored_in_the_order_of_their_questions() -> None:
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
             for q, a in (("long x", "yes"), ("s", "no"), ("longer", "no"), ("x", "no"))]
    assert verify.accuracy(Says(), Task("t", [], lines), batch_size=2) == 0.75


@pytest.mark.parametrize("same_texts", [True, False])
def test_another_text_in_float32_is_refused(same_texts, monkeypatch) -> None:
    monkeypatch.setattr(compare, "compare_logits", lambda *_, **__: {})
    monkeypatch.setattr(compare, "with_long", lambda *_: ((), ()))
    for texts in ([list(b"yes"), list(b"no")], [list(b"yes"), list(b"yes")]):
        monkeypatch.setattr(compare, "generate", lambda *_, texts=texts: texts)
        if same_texts and texts[1] != list(b"no"):
            with pytest.raises(ValueError, match="says other texts than PyTorch: 1 of 2 are"):
                compare.compare_graph(None, Says(), [[120], [97]], 1.0, same_texts)
            continue
        found = compare.compare_graph(None, Says(), [[120], [97]], 1.0, same_texts)
        assert found["texts_equal"] == found["batched_equal"] == (2 if texts[1] == [110, 111]
                                                                  else 1)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("new") / "run"
    train.main([*inputs, "--samples", "2", "--epochs", "1", "--rank", "2",
                "--dtype", "float32", "--out", str(run)])
    return run


def test_an_export_is_calibrated_on_what_its_run_was_trained_on(run: Path) -> None:
    source = export.load_run(ExportConfig(run=str(run), limit_test=2))
    assert [len(t.test) for t in source.tasks] == [2, 2]
    samples = shuffled_samples(ExportConfig(run=str(run)), source)
    assert {n: sorted(e.index for e in examples) for n, examples in samples.items()} == {
        n: sorted(e.index for e in examples) for n, examples in source.examples.items()}


def test_what_a_base_says_of_sampling_reaches_genai(inputs, tmp_path: Path) -> None:
    base = Path(shutil.copytree(inputs[1], tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps(
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "do_sample": True, "max_length": None,
         "repetition_penalty": 1.1}))
    copy_base_files(base, tmp_path / "out")
    assert "max_length" not in json.loads((tmp_path / "out/generation_config.json").read_text())
    write_genai(tmp_path / "out", 64)
    found = json.loads((tmp_path / "out/genai_config.json").read_text())
    assert found["model"]["context_length"] == 64
    assert {k: found["search"][k] for k in ("temperature", "top_p", "top_k", "do_sample",
            "repetition_penalty")} == {"temperature": 0.7, "top_p": 0.9, "top_k": 5,
                                       "do_sample": True, "repetition_penalty": 1.1}
