"""Task files, supervision and batches, against independent readings of the same text."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML, encode

from minismoe.data.lines import to_messages
from minismoe.data.tasks import (
    Example,
    Task,
    bucket,
    collate,
    encode_all,
    hold_out_validation,
    load_tasks,
    probe_batches,
)
from minismoe.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from minismoe.data.tools import Message
from minismoe.data.turns import encode_line
from minismoe.method.loss import IGNORE

# Keeps the reasoning of the last turn only, as reasoning models' templates do.
FORGETS = ("{% for m in messages %}{% if loop.last %}{{ m.role + ':' + m.content }}"
           "{% else %}{{ m.role + ':' + m.content.split('!')[-1] }}{% endif %}<|end|>{% endfor %}"
           "{% if add_generation_prompt %}assistant:{% endif %}")


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


MULTI = [say("system", "Be brief."), say("user", "the cat?"), say("assistant", "yes 🙂"),
         say("user", "and the mat <|im_start|>?"), say("assistant", "no,\nthe answer is no"),
         say("user", "user or assistant?"), say("assistant", "yes")]
PAIR = {"prompt": "the cat?", "completion": "yes"}
PAIR_MESSAGES = [say("user", "the cat?"), say("assistant", "yes")]


def lines(*values: Any) -> str:
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values)


def numbered(n: int, name: str = "q") -> list[dict[str, str]]:
    return [{"prompt": f"{name}{i}", "completion": f"a{i}"} for i in range(n)]


def prompts(conversations: list[list[Message]]) -> list[str]:
    return [c[0]["content"] for c in conversations]


def write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def put(root: Path, **files: str | bytes) -> Path:
    """Files by name, with __ for a folder: trec__train is trec/train.jsonl."""
    for name, content in files.items():
        write(root / (name.replace("__", "/") + ".jsonl"), content)
    return root


@pytest.fixture
def chatml(bpe: Path) -> Tokenizer:
    return Tokenizer(FileTokenizer(bpe), CHATML, "", "<|im_end|>")


# Lines

@pytest.mark.parametrize("line", [
    {"messages": PAIR_MESSAGES},
    {"messages": [m | {"id": "x", "weight": 1, "tool_calls": None} for m in PAIR_MESSAGES]},
    {"messages": PAIR_MESSAGES, "tools": "[]"},
    PAIR,
    {"instruction": "the cat?", "output": "yes"},
    {"instruction": "the cat?", "input": "", "output": "yes"},
    {"instruction": "the cat?", "input": None, "output": "yes"},
    {"instruction": "the", "input": "cat?", "output": "yes"},
    {"text": "the cat?", "label": 7}])
def test_each_form_of_a_line_becomes_messages(line: dict[str, Any]) -> None:
    asked, answer = "the\ncat?" if line.get("input") else "the cat?", str(line.get("label", "yes"))
    assert to_messages(line) == [say("user", asked), say("assistant", answer)]


def test_unicode_line_ends_and_crlf_survive(tmp_path: Path) -> None:
    """Only "\\n" ends a line; U+0085 and U+2028 may stand inside JSON strings unescaped."""
    odd = "a\u0085b\u2028c\u2029d\x1ce\x0bf 日本"
    text = lines({"prompt": odd, "completion": odd}).replace("\n", "\r\n")
    assert "\u2028" in text and "\u0085" in text
    task, = load_tasks(put(tmp_path, t__train=text + "\r\n" + text, t__valid="", t__test=""))
    wanted = [say("user", odd), say("assistant", odd)]
    assert (task.train, task.valid, task.test) == ([wanted, wanted], [], [])


@pytest.mark.parametrize(("line", "reason"), [
    ("{", "Expecting property name"),
    ("not json", "no JSON: Expecting value, column 1"),
    (b'{"prompt": "\xff", "completion": "a"}', "it is not UTF-8: save the file as UTF-8"),
    (r'{"prompt": "\ud83d", "completion": "a"}', "surrogates not allowed"),
    ("[" * 100_000, "recursion"),
    ("{" + " " * (1 << 20), "the line has 1,048,577 bytes; at most 1,048,576"),
    ("[1]", "not a JSON object but list"),
    ("{}", "it has nothing"),
    ('{"prompt": "a", "answer": "b"}', "it has prompt, answer"),
    ('{"prompt": 1, "completion": "b"}', "prompt must be a string, and is int"),
    ('{"prompt": "a", "completion": null}', "completion must be a string, and is NoneType"),
    ('{"instruction": "a", "input": ["x"], "output": "b"}', "input must be a string, and is list"),
    ('{"prompt": "a", "completion": "b", "system": 1}', "system must be a string, and is int"),
    ('{"prompt": " ", "completion": "b"}', "is empty"),
    ('{"prompt": "a", "completion": "\\n"}', "is empty"),
    *((f'{{"messages": {wrong}}}', "no list, or empty") for wrong in ("[]", '{"role": "user"}')),
    ('{"messages": [{"role": "assistant"}]}', "a string role and a string content"),
    ('{"messages": [{"role": "user", "content": ["hello"]}]}', "a string role and a string cont"),
    ('{"messages": [{"role": 1, "content": "hello"}]}', "a string role"),
    ('{"messages": ["hello"]}', "a string role"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "not the assistant's"),
    ('{"messages": [{"role": "assistant", "content": " "}]}', "the last answer is empty"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing comes before the answer"),
    (json.dumps({"messages": [PAIR_MESSAGES[0], PAIR_MESSAGES[1] | {"reasoning_content": "r"}]}),
     "a message has reasoning_content, which is not supported"),
    (json.dumps(PAIR | {"thinking": "r"}), "the line has thinking, which is not supported"),
    (json.dumps({"messages": [m | {"weight": 0} for m in PAIR_MESSAGES]}), "has weight 0: end"),
    (json.dumps({"messages": [m | {"train": False} for m in PAIR_MESSAGES]}), "has weight 0: end"),
    (json.dumps({"messages": [m | {"weight": 0.5} for m in PAIR_MESSAGES]}), "0.5: give 0 or 1"),
], ids=lambda x: str(x)[:40])
def test_a_bad_line_is_refused_with_its_place_and_reason(
        tmp_path: Path, line: str | bytes, reason: str) -> None:
    good, line = lines(PAIR).encode(), line if isinstance(line, bytes) else line.encode()
    put(tmp_path, t__train=good + b"\n" + line + b"\n" + good)           # an empty line counts too
    place = f"1 bad line: {tmp_path}/t/train.jsonl:3: "
    with pytest.raises(ValueError, match=f"^{re.escape(place)}.*{re.escape(reason)}"):
        load_tasks(tmp_path)


def test_bad_lines_are_listed_by_file_and_reason(tmp_path: Path) -> None:
    """The first ten reasons."""
    good, bad = lines(PAIR), "{}\n"
    put(tmp_path, a__train=good + bad * 5 + "[1]\n", a__test=bad * 3, b=bad + good, c=good * 2,
        d__train="\n\n", e=lines(*({f"key{i}": 1} for i in range(8))))
    with pytest.raises(ValueError) as e:
        load_tasks(tmp_path)
    needs = ("needs messages, or prompt and completion, or instruction and output, or question "
             "and answer, or text and label; it has ")
    assert str(e.value).replace(f"{tmp_path}/", "") == (
        f"19 bad lines: a/train.jsonl:2, 3, 4 and 2 more: {needs}nothing; "
        "a/train.jsonl:7: not a JSON object but list; "
        f"a/test.jsonl:1, 2, 3: {needs}nothing; b.jsonl:1: {needs}nothing; "
        "d/train.jsonl: it holds no example"
        + "".join(f"; e.jsonl:{i + 1}: {needs}key{i}" for i in range(5)) + "; and 3 more reasons")


# Tasks

def test_folders_and_files_are_tasks(tmp_path: Path) -> None:
    put(tmp_path, beta__train=lines(*numbered(3)), beta__test=lines(*numbered(2, "t")),
        alpha=lines(*numbered(20)))
    put(tmp_path / "dots.v1", train=lines(*numbered(2)))
    put(tmp_path / "dots.v2", train=lines(*numbered(4)))
    (tmp_path / "README.md").write_text("not a task")
    (tmp_path / "empty").mkdir()
    alpha, beta, v1, v2 = load_tasks(tmp_path)       # by name
    assert [t.name for t in (alpha, beta, v1, v2)] == ["alpha", "beta", "dots.v1", "dots.v2"]
    assert (prompts(beta.train), prompts(beta.test)) == (["q0", "q1", "q2"], ["t0", "t1"])
    assert (len(alpha.train), len(alpha.valid), len(alpha.test)) == (18, 0, 2)
    assert alpha.notes == ["20 lines of prompt and completion",
                           "no test.jsonl: 2 of 20 training lines held out"]
    assert (len(v1.train), len(v1.test), len(v2.train), len(v2.test)) == (1, 1, 3, 1)
    named = load_tasks(tmp_path, ["beta", "alpha"])
    assert named == [alpha, beta]


def test_what_may_hold_lines_is_never_passed_over_in_silence(tmp_path: Path) -> None:
    """But what macOS and Emacs leave is."""
    text = lines(*numbered(9))
    for name, content in {
            "a.jsonl": b"\xef\xbb\xbf" + text.encode(), "b.JSONL": text, "list.json": "[]",
            "d.parquet": b"PAR1", "._a.jsonl": b"\0\5"}.items():
        write(tmp_path / name, content)
    (tmp_path / ".#a.jsonl").symlink_to("someone@host.1:2")
    tasks = load_tasks(tmp_path)
    assert [task.name for task in tasks] == ["a", "b"]
    for task in tasks:
        assert sorted(prompts(task.train + task.test)) == [f"q{i}" for i in range(9)]
    assert [note for note in tasks[0].notes if "not read" in note] == [
        f"{name} not read: write its lines into a .jsonl file, one JSON object a line, or into "
        "a .csv file" for name in ("d.parquet", "list.json")]


TWO = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "b"}\n'


@pytest.mark.parametrize("files, reason", [
    # Tables, by the line
    ({"a.csv": "text,label\na,b\nc\n"}, "bad line: /a.csv: it cannot be read: line 3 has 1 fields "
     "where the first row names 2; a text that holds a separator stands in quotes"),
    ({"a.csv": 'text,label\na,"b\nc,d\n'}, "/a.csv: .* line 2: unexpected end of data"),
    ({"a.csv": 'text,"label\na,b\n'}, "/a.csv: .* line 1: unexpected end of data"),
    ({"a.csv": 'text,label\na,b\na,"b"c\n'}, "/a.csv: .* line 3: ',' expected after '\"'"),
    ({"a.csv": b"text,label\na,b\n\xe9,b\n"}, "line 3 is not UTF-8: save the table as CSV UTF-8"),
    ({"a.csv": 'text,label\n"a\nb",c\n\nd,\n'}, "/a.csv:5: the prompt or the answer is empty"),
    ({"a.csv": "text,label\n"}, "/a.csv: it holds no example"),
    ({"a.csv": ""}, "/a.csv: it holds no example"),
    ({"a.csv": "Q,A,Day\na,b,c\n"}, "/a.csv: .* its columns are Q, A, Day: name the prompt's"),
    ({"a.tsv": 'text\tlabel\n"No", he said\tb\n'}, "line 2: '\t' expected after '\"'"),
    # Files as a whole
    ({"a.jsonl": TWO.encode("utf-16")}, "/a.jsonl:1: it is not UTF-8: save the file as UTF-8"),
    ({"a.csv": "text,label\na,b\n".encode("utf-16")}, "line 1 is not UTF-8: save the table as"),
    ({"a.json": "[]"}, "holds no task: .* It holds a.json; a.json not read: write its lines"),
    ({"train.parquet": b"PAR1"}, "It holds train.parquet; train.parquet not read: write its lines"),
    ({".a/train.jsonl": TWO}, "holds no task: no .jsonl or .csv file, .* It holds .a"),
    # Names of splits and tasks
    ({"b/training.jsonl": TWO}, "b holds training.jsonl, and no train.jsonl: give the file of its"),
    ({"training.jsonl": TWO, "valid.jsonl": TWO}, "holds training.jsonl, valid.jsonl, and no "),
    ({"b.csv": "text,label\na,b\n", "b.jsonl": TWO}, "holds b twice: b.csv and b.jsonl"),
    ({"b.jsonl": TWO, "b/train.jsonl": TWO}, "holds b twice, as a folder and as a file"),
], ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_a_folder_is_refused_with_its_place(tmp_path: Path, files: dict[str, str | bytes],
                                            reason: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_tasks(tmp_path)
    assert re.search(reason, str(refused.value).replace(str(tmp_path), "")), refused.value


def test_what_is_asked_for_is_there(tmp_path: Path) -> None:
    put(tmp_path, a=lines(PAIR), b=lines(PAIR))
    with pytest.raises(FileNotFoundError, match="has no task c, x; it has a, b"):
        load_tasks(tmp_path, ["a", "c", "x"])
    with pytest.raises(FileNotFoundError, match="no such data folder"):
        load_tasks(tmp_path / "gone")
    (tmp_path / "t.csv").write_text("a,b\nc,d\nc,e\n")
    with pytest.raises(ValueError, match="t.csv: .* it has no column x; it has a, b"):
        load_tasks(tmp_path / "t.csv", columns=("a", "x"))
    assert load_tasks(tmp_path / "t.csv", columns=("a", "b"))[0].train


def test_files_beside_the_splits_are_told(tmp_path: Path) -> None:
    put(tmp_path / "t", train=lines(*numbered(3)), validation=lines(PAIR), other__train=lines(PAIR))
    (tmp_path / "t" / "more.tsv").write_text("a\tb\n1\t2\n")
    for place in tmp_path, tmp_path / "t":
        task, = load_tasks(place)
        assert ("more.tsv, other, validation.jsonl not read: a split is train, valid or "
                "test.jsonl") in task.notes


# Tables

ROWS = [("Where is it?", "here"), ('He said "no", twice', "a,b; c\td"), ("two\nlines", "é\u2028x")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name, between", [
    ("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.TSV", "\t")])
@pytest.mark.parametrize("columns", [
    "prompt,completion", "question,answer", "text,label", "instruction,output", "Q, A "])
def test_a_table_holds_the_same_lines(tmp_path: Path, name: str, between: str, encoding: str,
                                      columns: str) -> None:
    """As csv writes them, which quotes what it must; further columns are reported. The first row
    says what separates fields, whatever texts hold more of."""
    text, names = io.StringIO(newline=""), [*columns.split(",")]
    rows = [*ROWS, ("all but one", 9 * ",;\t".replace(between, ""))]
    writer = csv.writer(text, delimiter=between)
    writer.writerows([["id", *names], *([str(i), *row] for i, row in enumerate(rows))])
    (tmp_path / name).write_bytes(text.getvalue().encode(encoding))
    named = [n.strip() for n in names] if "Q" in columns else ()
    [task] = load_tasks(tmp_path / name, columns=named)
    found = {(m[0]["content"], m[1]["content"]) for m in task.train + task.valid + task.test}
    assert found == {*rows}
    assert ("4 lines with id, which is not read" in task.notes) == (not named)


def test_columns_beside_lines_are_told(tmp_path: Path) -> None:
    put(tmp_path, a=lines(*numbered(3)))
    task, = load_tasks(tmp_path, columns=("Q", "A"))
    assert "--columns is for tables (.csv, .tsv), and a.jsonl is none" in task.notes
    (tmp_path / "b.csv").write_text("Q,A\nx,y\nz,y\n")
    assert not any("--columns" in note for note in load_tasks(
        tmp_path, ["b"], columns=("Q", "A"))[0].notes)


@pytest.mark.parametrize("name", ["b.jsonl", "a/train.jsonl", "a/valid.jsonl", "a/test.csv"])
@pytest.mark.parametrize("make", [lambda place: place.symlink_to("gone"), os.mkfifo])
def test_a_place_without_a_file_is_refused(tmp_path: Path, name: str,
                                           make: Callable[[Path], None]) -> None:
    """A link that leads nowhere, or a pipe, which cannot be read twice."""
    put(tmp_path, a__train=lines(*numbered(3)))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is no file, but a link that leads nowhere, a p"):
        load_tasks(tmp_path)


def test_a_folder_of_three_files_or_a_file_is_one_task(tmp_path: Path) -> None:
    """mlx-lm's layout."""
    root = put(tmp_path / "mine", train=lines(*numbered(3)), valid=lines(*numbered(2, "v")),
               test=lines(*numbered(4, "t")))
    task, = load_tasks(root)
    assert (task.name, len(task.train), len(task.test)) == ("mine", 3, 4)
    assert prompts(task.valid) == ["v0", "v1"] and len(task.notes) == 1
    assert load_tasks(root, ["mine"]) == load_tasks(tmp_path) == [task]
    single, = load_tasks(root / "test.jsonl")
    assert (single.name, len(single.train + single.test + single.valid)) == ("test", 4)


