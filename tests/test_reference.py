"""The reference runs by itself, shows what it says, and imports nothing of ours."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minismoe import reference

FILE = Path(reference.__file__)


def test_the_reference_is_one_page_that_imports_torch_alone() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    imported = {name.name.split(".")[0] for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(ast.parse(text))
                 if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_the_toy_learns_and_freezing_loses_less_by_each_fit() -> None:
    done = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "2. experts" in lines[2] and re.search(r"left 1 +right 1 +join 2 +head 0", lines[2])
    before, after, *frozen = ([float(x) for x in re.findall(r"task \d (\S+)", line)]
                              for line in lines[3:8])
    assert all(b < a / 10 for a, b in zip(before, after))
    assert all(a < 4 * b for row in frozen for a, b in zip(row, after))
    lost = [float(x) for x in re.findall(r"loses (\S+)%", done.stdout)]
    assert len(lost) == 3 and lost[0] > lost[1] > 1.5 * lost[2]


def test_top_k_gates_equal_those_by_hand() -> None:
    layer = reference.Mixture(torch.eye(1), None, torch.ones(3, 1, 1), torch.ones(3, 1, 1),
                              torch.tensor([[0.0], [1.0], [2.0]]), 2, 1.0)
    gates = layer.gates(torch.ones(1, 1))
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(gates, torch.stack([0 * e, 1 / (1 + e), e / (1 + e)])[None])
    torch.testing.assert_close(layer(torch.ones(2, 3, 1)), torch.full((2, 3, 1), 2.0))


@pytest.mark.parametrize(("keep", "expected"), [
    (0.5, {"q": 1, "k": 0, "v": 2, "o": 1}), (0.01, {"q": 1, "k": 0, "v": 1, "o": 0})])
def test_votes_equal_counts_by_hand(keep: float, expected: dict[str, int]) -> None:
    scores = {"1": {"q": 9.0, "k": 1.0, "v": 5.0, "o": 2.0},
              "2": {"q": 0.1, "k": 0.2, "v": 0.9, "o": 0.3}}
    assert reference.vote(scores, ["qkvo"], keep) == expected


def test_half_votes_round_up_as_they_are_written() -> None:
    modules = [str(i) for i in range(100)]         # 0.145 * 100 is a little below 14.5 in floats
    assert sum(reference.vote({"1": dict.fromkeys(modules, 1.0)}, [modules], 0.145).values()) == 15


def test_balance_is_perfect_where_all_experts_are_chosen() -> None:
    loss = reference.balance_loss(torch.randn(5, 3, dtype=torch.float64), k=4)
    assert abs(loss.item() - 1) < 1e-12
