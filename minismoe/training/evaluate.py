"""How well a model does on unseen lines: loss, completion with the KV cache, exact match."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.tasks import Example, Task, collate, encode_lines
from ..data.tokenizer import Tokenizer
from ..data.tools import Message
from ..data.turns import Line
from ..io.progress import print_above_bar
from ..io.text import out_of_memory
from ..method.loss import head_scores, supervised_tokens, to_device
from ..model.decoder import CausalLM
from ..model.tokens import Cache, Tokens, to_device_together

Result = TypeVar("Result")
# As before.json and after.json hold it: "loss" (nats, the mean over the supervised tokens of test
# lines) and "token_accuracy", None without a test line; "samples", each of prompt, expected and
# given; and, if answers were generated, what `Accuracy` has.
Judgement = dict[str, Any]
SHOWN, LONGEST_SHOWN = 5, 64         # prompts whose answers are shown, and tokens of such an answer


class HalvingBatch:
    """How many examples are computed at once; `work`, such as "training", says in what."""

    def __init__(self, size: int, work: str):
        self.size, self.work = size, work

    def __call__(self, run: Callable[[int], Result]) -> Result:
        """run(size), begun again with half the size each time that memory runs out."""
        while True:
            try:
                return run(self.size)
            except (MemoryError, RuntimeError) as e:
                if not out_of_memory(e) or self.size == 1:
                    raise
            self.size //= 2
            print_above_bar(f"out of memory, so from now on {self.work} takes {self.size} examples "
                            "at a time")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def evaluating(micro: int) -> HalvingBatch:
    """For evaluation, which keeps nothing for a backward pass: more fit at once than the `micro`
    examples of training."""
    return HalvingBatch(min(32, 4 * micro), "evaluation")


def alike(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of at most `size` texts of these lengths, by number: the longest first, so that what
    does not fit in memory fails at once, and none below half the length of its batch's longest."""
    batches: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or len(batches[-1]) == size or 2 * lengths[n] < lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(n)
    return batches


@torch.no_grad()
def generate(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int],
             stop_ids: Sequence[int], batch_size: int = 32,
             progress: Callable[[int], Any] = lambda prompts: None) -> list[list[int]]:
    """Greedy continuations of token prompts: up to a stop id, which is left out, or the limit, one
    for all or one each. Prompts of similar length share a batch, which ends when all of its rows
    have stopped."""
    limits = ([max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int)
              else max_new_tokens)
    batches, answers = alike([*map(len, prompts)], batch_size), dict[int, list[int]]()
    for batch in batches:
        answers |= zip(batch, _generate_batch(
            model, [prompts[n] for n in batch], [limits[n] for n in batch], stop_ids))
        progress(len(batch))
    return [answers[n] for n in range(len(prompts))]


def _generate_batch(model: CausalLM, prompts: Sequence[Sequence[int]], limits: Sequence[int],
                    stop_ids: Sequence[int]) -> list[list[int]]:
    device = model.model.norm.weight.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
    lengths, positions = torch.tensor([[len(p)] for p in prompts]), torch.arange(longest)
    mask, needed = positions < lengths, positions == lengths - 1       # (B, T), right-padded
    cache = Cache(model, len(prompts), longest + max(limits))
    answers: list[list[int]] = [[] for _ in prompts]
    running, stops = {n for n, limit in enumerate(limits) if limit}, set(stop_ids)
    while running:
        tokens = Tokens(ids, mask, model.config, device, needed, cache)
        chosen = model.lm_head(model.model.rows(tokens)).argmax(-1).tolist()     # the one wait
        running -= {n for n in running if chosen[n] in stops}
        for n in running:
            answers[n].append(chosen[n])
        running -= {n for n in running if len(answers[n]) == limits[n]}
        ids = torch.tensor(chosen)[:, None]
        mask = needed = torch.ones_like(ids, dtype=torch.bool)
    return answers


class Supervised(NamedTuple):
    """What a model computes of the tokens of some examples that count in a loss, S in all."""

    hidden: Tensor           # (S, D) states of the tokens before these
    targets: Tensor          # (S,) these
    numbers: Tensor          # (S,) of each one's example; len(examples) if it is no supervised one
    weights: Tensor          # (S,) how much it counts, of all examples that share it
    repeats: Tensor          # (S,) how many these are
    tokens: Tokens           # all tokens of the examples, packed


