"""What a run's samples and settings decide in its export, and how its answers are scored."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixture import COUNTS, ROUTED, merge, model_of
from tiny import randomise, small_model
from torch import Tensor

import export
from minismoe.data.tasks import Example, Task
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer
from minismoe.export import answers, check, layers, ship
from minismoe.export.calibration import Calibration, shuffled_samples, unlabelled
from minismoe.export.layouts import copy_base_files, write_genai
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.ship import Part, place, sharing_copy, widened
from minismoe.io.files import read_json
from minismoe.method.experts import ExpertLinear, add_experts, drop_routers, expert_layers
from minismoe.model.quantize import BlockLinear


def test_prompts_are_turns_of_a_user_and_end_at_the_context(tmp_path) -> None:
    (tmp_path / "lines").write_text("\ufeffhi\n\n a longer prompt\n", encoding="utf-8")
    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>", 258, [257])
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=28))
    found = unlabelled(str(tmp_path / "lines"), SimpleNamespace(tokenizer=tokenizer, trained=model))
    assert [bytes(e.ids[1:]) for e in found] == [b"User: hi\nAssistant:",
                                                 b"User:  a longer prompt\nAssi"]
    assert all({*e.labels} == {-100} and len(e.labels) == len(e.ids) for e in found)


@pytest.mark.parametrize("routing", ["merge", "freeze", "dynamic"])
def test_experts_are_placed_and_texts_read_for_4_bits_alone(
        routing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, read = model_of(dtype=torch.float32), list[list[str]]()
    if routing != "dynamic":
        drop_routers(model)
    monkeypatch.setattr(ship, "Calibration", lambda model, batches: read.append(
        [*batches]) or Calibration(model, batches))
    lines = [Example("", [1, 2, 3, n], [-100, -100, 3, n]) for n in range(4, 9)]
    source = Source(tmp_path, tmp_path, "", model, SimpleNamespace(pad_id=0),
                    examples={"a": lines, "b": lines})
    config = ExportConfig(precision="int4", block=32, routing=routing)
    samples = shuffled_samples(config, source)
    for precision in "int4", "int8", "fp32":
        part = ship.ship(replace(config, precision=precision), source, model, samples)
        for name in COUNTS:
            layer = part.shipped.get_submodule(name)
            assert isinstance(layer, BlockLinear if routing == "merge" else ExpertLinear)
            assert (getattr(layer, "router", None) is not None) == (
                routing == "dynamic" and name in ROUTED)
    assert read == [["a", "b"], [], []]


def test_a_copy_shares_every_weight() -> None:
    model = model_of()
    copied = sharing_copy(model)
    assert copied.state_dict().keys() == model.state_dict().keys()
    for (name, ours), (_, theirs) in zip(copied.named_parameters(), model.named_parameters()):
        assert ours is theirs, name
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.model.layers[0] is not model.model.layers[0]


def test_a_base_in_16_bits_is_merged_in_float32() -> None:
    """All experts are in the weight, as a loop over them in float64 adds them."""
    model = widened(model_of(dtype=torch.bfloat16))
    drop_routers(model)
    part, wanted = Part(ExportConfig(precision="fp32"), sharing_copy(model)), sharing_copy(model)
    place(part, [*COUNTS])
    merge(wanted)
    for name in COUNTS:
        found, weight = (tree.get_submodule(name).weight for tree in (part.shipped, wanted))
        torch.testing.assert_close(found.dense(), weight, rtol=1e-6, atol=1e-6)


class Written(list[int]):
    """An answer that drafts wrote in two steps, and its stop token in one more."""

    ended, steps = "stop", 2


class Says:
    """A generator that answers "yes" to what holds an x, and "no" to all else; its logits say so,
    and are 3 where they do."""

    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>", 258, [257])
    context = 99

    def room(self, length: int) -> int:
        return 9

    def generate(self, prompt: Any, limit: int) -> Any:
        return Written(b"yes" if ord("x") in prompt else b"no")

    def batch(self, prompts: Any, limit: int) -> list[list[int]]:
        return [[*self.generate(prompt, limit)] for prompt in prompts]


def test_answers_are_scored_in_the_order_of_their_questions() -> None:
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
             for q, a in (("long x", "yes"), ("s", "no"), ("longer", "no"), ("x", "no"))]
    steps = Counter[str]()
    assert answers.rights_of(Says(), Task("t", [], lines), steps) == [1, 1, 1, 0]
    assert steps == {"steps": 4 * 2, "steps_without": 3 + 2 + 2 + 3}


def test_answers_of_training_lines_begin_with_what_is_before_them() -> None:
    """Of each turn, with at most four tokens of what comes before."""
    lines = [Example("t", [*range(10)], [-100] * 5 + [5, 6] + [-100] + [8, 9]),
             Example("t", [3, 4], [-100, 4])]
    source: Any = SimpleNamespace(examples={"t": lines})
    assert [*answers.training_answers(source)] == [
        ([1, 2, 3, 4], [5, 6]), ([4, 5, 6, 7], [8, 9]), ([3], [4])]


def logits_of(text: bytes, end: int = 257) -> Tensor:
    """Logits that take a text: 3 for its tokens and its end."""
    return 3 * torch.eye(259)[[*text, end]]


@pytest.mark.parametrize("above, refused", [(0.0, False), (5e-5, False), (3e-4, True)])
def test_another_text_in_floats_is_refused_unless_it_is_a_near_tie(
        above: float, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree finds "n" likelier than the graph's "y", by so much of the largest logit: what the
    two may differ is 1e-4 of it for each."""
    wanted = logits_of(b"yes")
    wanted[0, ord("n")] = 3 * (1 + above)
    monkeypatch.setattr(check, "logits", lambda *_: [wanted])
    part: Any = SimpleNamespace(config=ExportConfig(precision="fp32"), shipped=None)
    source: Any = SimpleNamespace(trained=model_of(), name="base")
    if refused:
        with pytest.raises(ValueError, match="other texts than PyTorch: .* 0.0009 below"):
            check.check_shipped(part, source, Says(), [[120]])
    else:
        assert check.check_shipped(part, source, Says(), [[120]])["texts_equal"] == 1


