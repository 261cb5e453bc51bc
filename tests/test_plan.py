"""What a run will need, against what autograd keeps and what a process takes."""

from __future__ import annotations

import pytest
import torch

from minismoe import plan
from minismoe.allocate import Allocation
from minismoe.config import Config
from minismoe.data import Example, collate
from minismoe.experts import add_experts, balance_loss, expert_layers, linear_layers
from minismoe.loss import supervised_losses
from minismoe.model import CausalLM

CONFIG = Config(vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=6,
                num_attention_heads=6, num_key_value_heads=2, head_dim=16, windows=(None,) * 6)


def examples(count: int = 8, longest: int = 60, shared: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [[1] * shared + torch.randint(2, 300, (longest - shared - i,),
                                         generator=generator).tolist() for i in range(count)]
    return [Example("a", ids, [-100] * (len(ids) - 4) + ids[-4:], i) for i, ids in enumerate(rows)]


def setup(every: int = 1, dtype: torch.dtype = torch.float32, config: Config = CONFIG,
          experts: int = 3, **options) -> tuple[plan.Setup, CausalLM]:
    """A model with experts on each `every`-th matrix, and what the plan knows of it."""
    model = CausalLM(config).to(dtype)
    allocation = Allocation(dict.fromkeys(list(linear_layers(model))[::every], experts), rank=4)
    return plan.Setup(config, allocation, dtype, **options), add_experts(model, allocation)


def autograd_keeps(model: CausalLM, batch: list[Example]) -> int:
    """Bytes of the storages that the graph of a loss holds, parameters aside."""
    held: dict[int, torch.UntypedStorage] = {}
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in frozen:
            held[storage.data_ptr()] = storage
        return t

    ids, mask, labels = collate(batch, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        losses, _ = supervised_losses(model, ids, mask, labels, share_prefix=True)
        total = losses.sum() + balance_loss(expert_layers(model).values(), mask)
    total.backward()
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("longest", [60, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, longest: int, every: int,
                                             experts: int) -> None:
    seen, model = setup(every, dtype, experts=experts)
    batch = examples(longest=longest)
    found = sum(plan.kept(seen, plan.Shape.of(batch)))
    assert found == pytest.approx(autograd_keeps(model, batch), rel=0.03)
