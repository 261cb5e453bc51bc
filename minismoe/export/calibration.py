"""Calibration texts, and their way through the layers of a decoder.

The hidden states of all texts are kept (8,000 tokens of 2,048 floats: 64 MB), so that each layer
runs once on each batch. What the matrices of one layer read is in memory, and no other layer's.
"""

import os
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.tasks import Batch, Example, probe_batches
from ..io.files import naming
from ..method.experts import linear_layers
from ..method.hooks import hooked, reads
from ..method.loss import IGNORE, supervised_tokens
from ..method.token_weights import token_weights
from ..model.decoder import CausalLM
from ..model.tokens import Tokens
from .gptq import DAMPING, factor
from .layers import HEAD
from .settings import ExportConfig, Source

TOKENS, OF_TASK, LONGEST = 8192, 4096, 512   # of all tasks, of one, and of a text: its last ones
BATCH = 32                       # texts at once
EVEN = 0.1                       # the part of a token's count that no answer decides
Samples = Mapping[str, Sequence[Example]]    # by task; those of --prompts have none
Batches = Mapping[str, Sequence[Batch]]      # by task


def shuffled_samples(config: ExportConfig, source: Source) -> Samples:
    """What an export is calibrated on: examples of the run, or lines of --prompts."""
    samples: Samples = source.examples
    if config.prompts:
        samples = {"prompts": unlabelled(config.prompts, source)}
    return {name: random.Random(0).sample(e, len(e)) for name, e in samples.items()}


def unlabelled(file: str, source: Source) -> list[Example]:
    """One example a line of a file, without labels, cut to the model's positions. Raises ValueError
    for a file that is empty or not UTF-8."""
    with naming(f"{file} is no UTF-8 text", ValueError):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    prompts = [[{"role": "user", "content": line}] for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    most = source.trained.config.max_position_embeddings
    ids = [source.tokenizer.encode_chat(p, True).ids for p in prompts]
    return [Example("prompts", tokens[:most], [IGNORE] * len(tokens[:most])) for tokens in ids]


def calibration_batches(samples: Samples, source: Source) -> dict[str, list[Batch]]:
    """Padded batches of the first examples of each task: two at least, whose tokens are the task's
    share of TOKENS or OF_TASK. What a text and the one before begin with alike counts once."""
    batches, pad_id = {}, source.tokenizer.pad_id
    for name, examples in samples.items():
        chosen, left = list[Example](), min(OF_TASK, TOKENS // len(samples))
        for example in examples:
            cut = Example(name, example.ids[-LONGEST:], example.labels[-LONGEST:])
            shared = len(os.path.commonprefix([cut.ids, chosen[-1].ids])) if chosen else 0
            left -= len(cut.ids) - shared
            if left < 0 and len(chosen) >= 2:
                break
            chosen.append(cut)
        batches[name] = [*probe_batches(chosen, len(chosen), BATCH, pad_id)]
    return batches


class State:
    """A batch on its way through a decoder. What its texts begin with alike is there once."""

    def __init__(self, model: CausalLM, batch: Batch):
        (ids, mask, labels), device = batch, model.model.norm.weight.device
        numbers = mask.cumsum(1)                                 # of tokens in their texts, from 1
        ends = numbers == mask.sum(1, keepdim=True)              # what lies before may be shared
        self.tokens = Tokens(ids, mask, model.config, device, ends)
        self.tokens.read = None                                  # all rows are read
        places = torch.arange(len(ids))[:, None] * ids.shape[1] + numbers - 1
        answers = places[supervised_tokens(mask, labels)[0]]
        self.answers = self.tokens.sources[answers.to(device)]   # (S,)
        self.x, self.ropes = model.model.embed(self.tokens)

    def run(self, layer: nn.Module, rope: str) -> None:
        """Go through a layer, whose rotary angles are of the kind `rope`."""
        self.x = layer(self.x, self.tokens, self.ropes[rope])

    def token_weights(self, model: CausalLM, signs: Tensor) -> dict[str, Tensor]:
        """The `token_weights` (N,) of the linear layers, by name, and of the head, for signs of the
        answers (S,)."""
        names: dict[nn.Module, str] = {m: name for name, m in linear_layers(model).items()}
        run = partial(model.model.rows, self.tokens, recompute=True)
        with hooked([model.model.embed_tokens], lambda layer, ids, x: x.requires_grad_()):
            found = token_weights(
                names, model.lm_head, run, self.answers, signs.to(self.answers))
        return {names.get(layer, HEAD): w for layer, w in found.items()}


class Calibration:
    """The T calibration tokens on their way through a decoder. A token that texts of a batch begin
    with alike is one of them, and counts as often as it is there."""

    def __init__(self, model: CausalLM, batches: Batches):
        self.model, self.token_weights = model, dict[str, Tensor]()      # (T,) each, by module
        self.states = [State(model, batch) for of_task in batches.values() for batch in of_task]
        if self.states:
            self.times = torch.cat([state.tokens.repeats for state in self.states])      # (T,)

    def weigh(self) -> None:
        """Let tokens count as the answers depend on them, if the texts have answers."""
        if any(len(state.answers) for state in self.states):
            generator = torch.Generator().manual_seed(0)
            found = [state.token_weights(self.model, 1 - 2 * torch.randint(
                2, state.answers.shape, generator=generator)) for state in self.states]
            weights = {name: torch.cat([of[name] for of in found]) for name in found[0]}
            if all(w.isfinite().all() for w in weights.values()):
                self.token_weights = weights

    def run_layer(self, number: int) -> Mapping[tuple[str, ...], Tensor | None]:
        """Run a decoder layer on all texts. Returns what its linear layers read, x (T, D), by the
        names of those that read the same; without texts, None for each layer."""
        layer, rope = self.model.model.layers[number], self.model.config.ropes[number]
        linears = {f"model.layers.{number}.{name}": m for name, m in linear_layers(layer).items()}
        if not self.states:
            return {(name,): None for name in linears}
        return reads(linears, [partial(state.run, layer, rope) for state in self.states])

    def of_head(self) -> Tensor | None:
        """What the head reads, after all layers, (T, D); None without texts."""
        decoder = self.model.model
        read = [decoder.head_input(state.x, state.tokens).float() for state in self.states]
        return torch.cat(read) if read else None

    def factor(self, names: Sequence[str], x: Tensor | None, damping: float = DAMPING,
               ) -> Tensor | None:
        """The `factor` of what some matrices read, x (T, D)."""
        return None if x is None else factor(x * self.counts(names, x).sqrt()[:, None], damping)

    def counts(self, names: Sequence[str], x: Tensor) -> Tensor:
        """How much each token counts for some matrices, (T,), in the dtype of x. A token that is
        there c times counts EVEN c + (1 - EVEN) w, where w sums its weights for these matrices,
        scaled so that all w add up to what all c do. Without answers it counts c."""
        counts = self.times.to(x)
        if not self.token_weights:
            return counts
        w = torch.stack([self.token_weights[name] for name in names]).sum(0).to(x)
        w *= counts.sum() / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
        return EVEN * counts + (1 - EVEN) * w
