"""What it is worth that each matrix gets bits of its own: plain ways, the probe's, and controls.

    python tests/benchmarks/bits.py RUN [--size MB] [--lines 24]

Merges the mixture of a run once, and rounds each matrix to 4 bits in blocks of 128 and of 32 (by
GPTQ), and to 8 in blocks of 128. Prints, for each way to choose among them, the megabytes of
weights, KL(merged float32 model || rounded) a token on test lines with their right answers, the
same on the answers' tokens alone, and what the harm of method/bits.py predicts. Tokens that all
lines of a task begin with are left out. The controls spend as many bytes as --size: at random, by
the error of the weights alone, by the first-order score <gradient, dW>, and by llama.cpp's rule.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import torch
from compare_report import table
from mixture import merge
from torch import Tensor
from tqdm import tqdm

import export
from minismoe.cli import script
from minismoe.data.tasks import Example, collate, encode
from minismoe.export.calibration import calibration_batches
from minismoe.export.layers import matrix, put_weight
from minismoe.export.part import Part, sharing_copy
from minismoe.export.plan import with_precision
from minismoe.export.rounding import change, harm_of
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.ship import fits_to_make, freeze_and_round
from minismoe.io.flags import above_zero, positive
from minismoe.method.bits import spend, total
from minismoe.method.loss import supervised_losses, supervised_tokens
from minismoe.model.checkpoint import load_adapter, load_model
from minismoe.model.decoder import CausalLM
from minismoe.model.quantize import Blocks, BlockWeight, quantize
from minismoe.model.tokens import Tokens

Chosen = dict[str, int]                      # module -> number of its option
Values = Mapping[str, Sequence[float]]       # module -> a value of each of its options
SMALL, MIDDLE, LARGE = range(3)              # 4 bits in blocks of 128, of 32, and 8 bits
DRAWS, GRADIENT = 3, 64                      # random choices; lines whose gradient is taken


def plain(names: Sequence[str], layers: int, vocabulary: int) -> Chosen:
    """One option for all layers, and one for embedding and head."""
    return {name: layers if ".layers." in name else vocabulary for name in names}


def at_random(cost: Values, budget: float, seed: int) -> Chosen:
    """Steps to larger options in a random order, as far as the budget pays them."""
    steps = [(name, option) for name in cost for option in (MIDDLE, LARGE)]
    random.Random(seed).shuffle(steps)
    chosen = dict.fromkeys(cost, SMALL)
    for name, option in steps:
        more = cost[name][option] - cost[name][chosen[name]]
        if 0 < more <= budget - total(cost, chosen):
            chosen[name] = option
    return chosen


def down_in_8(names: Sequence[str]) -> Chosen:
    """A rule of thumb: all down_proj in 8 bits, the rest in 4 in blocks of 128."""
    return {name: LARGE if name.endswith("down_proj") else SMALL for name in names}


def q4_k_m(names: Sequence[str], layers: int) -> Chosen:
    """llama.cpp's rule: more bits for v and down in the first and last eighth of the layers, and in
    each third one between, and for the head."""
    def more(layer: int) -> bool:
        eighth = layers // 8
        return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return {name: LARGE if ".layers." not in name or name.endswith(("v_proj", "down_proj"))
            and more(int(name.split(".")[2])) else MIDDLE for name in names}


def errors(options: Mapping[str, Sequence[Blocks]], tree: CausalLM) -> Values:
    """|| dW ||^2."""
    return {name: [change(tree.get_submodule(name), blocks).square().sum().item()
                   for blocks in ways] for name, ways in options.items()}


def first_order(options: Mapping[str, Sequence[Blocks]], tree: CausalLM, source: Source) -> Values:
    """| <gradient of the labels' loss, dW> |, mlx-lm's score without its division by the size."""
    lines = [e for examples in source.examples.values() for e in examples[:GRADIENT]]
    weights = [tree.get_submodule(name).weight.requires_grad_() for name in options]
    with torch.enable_grad():
        losses, _ = supervised_losses(tree, *collate(lines, source.tokenizer.pad_id))
        gradients = torch.autograd.grad(losses.mean(), weights)
    tree.requires_grad_(False)
    return {name: [(gradient * change(tree.get_submodule(name), blocks)).sum().abs().item()
                   for blocks in options[name]] for name, gradient in zip(options, gradients)}


def own_tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The tokens (B, T) after those that all right-padded rows begin with, such as an instruction.
    The last token of each row is its own."""
    real = attention_mask.bool()
    shared = int(((input_ids == input_ids[:1]) & real).all(0).cumprod(0).sum())
    own = real.clone()
    own[:, :min(shared, int(real.sum(1).min()) - 1)] = False
    return own


