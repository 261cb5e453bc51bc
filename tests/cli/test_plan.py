"""What --plan says of a run, against the loaded model and the steps that it trains."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import QWEN, finish

import minismoe.training.loop as training
import train
from minismoe.cli import plan
from minismoe.data.tasks import encode_all, load_tasks
from minismoe.data.tokenizer import load_tokenizer
from minismoe.io.files import write_json
from minismoe.method.allocate import Allocation
from minismoe.method.experts import add_experts, linear_layers
from minismoe.model.checkpoint import load_model
from minismoe.model.config import Config
from minismoe.model.decoder import CausalLM

PARTS = ["base weights", "adapters", "gradients", "optimizer"]


def parts(out: str) -> dict[str, float]:
    """MiB by part, as the table says."""
    return {name: float(size.replace(",", "")) for name, size in
            re.findall(r"^(\S+(?: weights)?) +([\d,.]+)$", out, re.MULTILINE)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_memory_by_part_is_that_of_the_loaded_model(tmp_path, bits: int | None, tied: bool) -> None:
    config = {"model_type": "qwen2", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80,
              "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": tied}
    write_json(tmp_path / "config.json", config)
    made = CausalLM(Config.from_dict(config)).to(torch.bfloat16)
    save_file(dict(made.named_parameters()), tmp_path / "model.safetensors")
    model = load_model(tmp_path, torch.bfloat16, base_bits=bits)
    allocation = Allocation(dict(zip(linear_layers(model), range(1, 9))), rank=4)
    found = plan.memory_by_part(model.config, allocation, torch.bfloat16, bits)
    assert found["base weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    add_experts(model, allocation)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found["adapters"], found["gradients"], found["optimizer"]) == (
        4 * count, 4 * count, 8 * count)


def test_a_plan_of_a_published_model_counts_its_parameters(tmp_path, capsys) -> None:
    write_json(tmp_path / "config.json", QWEN)
    code, out, err = finish(train.main, "--plan", "--model", str(tmp_path), "--dtype", "float32",
                            capsys=capsys)
    assert code == 0 and "a base of 752,393,024 parameters; " in out, err
    assert parts(out)["base weights"] == pytest.approx(752_393_024 * 4 / 2**20, abs=0.1)


def test_a_plan_needs_nothing_but_config_json_and_writes_nothing(inputs, tmp_path, capsys,
                                                                monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    shutil.copy(Path(inputs[1]) / "config.json", tmp_path / "model")
    code, out, err = finish(train.main, "--plan", "--model", "model", "--base-bits", "4",
                            capsys=capsys)
    assert code == 0, err
    assert list(parts(out)) == PARTS and "(of one task)" in out
    assert "not measured without --data, and .safetensors in model" in out
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "config.json"]


def test_a_plan_trains_three_steps_of_the_largest_batch(inputs, tmp_path, capsys,
                                                        monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps, step = [], training.Trainer.gradients

    def watched(trainer, batch):
        steps.append(sorted(batch, key=lambda e: (e.task, e.index)))
        return step(trainer, batch)

    monkeypatch.setattr(training.Trainer, "gradients", watched)
    code, out, err = finish(train.main, *inputs, "--plan", "--epochs", "2", "--dtype", "float32",
                            capsys=capsys)
    assert code == 0, err
    assert list(parts(out)) == PARTS
    tokenizer = load_tokenizer(inputs[1])
    lengths = [len(e.ids) for t in load_tasks(inputs[3], (), 0)
               for e in encode_all(t, tokenizer, 1024)]
    assert len(steps) == 3 and len(steps[0]) == 8 and steps == steps[:1] * 3
    assert max(len(e.ids) for e in steps[0]) == max(lengths)
    assert f"8 examples of up to {max(lengths)} tokens" in out
    assert f"training: 12 steps, {2 * sum(lengths):,} tokens, about " in out
    peak = re.search(r"peak memory: ([\d,]+) MiB, as this process counts it", out)
    assert int(peak[1].replace(",", "")) > sum(parts(out).values())
    assert not [*tmp_path.iterdir()]


def test_a_plan_of_a_run_that_goes_on_needs_no_probe(inputs, tmp_path, capsys) -> None:
    known = *inputs, "--samples", "2", "--epochs", "1", "--out", str(tmp_path)
    assert finish(train.main, *known, capsys=capsys)[0] == 0
    (tmp_path / "results.json").unlink()
    code, out, err = finish(train.main, "--resume", "--out", str(tmp_path), "--plan", capsys=capsys)
    assert code == 0 and "an example:" not in out and "probe" not in out, err
