"""--max-error: from which probability on an exported model may answer by itself."""

from collections.abc import Sequence
from typing import Any

from ..data.tasks import Task
from ..io.progress import progress_bar
from ..io.text import clean, table
from ..method.sure import CONFIDENCE, fewest, least_logprob
from ..runtime import Generator
from ..training.evaluate import exact_match, questions
from ..training.judge import has_short_answers
from .settings import Source

Answers = list[tuple[float, bool]]           # (log-probability of an answer, whether it is right)


def least_logprobs(generator: Generator, source: Source, only: str | None, max_error: float,
                   ) -> dict[str, dict[str, float | None]]:
    """What export.json says under `sure`, by task, or of the task `only`: the log-probability of
    the least likely answer that may stand, of those that the model writes ("text") and of those
    from the task's set ("set"); None if the validation lines show it for none.

    Prints a table, with the test lines beside, which choose nothing. Tasks with long answers are
    left out.
    """
    found, rows = dict[str, dict[str, float | None]](), []
    for task in source.tasks:
        if only not in (None, task.name) or not has_short_answers(
                questions(generator.tokenizer, task, generator.context, "valid")):
            continue
        of_task = found[task.name] = {}
        seen, unseen = (answers(generator, task, split) for split in ("valid", "test"))
        for way, valid in seen.items():
            least = of_task[way] = least_logprob(valid, max_error)
            sure = [[right for logprob, right in lines if least is not None and logprob >= least]
                    for lines in (valid, unseen[way])]
            rows.append([clean(task.name), {"text": "written", "set": "of the set"}[way],
                         len(valid), share(len(sure[0]), len(valid)), len(unseen[way]),
                         share(len(sure[1]), len(unseen[way])),
                         share(sure[1].count(False), len(sure[1]))])
    print(table(["sure answers", "", "validation lines", "sure", "test lines", "sure", "wrong"],
                rows))
    print(f"sure: at most {100 * max_error:g} % of such answers are wrong, with a confidence of "
          f"{100 * CONFIDENCE:g} %. It takes {fewest(max_error)} right answers of validation lines "
          "to show this, and more if some are wrong")
    return found


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def answers(generator: Generator, task: Task, split: str) -> dict[str, Answers]:
    """The answers to the lines of a split, by the way in which they are made."""
    asked = questions(generator.tokenizer, task, generator.context, split)
    written, chosen = list[float](), Answers()

    def complete(prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        texts = []
        for messages, prompt, limit in progress_bar(
                [*zip(asked.lines, prompts, limits)], f"sure of {clean(task.name)}", unit="line",
                leave=False):
            texts.append([*generator.generate(prompt, min(limit, generator.room(len(prompt))))])
            written.append(generator.logprob)
            if task.choices:
                best = generator.choose(prompt, task.choices)[0]
                chosen.append((best.logprob, best.text.strip() == messages[-1]["content"].strip()))
        return texts

    right = exact_match(generator.tokenizer, asked, complete).right
    found: dict[str, Any] = {"text": [*zip(written, map(bool, right))]}
    return found | ({"set": chosen} if task.choices else {})