def test_the_samples_of_the_clone_are_two_tasks() -> None:
    orders, support = load_tasks(Path(__file__).parents[2] / "minismoe/data/samples")
    for task in (orders, support):
        assert (len(task.train), len(task.valid), len(task.test)) == (200, 40, 60)
    assert support.choices == ["card", "fees", "loan", "login", "transfer"]
    assert all(json.loads(line[-1]["content"]).keys() == {"item", "colour", "count", "city"}
               for line in orders.train + orders.test)


def test_no_line_is_in_two_splits(tmp_path: Path) -> None:
    copies = numbered(3)
    put(tmp_path, a__train=lines(*numbered(9), *numbered(9)[:2], *numbered(9)[4:6]),
        a__valid=lines(*copies[1:], *numbered(2, "v")), a__test=lines(*copies[:2]))
    task, = load_tasks(tmp_path)
    assert prompts(task.test) == ["q0", "q1"] and prompts(task.valid) == ["q2", "v0", "v1"]
    assert prompts(task.train) == ["q3", "q4", "q5", "q6", "q7", "q8", "q4", "q5"]
    assert task.notes[1:] == ["1 validation lines left out, as they are in the test",
                              "5 training lines left out, as they are in the test or validation",
                              "2 training lines are copies of others"]
    put(tmp_path, a__train=lines(*copies))
    with pytest.raises(ValueError, match="all its training lines are test or val"):
        load_tasks(tmp_path)


