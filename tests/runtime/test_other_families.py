"""Families in the runtime: what PyTorch says, singly, and as chats go."""

from pathlib import Path

import pytest
import torch
from exported import KINDS, export
from tiny import BYTES, random_hf

from minismoe import generate, load_model
from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator

PROMPTS = [b"a", b"some words", b"longer: the quick brown fox jumps"]
FAMILIES = ("llama", "smollm3", "gemma3", "lfm2", "qwen3_5")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tmp_path_factory.mktemp(request.param)
    random_hf(request.param, vocab_size=BYTES["vocab_size"], hidden_size=64,
              head_dim=32 if request.param == "qwen3_5" else 16, eos_token_id=257,
              tie_word_embeddings=False).save_pretrained(folder)
    return load_model(folder)


@torch.no_grad()
@pytest.mark.parametrize("model, kind", [     # delta nets have no graph of another kind
    (family, kind) for family in FAMILIES for kind in KINDS if kind == "ort" or family != "qwen3_5"
    ], indirect=["model"])
def test_greedy_equals_torch(model: CausalLM, tmp_path: Path, kind: str) -> None:
    generator = Generator(export(model, tmp_path / kind, kind), threads=1)
    expected = generate(model, PROMPTS, 12, generator.tokenizer.stop_ids)
    assert len({*map(tuple, expected)}) == len(PROMPTS)
    assert [list(generator.generate(p, 12)) for p in PROMPTS] == expected
    assert generator.batch(PROMPTS, 12) == expected
    if kind != "chunks":
        cuttable = kind == "ort" and not model.config.convolutions
        for longer, fed in (([*PROMPTS[2], *expected[2][:1], *b"xyz"], 4), (b"longer: q", 1)):
            list(generator.generate(PROMPTS[2], 1))
            answer = generator.generate(longer, 8)
            assert list(answer) == generate(model, [longer], 8, generator.tokenizer.stop_ids)[0]
            read = len(longer) - answer.reader.cached_tokens
            assert read == (fed if cuttable or fed == 4 else len(longer))
