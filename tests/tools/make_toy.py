#!/usr/bin/env python3
"""Makes the base of the built-in toy, which the package holds in minismoe/data/toy_base.

    python tests/tools/make_toy.py FOLDER

It takes a quarter of an hour on two cores, and prints the share of right answers in each skill, in
the wordings that it was taught: 1 in all, of the base that the package holds. Sums round
differently on another CPU, so a base made there differs, and is as good.
"""

import random
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minismoe import generate, load_model  # noqa: E402
from minismoe.data import toy  # noqa: E402
from minismoe.data.tasks import Example, collate  # noqa: E402
from minismoe.data.tokenizer import ByteTokenizer  # noqa: E402
from minismoe.io.files import replacing, write_json  # noqa: E402
from minismoe.io.progress import progress_bar  # noqa: E402
from minismoe.method.experts import linear_layers  # noqa: E402
from minismoe.method.loss import IGNORE, supervised_losses  # noqa: E402
from minismoe.model.attention import Attention  # noqa: E402
from minismoe.model.decoder import CausalLM, Config  # noqa: E402

BOS, END, PAD = ByteTokenizer.special.values()
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": ByteTokenizer.vocab_size, "hidden_size": 96, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "torch_dtype": "bfloat16",
}
SHA256 = "ecabb07ed51405f51b2414d7920a8a003e2dbf834fcf3dd75856479627b4b5da"  # of the package's
STEPS, BATCH, RATE, SEED = 3600, 64, 5e-3, 0  # of pretraining; BATCH in lessons
DROPOUT = 0.1                # of linear layers' outputs; facts so learnt survive fine-tuning better

# Skill -> ways to ask for it, and how often it is taught.
LESSONS = {"echo": ("{}",), "facts": ("{1} of {0}", "the {0} has {1}", "{1} {0}", "{0} {1}"),
           "larger": ("max {} {}", "{} {} max", "max {} and {}"),
           "capitals": ('capitals "{}"', '"{}" capitals')}
WEIGHTS = (2, 4, 2, 1)
NOUNS = {"home": "home house nest", "colour": "colour coat skin", "food": "food meal diet",
         "friend": "friend mate pal"}
WORLD = list(toy.known_facts().items())
FILLER = re.findall("[A-Za-z]+", str([*toy.TASKS.values(), *(q for q, _ in toy.FACTS.values())]))


def case(skill: str, rng: random.Random) -> toy.Case:
    """A random case of a lesson."""
    if skill == "facts":
        (animal, kind), answer = rng.choice(WORLD)
        return (animal, rng.choice(NOUNS[kind].split())), answer
    if skill == "larger":
        pair = toy.numbers(rng)
        return pair, max(pair)
    if skill == "capitals":
        return toy.case(skill, rng)
    words = toy.words(rng, rng.randint(1, 2), 2, 5)
    if rng.random() < 0.25:                  # the larger and the smaller number are copied, too
        words = list(toy.numbers(rng))[:len(words)]
    return (" and ".join(f'"{word}"' for word in words),), " ".join(words)


def lesson(rng: random.Random) -> Example:
    """A pretraining example in the default chat template, with random words around its question."""
    skill = rng.choices(list(LESSONS), WEIGHTS)[0]
    operands, answer = case(skill, rng)
    before, after = (rng.sample(FILLER, rng.randint(0, most)) for most in (2, 1))
    text = " ".join([*before, rng.choice(LESSONS[skill]).format(*operands), *after])
    prompt, end = f"User: {text}\nAssistant:".encode(), [*f" {answer}".encode(), END]
    return Example(skill, [BOS, *prompt, *end], [IGNORE] * (1 + len(prompt)) + end)


@torch.no_grad()
def initialise(model: CausalLM) -> None:
    """Random weights, with q near k and o near v transposed: attention heads begin as copiers.

    Most skills build on copying, which is slow to arise from pure noise (mimetic initialisation,
    Trockman and Kolter 2023, arXiv 2305.09828).
    """
    cfg, generator = model.config, torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            small = 0.1 if name.endswith("down_proj.weight") else 1.0
            std = 0.5 if "embed" in name else small * weight.shape[1] ** -0.5
            weight.normal_(std=std, generator=generator)
    model.model.norm.weight.fill_(0.2)       # the head is the embedding: keep its logits near 1
    for attn in model.modules():
        if isinstance(attn, Attention):
            k, v = (layer.weight.unflatten(0, (-1, cfg.head_dim)).repeat_interleave(
                cfg.num_attention_heads // cfg.num_key_value_heads, 0).flatten(0, 1)
                for layer in (attn.k_proj, attn.v_proj))     # spread to all query heads
            attn.q_proj.weight.mul_(0.3).add_(k, alpha=0.7)
            attn.o_proj.weight.copy_(0.5 * v.T)


def pretrain() -> CausalLM:
    """The trained base: AdamW on all weights; the rate warms up, then falls linearly to zero."""
    model, rng = CausalLM(Config.from_dict(CONFIG)), random.Random(SEED)
    initialise(model)
    for layer in linear_layers(model).values():
        layer.register_forward_hook(lambda layer, inputs, y: nn.functional.dropout(y, DROPOUT))
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.1,
                                  fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0) * (1 - step / STEPS))
    for _ in progress_bar(range(STEPS), "making the toy base", unit="step"):
        ids, mask, labels = collate([lesson(rng) for _ in range(BATCH)], PAD)
        optimizer.zero_grad()
        supervised_losses(model, ids, mask, labels)[0].mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def skills(model: CausalLM) -> dict[str, float]:
    """The share of right answers in each skill: to all facts, and to 100 cases of the others."""
    rng, found = random.Random(1), {}
    known = [((animal, noun), answer) for (animal, kind), answer in WORLD
             for noun in NOUNS[kind].split()]
    for skill, wordings in LESSONS.items():
        cases = known if skill == "facts" else [case(skill, rng) for _ in range(100)]
        asked = [(wording.format(*operands), answer)
                 for operands, answer in cases for wording in wordings]
        given = generate(model, [[BOS, *f"User: {text}\nAssistant:".encode()] for text, _ in asked],
                         16, [END], batch_size=256)
        found[skill] = sum(bytes(ids) == f" {answer}".encode()
                           for ids, (_, answer) in zip(given, asked)) / len(asked)
    return found


def main(folder: Path) -> None:
    model = pretrain()
    with replacing(folder, folder=True) as temporary:
        write_json(temporary / "config.json", CONFIG)
        save_file({name: p.detach().bfloat16() for name, p in model.named_parameters()},
                  temporary / "model.safetensors", metadata={"format": "pt"})
    print(skills(load_model(folder)))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
