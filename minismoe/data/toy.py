"""The built-in toy: a tiny Llama base of bytes, and five small tasks. Nothing is downloaded.

tests/tools/make_toy.py taught the base to repeat quoted words, to write them in capitals, to name
the larger of two numbers, and facts about invented animals. Two tasks ask for capitals and facts in
other words; three are new to it: a word's length, the second of two words, the smaller of two
numbers. Each needs another skill, so each is sensitive in other matrices.
"""

import random
import string
from pathlib import Path

from .tasks import Task
from .tokenizer import Message

FOLDER = Path(__file__).parent / "toy_base"  # config.json and model.safetensors
TRAIN, VALID, TEST = 400, 40, 100            # conversations of a task, at most
LETTERS = string.ascii_lowercase[:16]

# Skill -> ways to ask for it. Facts fill in their question, the others their operands.
TASKS = {
    "capitals": ('Write "{}" in big letters.', 'Make "{}" upper case.'),
    "count": ('How many letters are in "{}"?', 'Count the letters of "{}".'),
    "facts": ("Tell me, {}?", "So {}?", "I forgot: {}?"),
    "second": ('Which comes after "{}", "{}"?', 'Leave out "{}" and say "{}".'),
    "smaller": ("Which is less, {} or {}?", "Take the smaller number: {}, {}."),
}
# What is known of an animal -> how the task asks for it, and the answers.
FACTS = {"home": ("where could I meet the {}", "oslo rome lima cairo delhi paris tokyo quito"),
         "colour": ("which paint suits the {}", "red blue green white pink yellow olive violet"),
         "food": ("what can I serve the {}", "figs nuts rice corn leaves honey moss apples"),
         "friend": ("who would play with the {}", "anna bob cleo dora emil fritz greta hugo")}
# Any two names differ in three letters at least, for the base confuses similar ones.
ANIMALS = """
    bumud bunar dalun derud dipit doriz dusoz gebid gevun goluk gufif kesuz
    kodas kunov madez malab mamum mibeb mukon nikob nosol palol pidun pusab
    raget razus rekeg repon silof somuz tazin telel tevav tifeg timoz tozuf
    vafod varip vefaz vogus vupuk zagug zaroz zebus zided zinir zovob zukav
""".split()

Case = tuple[tuple[str, ...], str]           # what fills in a question, and the answer


def known_facts() -> dict[tuple[str, str], str]:
    """{(animal, kind of fact): answer}, the same for every seed of the tasks."""
    rng = random.Random(0)
    return {(animal, kind): rng.choice(values.split())
            for animal in ANIMALS for kind, (_, values) in FACTS.items()}


def words(rng: random.Random, count: int, low: int, high: int) -> list[str]:
    """Random words of low to high letters, each letter only once, which makes copying easier."""
    letters = rng.sample(LETTERS, count * high)
    return ["".join(letters.pop() for _ in range(rng.randint(low, high))) for _ in range(count)]


def numbers(rng: random.Random) -> tuple[str, str]:
    """Two numbers of two digits, no digit twice: so the first digits say which is larger."""
    a, b, c, d = rng.sample("123456789", 4)
    return a + b, c + d


def cases(skill: str, rng: random.Random) -> list[Case]:
    """All facts, animal by animal, or 500 random cases of another skill, each once."""
    if skill == "facts":
        known = known_facts()
        return [((question.format(animal),), known[animal, kind])
                for animal in rng.sample(ANIMALS, len(ANIMALS))
                for kind, (question, _) in FACTS.items()]
    return list({case(skill, rng): None for _ in range(500)})


def case(skill: str, rng: random.Random) -> Case:
    """A random case of a task other than facts."""
    if skill == "smaller":
        pair = numbers(rng)
        return pair, min(pair)
    low, high = {"capitals": (3, 5), "count": (2, 6), "second": (3, 4)}[skill]
    drawn = words(rng, 2 if skill == "second" else 1, low, high)
    return tuple(drawn), {"capitals": drawn[0].upper(), "count": str(len(drawn[0])),
                          "second": drawn[-1]}[skill]


def tasks(seed: int = 0) -> list[Task]:
    """The five tasks, in chat form.

    No case of a split, and no animal, is in another split in any wording. Pretraining may contain a
    test case (a fact must be known before it can be asked for), but never a task's wording of it.
    """
    made = []
    for skill, questions in TASKS.items():
        rng = random.Random(f"{seed} {skill}")
        drawn = cases(skill, rng)
        tested, validated = len(drawn) // 6, len(drawn) // 6 + len(drawn) // 12
        splits: list[list[list[Message]]] = []
        for split, most in ((drawn[validated:], TRAIN), (drawn[:tested], TEST),
                            (drawn[tested:validated], VALID)):
            lines: list[list[Message]] = [
                [{"role": "user", "content": question.format(*operands)},
                 {"role": "assistant", "content": answer}]
                for operands, answer in split for question in questions]
            rng.shuffle(lines)
            splits.append(lines[:most])
        train, test, valid = splits
        made.append(Task(skill, train, test, valid))
    return made
