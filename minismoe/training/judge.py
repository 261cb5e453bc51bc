"""How well a model does on the test lines of a task: loss, token accuracy, exact match, answers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..data.tasks import Example
from ..data.tokenizer import Tokenizer
from ..model.decoder import CausalLM
from .evaluate import HalvingBatch, Questions, evaluate, generate, token_scores

# As before.json and after.json hold it: "loss" (nats, the mean over the supervised tokens of test
# lines) and "token_accuracy", None without a test line; "samples", each of prompt, expected and
# given; and, if answers were generated, what `Accuracy` has.
Judgement = dict[str, Any]
SHOWN, LONGEST_SHOWN = 5, 64         # prompts whose answers are shown, and tokens of such an answer


def judge(model: CausalLM, tokenizer: Tokenizer, asked: Questions, examples: Sequence[Example],
          exact: bool, shown: int, fitting: HalvingBatch,
          progress: Callable[[int], Any] = lambda lines: None) -> Judgement:
    """Judge `model` by the loss of a task's test lines, as examples; with `exact`, by its answers
    to what is asked, too, of which the first `shown` are kept as samples."""
    samples, loss, right = [], None, None
    if prompts := asked.prompts[:shown]:
        limit = min(LONGEST_SHOWN, model.config.max_position_embeddings - max(map(len, prompts)))
        for messages, answer, given in zip(asked.lines, asked.answers, fitting(partial(
                generate, model, prompts, limit, tokenizer.stop_ids))):
            samples.append({"prompt": messages[-2].get("content", ""),
                            "expected": tokenizer.decode(answer).strip(),
                            "given": tokenizer.decode(given).strip()})
    if examples:
        loss, right = (round(figure, 5) for figure in fitting(partial(
            token_scores, model, examples, tokenizer.pad_id))[:2])
    accuracy = {}
    if exact:
        accuracy = vars(fitting(lambda size: evaluate(model, tokenizer, asked, size, progress)))
    else:
        progress(len(asked.lines))
    return {"loss": loss, "token_accuracy": right, **accuracy, "samples": samples}
