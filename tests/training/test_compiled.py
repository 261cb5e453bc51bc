"""Compiled layers: the same numbers, few graphs whatever the lengths, and a fall back."""

import random
import sys

import pytest
import torch
from tiny import examples, tiny
from torch._dynamo.utils import counters

from minismoe.data.tasks import Example
from minismoe.model.decoder import CausalLM
from minismoe.training import compiled
from minismoe.training.compiled import compiled_layers
from minismoe.training.evaluate import generate, token_scores
from minismoe.training.loop import TrainConfig, Trainer, train


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.compiler.set_stance("default")


def batches(count: int) -> list[list[Example]]:
    """Batches of 2 to 8 rows of 3 to 40 tokens, some of which begin alike."""
    draw, found = random.Random(0), []
    for _ in range(count):
        rows = []
        for row in range(draw.randint(2, 8)):
            ids = [1, 2, 3, 4, *(draw.randrange(50) for _ in range(draw.randint(0, 36)))]
            rows.append(Example("a", ids, [-100, -100, *ids[2:]], row))
        found.append(rows)
    return found


@pytest.mark.parametrize("recompute, count", [
    (False, 50), pytest.param(True, 3, marks=pytest.mark.slow)])
def test_no_batch_compiles_anew_and_the_numbers_are_those_of_plain_layers(
        recompute: bool, count: int) -> None:
    # All layers differ in what they hold, and some groups have layers of one expert and of more.
    models = [tiny(1, 3, 2, 2, 1, layers=2 if recompute else 3) for _ in range(2)]
    cfg = TrainConfig(recompute=recompute)
    trainers = Trainer(models[0], cfg, 0), Trainer(models[1], cfg, 0, same_shapes=True)
    settings = torch._dynamo.config
    before = settings.recompile_limit
    with compiled_layers(models[1], lambda: None, backend="eager"):
        for batch in batches(count):
            results = []
            for trainer in trainers:
                sums = trainer.gradients(batch, 8)
                results.append((sums, [p.grad for p in trainer.parameters.values()]))
            torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        # Nor does what runs between and after the steps.
        losses = [token_scores(model, batch, 0)[0] for model in models]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        generate(models[1], [[1, 2, 3]], 2, [])
        assert settings.recompile_limit == 4 * len(models[1].model.layers)
    trainers[1].gradients(batch, 8)                         # the layers are as they were written
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert settings.recompile_limit == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
def test_a_compiled_run_is_resumed_to_the_same_bits(tmp_path, capsys) -> None:
    found = []
    for stops in ([2], [1, 2]):
        run = tmp_path / str(len(stops))
        for epochs in stops:                             # the second goes on from the first
            torch._dynamo.reset()
            model = tiny()
            cfg = TrainConfig(epochs=2, batch_size=8, lr=1e-2, compile="on", checkpoint_every=1)
            if epochs == 1:
                import minismoe.training.loop as training
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(training, "_signal_to_any", lambda signals: 2)
                    with pytest.raises(KeyboardInterrupt):
                        train(model, examples(), cfg, run, 0)
            else:
                train(model, examples(), cfg, run, 0, resume=len(stops) == 2)
        found.append([p for p in model.parameters() if p.requires_grad])
    assert "compiled in" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_be_compiled_is_trained_without(tmp_path, capsys, monkeypatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr("torch._dynamo.backends.inductor.inductor", broken)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    models = tiny(), tiny()
    for model, asked in zip(models, ("off", "on")):
        train(model, examples(), TrainConfig(epochs=1, compile=asked), tmp_path / asked, 0)
    said = capsys.readouterr().err
    assert "the layers cannot be compiled, and run without" in said
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("asked, device, steps, said", [
    ("off", "cuda", 10**6, ""), ("auto", "cpu", 10**6, ""), ("auto", "cuda", 10, ""),
    ("on", "cpu", 0, ""),
    ("on", "cpu", 1, "compiling"), ("auto", "cuda", 10**6, "compiling")])
def test_auto_compiles_where_it_pays(asked, device, steps, said, capsys, monkeypatch) -> None:
    model = tiny()
    monkeypatch.setattr("minismoe.training.compiled.find_spec", lambda name: name)
    monkeypatch.setattr(CausalLM, "lm_head", type("Head", (), {"weight": type(
        "Weight", (), {"device": torch.device(device)})}), raising=False)
    monkeypatch.delitem(model._modules, "lm_head")
    assert compiled.wanted(model, asked, steps) == (said == "compiling")
    assert capsys.readouterr().out.count("compiling") == (said == "compiling")
