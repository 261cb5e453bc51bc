"""How well a model does on the test lines of a task: loss, token accuracy, exact match, answers."""

from collections.abc import Callable
from statistics import median
from typing import Any

from ..data.tasks import Task, encode_all
from ..data.tokenizer import Tokenizer
from ..model.decoder import CausalLM
from .evaluate import evaluate, generate, questions, token_scores

# As before.json and after.json hold it: "loss" (nats, the mean over the supervised tokens of test
# lines) and "token_accuracy", None without a test line; "samples", each of prompt, expected and
# given; and, if answers were generated, what `Accuracy` has.
Judgement = dict[str, Any]
SHORT = 32               # tokens: longer answers are hardly ever the same to the last word
SHOWN, LONGEST_SHOWN = 5, 64         # prompts whose answers are shown, and tokens of such an answer


def has_short_answers(tokenizer: Tokenizer, task: Task, context: int) -> bool:
    """Whether half of the test answers have at most SHORT tokens. ValueError as `questions` has."""
    return median(map(len, questions(tokenizer, task, context)[1])) <= SHORT


def judge(model: CausalLM, tokenizer: Tokenizer, task: Task, exact: bool, shown: int,
          batch_size: int, progress: Callable[[int], Any] = lambda lines: None) -> Judgement:
    """Judge `model` by a task's test lines; with `exact`, by its own answers to them, too. `shown`
    answers are kept as samples, of validation lines if there is no test line."""
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
        return {"loss": None, "token_accuracy": None, "samples": samples}
    loss, right = token_scores(model, encode_all(task, tokenizer, context, "test"),
                               tokenizer.pad_id, batch_size)
    if exact:
        accuracy = vars(evaluate(model, tokenizer, task, batch_size, progress))
    else:
        accuracy = {}
        progress(len(task.test))
    return {"loss": round(loss, 5), "token_accuracy": round(right, 5), **accuracy,
            "samples": samples}
