"""A tiny mixture of experts and its calibration batches, for the tests of freezing and rounding."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from tiny import SMALL, randomise, small_model
from torch import Tensor, nn

from minismoe.export.settings import ExportConfig
from minismoe.export.ship import Part, freeze_and_round, sharing_copy
from minismoe.method.experts import add_experts, expert_layers
from minismoe.method.freeze import Fit, TaskFits, frozen_layer, merged, no_fits
from minismoe.method.loss import IGNORE

V, D = SMALL["vocab_size"], SMALL["hidden_size"]
COUNTS = {f"model.layers.{i}.{name}": count for i in range(2) for name, count in {
    "self_attn.q_proj": 3, "self_attn.k_proj": 2, "self_attn.v_proj": 1, "self_attn.o_proj": 4,
    "mlp.gate_proj": 2, "mlp.up_proj": 3, "mlp.down_proj": 3}.items()}
ROUTED = [name for name, count in COUNTS.items() if count > 1]
Data = tuple[Tensor, Tensor, Tensor]


def model_of(kind: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny random model with experts: ours, or "hf-llama"."""
    model = small_model(kind, tie_word_embeddings=True).to(dtype)
    return randomise(add_experts(model, COUNTS, rank=2)).eval()


def batch(seed: int, rows: int = 8, pad: str = "right") -> Data:
    """Rows of 3 to 12 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (rows, 1), generator=g)
    mask = (torch.arange(12) < lengths).long()
    mask = mask.flip(1) if pad == "left" else mask
    ids = torch.randint(0, V, mask.shape, generator=g)
    return ids, mask, ids


def tasks(rows: int = 8, pad: str = "right") -> dict[str, list[Data]]:
    return {t: [batch(10 * i + j, rows, pad) for j in range(3)] for i, t in enumerate("ab")}


def fit(model: Any, data: dict[str, list[Any]]) -> TaskFits:
    """The fits of an export: of each task, and of all of them together (None); all tokens count
    alike, as there are no answers."""
    data = {task: [(ids, mask, torch.full_like(ids, IGNORE)) for ids, mask, *_ in batches]
            for task, batches in data.items()}
    fits = no_fits(expert_layers(model), data, (None, *data))
    nothing = Part(ExportConfig(routing="dynamic", precision="fp32"), sharing_copy(model), {})
    freeze_and_round(nothing, model, data, fits)
    return fits


def frozen(model: Any, fits: Mapping[str, Fit]) -> Any:
    """A copy of a model with one LoRA in place of each mixture."""
    copied = copy.deepcopy(model)
    for name, layer in expert_layers(copied).items():
        copied.set_submodule(name, frozen_layer(layer, fits[name]))
    return copied


@torch.no_grad()
def merge(model: nn.Module, fits: Mapping[str, Fit]) -> None:
    """Replace each adapted layer, in place, by a plain one with the fit merged into its weight."""
    for name, layer in expert_layers(model).items():
        new = nn.Linear(layer.in_features, layer.out_features, device="meta")
        new.weight = nn.Parameter(merged(layer.dense(), fits[name]), requires_grad=False)
        new.bias = layer.bias
        model.set_submodule(name, new)