def test_texts_are_the_same_up_to_their_end() -> None:
    """The trained model goes on after the second."""
    texts = b"yes", b"no", b"no"
    found = check.compare([logits_of(text, end) for text, end in zip(texts, (257, 7, 257))],
                          [logits_of(text) for text in texts])
    assert (found["texts"], found["texts_equal"]) == (3, 2)
    assert found["tokens_agreed"] == round(9 / 10, 4)


@pytest.mark.parametrize("settings", [
    {"precision": "int4", "block": 32}, {"precision": "fp32", "layout": "hf"},
    {"precision": "int8"}, {"precision": "fp32", "routing": "freeze"}])
def test_experts_that_placing_loses_are_seen(settings: Any, monkeypatch: pytest.MonkeyPatch,
                                             ) -> None:
    """Merged or beside the weights, rounded or not. The biases of layers stay."""
    model = small_model("llama", attention_bias=True, mlp_bias=True)
    drop_routers(randomise(add_experts(model, COUNTS, rank=2)))
    part, prompts = Part(ExportConfig(**settings), sharing_copy(model)), [[1, 2, 3, 4, 5, 6]]
    place(part, [*COUNTS])
    check.check_placed(part, model, prompts)
    monkeypatch.setattr(layers, "merged", lambda weight, layer: weight)
    for layer in expert_layers(part.shipped).values():   # those that are beside
        layer.scaling /= 2
    with pytest.raises(ValueError, match="placing the experts changed .* explains 0.0001"):
        check.check_placed(part, model, prompts)


def scored(*rows: tuple[int, int, int], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What is printed for tasks with (lost, won, other) test lines."""
    answers.show_rights({chr(97 + n): {"trained": [1] * lost + [0] * won + [1] * same,
                                "int4": [0] * lost + [1] * won + [1] * same}
                  for n, (lost, won, same) in enumerate(rows)})
    return capsys.readouterr()


@pytest.mark.parametrize("lost, won, told", [(4, 0, False), (5, 0, True), (9, 4, False),
                                             (30, 10, True)])
def test_a_loss_is_told_if_chance_does_not_explain_it(lost: int, won: int, told: bool, capsys,
                                                      ) -> None:
    said, warned = scored((lost, won, 9), capsys=capsys)
    assert "trained" in said and "int4" in said
    assert (f"a: of {9 + lost + won} test lines, the export answers {lost} wrongly that the trained"
            f" model answers rightly, and {won} rightly" in warned) == told


def test_several_tasks_share_the_chance_of_a_false_alarm(capsys) -> None:
    """5 of 5 are lost once in 32 times: too often for two tasks, and all together."""
    assert "wrongly" not in scored((5, 0, 9), (0, 0, 9), capsys=capsys)[1]
    warned = scored((5, 0, 9), (4, 0, 9), capsys=capsys)[1]
    assert warned.startswith("all tasks: of 27 test lines") and warned.count("wrongly") == 2


@pytest.mark.parametrize("count, few", [(49, True), (50, False)])
def test_too_few_lines_are_told(count: int, few: bool, capsys) -> None:
    said = scored((0, 0, count), (0, 0, 50), capsys=capsys)[0]
    assert ("too few test lines to show a loss: a 49. Ask 50" in said) == few


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
