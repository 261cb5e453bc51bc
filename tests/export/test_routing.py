"""What a run's samples and settings decide in its export, and how its answers are scored."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixture import ROUTED, model_of, tasks
from torch import Tensor

import export
from minismoe.data.tasks import Task
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer
from minismoe.export import compare, scores, ship
from minismoe.export.calibration import Calibration, shuffled_samples, unlabelled
from minismoe.export.layouts import copy_base_files, write_genai
from minismoe.export.part import Part, sharing_copy
from minismoe.export.settings import ExportConfig, Source
from minismoe.io.files import read_json
from minismoe.method.experts import expert_layers
from minismoe.method.freeze import exact
from minismoe.training.evaluate import Accuracy


def test_prompts_are_turns_of_a_user_and_end_at_the_context(tmp_path) -> None:
    (tmp_path / "lines").write_text("\ufeffhi\n\n a longer prompt\n", encoding="utf-8")
    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>", 258, [257])
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=28))
    found = unlabelled(str(tmp_path / "lines"), SimpleNamespace(tokenizer=tokenizer, trained=model))
    assert [bytes(e.ids[1:]) for e in found] == [b"User: hi\nAssistant:",
                                                 b"User:  a longer prompt\nAssi"]
    assert all({*e.labels} == {-100} and len(e.labels) == len(e.ids) for e in found)


@pytest.mark.parametrize("task", [None, "a"])
@pytest.mark.parametrize("routing", ["merge", "freeze"])
def test_a_task_is_rounded_on_its_own_samples(task, routing, monkeypatch, tmp_path) -> None:
    """Two graphs share one pass through the layers."""
    model, read = model_of(dtype=torch.float32), []
    monkeypatch.setattr(ship, "calibration_batches", lambda samples, source: {
        name: tasks()[name] for name in samples})
    monkeypatch.setattr(ship, "Calibration", lambda model, batches: read.append(
        [*batches]) or Calibration(model, batches))
    source = Source(tmp_path, tmp_path, "", model, SimpleNamespace(pad_id=0),
                    examples={"a": [], "b": []})
    config = ExportConfig(precision="int4", block=32, task=task, routing=routing)
    parts = ship.ship([config] * 2, source, model, shuffled_samples(config, source))
    assert read == [["a"] if task else ["a", "b"]]
    leaf = parts[0].shipped.get_submodule(ROUTED[0])
    assert type(leaf).__name__ == ("BlockLinear" if routing == "merge" else "ExpertLinear")


def test_a_copy_shares_every_weight() -> None:
    model = model_of()
    copied = sharing_copy(model)
    assert copied.state_dict().keys() == model.state_dict().keys()
    for (name, ours), (_, theirs) in zip(copied.named_parameters(), model.named_parameters()):
        assert ours is theirs, name
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.model.layers[0] is not model.model.layers[0]


def test_a_base_in_16_bits_is_merged_in_float32() -> None:
    model = model_of(dtype=torch.bfloat16).to(torch.float32)
    fits = {name: exact(layer) for name, layer in expert_layers(model).items()}
    part = Part(ExportConfig(precision="fp32"), model, {None: fits})
    part.place([*fits])
    for name, linear in fits.items():
        merged = part.shipped.get_submodule(name).weight
        assert merged.dense().dtype == torch.float32
        torch.testing.assert_close(merged.dense(), merged.base + linear.lora_B @ linear.lora_A)


class Says:
    """A generator that answers "yes" to what holds an x, and "no" to all else; its logits say so,
    and are 3 where they do."""

    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>", 258, [257])
    context = 99

    def room(self, length: int) -> int:
        return 9

    def generate(self, prompt: Any, limit: int) -> Any:
        return iter(b"yes" if ord("x") in prompt else b"no")


def test_answers_are_scored_in_the_order_of_their_questions() -> None:
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
             for q, a in (("long x", "yes"), ("s", "no"), ("longer", "no"), ("x", "no"))]
    assert scores.accuracy(Says(), Task("t", [], lines)).right == [1, 1, 1, 0]


def logits_of(text: bytes, end: int = 257) -> Tensor:
    """Logits that take a text: 3 for its tokens and its end."""
    return 3 * torch.eye(259)[[*text, end]]


@pytest.mark.parametrize("above, refused", [(0.0, False), (5e-4, False), (2e-3, True)])
def test_another_text_in_floats_is_refused_unless_it_is_a_near_tie(
        above: float, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree finds "n" likelier than the graph's "y", by so much of the largest logit."""
    wanted = logits_of(b"yes")
    wanted[0, ord("n")] = 3 * (1 + above)
    monkeypatch.setattr(compare, "logits", lambda *_: [wanted])
    if refused:
        with pytest.raises(ValueError, match="other texts than PyTorch: .* 0.006 below"):
            compare.compare_shipped(None, Says(), [[120]], [list(b"yes")], 5e-4, False)
    else:
        compare.compare_shipped(None, Says(), [[120]], [list(b"yes")], 5e-4, False)


