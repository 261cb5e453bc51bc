"""answer.bin, which port/answer.c reads beside model.onnx: what an app needs of JSON and Jinja.

answer.c describes the tables. The `tokenizers` library itself says which characters are letters,
numbers, spaces and marks, and what they are composed of: its Unicode differs from Python's.
"""

import re
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping
from itertools import accumulate, chain
from pathlib import Path
from typing import Any
from unicodedata import combining

from ..data.tokenizer import Tokenizer
from ..io.files import read_json
from ..method.vocabulary import BPE, BYTE, BYTES
from ..runtime.choices import answer_tokens
from ..runtime.drafts import read_drafts
from ..runtime.folder import known_tasks
from .contract import QUESTION

Rows = list[tuple[int, int, int, int]]
NONE, SPECIAL, ONE_WORD, GPT2, LLAMA3 = 0xFFFFFFFF, 1 << 31, 0, 1, 2
SHARED, CHARACTERS, WHOLE_WORDS, NORMAL_FORM, DIGITS, MARKS, STRIP = (1 << i for i in range(7))
KINDS, DIGIT, BLANK = {1: r"\p{L}", 2: r"\p{N}", 4: r"\s", 8: r"\p{M}"}, 16, 32
SPACES, NFC = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "NFC"}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTERS+|NUMBERS| ?[^\sOTHERS\p{N}]+"
         r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
WAYS: list[tuple[list[Any], int, int, int]] = [          # to split texts, and answer.c's head
    ([], ONE_WORD, 0, CHARACTERS),
    ([SPLIT | {"pattern": {"String": " "}, "behavior": "MergedWithPrevious"}], 0, 0, CHARACTERS),
    ([LEVEL], ONE_WORD, 0, 0), ([LEVEL | {"use_regex": True}], GPT2, 0, 0),
    ([{"type": "Digits", "individual_digits": True}, LEVEL | {"use_regex": True}], GPT2, 0, DIGITS),
    *(([SPLIT | {"pattern": {"Regex": WORDS.replace("LETTERS", letters).replace("NUMBERS", numbers)
                             .replace("OTHERS", letters.strip("[]"))}}, LEVEL], LLAMA3, most, flags)
      for letters, numbers, most, flags in (             # Llama 3, Qwen 2 and 3, Qwen 3.5
          (r"\p{L}", r"\p{N}{1,3}", 3, 0), (r"\p{L}", r"\p{N}", 1, 0),
          (r"[\p{L}\p{M}]", r"\p{N}", 1, MARKS)))]


def splitting(folder: Path) -> tuple[BPE, int, int, int]:
    """The encoding of a tokenizer.json, and how it splits texts: words, numbers and flags of
    answer.c's head. Raises ValueError for a tokenizer that answer.c does not know."""
    content = read_json(folder / "tokenizer.json")
    bpe, model, normalizer = BPE(content), content["model"], content["normalizer"]
    first = content["pre_tokenizer"] or {"pretokenizers": []}
    steps = [{key: step[key] for key in step if key != "trim_offsets"}
             for step in first.get("pretokenizers", [first])]
    fallback = bool(model.get("byte_fallback"))
    odd = [t["content"] for t in content["added_tokens"] if t["lstrip"] or t["rstrip"] or t[
        "single_word"] or (t["normalized"] and normalizer and not t["special"])]
    if len(bpe.bytes) < 256 + fallback and (fallback or model.get("unk_token")):
        odd.append("a byte without a token")
    for way, words, numbers, flags in WAYS:
        if not odd and way == steps and fallback == bool(flags & CHARACTERS) and normalizer in (
                [SPACES] if fallback else [None, NFC]):
            return bpe, words, numbers, flags | NORMAL_FORM * (normalizer == NFC) | (
                WHOLE_WORDS * bool(model.get("ignore_merges")))
    raise ValueError(f"answer.c does not know such a tokenizer: {odd or (normalizer, steps)}"[:400])


def characters(words: int, normal_form: bool) -> tuple[list[int], list[int], Rows, Rows]:
    """The tables PAGES, KINDS, PARTS and WHOLES, as far as they are needed."""
    every = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))]
    kinds, parts, wholes = [BLANK * chr(c).isspace() for c in range(0x110000)], Rows(), Rows()
    if words:                                # of others, up to 0x10FFFF, none is assigned
        from tokenizers import Regex, pre_tokenizers
        splits = {bit: pre_tokenizers.Split(Regex(kind), "isolated") for bit, kind in KINDS.items()}
        for bit, split in (splits | {DIGIT: pre_tokenizers.Digits(True)}).items():
            for piece, _ in split.pre_tokenize_str("\0".join(every)):
                kinds[ord(piece[0])] |= bit * (len(piece) == 1 and piece != "\0")
    if normal_form:
        from tokenizers import normalizers
        nfd, nfc = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
        for c in every:
            if combining(c) and nfd("\u0345" + c) == c + "\u0345":   # the library sorts it, too
                kinds[ord(c)] |= combining(c) << 8
            if (apart := nfd(c)) != c:
                if not "\uac00" <= c <= "\ud7a3":    # syllables of Hangul are composed alone
                    parts += [(ord(c), i, ord(part), 0) for i, part in enumerate(apart)]
                start, last = nfc(apart[:-1]), apart[-1]
                if len(start) == 1 and nfc(start + last) == c:
                    wholes.append((ord(start), ord(last), ord(c), 0))
    pages = [tuple(kinds[c:c + 256]) for c in range(0, 0x110000, 256)]
    kept = [*dict.fromkeys(pages)]
    return [kept.index(page) for page in pages], [*chain(*kept)], parts, sorted(wholes)