def test_copies_of_a_line_are_held_out_together(tmp_path: Path) -> None:
    task, = load_tasks(put(tmp_path, a=lines(*numbered(20), *numbered(20))))
    train, test = {*prompts(task.train)}, {*prompts(task.test)}
    assert not train & test and len(train | test) == 20 and len(test) == 4   # a tenth of all lines


def test_lines_that_another_task_trains_on_and_white_space_are_noticed(tmp_path: Path) -> None:
    put(tmp_path, a__train=lines(*numbered(3), {"prompt": " the cat?", "completion": "yes"}),
        a__test=lines(PAIR, *numbered(2, "t")), b__test="",
        b__train=lines(PAIR | {"completion": "yes \n"}, *numbered(9, "t"), PAIR))
    a, b = load_tasks(tmp_path)
    assert prompts(a.train) == ["q0", "q1", "q2"]
    assert a.notes[-1] == "3 test lines are training lines of b"
    assert b.notes[-1] == "1 training lines are copies of others"


def test_what_lines_hold_is_said(tmp_path: Path) -> None:
    odd = {"messages": [{"role": "critic", "content": "a", "id": 7}, say("assistant", "b")]}
    put(tmp_path, a__train=lines(PAIR | {"id": 1, "source": "x"}, PAIR | {"system": "Be brief."},
                                 {"messages": MULTI}, odd), a__valid="", a__test=lines(PAIR))
    task, = load_tasks(tmp_path)
    assert task.notes[:7] == [
        "3 lines of prompt and completion", "2 system prompts", "2 lines of messages",
        "1 lines with id, which is not read", "1 lines with source, which is not read",
        "1 lines with id of a message, which is not read", "1 lines with the role critic"]
    assert task.train[0] == [say("system", "Be brief."), *PAIR_MESSAGES]


