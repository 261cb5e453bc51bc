"""The embedded default: a tiny Llama-form base, made here on first use, and five small tasks.

The base knows five skills, because it is pretrained on text that shows them: facts about invented
animals, capitals, swapped words, sums, the larger of two numbers. What it has never seen is a
question in chat form, so it answers almost none before fine-tuning; and as each skill sits in other
matrices, each task is sensitive elsewhere, which is what the method needs to have a point.

Nothing is downloaded: bytes are the tokens, the text is generated, and pretraining takes about a
minute on two CPU cores. The result is cached under a name that holds a hash of this file.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import replacing, write_json
from .data import Example, Task, collate
from .loss import IGNORE, supervised_losses
from .model import Attention, CausalLM, Config
from .tokenizer import Message

BOS, END, PAD = 256, 257, 258                # of tokenizer.ByteTokenizer
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 259, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "torch_dtype": "float32",
}
STEPS, BATCH, ITEMS, RATE, SEED = 1000, 48, 1, 4e-3, 0
EMB, NORM = 0.15, 1.0
LETTERS = string.ascii_lowercase[:16]
TRAIN, TEST = 500, 100                       # lines a task

Case = tuple[tuple[str, ...], str]           # what fills the gaps of a question, and the answer


@dataclass(frozen=True)
class Skill:
    """Cases, and ways to ask for their answer."""

    name: str
    draw: Callable[[random.Random], Case]
    questions: tuple[str, ...]


def _words(rng: random.Random, *sizes: int) -> tuple[str, ...]:
    """Words of 3 to 5 letters, or of as many as given; none has a letter of another, or twice."""
    letters = rng.sample(LETTERS, sum(sizes))
    return tuple("".join(letters.pop() for _ in range(size)) for size in sizes)


def _capitals(rng: random.Random) -> Case:
    (word,) = _words(rng, rng.randint(3, 5))
    return (word,), word.upper()


def _count(rng: random.Random) -> Case:
    (word,) = _words(rng, rng.randint(2, 9))
    return (word,), str(len(word))


def _larger(rng: random.Random) -> Case:
    a, b = rng.sample(range(100), 2)
    return (str(a), str(b)), str(max(a, b))


def _swap(rng: random.Random) -> Case:
    first, second = _words(rng, rng.randint(3, 4), rng.randint(3, 4))
    return (first, second), f"{second} {first}"


FACTS = {"home": ("where does a {} live", "oslo rome lima cairo delhi paris tokyo quito"),
         "colour": ("what does a {} look like", "red blue green white black gold pink grey"),
         "food": ("what does a {} eat", "figs nuts fish rice corn leaves honey moss")}


def _animals(count: int) -> list[Case]:
    """All facts about `count` animals: the same world for every seed of the tasks."""
    rng, found = random.Random(SEED), dict[tuple[str, ...], str]()
    while len(found) < len(FACTS) * count:
        name = "".join(rng.choice(part) for part in ("bdfgklmnprstvz", "aeiou") * 2) + "x"
        for noun, (question, values) in FACTS.items():
            found.setdefault((name, noun, question.format(name)), rng.choice(values.split()))
    return list(found.items())


WORLD = _animals(40)

def _fact(rng: random.Random) -> Case:
    return rng.choice(WORLD)


def _echo(rng: random.Random) -> Case:
    words = _words(rng, *(rng.randint(2, 5) for _ in range(rng.randint(1, 2))))
    return (" and ".join(f'"{word}"' for word in words),), " ".join(words)


LESSONS = (Skill("echo", _echo, ("{}",)), Skill("facts", _fact, ("{1} of {0}",)),
           Skill("larger", _larger, ("max {} {}",)), Skill("echo", _echo, ("{}",)),
           Skill("facts", _fact, ("the {0} has {1}",)))
SKILLS = (
    Skill("capitals", _capitals, ('Write "{}" in big letters.', 'Make "{}" upper case.')),
    Skill("count", _count, ('How many letters are in "{}"?', 'Count the letters of "{}".')),
    Skill("facts", _fact, ("Tell me, {2}?", "So {2}?", "I forgot: {2}?", "Do you know {2}?")),
    Skill("larger", _larger, ("Which is more, {} or {}?", "Take the larger number: {}, {}.")),
    Skill("swap", _swap, ('Exchange "{}" and "{}".', 'Put "{}" behind "{}".')),
)
VOCAB = re.findall("[A-Za-z]+", " ".join(q for s in SKILLS for q in s.questions)) + "where does a live what does a look like eat".split()


def _chat(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tasks(seed: int = 0) -> list[Task]:
    """The five tasks, a skill each, asked in chat form; no test case is trained on.

    Test cases are set apart before they are put into words. The base may have met one in its
    pretraining, as a fact must be known before it can be asked for, but never as a question.
    """
    found = []
    for skill in SKILLS:
        rng = random.Random(f"{seed} {skill.name}")
        cases = list({skill.draw(rng): None for _ in range(TRAIN + 2 * TEST)})
        share = TEST * len(cases) // (TRAIN + TEST)
        lines = [[_chat(question.format(*gaps), answer)
                  for gaps, answer in part for question in skill.questions]
                 for part in (cases[share:], cases[:share])]
        for part in lines:
            rng.shuffle(part)
        found.append(Task(skill.name, lines[0][:TRAIN], lines[1][:TEST]))
    return found


def _document(rng: random.Random) -> Example:
    """One lesson; only its answer is supervised."""
    skill = rng.choice(LESSONS)
    gaps, answer = skill.draw(rng)
    before, after = (rng.sample(VOCAB, rng.randint(0, 3)) for _ in range(2))
    text = " ".join([*before, rng.choice(skill.questions).format(*gaps), *after])
    start, end = f"User: {text}\nAssistant: ".encode(), [*answer.encode(), END]
    return Example(skill.name, [BOS, *start, *end], [IGNORE] * (len(start) + 1) + end)


@torch.no_grad()
def _initialise(model: CausalLM, generator: torch.Generator) -> None:
    """Random weights, but heads begin as copiers: q looks for its own like, o undoes v.

    Copying is what most of the skills build on, and is slow to arise from pure noise (mimetic
    initialisation, Trockman and Kolter 2023, arXiv 2305.09828).
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            small = 0.1 if name.endswith("down_proj.weight") else 1.0
            std = EMB if "embed" in name else small * weight.shape[1] ** -0.5
            weight.normal_(std=std, generator=generator)
    model.model.norm.weight.fill_(NORM)
    cfg = model.config

    def spread(weight: Tensor) -> Tensor:                # from key/value heads to all query heads
        heads = weight.unflatten(0, (cfg.num_key_value_heads, cfg.head_dim))
        times = cfg.num_attention_heads // cfg.num_key_value_heads
        return heads.repeat_interleave(times, 0).flatten(0, 1)

    for attn in model.modules():
        if isinstance(attn, Attention):
            attn.q_proj.weight.mul_(0.3).add_(spread(attn.k_proj.weight), alpha=0.7)
            attn.o_proj.weight.copy_(0.5 * spread(attn.v_proj.weight).T)


