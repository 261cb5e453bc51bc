"""Small byte-pair encodings, made by the tokenizers library: of bytes, and of characters."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minismoe.method.vocabulary import BYTE

CORPUS = ["the cat sat on the mat and the hats of the cats are flat", "a man ran and ran again",
          "naïve café, größer als Straße", "3.14 + 2.72 = 5.86 and 1,000,000 more", "猫 🐈 cat"] * 3
WORDS = [word for line in CORPUS for word in line.split(" ")]


def byte_level(ignore_merges: bool = False, corpus: Sequence[str] = CORPUS, size: int = 420,
               special: Sequence[str] = ("<s>", "</s>", "<unused0>")) -> Tokenizer:
    """A BPE of bytes as GPT-2's, trained on a corpus."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[*special]))
    return made


def byte_fallback() -> Tokenizer:
    """A BPE of characters as Gemma's, where a whole text is one word, with several merges for one
    token, and an added token that is not special inside its vocabulary."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse()])
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=440, show_progress=False, special_tokens=[
            "<unk>", "<bos>", "<unused0>", *map(BYTE, range(256))]))
    content = json.loads(made.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"][:3] != "<0x"]
    vocab = content["model"]["vocab"]
    content["model"]["merges"] += [
        [text[:i], text[i:]] for text in vocab for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
        and [text[:i], text[i:]] not in content["model"]["merges"]]
    made = Tokenizer.from_str(json.dumps(content))
    made.add_tokens(["the▁cat"])
    return made