def test_held_out_lines_depend_on_seed_and_task_alone(tmp_path: Path) -> None:
    put(tmp_path, a=lines(*numbered(40)), b=lines(*numbered(40)))

    def loaded(seed: int, *names: str) -> list[Task]:
        tasks = load_tasks(tmp_path, names, seed)
        for task in tasks:
            hold_out_validation(task, seed)              # as it is done for long answers
        return tasks

    first, other = loaded(1), loaded(2)
    assert first == loaded(1)
    for task in (*first, *other):
        train, test = prompts(task.train), prompts(task.test)
        assert sorted(train + prompts(task.valid) + test) == sorted(f"q{i}" for i in range(40))
        assert (len(task.valid), len(test)) == (4, 4)
        assert test != ["q0", "q1", "q2", "q3"] and train == sorted(train, key=lambda q: int(q[1:]))
    splits = {tuple(sorted(prompts(t.test))) for t in (*first, *other)}
    assert len(splits) == 4, "seeds and tasks share a split"
    alone, beside = loaded(1, "b")[0], first[1]          # whichever others are loaded
    assert (alone.train, alone.valid, alone.test) == (beside.train, beside.valid, beside.test)


@pytest.mark.parametrize(("count", "test", "valid"), [
    (1, 0, 0), (2, 1, 0), (5, 1, 0), (9, 1, 1), (30, 3, 3), (1000, 100, 64), (20_000, 1000, 64)])
