"""loss.py against F.cross_entropy on full logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import SMALL, Shapes, padded, randomise, small_model
from torch import Tensor, nn

from minismoe.method.experts import add_experts
from minismoe.method.loss import IGNORE, head_losses, supervised_losses, supervised_tokens
from minismoe.model.tokens import Tokens

V, D = SMALL["vocab_size"], SMALL["hidden_size"]
COUNTS = {"model.layers.0.self_attn.q_proj": 1, "model.layers.1.mlp.down_proj": 3}


def model_of(kind: str = "llama", **sizes: Any) -> nn.Module:
    """Ours or transformers' ("hf-llama"), frozen, with trained experts."""
    return randomise(add_experts(small_model(kind, **sizes), COUNTS, rank=2))


def batch(pad: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 9, 4 and 6 tokens; two stretches are supervised in the first, none in the second."""
    ids, mask = padded([9, 4, 6], pad)
    supervised = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 1], [0] * 9, [1, 0, 0, 0, 1, 1, 0, 0, 0]])
    if pad == "left":
        supervised[2] = supervised[2].roll(3)
    return ids, mask, torch.where(supervised.bool(), ids, IGNORE)


def reference(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and rows from whole logits, a row at a time and without its pads."""
    losses, rows = [], []
    for row in range(len(ids)):
        real = mask[row].bool()
        logits = model(ids[row, real][None])
        logits = getattr(logits, "logits", logits)[0, :-1]
        targets = labels[row, real][1:]
        loss = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
        losses.append(loss[targets != IGNORE])
        rows += [row] * int((targets != IGNORE).sum())
    return torch.cat(losses), torch.tensor(rows)


def trained_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad],
                            strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(("chunk", "pad"), [(1, "right"), (3 * V + 1, "left"), (1 << 24, "right")])
@pytest.mark.parametrize("kind", ["llama", "hf-llama"])
def test_equals_cross_entropy_of_full_logits(kind: str, pad: str, chunk: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minismoe.method.loss.CHUNK", chunk)
    model = model_of(kind)
    data = batch(pad)
    losses, rows = supervised_losses(model, *data)
    expected, expected_rows = reference(model, *data)
    assert losses.dtype == torch.float32
    assert rows.tolist() == expected_rows.tolist() == [0] * 5 + [2] * 2
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(len(losses), generator=torch.Generator().manual_seed(2))
    found = trained_gradients(model, (losses * upstream).sum())
    wanted = trained_gradients(model, (expected * upstream).sum())
    for name, gradient in wanted.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_smoothed_targets_change_the_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's by its own smoothing."""
    monkeypatch.setattr("minismoe.method.loss.CHUNK", 3 * V)
    hidden, head = torch.randn(7, D, requires_grad=True), torch.randn(V, D)
    targets, upstream, smoothing = torch.arange(7), torch.randn(7), torch.arange(7) / 20
    losses = head_losses(hidden, head, targets, smoothing)
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ head.T, targets, reduction="none"))
    (found,) = torch.autograd.grad((losses * upstream).sum(), hidden)
    smooth = torch.stack([F.cross_entropy(logits, target, label_smoothing=share) for logits, target,
                          share in zip(hidden @ head.T, targets, smoothing.tolist())])
    (wanted,) = torch.autograd.grad((smooth * upstream).sum(), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_sums_in_float32() -> None:
    model, (ids, mask, labels) = model_of().bfloat16(), batch()
    states: list[Tensor] = []
    hook = model.model.register_forward_hook(lambda m, i, output: states.append(output))
    losses, _ = supervised_losses(model, ids, mask, labels)
    hook.remove()
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    logits = (states[0][rows, columns] @ model.lm_head.weight.T).float()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(
        logits, labels[rows, columns + 1], reduction="none"), rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in trained_gradients(model, losses.sum()).values())