class Lines:
    """Batches of lines, and what the float model predicts after each of their tokens."""

    def __init__(self, batches: Sequence[Sequence[Example]], pad_id: int, model: CausalLM):
        self.batches, answers = [], []
        for examples in batches:
            ids, mask, labels = collate(sorted(examples, key=lambda e: e.ids), pad_id)
            own = own_tokens(ids, mask)
            self.batches.append((ids, mask, own))
            answers.append(supervised_tokens(mask, labels)[0][own])
        self.answers, self.head = torch.cat(answers), model.lm_head.weight.clone()
        self.hidden = [self.read(model, i) for i in range(len(batches))]

    def read(self, model: CausalLM, number: int) -> Tensor:
        """Hidden states (N, D) of the tokens of a batch."""
        ids, mask, own = self.batches[number]
        return model.model.rows(Tokens(ids, mask, model.config, self.head.device, own))

    def kl(self, model: CausalLM, number: int) -> Tensor:
        """KL (N,) of each token of a batch."""
        parts = []
        for h, g in zip(self.hidden[number].split(64), self.read(model, number).split(64)):
            p = (h @ self.head.T).log_softmax(-1)
            parts.append((p.exp() * (p - model.lm_head(g).log_softmax(-1))).sum(-1))
        return torch.cat(parts)

    def divergence(self, model: CausalLM) -> tuple[float, float]:
        """KL a token: of all, and of those that predict an answer."""
        each = torch.cat([self.kl(model, number) for number in range(len(self.batches))])
        return each.mean().item(), each[self.answers].mean().item()


def test_lines(source: Source, count: int, model: CausalLM) -> Lines:
    """So many test lines of each task, with their right answers."""
    return Lines([[encode(task.name, messages, source.tokenizer) for messages in task.test[:count]]
                  for task in source.tasks], source.tokenizer.pad_id, model)


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of train.py")
    parser.add_argument("--size", type=above_zero, help="MB of the controls (default: those of 4 "
                        "bits in blocks of 32)")
    parser.add_argument("--lines", type=positive, default=24, help="test lines of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the samples that calibrate")
    args = parser.parse_args(argv)
    config = with_precision(ExportConfig(run=args.run, size=1.0), has_texts=True)
    source = export.load_run(config)
    load_adapter(mixture := load_model(source.base), source.run / "adapter")
    batches, unseen = (calibration_batches({
        task: random.Random(args.seed).sample(examples, len(examples))
        for task, examples in lines.items()}, source) for lines in (source.examples, source.unseen))
    fits = fits_to_make(config, source, batches)
    part = Part(config, mixture, fits)
    freeze_and_round([part], source.trained, batches, fits)
    merge(tree := sharing_copy(mixture), fits[None])
    tree.eval().requires_grad_(False)
    harm = harm_of(part.in_4_bits, tree, source.trained, unseen)
    ways_of = part.config.form.options_of
    options = {name: [*ways, quantize(matrix(tree.get_submodule(name)), *ways_of(name)[-1])]
               for name, ways in part.in_4_bits.items()}
    harm = {name: [*harms, 0.0] for name, harms in harm.items()}
    cost = {name: [storage.nbytes(ways[0].shape) for storage in ways_of(name)]
            for name, ways in options.items()}
    names, lines = [*options], test_lines(source, args.lines, tree)
    of_32, of_rule = total(cost, plain(names, MIDDLE, MIDDLE)), total(cost, down_in_8(names))
    budget = args.size * 1e6 if args.size else of_32
    ways = {"4 bits, blocks of 128": plain(names, SMALL, SMALL),
            "4 bits, blocks of 32": plain(names, MIDDLE, MIDDLE),
            "4 bits, blocks of 32; embedding and head 8": plain(names, MIDDLE, LARGE),
            **{f"by the probe, {share:.2f} of blocks of 32": spend(harm, cost, share * of_32)
               for share in (0.96, 1.0, 1.04, 1.08)},
            "by the probe": spend(harm, cost, budget),
            **{f"at random, {seed}": at_random(cost, budget, seed) for seed in range(DRAWS)},
            "by the weights' error": spend(errors(options, tree), cost, budget),
            "by <gradient, dW>": spend(first_order(options, tree, source), cost, budget),
            "down_proj in 8 bits, the rest blocks of 128": down_in_8(names),
            "by the probe, as many bytes": spend(harm, cost, of_rule),
            "llama.cpp's rule": q4_k_m(names, source.trained.config.num_hidden_layers)}
    rows = []
    for way, chosen in tqdm(ways.items(), "ways"):
        stored = sharing_copy(tree)
        for name in names:
            blocks = options[name][chosen[name]]
            put_weight(stored, name, BlockWeight(blocks, torch.float32))
        every, answers = lines.divergence(stored)
        rows.append([way, f"{total(cost, chosen) / 1e6:.1f}", f"{every:.3f}", f"{answers:.4f}",
                     f"{total(harm, chosen):.3f}"])
    print(table(["", "MB", "KL", "of answers", "predicted"], rows))


if __name__ == "__main__":
    script.run_script(main)