def tree(values: Mapping[str, int]) -> Rows:
    """Texts with values, as rows: node (its first row), character, next node, value or NONE."""
    ways = sorted({s[:n] for s in values for n in range(1, len(s) + 1)}, key=lambda s: (s[:-1], s))
    nodes = {way[:-1]: row for row, way in reversed([*enumerate(ways)])}
    return [(nodes[w[:-1]], ord(w[-1]), nodes.get(w, NONE), values.get(w, NONE)) for w in ways]


def task_tables(folder: Path, tokenizer: Tokenizer, first: int) -> tuple[list[str], Rows, Rows]:
    """Texts, the first of which is text `first`, and the tables TASKS and CHOICES."""
    tasks = known_tasks(folder)
    sets = [answer_tokens(tokenizer, tuple(task["choices"])) if task["choices"] else {}
            for task in tasks.values()]
    texts = [*tasks, *(task["instruction"] for task in tasks.values())]
    answers = {"".join(map(chr, (n, *tokens))): text for n, choices in enumerate(sets)
               for tokens, text in choices.items()}
    choices = [(node, token, *((child, NONE) if n == NONE else (first + len(texts) + n, 0)))
               for node, token, child, n in tree({way: n for n, way in enumerate(answers)})]
    roots = {row[1]: row[2] for row in choices if not row[0]}
    return [*texts, *answers.values()], [
        (first + n, first + len(sets) + n, roots.get(n, NONE), max(map(len, answers), default=0))
        for n, answers in enumerate(sets)], choices


def crc32(files: Iterable[Path]) -> int:
    """Of the files that are there, end to end."""
    check = 0
    for path in filter(Path.is_file, files):
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                check = zlib.crc32(part, check)
    return check


def write_port(folder: Path, info: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Write answer.c, answer.h and answer.bin into a folder of which export.json says `info`."""
    for name in ("answer.c", "answer.h"):
        shutil.copyfile(Path(__file__).with_name("port") / name, folder / name)
    bpe, words, numbers, flags = splitting(folder)
    vocab, special, size, said = bpe.vocab, tokenizer.special, info["vocab_size"], info["contract"]
    added = {text: i for text, i in bpe.added.items() if text not in special}
    fallback, golden, code = flags & CHARACTERS, said["golden"], {c: b for b, c in enumerate(BYTES)}
    byte = {(BYTE(b) if fallback else BYTES[b]): bytes([b]) for b in range(256)}
    written = {i: byte[t] if t in byte else t.replace("▁", " ").encode() if fallback else
               bytes(code[c] for c in t) if code.keys() >= {*t} else t.encode()
               for t, i in (vocab | added).items() if t not in special}
    names = {text.decode(): i for i, text in written.items()
             if flags & WHOLE_WORDS and text == text.decode("utf-8", "ignore").encode()}
    if fallback:
        names = {t: i for t, i in (vocab | {" ": vocab["▁"]}).items() if len(t) == 1}
    named, tasks, choices = task_tables(folder, tokenizer, size + 1)
    texts = [*(written.get(i, b"") for i in range(size)), *map(str.encode, [QUESTION, *named])]
    drafts = {"".join(map(chr, ids[::-1])): t for ids, t in (read_drafts(folder) or {}).items()}
    cut = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len)[::-1])) + ")")
    tables: list[Any] = [
        b"".join(texts), [0, *accumulate(map(len, texts))], [vocab.get(t, NONE) for t in byte],
        *(pages := characters(words, bool(flags & NORMAL_FORM)))[:2],
        *([n for part in cut.split(said["prompt"][side]) for n in (
            [SPECIAL + special[part]] if part in special else map(ord, part))]
          for side in ("before", "after")),
        said["stop_ids"], golden["input_ids"], golden["tokens"],
        sorted((vocab[a], vocab[b], rank, vocab[a + b]) for (a, b), rank in bpe.ranks.items()),
        tree(names), tree(added), *pages[2:],
        [(i, 0, *struct.unpack("<I", struct.pack("<f", score)), 0) for i, score in zip(
            golden["logits"]["ids"], golden["logits"]["values"])], tasks, choices, tree(drafts)]
    places, body = list[int](), b""
    for table in tables:                     # of a row, the second number comes first: see answer.c
        flat = [n for entry in table for n in (
            (entry[1], entry[0], *entry[2:]) if isinstance(entry, tuple) else (entry,))]
        data = table if isinstance(table, bytes) else struct.pack(f"<{len(flat)}I", *flat)
        places += [48 + 8 * len(tables) + len(body), len(table)]
        body += data + bytes(-len(data) % 8)
    flags |= STRIP * said["prompt"]["strip"] | SHARED * (said["cache"] == "shared")
    body = struct.pack(
        f"<7IfI{len(places)}I", crc32(folder / name for name in ("model.onnx", "model.onnx.data")),
        size, info["context"], words, numbers, flags, size, golden["logits"]["tolerance"], 0,
        *places) + body
    (folder / "answer.bin").write_bytes(b"answer.2" + struct.pack("<I", zlib.crc32(body)) + body)
