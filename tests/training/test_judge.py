"""Loss and token accuracy beside a plain loop over tokens."""

import pytest
import torch
from tiny import save_bytes_model

from minismoe.data.tasks import Example
from minismoe.method.loss import IGNORE
from minismoe.model.checkpoint import load_model
from minismoe.training import evaluate
from minismoe.training.evaluate import alike, token_scores


@pytest.mark.parametrize("head_rows", [2, 512])
def test_token_scores_are_those_of_a_plain_loop(tmp_path, monkeypatch, head_rows) -> None:
    monkeypatch.setattr("minismoe.method.loss.CHUNK", 259 * head_rows)
    model = load_model(save_bytes_model(tmp_path / "model"))
    generator = torch.Generator().manual_seed(0)
    losses, rights, examples = [], [], []
    for length in (7, 4, 9, 6):
        ids = torch.randint(0, 259, (length,), generator=generator).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].double()
        ids[-1] = logits[-2].argmax().item()             # one token of each is the likeliest
        labels = [IGNORE] * (length - 3) + ids[-3:]
        examples.append(Example("t", ids, labels))
        for i in range(length - 3, length):
            losses.append(-logits[i - 1].log_softmax(-1)[ids[i]].item())
            rights.append(logits[i - 1].argmax().item() == ids[i])
    loss, right, lines = token_scores(model, examples, 0, batch_size=3)
    assert loss == pytest.approx(sum(losses) / 12, abs=1e-5)
    assert right == sum(rights) / 12 >= 4 / 12
    assert lines == sum(all(rights[i:i + 3]) for i in range(0, 12, 3))


def test_batches_hold_texts_of_similar_length(monkeypatch, tmp_path) -> None:
    """One long line among short ones is computed by itself, and the head runs once on each."""
    model, seen = load_model(save_bytes_model(tmp_path / "model")), []
    monkeypatch.setattr(model.lm_head, "forward", lambda x: pytest.fail("the head runs again"))
    pack = evaluate.Tokens
    monkeypatch.setattr(evaluate, "Tokens", lambda ids, *rest, **more: seen.append(
        tuple(ids.shape)) or pack(ids, *rest, **more))
    lengths = [9, 5, 300, *range(10, 39)]
    token_scores(model, [Example("t", [i] * n, [IGNORE] * (n - 1) + [i])
                         for i, n in enumerate(lengths)], 0)
    assert seen == [(1, 300), (20, 38), (10, 18), (1, 5)]
    assert alike([3, 4, 4, 4, 2], 2) == [[1, 2], [3, 0], [4]]