@pytest.mark.parametrize("kind", ["llama", "hf-llama"])
def test_full_logits_never_exist(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minismoe.method.loss.CHUNK", 3 * V)
    model, data = model_of(kind), batch()
    with Shapes() as shapes:
        losses, _ = supervised_losses(model, *data)
        losses.mean().backward()
    logits = [shape for _, shape in shapes.seen if shape[-1:] == (V,) and shape != (D, V)]
    assert max(shape[0] for shape in logits) == 3
    assert all(len(shape) == 2 for shape in logits)
    products = [shape[0] for name, shape in shapes.seen if name == "mm" and shape[-1:] == (V,)]
    assert products == [3, 3, 1]                 # 7 supervised tokens, prompts and pads not at all


def test_the_gradient_is_not_made_where_nobody_asks() -> None:
    model, data = model_of(), batch()
    with Shapes() as asked:
        supervised_losses(model, *data)
    with torch.no_grad(), Shapes() as shapes:
        losses, _ = supervised_losses(model, *data)
    assert not losses.requires_grad
    made = [{name for name, _ in found.seen} for found in (asked, shapes)]
    assert "scatter_add_" in made[0] and "scatter_add_" not in made[1]
    torch.testing.assert_close(losses, reference(model, *data)[0])


def test_a_first_token_has_no_loss_on_whichever_side_the_pads_are() -> None:
    """What would predict it is a pad on the left side, and nothing on the right one."""
    model = model_of("hf-llama")
    for pad in ("right", "left"):
        ids, mask, _ = batch(pad)
        data = ids, mask, torch.where(mask.bool(), ids, IGNORE)            # every real token
        losses, rows = supervised_losses(model, *data)
        assert rows.bincount().tolist() == [8, 3, 5]
        torch.testing.assert_close(losses, reference(model, *data)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_heads_that_do_more_than_multiply_are_refused(setting: str) -> None:
    model = model_of("hf-llama")
    for harmless in (None, 1, 1.0):
        setattr(model.config, setting, harmless)
        supervised_losses(model, *batch())
    setattr(model.config, setting, 30.0)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM.*{setting}"):
        supervised_losses(model, *batch())
    setattr(model.config, setting, None)
    model.lm_head.bias = nn.Parameter(torch.ones(V))
    with pytest.raises(ValueError, match="bias"):
        supervised_losses(model, *batch())


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", ["prefix", "supervised", "groups", "all the same",
                                  "pads on the left"])
def test_a_shared_prefix_changes_nothing(case: str, window: int | None) -> None:
    """Computed once for all rows, up to where a loss is read: losses and gradients are those of
    every row by itself."""
    model = model_of("mistral", sliding_window=window).double()
    ids, mask, labels = batch("left" if case == "pads on the left" else "right")
    labels[:, :7 if case == "groups" else 4] = IGNORE
    if case == "groups":                 # two rows begin with 6 tokens alike, and all with 2
        ids, mask, labels = (t[[1, 0, 2]] for t in (ids, mask, labels))
        ids[:, :2], ids[2, :6] = ids[0, :2], ids[1, :6]
        assert mask[1:, :6].all()
    else:
        ids[:, :3] = ids[0, :3]
    if case == "supervised":
        labels[:, 1:3] = ids[:, 1:3]
    if case == "all the same":
        ids, mask, labels = (t[:1].expand(3, -1) for t in (ids, mask, labels))
    computed: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda m, x, y: computed.append(len(x[0])))
    found = []
    for shared in (False, True):
        if shared:
            needed = supervised_tokens(mask, labels)[0]
            tokens = Tokens(ids, mask, model.config, torch.device("cpu"), needed)
            targets = F.pad(labels[:, 1:], (0, 1))[needed]
            losses = head_losses(model.model.rows(tokens), model.lm_head.weight, targets)
        else:
            losses, _ = supervised_losses(model, ids, mask, labels)
        model.zero_grad()
        (losses * torch.arange(1.0, len(losses) + 1)).sum().backward()
        found.append([losses.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for plain, once in zip(*found, strict=True):
        torch.testing.assert_close(once, plain, rtol=1e-9, atol=1e-12)
    saved = {"groups": 2 * 2 + 4, "all the same": 2 * 5, "pads on the left": 0, "supervised": 0}
    assert computed[0] - computed[1] == saved.get(case, 2 * 3)