def test_a_small_task_keeps_something_to_train_on(tmp_path: Path, count: int, test: int,
                                                  valid: int) -> None:
    task, = load_tasks(put(tmp_path, a=lines(*numbered(count))))
    assert (len(task.train), len(task.test), len(task.valid)) == (count - test, test, 0)
    hold_out_validation(task, 0)
    assert (len(task.train), len(task.test), len(task.valid)) == (count - test - valid, test, valid)


# Supervision

def test_supervised_are_the_assistants_turns(chatml: Tokenizer) -> None:
    """Against tokens counted by hand: each piece of the conversation is encoded by itself, and what
    a user writes is text, also if it looks like a special token."""
    ids, labels, asked = list[int](), list[int](), list[int]()
    for message in MULTI:
        role, said = message["role"], chatml.encode(message["content"], special=False)[0]
        start, end, line = (chatml.encode(text)[0] for text in (
            f"<|im_start|>{role}\n", "<|im_end|>", "\n"))
        begun = len(ids) + len(start)
        asked += range(begun, begun + len(said)) if role == "user" else ()
        ids += start + said + end + line
        taught = said + end if role == "assistant" else [IGNORE] * len(said + end)
        labels += [IGNORE] * len(start) + taught + [IGNORE] * len(line)
    assert encode("t", MULTI, chatml) == Example("t", ids, labels, asked=asked)
    unlearned = [m | {"weight": 0} if m["role"] == "user" else m for m in MULTI]
    assert encode("t", unlearned, chatml) == Example("t", ids, labels)


