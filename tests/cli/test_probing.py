"""How far halves of a probe agree, by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minismoe.cli import probing
from minismoe.cli.flags import AllocationConfig
from minismoe.data.tasks import Example


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_overlap_of_halves_is_that_by_hand(monkeypatch, capsys, count: int) -> None:
    """Token i of a sample stands for row i of the norms; two of four matrices are voted for."""
    norms = torch.rand(count, 4, generator=torch.Generator().manual_seed(count)).double()
    model = nn.Module()
    for name in "abcd":
        setattr(model, name, nn.Linear(3, 3))
    model.lm_head = nn.Linear(3, 3)
    inputs = SimpleNamespace(
        model=model, tokenizer=SimpleNamespace(pad_id=0),
        encoded={"t": [Example("t", [i], [i]) for i in range(count)]})
    monkeypatch.setattr(probing, "probe", lambda _, tasks: SimpleNamespace(
        samples={"t": norms[tasks["t"][0][0][:, 0]]}))
    scores = probing.measure(AllocationConfig(keep=0.5, group="all"), inputs, size=3)
    rows = scores.samples["t"].tolist()
    assert sorted(rows) == sorted(norms.tolist())
    even, odd = (set(sorted(range(4), key=lambda m: -sum(row[m] for row in half))[:2])
                 for half in (rows[::2], rows[1::2]))
    expected = f"{len(even & odd) / 2:.2f}" if count > 1 else "-"
    assert capsys.readouterr().out.splitlines()[-1].split() == ["t", str(count), expected]
