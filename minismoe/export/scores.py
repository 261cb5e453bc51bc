"""Exact match of the model as it was trained and of an export, and which step lost what.

Between the two, the model may be trimmed to fewer tokens, its mixtures merged, its weights rounded.
The trimmed model is always measured; the merged one only if the export answers worse than chance
explains.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..data.tasks import Task
from ..data.tokenizer import Tokenizer
from ..io.progress import progress_bar
from ..io.text import clean, table
from ..model.decoder import CausalLM
from ..runtime import Generator
from ..training.evaluate import Accuracy, evaluate, exact_match, questions
from .settings import ExportConfig, Source

TRAINED, TRIMMED, MERGED, ROUNDED = "trained", "trimmed", "merged", "rounded"
Scores = dict[str, dict[str, Accuracy]]      # by task: of the trained model, steps, and the export
ADVICE = {
    TRIMMED: "keep more tokens (a larger --vocab, or none)",
    MERGED: "keep the mixtures (--layout onnx --routing dynamic), or calibrate on lines like those "
            "of the test (--prompts FILE)",
    ROUNDED: "export with more bits (--precision int4, int4-8, int8, fp32, in rising order)"}
FIRST = 100              # test lines of a task that are answered first
CHANCE = 0.05            # a loss is told if chance explains it less often than this


def scored(source: Source, config: ExportConfig, name: str, measure: Callable[[Task], Accuracy],
           ) -> Scores:
    """Exact match by task, or of the task that is exported: of the trained model, of the trimmed
    one with --vocab, and of the export `name`, which `measure` gives. Tasks whose answers the
    export has no room for are left out.

    The first FIRST test lines of each task are answered; the others if --limit-test asks for them,
    or if as many losses among them would be more than chance explains.
    """
    tasks = [task for task in source.tasks if config.task in (None, task.name)]
    first = max((len(task.test) for task in tasks), default=0) if config.limit_test else FIRST
    scores = scores_of_lines(source, config, tasks, slice(first), name, measure)
    sizes = {task.name: -(-len(task.test) // first) for task in tasks if task.test}
    if any(losses({task: {step: counted(of.right * sizes[task]) for step, of in row.items()}
                   for task, row in scores.items()})):
        for task, row in scores_of_lines(
                source, config, tasks, slice(first, None), name, measure).items():
            scores[task] = {step: counted(of.right + row[step].right)
                            for step, of in scores[task].items()}
    return scores


def scores_of_lines(source: Source, config: ExportConfig, tasks: Sequence[Task], lines: slice,
                    name: str, measure: Callable[[Task], Accuracy]) -> Scores:
    """What `scored` returns, for some of each task's test lines."""
    found = Scores()
    for task in (replace(task, test=task.test[lines]) for task in tasks):
        if not task.test or not (of_export := measure(task)).examples:
            continue
        row, own = dict[str, Accuracy](), TRIMMED if config.vocab else TRAINED
        if task.name in source.judged:
            row[TRAINED] = counted(source.judged[task.name][lines][:len(task.test)])
        if own not in row:
            row[own] = accuracy_in_torch(source.trained, source.tokenizer, task)
        found[task.name] = row | {name: of_export}
    return found


def counted(right: list[int]) -> Accuracy:
    """Exact match, of whether each line is right."""
    return Accuracy(sum(right), len(right), right=right)


def accuracy_in_torch(model: CausalLM, tokenizer: Tokenizer, task: Task) -> Accuracy:
    """Exact match of a model on the test split of a task."""
    return evaluate(model, tokenizer, questions(
        tokenizer, task, model.config.max_position_embeddings))


def accuracy(generator: Generator, task: Task) -> Accuracy:
    """Exact match of an exported folder on the test split of a task; of no line if it has no room
    for the answers, in the context or in the past of a static graph."""
    def complete(prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        limit = max(limits, default=0)
        if (room := generator.room(max(map(len, prompts), default=0))) < limit:
            print(f"{clean(task.name)}: no exact match, as an answer may have {limit} tokens, and "
                  f"there is room for {room}")
            return []
        return [[*generator.generate(prompt, limit)] for prompt, limit in progress_bar(
            [*zip(prompts, limits)], f"evaluate {clean(task.name)}", unit="line", leave=False)]

    # The same lines as in PyTorch: `sizes_of` sees to it that the context holds all of them.
    asked = questions(generator.tokenizer, task, generator.context)
    return exact_match(generator.tokenizer, asked, complete)


def shares(scores: Scores) -> dict[str, dict[str, float]]:
    """What export.json says of exact match, by task."""
    return {task: {name: of.share for name, of in row.items()} for task, row in scores.items()}


def losses(scores: Scores) -> Iterator[tuple[str, dict[str, list[int]], int, int]]:
    """Each task, and all together, of which the export answers more lines wrongly than chance
    explains: whether each line is right, in each column; lines that it answers wrongly and the
    trained model rightly; and the other way round."""
    rows = {clean(task): {name: of.right for name, of in row.items()}
            for task, row in scores.items()}
    if len(rows) > 1:
        rows["all tasks"] = {name: [right for row in [*rows.values()] for right in row[name]]
                             for name in next(iter(rows.values()))}
    for task, row in rows.items():
        before, *_, after = row.values()
        pairs = [*zip(before, after)]
        lost, won = pairs.count((1, 0)), pairs.count((0, 1))
        if chance_of(lost, won) < CHANCE / len(rows):
            yield task, row, lost, won


def chance_of(lost: int, won: int) -> float:
    """How often chance loses as many or more of the lines that two models answer differently: the
    sign test of paired lines, exact and one-sided."""
    every = lost + won
    return sum(math.comb(every, k) for k in range(lost, every + 1)) / 2 ** every


def show_scores(scores: Scores, last_step: str) -> None:
    """Print exact match by task and, where the export has lost more than chance explains, after
    which step how many lines are right. last_step: the one before the export, a key of ADVICE."""
    if not scores:
        return
    names = [*next(iter(scores.values()))]
    rows = [(clean(task), [of.share for of in row.values()]) for task, row in scores.items()]
    rows.append(("mean", [statistics.mean(column) for column in zip(*(row for _, row in rows))]))
    print(table(["exact match", *names], [
        [task, *(f"{share:.3f}" for share in row)] for task, row in rows]))
    for task, right, lost, won in losses(scores):
        counts = [sum(lines) for lines in right.values()]
        falls = [a - b for a, b in zip(counts, counts[1:])]
        worst = [*names[1:-1], last_step][falls.index(max(falls))]
        print(f"{task}: of {len(right[TRAINED])} test lines, the export answers {lost} wrongly "
              f"that the trained model answers rightly, and {won} rightly that it answers wrongly. "
              "This is more than chance explains. Right answers: "
              + ", ".join(f"{name} {count}" for name, count in zip(names, counts))
              + f". Most are lost where the model is {worst}: {ADVICE[worst]}", file=sys.stderr)