@pytest.mark.parametrize("backend", ["bytes", "bpe"])
def test_training_sees_the_tokens_of_inference(bpe: Path, backend: str) -> None:
    """With the default template: the prompt's tokens begin the example's, and all else is taught.

    A generation prompt that ended in a space would fail here: BPE makes one token of " yes".
    """
    tokenizer = Tokenizer(ByteTokenizer(), None, "<|bos|>", "<|end|>") if backend == "bytes" else (
        Tokenizer(FileTokenizer(bpe), None, "<s>", "</s>"))
    prompt, answer, line_end = (tokenizer.encode(text)[0] for text in (
        tokenizer.render(PAIR_MESSAGES[:1], True), " yes" + tokenizer.eos, "\n"))
    example = encode("t", PAIR_MESSAGES, tokenizer)
    assert example.ids == prompt + answer + line_end
    assert example.labels == [IGNORE] * len(prompt) + answer + [IGNORE] * len(line_end)
    asked = tokenizer.decode([example.ids[n] for n in example.asked])
    assert asked.strip() == "the cat?"           # BPE's first token begins with the space before


def test_a_template_that_changes_earlier_turns_is_refused(chatml: Tokenizer) -> None:
    forgets = Tokenizer(ByteTokenizer(), FORGETS, "", "<|end|>")
    encode("t", [say("user", "a"), say("assistant", "why!yes")], forgets)    # one turn is fine
    two = [say("user", "a"), say("assistant", "why!yes"), say("user", "b"), say("assistant", "no")]
    with pytest.raises(ValueError, match="renders turn 2 of 4 differently when more follows"):
        encode("t", two, forgets)
    encode("t", two, chatml)


