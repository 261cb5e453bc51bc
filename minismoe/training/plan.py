"""What a run does for each of its tasks: how often it reads their lines, what counts in the loss,
and how they are judged. Each task's plan follows from its own lines alone."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from statistics import fmean

from ..data.tasks import Example, bucket
from ..io import flags
from ..io.flags import flag
from ..io.text import table

PASSES, LEAST_PASSES, OPEN_PASSES = 120, 3, 2         # see `plan_tasks`
ENOUGH = 50                       # validation lines of a task that can tell steps apart
MOST_PROMPT, PROMPT_SHARE = 0.2, 3.0         # see `prompt_weight`
MOST_SMOOTHING, SMOOTHED = 0.1, 1.0          # see `smoothing`
FITTED, FITTED_TOKENS = 256, 8192            # see `lines_to_fit`
CLOSED, OPEN = 0.3, 0.45          # shares of new words in answers: see `plan_tasks`


@dataclass(frozen=True)
class TrainConfig:
    """How experts are trained; with data, model and allocation it determines the result."""

    epochs: int | None = flag(None, "passes over the training lines (default: each task's follow "
                              "its own lines, and are printed)", flags.natural, metavar="N")
    batch_size: int = flag(
        8, "examples per optimizer step (default: %(default)s)", flags.positive, metavar="N")
    recompute: bool = flag(
        False, "activation checkpointing: about a third slower, far less memory for long examples")
    lr: float | None = flag(None, "peak learning rate, after a warm-up; a cosine takes it to 0 "
                            "(default: it follows the size of the base's weights)", flags.number)
    routing: str = flag(
        "frozen", "frozen (default): after a part of the steps, the mixture of each matrix becomes "
        "one plain LoRA, which an export merges; dynamic: routers to the end, which an export "
        "keeps, or freezes at a loss", choices=("frozen", "dynamic"))
    seed: int = 0
    # Without a flag:
    micro_batch_size: int | None = None  # examples computed at once; None: batch_size
    prompt_loss: float = MOST_PROMPT     # the most that a token of a user counts: `prompt_weight`
    checkpoint_every: int = 200          # optimizer steps
    keep: str = "best"                   # or "last": which step's experts are kept
    max_grad_norm: float = 1.0           # gradients are clipped to this norm
    router_aux_loss_coef: float = 0.01   # weight of the balance loss

    @property
    def micro(self) -> int:
        """Examples computed at once."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


@dataclass(frozen=True)
class TaskPlan:
    """How one task is trained and judged."""

    lines: int               # training lines
    passes: int              # over them
    steps: float             # of the run, as many as these lines fill
    prompt_weight: float     # of a token that a user wrote, in the loss: the mean over lines
    smoothing: float         # what targets leave to all tokens alike: the mean over lines
    new_words: float         # the share of words in answers that neither prompts nor others hold
    judged: str              # by right "answers", or by the "loss" of unseen lines
    valid: int               # validation lines, in a file or held out


def can_match(new_words: float) -> bool:
    """Whether the answers of a task can be written exactly as its unseen lines have them, by the
    share of new words in its answers: those of labels, JSON, keywords and corrected sentences can,
    and those of free text cannot."""
    return new_words < (CLOSED + OPEN) / 2


def prompt_weight(example: Example, most: float) -> float:
    """How much each token that a user wrote counts in the loss, where one of the answer counts 1.

    With few lines, the loss of prompts keeps the model from knowing its lines by heart alone (Shi
    et al. 2024, arXiv 2405.14394). All of a line's prompt counts at most PROMPT_SHARE times as much
    as its answer: else long prompts are what is learnt.
    """
    return min(most, PROMPT_SHARE * example.supervised / max(1, len(example.asked)))


def smoothing(example: Example) -> float:
    """The probability that the target of each token of an answer leaves to all tokens alike.

    With few lines, a model is certain of short answers long before it is right (Szegedy et al.
    2016, arXiv 1512.00567). Most of a long answer is copied or given by what stands before it, and
    there the model may be certain: its tokens leave SMOOTHED together.
    """
    return min(MOST_SMOOTHING, SMOOTHED / max(1, example.supervised))