def _pretrain(steps: int) -> CausalLM:
    """A base that has learnt the skills: AdamW on all weights, a warm-up, then down to zero."""
    model, rng = CausalLM(Config.from_dict(CONFIG)), random.Random(SEED)
    _initialise(model, torch.Generator().manual_seed(SEED))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0) * (1 - step / steps))
    seen, start = 0, time.perf_counter()
    with tqdm(range(steps), "making the toy base, once", unit="step") as bar:
        for step in bar:
            ids, mask, labels = collate([_document(rng) for _ in range(BATCH)], PAD)
            loss = supervised_losses(model, ids, mask, labels)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen += int(mask.sum())
            if step % 10 == 9 or step == steps - 1:
                speed = seen / (time.perf_counter() - start)
                bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s")
    return model


def _cache() -> Path:
    """Where this user's caches are: MINISMOE_CACHE, or the custom of the system."""
    if own := os.environ.get("MINISMOE_CACHE"):
        return Path(own)
    home = Path.home()
    variable, default = {"win32": ("LOCALAPPDATA", home / "AppData" / "Local"),
                         "darwin": ("", home / "Library" / "Caches"),
                         }.get(sys.platform, ("XDG_CACHE_HOME", home / ".cache"))
    return Path(os.environ.get(variable) or default) / "minismoe"


def base_folder(*, _steps: int = STEPS) -> Path:
    """The folder of the toy base, which is made where the cache does not hold it yet.

    It appears whole or not at all; where two processes make it at once, the first one's is used.
    """
    recipe = hashlib.sha256(Path(__file__).read_bytes() + str(_steps).encode()).hexdigest()
    folder = _cache() / f"toy-{recipe[:12]}"
    if folder.is_dir():
        return folder
    model = _pretrain(_steps)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_json(temporary / "config.json", CONFIG)
        with replacing(temporary / "model.safetensors") as file:
            save_file({name: p.detach().contiguous() for name, p in model.named_parameters()},
                      file, metadata={"format": "pt"})
        temporary.chmod(0o755)                       # mkdtemp's is for one user only
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():                      # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
