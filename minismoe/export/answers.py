"""Exact match of the model as it was trained and of an export, and which step lost what.

Between the two, the model may be trimmed to fewer tokens, its mixtures frozen if training has not
done it, and its weights are rounded.
"""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby

from ..data.tasks import Task
from ..io.progress import progress_bar
from ..io.text import clean, table
from ..method.loss import IGNORE
from ..model.decoder import CausalLM
from ..runtime import Generator
from ..runtime.drafts import SUFFIX
from ..training.evaluate import evaluate, exact_match, questions
from .settings import Source
from .ship import Part

Rights = dict[str, dict[str, list[int]]]     # by task and model: 1 or 0 for each test line
CHANCE = 0.05            # a loss is told if chance explains it less often than this
ENOUGH = 50              # test lines, of which fewer cannot show a loss
ADVICE = {
    "trimmed": "keep more tokens (a larger --vocab, or none)",
    "frozen": "train with --routing frozen, or export with --routing dynamic",
    "rounded": "export with more bits (--precision int4, int4-8, int8, fp32, in rising order)"}


def check_answers(part: Part, source: Source, name: str, right: Callable[[Task], list[int]],
                  ) -> Rights:
    """Print exact match by task of the trained model, of the trimmed one with --vocab or the one
    that was frozen after training, and of the export, called `name` and answered by `right`; and
    which step lost what, if the export has lost more than chance explains. Tasks whose answers the
    export has no room for are left out."""
    rights, own = Rights(), "frozen" if source.froze else "trained"
    if part.config.vocab:
        own = "trimmed"
    for task in source.tasks:
        if task.test and (given := right(task)):
            known = {"trained": source.judged[task.name]} if task.name in source.judged else {}
            if own not in known:
                known[own] = rights_in_torch(source.trained, source, task)
            rights[task.name] = known | {name: given}
    show_rights(rights)
    return rights


def rights_of(generator: Generator, task: Task, steps: Counter[str]) -> list[int]:
    """Whether an exported folder answers each test line of a task rightly; [] if it has no room for
    the answers, in the context or in the past of a static graph. Adds to `steps` how many steps the
    answers took, and would have taken `steps_without` drafts."""
    # The same lines as in PyTorch: `sizes_of` sees to it that the context holds all of them.
    asked = questions(generator.tokenizer, task, generator.context)
    limit, longest = max(asked.limits, default=0), max(map(len, asked.prompts), default=0)
    if (room := generator.room(longest)) < limit:
        print(f"{clean(task.name)}: no exact match, as an answer may have {limit} tokens, and "
              f"there is room for {room}")
        return []

    def answer(prompt: list[int], limit: int) -> list[int]:
        tokens = [*(answer := generator.generate(prompt, limit))]
        steps.update(steps=answer.steps, steps_without=len(tokens) - (answer.ended != "stop"))
        return tokens

    return exact_match(generator.tokenizer, asked, lambda prompts, limits: [
        answer(*line) for line in progress_bar([*zip(prompts, limits)],
                                               f"evaluate {clean(task.name)}", unit="line",
                                               leave=False)]).right


def training_answers(source: Source) -> Iterator[tuple[list[int], list[int]]]:
    """The answers of the training lines as the model would write them, with the stop token, each
    after the tokens before it: what `make_drafts` takes."""
    for example in (e for examples in source.examples.values() for e in examples):
        start = 0
        for is_answer, labels in groupby(example.labels, lambda label: label != IGNORE):
            end = start + len([*labels])
            if is_answer:
                yield example.ids[max(0, start - SUFFIX):start], example.ids[start:end]
            start = end


def rights_in_torch(model: CausalLM, source: Source, task: Task) -> list[int]:
    """Whether a model answers each test line of a task rightly."""
    asked = questions(source.tokenizer, task, model.config.max_position_embeddings)
    return evaluate(model, source.tokenizer, asked).right


def shares(row: dict[str, list[int]]) -> dict[str, float]:
    """The share of right answers of each model."""
    return {name: statistics.fmean(right) for name, right in row.items()}


def losses(rights: Rights) -> Iterator[tuple[str, dict[str, list[int]], int, int]]:
    """Each task, and all together, of which the export answers more lines wrongly than chance
    explains: its row, the lines that only the trained model answers rightly, and those that only
    the export does. By the sign test of paired lines, exact and one-sided."""
    rows = {clean(task): row for task, row in rights.items()}
    if len(rows) > 1:
        rows["all tasks"] = {name: [n for row in rights.values() for n in row[name]]
                             for name in next(iter(rights.values()))}
    for task, row in rows.items():
        trained, *_, export = row.values()
        pairs = [*zip(trained, export)]
        lost, won = pairs.count((1, 0)), pairs.count((0, 1))
        tail = sum(math.comb(lost + won, k) for k in range(lost, lost + won + 1))
        if tail / 2 ** (lost + won) < CHANCE / len(rows):
            yield task, row, lost, won


def show_rights(rights: Rights) -> None:
    """Print the table, each loss with the step that lost most, and which tasks have too few lines.
    """
    if not rights:
        return
    names = [*next(iter(rights.values()))]
    rows = [(clean(task), [*shares(row).values()]) for task, row in rights.items()]
    rows.append(("mean", [statistics.fmean(column) for column in zip(*(row for _, row in rows))]))
    print(table(["exact match", *names], [
        [task, *(f"{share:.3f}" for share in row)] for task, row in rows]))
    for task, row, lost, won in losses(rights):
        counts = [*map(sum, row.values())]
        falls = [a - b for a, b in zip(counts, counts[1:])]
        worst = [*names[1:-1], "rounded"][falls.index(max(falls))]
        print(f"{task}: of {len(row[names[0]])} test lines, the export answers {lost} wrongly "
              f"that the trained model answers rightly, and {won} rightly that it answers wrongly. "
              "This is more than chance explains. Right answers: "
              + ", ".join(f"{name} {count}" for name, count in zip(names, counts))
              + f". Most are lost where the model is {worst}: {ADVICE[worst]}", file=sys.stderr)
    asked = {task: len([*row.values()][-1]) for task, row in rights.items()}
    if few := [f"{clean(task)} {count}" for task, count in asked.items() if count < ENOUGH]:
        print(f"too few test lines to show a loss: {', '.join(few)}. Ask {ENOUGH} or more: "
              "--limit-test N, or a longer test.jsonl in the task's folder")