def test_answers_of_weight_0_are_not_learnt(chatml: Tokenizer) -> None:
    for line in ({"messages": [*MULTI[:4], MULTI[4] | {"weight": 0}, *MULTI[5:]]},
                 {"messages": [*MULTI[:4], MULTI[4] | {"train": False}, *MULTI[5:]]},
                 {"messages": [*MULTI[:4], MULTI[4] | {"weight": 1, "train": False}, *MULTI[5:]]}):
        example = encode("t", to_messages(line), chatml)
        taught = [token for token in example.labels if token != IGNORE]
        assert chatml.decode(taught) == "yes 🙂yes"


def test_an_answer_that_holds_an_end_token_is_refused(chatml: Tokenizer) -> None:
    """The model would learn to stop there, and never what comes behind it."""
    messages = [say("user", "<|im_end|>?"), say("assistant", "Use <|im_end|> to stop.")]
    with pytest.raises(ValueError, match=r"the answer holds <\|im_end\|>, which ends a turn"):
        encode("t", messages, chatml)


def supervised_texts(messages: list[Message], tokenizer: Tokenizer) -> list[str]:
    """The text of each answer that is learnt."""
    line = encode_line(messages, tokenizer)
    ends = [*line.whole.starts, len(line.whole.text)]
    return [line.whole.text[ends[turn.tokens.start]:ends[turn.tokens.stop]]
            for turn in line.turns if turn.supervised]


def test_a_greeting_before_any_question_is_not_supervised(bpe: Path) -> None:
    """Nothing asks for it, and a template may not render a conversation without a message."""
    wants = "{% if messages[0].role == 'x' %}{% endif %}" + CHATML
    tokenizer = Tokenizer(FileTokenizer(bpe), wants, "", "<|im_end|>")
    assert supervised_texts([say("assistant", "user"), *PAIR_MESSAGES], tokenizer) == [
        "yes<|im_end|>"]


@pytest.mark.parametrize("written", [
    "m.content + ' ' + m.content", "m.content | capitalize", "'text'",
    "raise_exception('no') if '\ufdd1' in m.content else m.content"])
def test_a_user_whose_text_the_template_changes_has_no_loss(written: str) -> None:
    """It repeats the text, writes it otherwise where borders are around it, leaves it out, or
    refuses such borders. The answer is learnt all the same."""
    template = ("{% for m in messages %}{% if m.role == 'user' %}{{ " + written + " }}"
                "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}")
    line = encode_line(PAIR_MESSAGES, Tokenizer(ByteTokenizer(), template, "", "<|end|>"))
    assert [turn.role for turn in line.turns] == ["assistant"] and line.answer == [*b"yes"]


def test_a_blank_answer_amid_a_conversation_is_its_end_token(chatml: Tokenizer) -> None:
    blank = [PAIR_MESSAGES[0], say("assistant", " "), *PAIR_MESSAGES]
    assert supervised_texts(blank, chatml) == [" <|im_end|>", "yes<|im_end|>"]


def test_a_template_whose_prompt_is_not_the_answers_beginning_is_refused(bpe: Path) -> None:
    thinks = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    with pytest.raises(ValueError, match=r"as its generation prompt, which ends in .*<think>\\n'"):
        encode("t", PAIR_MESSAGES, Tokenizer(FileTokenizer(bpe), thinks, "", "<|im_end|>"))
    forgets = CHATML.replace("add_generation_prompt", "false")
    with pytest.raises(ValueError, match=r"opens an answer by <\|im_start\|>, which its gen"):
        encode_all(Task("t", [PAIR_MESSAGES], []), Tokenizer(
            FileTokenizer(bpe), forgets, "", "<|im_end|>"), 99)


