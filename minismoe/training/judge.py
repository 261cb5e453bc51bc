"""How well a model does on the test lines of a task: loss, token accuracy, exact match, answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..data.tasks import Example, Task, encode_all
from ..data.tokenizer import Tokenizer
from ..method.loss import CHUNK, head_losses
from ..model.decoder import CausalLM
from .compiled import uncompiled
from .copies import Copies
from .distributed import spread
from .evaluate import Accuracy, evaluate, generate, questions, supervised

SHORT = 32               # tokens: longer answers are hardly ever the same to the last word
SHOWN, LONGEST_SHOWN = 5, 64         # prompts whose answers are shown, and tokens of such an answer


@dataclass
class Judgement:
    """What a model does with the test lines of a task."""

    loss: float | None           # nats, the mean over the supervised tokens; None without a line
    token_accuracy: float | None         # share of these tokens that the model finds likeliest
    exact: Accuracy | None       # None if answers were not generated, or there is no line
    samples: list[dict[str, str]]        # prompt, expected, given

    def to_json(self) -> dict[str, Any]:
        """As before.json and after.json hold it."""
        return {"loss": self.loss, "token_accuracy": self.token_accuracy,
                **(vars(self.exact) if self.exact else {}), "samples": self.samples}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Judgement":
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        numbers = value["loss"], value["token_accuracy"]
        exact = Accuracy(value["correct"], value["examples"]) if "correct" in value else None
        if exact and not (type(exact.correct) is type(exact.examples) is int
                          and 0 <= exact.correct <= exact.examples > 0):
            raise ValueError("no count of right answers")
        if not all(isinstance(number, float | int | None) for number in numbers):
            raise TypeError("a loss that is no number")
        return cls(*numbers, exact, [dict(sample) for sample in value["samples"]])


def has_short_answers(tokenizer: Tokenizer, task: Task, context: int) -> bool:
    """Whether half of the test answers have at most SHORT tokens. ValueError as `questions` has."""
    return median(map(len, questions(tokenizer, task, context)[1])) <= SHORT


def judge(model: CausalLM, tokenizer: Tokenizer, task: Task, exact: bool, shown: int,
          batch_size: int, progress: Callable[[int], Any] = lambda lines: None) -> Judgement:
    """Judge `model` by a task's test lines; with `exact`, by its own answers to them, too. `shown`
    answers are kept, of validation lines if there is no test line."""
    context, lines = model.config.max_position_embeddings, task.test or task.valid
    kept = Task(task.name, [], lines[:shown])
    samples = []
    if kept.test:
        prompts, answers, _ = questions(tokenizer, kept, context)
        limit = min(LONGEST_SHOWN, context - max(map(len, prompts)))
        for messages, answer, given in zip(kept.test, answers, generate(
                model, prompts, limit, tokenizer.stop_ids, batch_size)):
            samples.append({"prompt": messages[-2].get("content", ""),
                            "expected": tokenizer.decode(answer).strip(),
                            "given": tokenizer.decode(given).strip()})
    if not task.test:
        return Judgement(None, None, None, samples)
    loss, right = token_scores(model, encode_all(task, tokenizer, context, "test"),
                               tokenizer.pad_id, batch_size)
    accuracy = evaluate(model, tokenizer, task, batch_size, progress) if exact else None
    if not exact:
        progress(len(task.test))
    return Judgement(round(loss, 5), round(right, 5), accuracy, samples)


@torch.no_grad()
def token_scores(model: CausalLM, examples: Sequence[Example], pad_id: int,
                 batch_size: int) -> tuple[float, float]:
    """Mean cross-entropy of the supervised tokens, in nats, and the share of them that the model
    finds likeliest, both given the right tokens before them."""
    step = max(1, CHUNK // model.config.vocab_size)

    def sums(batch: Sequence[Example]) -> tuple[float, int, int]:
        hidden, targets, _, _ = supervised(model, batch, pad_id)
        loss = head_losses(hidden, model.lm_head.weight, targets).sum().item()
        right = sum(int((model.lm_head(part).argmax(-1) == target).sum())
                    for part, target in zip(hidden.split(step), targets.split(step)))
        return loss, right, len(targets)

    order = sorted(examples, key=lambda e: e.ids)
    with uncompiled(), Copies(model).multiplying():
        losses, rights, counts = zip(*spread(sums, [
            order[i:i + batch_size] for i in range(0, len(order), batch_size)]))
    return sum(losses) / sum(counts), sum(rights) / sum(counts)