def test_texts_are_the_same_up_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained model goes on after the second; nothing says where the longest would end, unless
    it might have been longer."""
    given = [b"yes", b"no", b"no"]
    trained = [logits_of(b"yes", 7), logits_of(b"no", 7), logits_of(b"no")]
    monkeypatch.setattr(compare, "logits", lambda model, prompts, texts: trained if (
        model is None) else [logits_of(bytes(text)) for text in texts])
    for most, equal in (3, 2), (4, 1):
        found = compare.compare_texts(None, Says(), [[1]] * 3, [[*text] for text in given], most)
        assert found["texts_equal"] == equal and found["texts"] == 3
        assert found["tokens_agreed"] == round(8 / 10, 4)


@pytest.mark.parametrize("lost, won, told", [(4, 0, False), (5, 0, True), (9, 4, False),
                                             (30, 10, True)])
def test_a_loss_is_told_if_chance_does_not_explain_it(lost: int, won: int, told: bool, capsys,
                                                      ) -> None:
    right = [[1] * lost + [0] * won + [1] * 9, [0] * lost + [1] * won + [1] * 9]
    scores.show_scores({"t": {name: Accuracy(sum(r), len(r), [], r) for name, r in zip(
        ("trained", "int4"), right)}}, scores.ROUNDED)
    said, warned = capsys.readouterr()
    assert "trained" in said and "int4" in said
    assert (f"t: of {9 + lost + won} test lines, the export answers {lost} wrongly that the trained"
            f" model answers rightly, and {won} rightly" in warned) == told


@pytest.mark.parametrize("lost, limit, answered", [
    ([], None, [100, 100]), ([7], None, [100, 100]), ([120, 130], None, [100, 100]),
    ([7, 80], None, [100, 100, 200, 20]), ([7], 300, [300, 120])])
def test_other_lines_are_answered_if_they_may_show_a_loss(
        lost: list[int], limit: int | None, answered: list[int], tmp_path: Path) -> None:
    """Two of 100 lines would be six of 300: less often than once in twenty by chance, of two tasks.
    The run says that the trained model is right at all of them."""
    def measure(task: Task) -> Accuracy:
        asked.append(len(task.test))
        return scores.counted([int(task.name == "b" or number not in lost) for number in task.test])

    asked = list[int]()
    tasks = [Task(name, [], list(range(count))) for name, count in (("a", 300), ("b", 120))]
    source = Source(tmp_path, tmp_path, "", None, None, tasks,
                    judged={task.name: [1] * len(task.test) for task in tasks})
    found = scores.scored(source, ExportConfig(limit_test=limit), "int4", measure)
    assert asked == answered
    for task in tasks:
        count = 100 if answered == [100, 100] else len(task.test)
        right = [int(task.name == "b" or n not in lost) for n in range(count)]
        assert [of.right for of in found[task.name].values()] == [[1] * count, right]


def test_an_export_is_calibrated_on_what_its_run_was_trained_on(finished: Path) -> None:
    source = export.load_run(ExportConfig(run=str(finished), limit_test=2))
    assert [len(t.test) for t in source.tasks] == [2, 2]
    samples = shuffled_samples(ExportConfig(run=str(finished)), source)
    assert {n: sorted(e.index for e in examples) for n, examples in samples.items()} == {
        n: sorted(e.index for e in examples) for n, examples in source.examples.items()}


def test_the_answers_that_a_run_keeps_are_taken_if_new_ones_would_be_the_same(finished: Path,
                                                                             ) -> None:
    run = str(finished)
    kept = {task: of["right"] for task, of in read_json(finished / "after.json").items()}
    assert kept and export.load_run(ExportConfig(run=run)).judged == kept
    for other in (ExportConfig(run=run, limit_test=2), ExportConfig(run=run, dtype="bfloat16")):
        assert export.load_run(other).judged == {}


def test_what_a_base_says_of_sampling_reaches_genai(inputs, tmp_path: Path) -> None:
    base = Path(shutil.copytree(inputs[1], tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps(
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "do_sample": True, "max_length": None,
         "repetition_penalty": 1.1}))
    copy_base_files(base, tmp_path / "out")
    assert "max_length" not in read_json(tmp_path / "out/generation_config.json")
    write_genai(tmp_path / "out", 64)
    found = read_json(tmp_path / "out/genai_config.json")
    assert found["model"]["context_length"] == 64
    assert {k: found["search"][k] for k in ("temperature", "top_p", "top_k", "do_sample",
            "repetition_penalty")} == {"temperature": 0.7, "top_p": 0.9, "top_k": 5,
                                       "do_sample": True, "repetition_penalty": 1.1}
