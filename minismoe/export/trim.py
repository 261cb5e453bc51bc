"""A checkpoint with fewer tokens, as a folder that transformers opens like any other.

method/vocabulary.py says which tokens stay. They are numbered anew, in their order.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.files import read_json, write_json
from .layers import EMBEDDING, HEAD
from .layouts import copy_base_files, rewrite_weights

# Keys of JSON files that hold ids of tokens: a number, or numbers in lists.
IDS = re.compile(r"(token_ids?|token_index|suppress_tokens|bad_words_ids)$")


def write_trimmed(base: Path, out: Path, kept: Sequence[int]) -> None:
    """Write the checkpoint `base` with the tokens `kept` alone, which are sorted, to `out`."""
    new = {old: number for number, old in enumerate(kept)}
    copy_base_files(base, out)
    write_json(out / "tokenizer.json", trimmed_tokenizer(read_json(out / "tokenizer.json"), new))
    settings = renumbered(read_json(out / "tokenizer_config.json"), new)
    if added := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {
            str(new[int(i)]): token for i, token in added.items() if int(i) in new}
    write_json(out / "tokenizer_config.json", settings)
    generation = read_json(out / "generation_config.json")
    write_json(out / "generation_config.json", renumbered(generation, new))
    write_json(out / "config.json", renumbered(read_json(out / "config.json"), new) | {
        "vocab_size": len(new)})
    tables = {f"{name}.weight" for name in (EMBEDDING, HEAD)}
    rewrite_weights(base, out, lambda name, w: w[[*kept]] if name in tables else w)


def trimmed_tokenizer(content: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer.json of BPE, with the tokens of {old id: new id} alone.

    All of them are in its vocabulary, also those that were only added to it: else `tokenizers`
    would number these behind the others.
    """
    model, added = content["model"], content["added_tokens"]
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    vocab = {text: new[i] for text, i in ids.items() if i in new}
    merges = [merge for merge in model["merges"] if _stays(merge, vocab)]
    return {**content, "model": {**model, "vocab": vocab, "merges": merges},
            "added_tokens": [token | {"id": new[token["id"]]} for token in added
                             if token["id"] in new],
            "post_processor": _with_ids_of(content.get("post_processor"), vocab),
            "padding": None}


def _stays(merge: str | Sequence[str], vocab: Mapping[str, int]) -> bool:
    """Whether both parts of a merge, and what they make, are in a vocabulary."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right} <= vocab.keys()


def _with_ids_of(value: Any, vocab: Mapping[str, int]) -> Any:
    """A post-processor whose special tokens have the ids of `vocab`."""
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            return [value[0], vocab[value[0]]]           # "sep": ["</s>", 2]
        return [_with_ids_of(item, vocab) for item in value]
    if not isinstance(value, dict):
        return value
    if "ids" in value and "tokens" in value:             # of a template
        return value | {"ids": [vocab[text] for text in value["tokens"]]}
    return {key: _with_ids_of(item, vocab) for key, item in value.items()}


def renumbered(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Settings whose ids of tokens are new ones, without those of tokens that are gone."""
    def mapped(value: Any) -> Any:
        if isinstance(value, list):
            return [m for item in value if (m := mapped(item)) is not None]
        return new.get(value) if type(value) is int else value

    found = {key: mapped(value) if IDS.search(key) else value for key, value in settings.items()}
    return {key: value for key, value in found.items() if value is not None}
