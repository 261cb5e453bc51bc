"""--vocab: a base with the tokens that its task needs, in place of all."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.tasks import Example, Task, probe_batches
from ..data.tokenizer import FileTokenizer, Tokenizer
from ..export.layers import vocabularies
from ..export.settings import Source
from ..export.trim import write_trimmed
from ..io.files import naming, read_json, replacing
from ..io.text import clean, table
from ..method.vocabulary import BPE, expected, tokens_to_keep
from ..model.decoder import CausalLM
from ..training.evaluate import token_scores
from .flags import InputConfig
from .inputs import Inputs, load_inputs

ROWS = 64                # the number of tokens is a multiple of it, for the sake of kernels
TEXTS, BATCH = 100, 8    # of each task, for what the model expects


def trimmed(inputs: Inputs, config: InputConfig, count: int, out: Path) -> Inputs:
    """The same inputs with a base of about `count` tokens, which is written to the folder `out`.

    Raises ValueError for a count that is too small or too large, and for a tokenizer that is no
    BPE.
    """
    texts = {name: [*inputs.encoded[name], *inputs.valid[name]] for name in inputs.encoded}
    trim(inputs.folder, inputs.model, inputs.tokenizer, texts, inputs.tasks, count, out)
    found = load_inputs(replace(config, model=str(out)), quiet=True)
    # It takes the same adapters: no expert is on the embedding or the head.
    found.model.name, found.model.fingerprint = inputs.model.name, inputs.model.fingerprint
    print_lost(inputs.tasks, inputs.tokenizer, found.tokenizer)
    return found


def trim(base: Path, model: CausalLM, tokenizer: Tokenizer, texts: Mapping[str, Sequence[Example]],
         tasks: Sequence[Task], count: int, out: Path) -> None:
    """Write the base `base`, which is `model`, with about `count` tokens: those of the texts, and
    what the model expects in them."""
    if not isinstance(tokenizer.backend, FileTokenizer):
        raise ValueError("--vocab: the model reads bytes, and has no token to leave out")
    count, total = -(-count // ROWS) * ROWS, tokenizer.backend.backend.get_vocab_size()
    if count >= total:
        raise ValueError(f"--vocab {count}: the base has {total} tokens, so none would be left out")
    with naming("--vocab", ValueError):
        bpe = BPE(read_json(base / "tokenizer.json"))
        needed = needed_tokens(tokenizer, tasks, texts)
        tokens_to_keep(bpe, needed, (), count)           # before the work: it raises for too few
        batches = (batch for examples in texts.values() for batch in probe_batches(
            examples, TEXTS, BATCH, tokenizer.pad_id))
        likely = expected(model, batches).argsort(descending=True).tolist()
        kept = tokens_to_keep(bpe, needed, likely, count)
    del bpe                                              # 0.3 GB of Gemma 3's, which is read again
    with replacing(out, folder=True) as folder:
        write_trimmed(base, folder, kept)
    print(f"vocabulary: {len(kept):,} of {total:,} tokens; {len(needed):,} are those of the texts")


def needed_tokens(tokenizer: Tokenizer, tasks: Sequence[Task],
                  texts: Mapping[str, Sequence[Example]]) -> set[int]:
    """Tokens of the texts, of the answers of sets, and of what the chat template writes; and those
    that end answers and fill up batches."""
    question = {"role": "user", "content": "question"}
    needed = {*tokenizer.stop_ids, tokenizer.pad_id,
              *tokenizer.encode(tokenizer.render([question], True))[0]}
    for text in tokenizer.bos, tokenizer.eos:
        needed.update(tokenizer.encode(text)[0])
    for answer in (answer for task in tasks for answer in task.choices):
        needed.update(tokenizer.turn([question, {"role": "assistant", "content": answer}]))
    return needed.union(*(e.ids for examples in texts.values() for e in examples))


def print_lost(tasks: Sequence[Task], before: Tokenizer, after: Tokenizer) -> None:
    """Print, of the test lines of each task, how many have a token that was left out, and how many
    tokens all take before and after."""
    rows = []
    for task in tasks:
        texts = [before.render(messages) for messages in task.test]
        old, new = ([t.encode(text)[1] for text in texts] for t in (before, after))
        changed = sum(a != b for a, b in zip(old, new))          # where tokens begin
        sizes = [sum(map(len, side)) for side in (old, new)]
        rows.append([clean(task.name), len(texts), changed, *map("{:,}".format, sizes),
                     f"{100 * (sizes[1] / max(1, sizes[0]) - 1):+.1f} %"])
    print(table(["test lines", "all", "with a token that is gone", "tokens before", "after", ""],
                rows))


def print_logprobs(whole: Inputs, fewer: Inputs) -> None:
    """Print what fewer tokens cost: by task, the mean log-probability of the right answers to the
    test lines, whole answers, in nats; whatever the tokens."""
    rows = []
    for name in (name for name, examples in whole.test.items() if examples):
        rows.append([clean(name)])
        for inputs in whole, fewer:
            examples = inputs.test[name]
            loss, *_ = token_scores(inputs.model, examples, inputs.tokenizer.pad_id)
            rows[-1].append(f"{-loss * sum(e.supervised for e in examples) / len(examples):.4f}")
    print(table(["log-probability of right answers", "all tokens", "fewer"], rows))


def hint(source: Source, info: Mapping[str, Any]) -> str:
    """What --vocab would make of an export, of which export.json says `info`; "" if embedding and
    head take less than a third of it, and for a tokenizer that --vocab refuses."""
    total, count = source.trained.config.vocab_size, 32768     # 16384 cost one run of six 0.1 nats
    floats, size, rows = 2 if info.get("precision") == "fp16" else 4, info["bytes"], 0.0
    for name in vocabularies(source.trained) if "bits" in info else ():
        bits, block = info["bits"].get(name, (8 * floats, math.inf))
        table: Any = source.trained.get_submodule(name)
        rows += table.weight.shape.numel() * (bits / 8 + 4 / block)
    with suppress(FileNotFoundError, ValueError):
        BPE(read_json(source.base / "tokenizer.json"))
        if total > count and 3 * rows > size:
            return (f"the vocabulary takes {rows / 1e6:.0f} of {size / 1e6:.0f} MB: --vocab "
                    f"{count} would leave {rows * count / total / 1e6:.0f}\n")
    return ""
