"""What the texts of a task's lines have in common: sets of answers, free text, instructions."""

import re
from pathlib import Path

import pytest

from minismoe.data.answers import closed_answers, new_words, shared_instruction
from minismoe.data.tasks import Task, encode_all
from minismoe.data.tokenizer import ByteTokenizer, Tokenizer
from minismoe.data.tools import Message
from minismoe.training.plan import TrainConfig, plan_table, plan_tasks

# Small tasks, each headed by its name and by what its user expects: "answers" that can be compared,
# or free text that is judged by its "loss". A line is a prompt, => and its answer.
KINDS = (Path(__file__).parent / "kinds.txt").read_text(encoding="utf-8").strip().split("\n\n")


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.partition("\n")[0])
@pytest.mark.parametrize("before", [[], [say("system", "Write what was asked for.")],
                                    [say("user", "Hello"), say("assistant", "Hi.")]])
def test_a_task_is_judged_as_its_user_expects(kind: str, before: list[Message]) -> None:
    head, *lines = kind.split("\n")
    name, wanted = head.split(": ")
    pairs = [line.split(" => ") for line in lines]
    task = Task(name, [[*before, say("user", prompt), say("assistant", answer)]
                       for prompt, answer in pairs], [])
    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>")
    plans = plan_tasks(encode_all(task, tokenizer, 10_000), [], TrainConfig())
    assert plans[name].judged == wanted
    row, why = plan_table(plans).splitlines()[2:]
    assert row.split()[-3:] == [f"{task.new_words:.2f}".rstrip("0").rstrip(".") if task.new_words
                                >= 0.005 else "0.0", wanted, "0"]
    assert "--exact-match on" in why and "--epochs" in why


@pytest.mark.parametrize("prompt, answers, new", [
    ("", ["one two three", "one two four"], [1, 1]),             # two lines share "one two"
    ("", ["one two three", "one two three", "x"], [0, 0, 1]),
    ("two three", ["one two three", "x"], [3, 1]),               # three is new after one two
    ("one, two three", ["One two three!", "three: 17", "two 3"], [0, 0, 1]),
    ("", ["5 one", "6 one", "17"], [0, 0, 0]),                   # all numbers are one word
    ("天很蓝", ["天很蓝", "蓝天"], [0, 1])])
def test_new_words_are_counted(prompt: str, answers: list[str], new: list[int]) -> None:
    """By hand; each line counts six words more."""
    words = [len(re.findall(r"[\w]+" if answer.isascii() else r"\w", answer)) for answer in answers]
    lines = [[say("user", prompt), say("assistant", answer)] for answer in answers]
    assert new_words(lines) == pytest.approx(sum(new) / (sum(words) + 6 * len(answers)))
    assert new_words([]) == 0


def test_only_answers_that_are_learnt_hold_new_words() -> None:
    """Each is read by itself: "two" follows no "one"."""
    chat = [say("user", ""), say("assistant", "one"), say("user", ""), say("assistant", "two")]
    unlearned = [chat[0], {**say("assistant", "one two three"), "weight": 0}, *chat[2:]]
    assert new_words([chat, chat[2:]]) == pytest.approx(1 / (2 + 6 + 1 + 6))
    assert new_words([unlearned, chat[2:]]) == 0         # both answer "two"
    assert new_words([[say("assistant", "Hello you."), *chat[2:]]]) == pytest.approx(1 / 7)


def test_calls_of_offered_functions_are_not_new() -> None:
    """Each line offers another function, as lists of many do."""
    tools = [{"type": "function", "function": {"name": f"get_{word}", "parameters": {
        "type": "object", "properties": {"place": {"type": "string"}}}}} for word in "abcdefgh"]
    lines = [[{**say("user", f"tell me {tool['function']['name'][-1]} of Rome"), "tools": [tool]},
              {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
                  "name": tool["function"]["name"], "arguments": {"place": "Rome"}}}]}]
             for tool in tools]
    assert new_words(lines) == 0
    unlike = [[{**line[0], "tools": []}, *line[1:]] for line in lines]
    assert new_words(unlike) > 0


@pytest.mark.parametrize("answers, expected", [
    (["b", "a "] * 50, ["a", "b"]), (["a", "b"] * 50 + ["c"], ["a", "b", "c"]),
    (["a", "b"] * 40 + ["c"], []), (["a", "b"] * 50 + ["c", "d"], []), (["a"], []),
    ([str(n) for n in range(300)] * 2, sorted(map(str, range(300)))),
    ([str(n) for n in range(301)] * 2, [])])
def test_a_small_set_of_answers_is_closed(answers: list[str], expected: list[str]) -> None:
    """At most 300, and at most one line in a hundred has an answer of its own. Lines of one wording
    count once, and a line that is held out may not have another answer."""
    asked = [[say("user", f"q{i}"), say("assistant", a)] for i, a in enumerate(answers)]
    assert closed_answers(asked) == expected
    repeated = [[say("user", f" Q{i}?"), line[1]] for i, line in enumerate(asked)]
    assert closed_answers(asked + repeated) == expected
    known, unknown = ([say("user", "new"), say("assistant", a)] for a in (answers[0], "z"))
    assert closed_answers(asked, [known]) == expected
    assert closed_answers(asked, [known, unknown]) == []
    assert Task("t", asked, [known], [unknown]).choices == []
    assert Task("t", asked, [unknown]).choices == []


@pytest.mark.parametrize("prompts, expected", [
    (["Do it.\nNow\na", "Do it.\nNow\nb"], "Do it.\nNow\n"), (["Do it.\na", "Do it. b"], ""),
    (["Say 1", "Say 2"], ""), (["Do it.\nsay", "Do it.\nsaw"], "Do it.\n"), ([], "")])
def test_whole_lines_that_all_prompts_begin_with(prompts: list[str], expected: str) -> None:
    lines = [[say("user", text), say("assistant", "a")] for text in prompts]
    assert shared_instruction(lines) == expected
    longer = [*lines, [say("system", "s"), say("user", "Do it.\nNow\nb"), say("assistant", "a")]]
    assert shared_instruction(longer) == ""
