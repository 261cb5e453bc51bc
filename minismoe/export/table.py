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
from typing import Any, NamedTuple
from unicodedata import combining

from ..data.tokenizer import Tokenizer
from ..io.files import read_json
from ..method.vocabulary import BPE, BYTE, BYTES
from ..runtime.choices import answer_tokens
from ..runtime.drafts import read_drafts
from ..runtime.folder import known_tasks
from .contract import QUESTION

Rows = list[tuple[int, int, int, int]]
NAME = b"answer.2"                           # with the version of the format
BYTE_NAMES = {BYTE(byte): bytes([byte]) for byte in range(256)}
BYTE_CHARACTERS = {character: byte for byte, character in enumerate(BYTES)}
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
    odd = [t["content"] for t in content["added_tokens"]
           if t["lstrip"] or t["rstrip"] or t["single_word"]
           or (t["normalized"] and normalizer and not t["special"])]
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


class Tables(NamedTuple):
    """The tables of answer.bin, by answer.c's names and in its order: it says what they hold."""

    TEXTS: bytes
    STARTS: list[int]
    BYTES: list[int]
    PAGES: list[int]
    KINDS: list[int]
    BEFORE: list[int]
    AFTER: list[int]
    STOPS: list[int]
    PROMPT: list[int]
    FOLLOWING: list[int]
    MERGES: Rows
    NAMES: Rows
    ADDED: Rows
    PARTS: Rows
    WHOLES: Rows
    LARGEST: Rows
    TASKS: Rows
    CHOICES: Rows
    DRAFTS: Rows


def token_bytes(token: str, fallback: bool) -> bytes:
    r"""What a token writes, by its name in tokenizer.json. fallback: the names are characters, with
    "▁" for a space, and tokens of bytes besides; otherwise each character stands for a byte.

    >>> token_bytes("Ġcard", fallback=False), token_bytes("Ã©", fallback=False)
    (b' card', b'\xc3\xa9')
    >>> token_bytes("▁card", fallback=True), token_bytes("<0x0A>", fallback=True)
    (b' card', b'\n')
    """
    if fallback:
        return BYTE_NAMES.get(token) or token.replace("▁", " ").encode()
    if all(character in BYTE_CHARACTERS for character in token):
        return bytes(BYTE_CHARACTERS[character] for character in token)
    return token.encode()                    # such as an added one of two line ends


def names_of(bpe: BPE, flags: int, written: Mapping[int, bytes]) -> dict[str, int]:
    """Texts that are looked up before any pair is merged, and their tokens: whole words, or single
    characters."""
    if flags & CHARACTERS:
        return {t: i for t, i in (bpe.vocab | {" ": bpe.vocab["▁"]}).items() if len(t) == 1}
    if flags & WHOLE_WORDS:
        return {text.decode(): i for i, text in written.items()
                if text == text.decode("utf-8", "ignore").encode()}
    return {}


def template_codes(text: str, special: Mapping[str, int]) -> list[int]:
    """A part of the chat template: its characters, and SPECIAL + its special tokens."""
    longest_first = sorted(special, key=len, reverse=True)       # one may begin another
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return [n for part in parts
            for n in ([SPECIAL + special[part]] if part in special else map(ord, part))]


def pack_tables(head: bytes, tables: Tables) -> bytes:
    """The content of answer.bin: its name, a hash of the rest, the head, where each table is and
    how many entries it has, and the tables."""
    places, body = list[int](), b""
    start = len(NAME) + 4 + len(head) + 8 * len(tables)
    for table in tables:
        places += [start + len(body), len(table)]
        if isinstance(table, bytes):
            data = table
        else:                                # of a row, the second number comes first: see answer.c
            flat = [n for entry in table for n in (
                (entry[1], entry[0], *entry[2:]) if isinstance(entry, tuple) else (entry,))]
            data = struct.pack(f"<{len(flat)}I", *flat)
        body += data + bytes(-len(data) % 8)
    rest = head + struct.pack(f"<{len(places)}I", *places) + body
    return NAME + struct.pack("<I", zlib.crc32(rest)) + rest


def write_port(folder: Path, info: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Write answer.c, answer.h and answer.bin into a folder of which export.json says `info`."""
    for name in ("answer.c", "answer.h"):
        shutil.copyfile(Path(__file__).with_name("port") / name, folder / name)
    bpe, words, numbers, flags = splitting(folder)
    special, size, said = tokenizer.special, info["vocab_size"], info["contract"]
    golden, fallback = said["golden"], bool(flags & CHARACTERS)
    written = {i: token_bytes(token, fallback) for token, i in (bpe.vocab | bpe.added).items()
               if token not in special}
    named, tasks, choices = task_tables(folder, tokenizer, size + 1)
    texts = [*(written.get(i, b"") for i in range(size)), *map(str.encode, [QUESTION, *named])]
    pages, kinds, parts, wholes = characters(words, bool(flags & NORMAL_FORM))
    values = golden["logits"]["values"]
    scores = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    drafts = {"".join(map(chr, ids[::-1])): t for ids, t in (read_drafts(folder) or {}).items()}
    tables = Tables(
        TEXTS=b"".join(texts), STARTS=[0, *accumulate(map(len, texts))],
        BYTES=[bpe.vocab.get(token, NONE) for token in (BYTE_NAMES if fallback else BYTES)],
        PAGES=pages, KINDS=kinds, BEFORE=template_codes(said["prompt"]["before"], special),
        AFTER=template_codes(said["prompt"]["after"], special), STOPS=said["stop_ids"],
        PROMPT=golden["input_ids"], FOLLOWING=golden["tokens"],
        MERGES=sorted((bpe.vocab[a], bpe.vocab[b], rank, bpe.vocab[a + b])
                      for (a, b), rank in bpe.ranks.items()),
        NAMES=tree(names_of(bpe, flags, written)),
        ADDED=tree({text: i for text, i in bpe.added.items() if text not in special}),
        PARTS=parts, WHOLES=wholes,
        LARGEST=[(i, 0, bits, 0) for i, bits in zip(golden["logits"]["ids"], scores)],
        TASKS=tasks, CHOICES=choices, DRAFTS=tree(drafts))
    flags |= STRIP * said["prompt"]["strip"] | SHARED * (said["cache"] == "shared")
    model = crc32(folder / name for name in ("model.onnx", "model.onnx.data"))
    head = struct.pack("<7IfI", model, size, info["context"], words, numbers, flags, size,
                       golden["logits"]["tolerance"], 0)     # struct Head of answer.c
    (folder / "answer.bin").write_bytes(pack_tables(head, tables))
