"""The embedded default: a tiny Llama base of bytes, and five small tasks. Nothing is downloaded.

The base learns, in about a minute of pretraining on first use, to repeat quoted words, to write
them in capitals, to name the larger of two numbers, and facts about invented animals. Two tasks ask
for capitals and facts in other words; three are new to it: a word's length, the second of two
words, the smaller of two numbers. Each needs another skill, so each is sensitive in other matrices.
"""

import hashlib
import json
import os
import random
import re
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..io.files import new_folder, replacing, write_json
from ..io.progress import progress_bar
from ..method.loss import IGNORE, supervised_losses
from ..model.attention import Attention
from ..model.decoder import CausalLM, Config
from .tasks import Example, Task, collate
from .tokenizer import ByteTokenizer, Message

BOS, END, PAD = ByteTokenizer.special.values()
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": ByteTokenizer.vocab_size, "hidden_size": 96, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "torch_dtype": "float32",
}
RECIPE = 1                   # raise it when code below changes the base: caches then make a new one
STEPS, BATCH, RATE, SEED = 800, 64, 5e-3, 0  # of pretraining; BATCH in lessons
TRAIN, TEST = 600, 100                       # conversations of a task, at most
LETTERS = string.ascii_lowercase[:16]

# Skill -> ways to ask for it. Facts fill in (animal, noun, question, verb), others their operands.
LESSONS = {"echo": ("{}",), "facts": ("{1} of {0}", "the {0} has {1}", "{3} {0}"),
           "larger": ("max {} {}",), "capitals": ('capitals "{}"', '"{}" capitals')}
WEIGHTS = (2, 2, 1, 1)                       # how often each lesson is taught
TASKS = {
    "capitals": ('Write "{}" in big letters.', 'Make "{}" upper case.'),
    "count": ('How many letters are in "{}"?', 'Count the letters of "{}".'),
    "facts": ("Tell me, {2}?", "So {2}?", "I forgot: {2}?", "Do you know {2}?", "Well, {2}?"),
    "second": ('Which comes after "{}", "{}"?', 'Leave out "{}" and say "{}".'),
    "smaller": ("Which is less, {} or {}?", "Take the smaller number: {}, {}."),
}
NOISE = re.findall("[A-Za-z]+", "where what how does a " + str(list(TASKS.values())))
FACTS = {"home": ("where does a {} live", "oslo rome lima cairo delhi paris tokyo quito"),
         "colour": ("how does a {} look", "red blue green white black gold pink grey"),
         "food": ("what does a {} eat", "figs nuts fish rice corn leaves honey moss")}

Case = tuple[tuple[str, ...], str]           # the operands, and the answer


def _animals(count: int) -> list[Case]:
    """All facts about `count` animals, the same for every seed of the tasks."""
    rng, found = random.Random(SEED), dict[tuple[str, ...], str]()
    while len(found) < len(FACTS) * count:
        name = "".join(rng.choice(part) for part in ("bdfgklmnprstvz", "aeiou") * 2) + "x"
        for noun, (question, values) in FACTS.items():
            operands = name, noun, question.format(name), question.split()[-1]
            found.setdefault(operands, rng.choice(values.split()))
    return list(found.items())


WORLD = _animals(32)


def _case(skill: str, rng: random.Random) -> Case:
    """A random case of a skill."""
    if skill == "facts":
        return rng.choice(WORLD)
    if skill in ("larger", "smaller"):       # the tens differ, so the first digits decide
        a, b = (10 * tens + rng.randrange(10) for tens in rng.sample(range(1, 10), 2))
        return (str(a), str(b)), str(max(a, b) if skill == "larger" else min(a, b))
    low, high = {"capitals": (3, 5), "count": (2, 6), "second": (3, 4)}.get(skill, (2, 5))
    number = {"second": 2, "echo": rng.randint(1, 2)}.get(skill, 1)
    letters = rng.sample(LETTERS, high * number)       # each only once, which makes copying easier
    words = ["".join(letters.pop() for _ in range(rng.randint(low, high))) for _ in range(number)]
    if skill == "echo":
        return (" and ".join(f'"{word}"' for word in words),), " ".join(words)
    return tuple(words), {"capitals": words[0].upper(), "count": str(len(words[0])),
                          "second": words[-1]}[skill]


def tasks(seed: int = 0) -> list[Task]:
    """The five tasks, in chat form.

    No test case is trained on in any wording. Pretraining may contain a test case (a fact must be
    known before it can be asked for), but never a task's wording of it.
    """
    found = []
    for skill, questions in TASKS.items():
        rng = random.Random(f"{seed} {skill}")
        cases = list({_case(skill, rng): None for _ in range(TRAIN + TEST)})
        parts: list[list[list[Message]]] = []
        for part in (cases[len(cases) // 6:], cases[:len(cases) // 6]):
            parts.append([[{"role": "user", "content": question.format(*operands)},
                           {"role": "assistant", "content": answer}]
                          for operands, answer in part for question in questions])
            rng.shuffle(parts[-1])
        found.append(Task(skill, parts[0][:TRAIN], parts[1][:TEST]))
    return found


def _lesson(rng: random.Random) -> Example:
    """A pretraining example in the default chat template, with random words around its question."""
    skill = rng.choices(list(LESSONS), WEIGHTS)[0]
    operands, answer = _case(skill, rng)
    before, after = (rng.sample(NOISE, rng.randint(0, 1)) for _ in range(2))
    text = " ".join([*before, rng.choice(LESSONS[skill]).format(*operands), *after])
    prompt, end = f"User: {text}\nAssistant:".encode(), [*f" {answer}".encode(), END]
    return Example(skill, [BOS, *prompt, *end], [IGNORE] * (1 + len(prompt)) + end)


@torch.no_grad()
def _initialise(model: CausalLM) -> None:
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


def _pretrain(steps: int) -> CausalLM:
    """The trained base: AdamW on all weights; the rate warms up, then falls linearly to zero."""
    model, rng = CausalLM(Config.from_dict(CONFIG)), random.Random(SEED)
    _initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0) * (1 - step / steps))
    for _ in progress_bar(range(steps), "making the toy base, once", unit="step"):
        ids, mask, labels = collate([_lesson(rng) for _ in range(BATCH)], PAD)
        optimizer.zero_grad()
        supervised_losses(model, ids, mask, labels)[0].mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def _cache() -> Path:
    """MINISMOE_CACHE, or minismoe in the folder where torch and Hugging Face's libraries keep
    theirs, on every system."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MINISMOE_CACHE") or Path(home) / "minismoe")


def _recipe(steps: int) -> str:
    """A hash of all constants that the weights of the base depend on."""
    recipe = (RECIPE, CONFIG, steps, BATCH, RATE, SEED, LETTERS, LESSONS, WEIGHTS, NOISE, FACTS)
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def checkpoint_folder(*, _steps: int = STEPS) -> Path:
    """The folder of the toy base in the cache; it is pretrained first if the cache lacks it. If two
    processes make it at once, the first one wins."""
    folder = _cache() / f"toy-{_recipe(_steps)}"
    if folder.is_dir():
        return folder
    try:
        with new_folder(folder) as temporary:        # first: a full disk is seen before the work
            model = _pretrain(_steps)
            write_json(temporary / "config.json", CONFIG)
            with replacing(temporary / "model.safetensors") as file:
                save_file(dict(model.named_parameters()), file, metadata={"format": "pt"})
    except OSError:
        if not folder.is_dir():                      # if it is there, another process was faster
            raise
    return folder
