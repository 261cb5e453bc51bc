"""Calibration samples, and their way through a decoder, layer by layer.

The hidden states of the samples are kept (8,000 tokens of 2,048 floats: 64 MB), so that each layer
runs once on each batch, however much its sums take: those of one layer alone are in memory.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.tasks import Batch, Example, probe_batches
from ..io.files import naming
from ..io.progress import progress_bar
from ..method.experts import ExpertLinear, linear_layers
from ..method.freeze import TaskFits, fit_group
from ..method.hooks import measuring
from ..method.loss import IGNORE
from ..method.moments import gram
from ..model.decoder import CausalLM, Decoder
from ..model.tokens import Tokens
from .gptq import DAMPING, TIED_DAMPING, inverse_factor
from .leaves import EMBEDDING, HEAD
from .settings import ExportConfig, Source
from .weights import GraphFormat

SAMPLES, BATCH = 64, 16                      # of each task, and at once
Samples = Mapping[str, Sequence[Example]]    # by task; those of --prompts have none
Batches = Mapping[str, Sequence[Batch]]      # by task
Factors = Mapping[str, Tensor]               # module -> `inverse_factor` (K, K) of what it reads


def shuffled_samples(config: ExportConfig, source: Source, unseen: bool = False) -> Samples:
    """What an export is calibrated on: examples of the run, or of one task; or lines of --prompts.

    unseen: of the run's examples, those that it was not trained on, if it has any.
    """
    samples = {task: (source.unseen.get(task) if unseen else None) or examples
               for task, examples in source.examples.items() if config.task in (None, task)}
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
    render, most = source.tokenizer.render, source.model.config.max_position_embeddings
    ids = [source.tokenizer.encode(render(p, add_generation_prompt=True))[0] for p in prompts]
    return [Example("prompts", tokens[:most], [IGNORE] * len(tokens[:most])) for tokens in ids]


def calibration_batches(samples: Samples, source: Source) -> dict[str, list[Batch]]:
    """Padded batches of the first SAMPLES, by task, on the model's device."""
    device, pad_id = source.model.lm_head.weight.device, source.tokenizer.pad_id
    return {name: [*probe_batches(examples, SAMPLES, BATCH, pad_id, device)]
            for name, examples in samples.items()}


class States:
    """The hidden states of one batch, before one layer after another."""

    def __init__(self, decoder: Decoder, batch: Batch):
        ids, self.mask, *_ = batch
        self.tokens = Tokens(ids, self.mask, decoder.config, decoder.norm.weight.device)
        self.x, self.ropes = decoder.enter(self.tokens)

    def run(self, layer: nn.Module, rope: str) -> None:
        """Go through a layer, whose rotary angles are of the kind `rope`."""
        self.x = layer(self.x, self.tokens, self.ropes[rope])


@torch.no_grad()
def layer_by_layer(model: CausalLM, batches: Batches, fits: TaskFits,
                   forms: Sequence[GraphFormat]) -> Iterator[tuple[list[str], Factors]]:
    """Names of the linear layers of one decoder layer after another, once their mixtures are in
    `fits`, see `fit_group`; and the factors of those that a graph stores in 4 bits, of one of these
    forms. Last come the embedding and, if it is not tied, the head.

    model: the run's, with the experts as they were trained. Without batches there is no factor.
    """
    def in_4_bits(name: str) -> bool:
        return any(storage.bits == 4 for form in forms for storage in form.options_of(name))

    def measured(name: str, layer: nn.Linear) -> bool:
        return in_4_bits(name) or isinstance(layer, ExpertLinear) and (
            layer.router is not None and any(name in of_task for of_task in fits.values()))

    if not any(measured(name, layer) for name, layer in linear_layers(model).items()):
        batches = {}
    decoder, tied = model.model, model.config.tie_word_embeddings
    with measuring(model):
        states = {task: [States(decoder, b) for b in of_task] for task, of_task in batches.items()}
        bar = progress_bar(decoder.layers, "freeze and round", unit="layer")
        for i, (layer, rope) in enumerate(zip(bar, decoder.config.ropes)):
            linears = {f"model.layers.{i}.{name}": m for name, m in linear_layers(layer).items()}
            moments = fit_group({name: m for name, m in linears.items() if measured(name, m)}, {
                task: [(state.mask, partial(state.run, layer, rope)) for state in of_task]
                for task, of_task in states.items()}, fits, packed=True)
            to_round = {name: M for name, M in moments.items() if in_4_bits(name)}
            factors = {M: inverse_factor(M) for M in {*to_round.values()}}
            yield [*linears], {name: factors[M] for name, M in to_round.items()}
        name, damping = (EMBEDDING, TIED_DAMPING) if tied else (HEAD, DAMPING)
        of_head = dict[str, Tensor]()
        if in_4_bits(name) and states:
            read = [decoder.leave(state.x, state.tokens).float()
                    for of_task in states.values() for state in of_task]
            of_head = {name: inverse_factor(gram(torch.cat(read)), damping)}
    yield [EMBEDDING, *[HEAD] * (not tied)], of_head
