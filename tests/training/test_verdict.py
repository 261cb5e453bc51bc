"""What a run is told to try next: by the losses alone, and on the toy as the script prints it."""

from pathlib import Path

import pytest
from tiny import write_lines

import train
from minismoe.data import toy
from minismoe.training.verdict import read_losses, verdict

ROSE, HEART = "the training loss rose from {} to {}: try a lower --lr", "are learnt by heart"


@pytest.mark.parametrize("losses, unseen, said", [
    ([2, 1, 0.5, 0.1, 0.05], 0.9, HEART), ([2, 1, 0.5, 0.1, 0.05], 0.26, HEART),
    ([2, 1, 0.5, 0.1, 0.05], 0.24, ""), ([2, 1, 0.5, 0.1, 0.05], None, ""),
    ([2, 1, 0.5, 0.1, 0.19], 0.4, HEART), ([2, 1, 0.5, 0.1, 0.21], 0.9, ""),
    ([2, 1, 0.9, 1.0, 1.9], 2, ROSE.format("0.900", "1.900")), ([1, 1.3], 9, ""),
    ([2, 1, 1.59], 9, ""), ([2, 1, 1.61], 9, ROSE.format("1.000", "1.610")),
    ([0.02, 0.12], 0.1, ""), ([0.02, 0.14], 0.1, ROSE.format("0.020", "0.140")),
    ([1, 3, 0, 2, 1, 5, 3, 3, 0, 9], None, ROSE.format("1.000", "4.500")), ([7], None, "")])
def test_a_verdict_follows_from_the_losses_of_a_task(losses, unseen, said) -> None:
    """Of ten steps, two are a fifth."""
    last, given = verdict(dict(enumerate(losses, 1)), unseen)
    assert last == (4.5 if len(losses) == 10 else losses[-1])
    assert said in given and bool(said) == bool(given)


def test_losses_are_read_by_task_and_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "valid_loss": 3}\n{"step": 1, "loss_by_task": {"a": 2, "b": 1}}\n'
                    '{"step": 2, "loss_by_task": {"b": 0.5}}\n')
    assert read_losses(file) == {"a": {1: 2}, "b": {1: 1, 2: 0.5}}
    file.write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: "):
        read_losses(file)


def test_a_run_is_told_what_helps(tmp_path: Path, succeed) -> None:
    lines = [(line[0]["content"], line[1]["content"]) for line in toy.tasks()[1].train[:24]]
    write_lines(tmp_path / "t" / "train.jsonl", lines)
    write_lines(tmp_path / "t" / "test.jsonl", [('Make "kn" upper case.', "KN")])
    run = tmp_path / "run"
    out = succeed(train.main, "--model", toy.FOLDER, "--data", tmp_path / "t", "--epochs", 30,
                  "--out", run)
    assert "\nt: its training lines are learnt by heart: more lines would help\n" in out
    assert (run / "loss.svg").read_text().count("<polyline") == 1
