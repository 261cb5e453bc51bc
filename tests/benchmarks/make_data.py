"""Download the public tasks that the benchmarks call DATA, and write them as lines of train.py.

    python tests/benchmarks/make_data.py DATA [--tasks trec,clinc,banking77]

A task is a folder with train.jsonl and test.jsonl, in the form of Alpaca (instruction, input,
output). The lines are drawn with a fixed seed: everyone gets the same ones. Their sources:

- trec, one of 6 types: Li and Roth (2002), cogcomp.seas.upenn.edu; free for research;
- clinc, one of 10 domains: CLINC150 (Larson et al. 2019), github.com/clinc/oos-eval; CC BY 3.0;
- banking77, one of 77 intents: github.com/PolyAI-LDN/task-specific-datasets; CC BY 4.0;
- boolq, arc_easy, openbookqa, piqa, winogrande, social_i_qa, one of 2 to 5 choices in the prompts
  of the LoRA-SMoE paper: github.com/AGI-Edgerunners/LLM-Adapters; ODC-By, and their own licences.
"""

import argparse
import csv
import io
import json
import random
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minismoe.io.files import replacing

GITHUB = "https://raw.githubusercontent.com/"
TREC = "https://cogcomp.seas.upenn.edu/Data/QA/QC/"
CLINC = GITHUB + "clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/"
BANKING = (GITHUB + "PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/"
           "banking_data/")
ADAPTERS = (GITHUB + "AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/"
            "dataset/")
CHOICES = {"boolq": "boolq", "arc_easy": "ARC-Easy", "openbookqa": "openbookqa", "piqa": "piqa",
           "winogrande": "winogrande", "social_i_qa": "social_i_qa"}
TYPES = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human",
         "LOC": "location", "NUM": "number"}
LINES = {"train": 1200, "test": 300}
Line = tuple[str, str, str]                      # instruction, input, output


def download(url: str) -> bytes:
    print(url, file=sys.stderr)
    with urllib.request.urlopen(url, timeout=60) as answer:
        data: bytes = answer.read()
    return data


def trec(split: str, read: Callable[[str], bytes]) -> Iterator[Line]:
    file = {"train": "train_5500.label", "test": "TREC_10.label"}[split]
    *most, last = TYPES.values()
    for line in read(TREC + file).decode("latin-1").splitlines():
        kind, question = line.split(" ", 1)      # as in "NUM:dist How far is it ... ?"
        yield (f"What type of answer does this question ask for: {', '.join(most)} or {last}?",
               question, TYPES[kind.split(":")[0]])


def clinc(split: str, read: Callable[[str], bytes]) -> Iterator[Line]:
    domains = {intent: domain.replace("_", " ") for domain, intents in
               json.loads(read(CLINC + "domains.json")).items() for intent in intents}
    names = ", ".join(sorted(set(domains.values())))
    for text, intent in json.loads(read(CLINC + "data_full.json"))[split]:
        yield f"Which domain does this request belong to: {names}?", text, domains[intent]


def banking77(split: str, read: Callable[[str], bytes]) -> Iterator[Line]:
    for row in csv.DictReader(io.StringIO(read(f"{BANKING}{split}.csv").decode())):
        yield ("Name the banking intent of this customer message.", row["text"],
               row["category"].replace("_", " "))


def choices(folder: str, split: str, read: Callable[[str], bytes]) -> Iterator[Line]:
    for row in json.loads(read(f"{ADAPTERS}{folder}/{split}.json")):
        yield row["instruction"], row["input"], row["output"]


def write_task(name: str, folder: Path, read: Callable[[str], bytes] = download) -> None:
    """The two files of a task in a folder. read: the bytes behind an address."""
    rng = random.Random(0)
    for split, count in LINES.items():
        lines = list(choices(CHOICES[name], split, read) if name in CHOICES else
                     {"trec": trec, "clinc": clinc, "banking77": banking77}[name](split, read))
        rng.shuffle(lines)
        if name == "banking77" and split == "train":
            count = 2000                         # of 77 answers
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(
            {"instruction": asked, "input": text.strip(), "output": answer},
            ensure_ascii=False) + "\n" for asked, text, answer in lines[:count]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["trec", "clinc", "banking77", *CHOICES]
    parser.add_argument("out", type=Path, metavar="DATA", help="a new folder")
    parser.add_argument("--tasks", default=",".join(known), help="default: %(default)s")
    args = parser.parse_args()
    if unknown := [name for name in args.tasks.split(",") if name not in known]:
        parser.error(f"--tasks {unknown[0]} is none of {', '.join(known)}")
    with replacing(args.out, folder=True) as folder:
        for name in args.tasks.split(","):
            (folder / name).mkdir()
            write_task(name, folder / name)


if __name__ == "__main__":
    main()