def supervised(model: CausalLM, examples: Sequence[Example], pad_id: int, recompute: bool = False,
               weights: Tensor | None = None) -> Supervised:
    """Run a model, without its head, on some examples. A prefix that neighbouring examples share is
    computed once. Nothing waits for the device.

    weights (B, T): how much each token counts; without, the supervised ones count 1.
    """
    ids, mask, labels = collate(examples, pad_id)
    needed, device = supervised_tokens(mask, labels)[0], model.lm_head.weight.device
    weights = needed.float() if weights is None else F.pad(weights[:, 1:], (0, 1))     # of targets
    counts = weights > 0
    tokens = Tokens(ids, mask, model.config, device, needed, read=counts | needed)
    rows, columns = tokens.places
    there = to_device_together({
        "targets": ids[rows, columns + 1],
        "numbers": rows.where(needed[rows, columns], len(examples))}, device)
    weights = to_device(weights.flatten(), device)
    weights = weights.new_zeros(len(tokens.ids)).index_add(0, tokens.sources, weights)
    return Supervised(model.model.rows(tokens, recompute), there["targets"], there["numbers"],
                      weights[tokens.read], tokens.repeats[tokens.read], tokens)


class TokenScores(NamedTuple):
    """How well a model predicts the supervised tokens of examples, given the right ones before."""

    loss: float              # the mean cross-entropy, in nats
    accuracy: float          # the share of tokens that the model finds likeliest
    lines: int               # examples of whose tokens it finds each one likeliest: greedy
    #                          generation would write just these answers


@torch.no_grad()
def token_scores(model: CausalLM, examples: Sequence[Example], pad_id: int, batch_size: int = 32,
                 ) -> TokenScores:
    """The scores of some examples, by one forward pass."""
    def sums(batch: Sequence[int]) -> tuple[float, int, int, int]:
        # Sorted rows put shared prefixes side by side.
        lines = sorted((examples[n] for n in batch), key=lambda e: e.ids)
        found = supervised(model, lines, pad_id)
        losses, right = head_scores(found.hidden, model.lm_head.weight, found.targets)
        wrong = len({*found.numbers[~right].tolist()})
        return losses.sum().item(), int(right.sum()), len(found.targets), len(lines) - wrong

    batches = alike([len(e.ids) for e in examples], batch_size)
    losses, rights, counts, lines = map(sum, zip(*map(sums, batches)))
    return TokenScores(losses / counts, rights / counts, lines)


@dataclass
class Accuracy:
    """How many answers of one task are exactly right."""

    correct: int
    examples: int
    wrong: list[dict[str, str]] = field(default_factory=list)          # prompt, expected, given
    right: list[int] = field(default_factory=list)                     # 1 or 0 a line

    @property
    def share(self) -> float:
        """Correct answers as a part of all, 0 to 1."""
        return self.correct / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share (Wilson 1927); it holds for few examples and near 0 or 1."""
        n, p, z = self.examples, self.share, 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


class Questions(NamedTuple):
    """Lines, each a conversation, as questions to a model."""

    lines: list[Sequence[Message]]
    prompts: list[list[int]]         # tokens before the last answer
    answers: list[list[int]]         # tokens of that answer, without stop ids

    @property
    def limits(self) -> list[int]:
        """The most tokens of each completion: 4 above the right one's, so that an answer that runs
        on is wrong."""
        return [len(answer) + 4 for answer in self.answers]


def ask(lines: Sequence[Line]) -> Questions:
    """The last answers of lines, asked for."""
    return Questions([line.messages for line in lines], [line.prompt for line in lines],
                     [line.answer for line in lines])


def questions(tokenizer: Tokenizer, task: Task, context: int, split: str = "test") -> Questions:
    """The lines of a split whose prompts have fewer than `context` tokens. Raises the ValueErrors
    of `encode_lines`."""
    lines = encode_lines(task, tokenizer, split)
    return ask([line for line in lines if len(line.prompt) < context])


def evaluate(model: CausalLM, tokenizer: Tokenizer, asked: Questions, batch_size: int = 32,
             progress: Callable[[int], Any] = lambda prompts: None) -> Accuracy:
    """Exact match of `model` on questions."""
    return exact_match(tokenizer, asked, lambda prompts, limits: generate(
        model, prompts, limits, tokenizer.stop_ids, batch_size, progress))


def exact_match(tokenizer: Tokenizer, asked: Questions, complete: Callable[
        [list[list[int]], list[int]], list[list[int]]]) -> Accuracy:
    """Exact match on questions; complete(prompts, limits) answers, tokens in and out.

    An answer is right if it equals the last turn as the chat template writes it, apart from white
    space around both and the order of keys in calls.
    """
    wrong, right = [], []
    for messages, reference, answer in zip(asked.lines, asked.answers,
                                           complete(asked.prompts, asked.limits)):
        wanted, given = (tokenizer.decode(ids).strip() for ids in (reference, answer))
        contents = [json.dumps(tokenizer.parse(messages, text), sort_keys=True)
                    for text in (wanted, given)]
        right.append(int(contents[0] == contents[1]))
        if not right[-1]:
            wrong.append({"prompt": messages[-2].get("content", ""), "expected": wanted,
                          "given": given})
    return Accuracy(sum(right), len(right), wrong, right)


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