def plan_tasks(examples: Sequence[Example], valid: Sequence[Example], cfg: TrainConfig,
               ) -> dict[str, TaskPlan]:
    """The plan of each task of the training lines `examples`; its validation lines are in `valid`.

    A task takes PASSES / sqrt(lines) passes over its lines, and LEAST_PASSES at least: 12 over 100
    lines, 6 over 400, 3 from 1,200 on. few.py in tests/benchmarks measured PASSES. Free text, whose
    loss on unseen lines rises again after few passes, takes OPEN_PASSES: a task is free text if a
    share of OPEN of the words in its answers is new (see answers.py in data), and none below
    CLOSED. In between, passes change gradually.
    """
    plans = {}
    for task, lines in by_task(examples).items():
        new_words = lines[0].new_words
        closed = min(1.0, max(0.0, (OPEN - new_words) / (OPEN - CLOSED)))
        usual = max(LEAST_PASSES, PASSES / math.sqrt(len(lines)))
        passes = (round(OPEN_PASSES + closed * (usual - OPEN_PASSES)) if cfg.epochs is None
                  else cfg.epochs)
        plans[task] = TaskPlan(
            len(lines), passes, round(passes * len(lines) / cfg.batch_size, 1),
            round(fmean(prompt_weight(e, cfg.prompt_loss) for e in lines), 3),
            round(fmean(map(smoothing, lines)), 3), round(new_words, 2),
            "answers" if can_match(new_words) else "loss", sum(e.task == task for e in valid))
    return plans


def by_task(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The examples of each task, in order of name."""
    return {task: [*lines] for task, lines in groupby(
        sorted(examples, key=lambda e: e.task), key=lambda e: e.task)}


def planned_batches(examples: Sequence[Example], plans: Mapping[str, TaskPlan], cfg: TrainConfig,
                    ) -> list[list[Example]]:
    """The batches of a run, which a resumed run computes again. Each task's passes are spread
    evenly over it: the run is cut into as many parts as the task with most passes has."""
    streams, parts = list[list[Example]](), max(plan.passes for plan in plans.values())
    for task, lines in by_task(examples).items():
        weighed = [replace(e, prompt_weight=prompt_weight(e, cfg.prompt_loss),
                           smoothing=smoothing(e)) for e in lines]
        streams.append([line for number in range(plans[task].passes) for line in random.Random(
            f"{cfg.seed} {number}").sample(weighed, len(weighed))])
    return [batch for part in range(parts) for batch in bucket(
        [line for stream in streams for line in stream[len(stream) * part // parts:
                                                       len(stream) * (part + 1) // parts]],
        cfg.batch_size, cfg.seed * 1000 + part)]


def lines_to_fit(lines: Iterable[Example]) -> list[Example]:
    """The first lines, FITTED of them or FITTED_TOKENS tokens at most, but two in any case: those
    that mixtures are fitted to when they become plain LoRAs."""
    chosen, tokens = list[Example](), 0
    for line in islice(lines, FITTED):
        tokens += len(line.ids)
        if tokens > FITTED_TOKENS and len(chosen) > 1:
            break
        chosen.append(line)
    return chosen


def plan_table(plans: Mapping[str, TaskPlan]) -> str:
    """The plans, for a terminal, with the reason why tasks are judged as they are."""
    return table(["task", "lines", "passes", "steps", "weight of prompts", "smoothing", "new words",
                  "judged by", "validation lines"],
                 [[task, *vars(plan).values()] for task, plan in plans.items()]) + (
        "\nnew words: the share of words in answers that neither their prompts nor other lines "
        f"hold; from {(CLOSED + OPEN) / 2:.3f} on a task is free text, judged by its loss "
        "(--exact-match on compares its answers in the test, too; --epochs sets the passes)")