def test_truncated_and_dropped_are_counted() -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer, (a,), no = Tokenizer(ByteTokenizer(), plain, "", ""), b"a", IGNORE
    fits, lost, cut, edge = ([say("user", "p" * prompt), say("assistant", "a" * answer)]
                             for prompt, answer in ((4, 6), (10, 5), (6, 6), (9, 5)))
    result = encode_all(Task("t", [fits, lost, cut, edge], []), tokenizer, max_length=10)
    assert [e.labels for e in result] == [[no] * 4 + [a] * 6, [no] * 6 + [a] * 4, [no] * 9 + [a]]
    assert all(len(e.ids) == 10 and e.task == "t" for e in result)
    assert [(e.index, e.cut) for e in result] == [(0, False), (2, True), (3, True)]
    asked = [say("user", "p" * 12), say("assistant", "a"), say("user", "q" * 9), fits[1]]
    line, = encode_all(Task("t", [asked], []), tokenizer, max_length=15)
    assert line.asked == [*range(12), 13, 14] and len(line.ids) == 15
    # A label at position 0 is never predicted, so alone it teaches nothing.
    blank = Tokenizer(ByteTokenizer(), plain.replace("m.content", "m.content | trim"), "", "")
    only = Task("t", [[say("user", " "), say("assistant", "aa")]], [])
    assert encode_all(only, blank, max_length=1) == []


# Batches

def examples(lengths: list[int]) -> list[Example]:
    """Examples that differ, also at equal length."""
    return [Example("t", [i + 1] * n, [IGNORE] * (n - 1) + [i + 1]) for i, n in enumerate(lengths)]


def test_collate_pads_on_the_right() -> None:
    ids, mask, labels = collate(examples([3, 1, 2]), pad_id=99)
    assert ids.tolist() == [[1, 1, 1], [2, 99, 99], [3, 3, 99]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    no = IGNORE
    assert labels.tolist() == [[no, no, 1], [2, no, no], [no, 3, no]]
    assert {t.dtype for t in (ids, mask, labels)} == {torch.int64}


@given(st.lists(st.integers(1, 40), max_size=120), st.integers(1, 5), st.integers(0, 9))
def test_bucket_covers_each_example_once(lengths: list[int], size: int, seed: int) -> None:
    given_, before = examples(lengths), examples(lengths)
    batches = bucket(given_, size, seed)
    assert Counter(e.ids[0] for b in batches for e in b) == Counter(range(1, len(lengths) + 1))
    assert all(1 <= len(b) <= size for b in batches)
    # Only the last window may leave a batch that is not full.
    assert sum(len(b) < size for b in batches) == (len(lengths) % size > 0)
    assert bucket(given_, size, seed) == batches
    assert given_ == before


def test_bucket_shuffles_by_seed_and_saves_pads() -> None:
    generator = torch.Generator().manual_seed(0)
    all_ = examples(torch.randint(1, 100, (400,), generator=generator).tolist())

    def pads(batches: list[list[Example]]) -> int:
        return sum(max(len(e.ids) for e in b) - len(e.ids) for b in batches for e in b)

    random_order = pads([all_[i:i + 8] for i in range(0, 400, 8)])
    first, second = bucket(all_, 8, seed=0), bucket(all_, 8, seed=1)
    assert max(pads(first), pads(second)) < random_order / 4
    longest = [max(len(e.ids) for e in b) for b in bucket(all_[:100], 8, seed=0)]    # one window
    assert longest != sorted(longest), "training would run from short to long"
    # Batches stay mixed: the same examples do not meet in both epochs.
    met = [{frozenset(e.ids[0] for e in b) for b in batches} for batches in (first, second)]
    assert len(met[0] & met[1]) < len(met[0]) / 10


def test_probe_batches_hold_the_examples_asked_for() -> None:
    all_ = examples([1, 4, 2, 3, 9, 9])
    batches = list(probe_batches(all_, count=4, batch_size=3, pad_id=0))
    assert [tuple(ids.shape) for ids, _, _ in batches] == [(3, 3), (1, 4)]
    assert [mask.sum(1).tolist() for _, mask, _ in batches] == [[1, 2, 3], [4]]
    assert [ids[:, 0].tolist() for ids, _, _ in batches] == [[1, 3, 4], [2]]
