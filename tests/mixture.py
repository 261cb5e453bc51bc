"""A tiny mixture of experts and its batches, for the tests of freezing, placing and rounding."""

import torch
from tiny import SMALL, randomise, small_model
from torch import Tensor, nn

from minismoe.method.experts import ExpertLinear, add_experts, expert_layers

V, D = SMALL["vocab_size"], SMALL["hidden_size"]
COUNTS = {f"model.layers.{i}.{name}": count for i in range(2) for name, count in {
    "self_attn.q_proj": 3, "self_attn.k_proj": 2, "self_attn.v_proj": 1, "self_attn.o_proj": 4,
    "mlp.gate_proj": 2, "mlp.up_proj": 3, "mlp.down_proj": 3}.items()}
ROUTED = [name for name, count in COUNTS.items() if count > 1]


def model_of(kind: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny random model with experts: ours, or "hf-llama"."""
    model = small_model(kind, tie_word_embeddings=True).to(dtype)
    return randomise(add_experts(model, COUNTS, rank=2)).eval()


def batch(seed: int, rows: int = 8, pad: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of rows of 3 to 12 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (rows, 1), generator=g)
    mask = (torch.arange(12) < lengths).long()
    mask = mask.flip(1) if pad == "left" else mask
    ids = torch.randint(0, V, mask.shape, generator=g)
    return ids, mask, ids


def frozen_layer(linear: nn.Linear, experts: int, rank: int, scale: float = 0.2, seed: int = 0,
                 ) -> ExpertLinear:
    """Random experts on a layer, without a router."""
    layer = ExpertLinear(linear, experts, rank, alpha=3.0 * rank, top_k=2)
    g = torch.Generator().manual_seed(seed)
    for p, factor in ((layer.lora_A, scale), (layer.lora_B, scale / layer.scaling)):
        p.data = torch.randn(p.shape, generator=g) * factor
    layer.router = None
    return layer


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace each layer with experts and no router, in place, by a plain one, to whose weight they
    are added one by one in float64."""
    for name, layer in expert_layers(model).items():
        assert layer.router is None, name
        weight = layer.dense()
        total = weight.double()
        for A, B in zip(layer.lora_A.double(), layer.lora_B.double()):
            total = total + layer.scaling * B.T @ A
        new = nn.Linear(layer.in_features, layer.out_features, device="meta")
        new.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        new.bias = layer.bias
        model.set_submodule(name, new)
