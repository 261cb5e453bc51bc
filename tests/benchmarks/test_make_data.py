"""The public tasks, from small files in the forms of their sources."""

import json
import random
from pathlib import Path

import make_data
import pytest

SOURCES = {
    "train_5500.label": "\n".join(f"NUM:dist How far is caf\xe9 {n} ?" for n in range(9)
                                  ).encode("latin-1"),
    "TREC_10.label": b"ABBR:exp What is LED ?\n",
    "domains.json": b'{"credit_cards": ["limit"], "work": ["pto"]}',
    "data_full.json": b'{"train": [["raise my limit", "limit"]], "test": [["days off", "pto"]]}',
    "banking_data/train.csv": b'text,category\n"Hello, where\nis it? ",card_arrival\n',
    "banking_data/test.csv": b"text,category\nhello,age_limit\n",
    "ARC-Easy/train.json": b'[{"instruction": "?", "input": "", "output": "a", "answer": "b"}]',
    "ARC-Easy/test.json": b"[]"}


def source(url: str) -> bytes:
    return next(data for name, data in SOURCES.items() if url.endswith(name))


def written(folder: Path, task: str, split: str) -> list[list[str]]:
    make_data.write_task(task, folder, source)
    return [list(json.loads(line).values())
            for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]


def test_lines_are_drawn_with_a_fixed_seed(tmp_path: Path) -> None:
    order = [*range(9)]
    random.Random(0).shuffle(order)
    lines = written(tmp_path, "trec", "train")
    assert [line[1:] for line in lines] == [[f"How far is café {n} ?", "number"] for n in order]
    assert lines[0][0].endswith(": abbreviation, description, entity, human, location or number?")


@pytest.mark.parametrize(("task", "split", "line"), [
    ("trec", "test", ["What is LED ?", "abbreviation"]),
    ("clinc", "train", ["raise my limit", "credit cards"]),
    ("clinc", "test", ["days off", "work"]),
    ("banking77", "train", ["Hello, where\nis it?", "card arrival"]),
    ("arc_easy", "train", ["", "a"])])
def test_each_source_has_its_form(tmp_path: Path, task: str, split: str, line: list[str]) -> None:
    (instruction, *rest), = written(tmp_path, task, split)
    assert rest == line
    assert task != "clinc" or instruction.endswith("belong to: credit cards, work?")
