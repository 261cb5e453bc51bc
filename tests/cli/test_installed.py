"""The installed command, as an editable installation runs it."""

import signal
import sys

import pytest
from tiny import python

from minismoe.cli import script
from minismoe.io.signals import Interrupted


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minismoe", *words])
    code = 0
    try:
        script.main()
    except SystemExit as e:
        code = e.code or 0
    return (code, *capsys.readouterr())


def test_train_is_the_script_and_proposes_the_command(inputs, tmp_path, monkeypatch,
                                                      capsys) -> None:
    code, out, err = run(monkeypatch, capsys, "train", *inputs, "--only-tasks", "sum", "--epochs",
                         "1", "--out", str(tmp_path))
    assert code == 0, err
    assert f"  minismoe export {tmp_path}\n" in out and ".py" not in out
    code, out, _ = run(monkeypatch, capsys, "train", "--help")
    assert code == 0 and out.startswith("usage: minismoe train ")


@pytest.mark.parametrize("word, code", [("", 0), ("--help", 0), ("tune", 2)])
def test_it_lists_what_there_is(monkeypatch, capsys, word, code) -> None:
    ended, out, err = run(monkeypatch, capsys, *[word] * bool(word))
    assert ended == code and all(f"minismoe {name}" in out + err for name in script.COMMANDS)
    assert (out == "") == (code == 2)


def test_chat_starts_without_torch() -> None:
    code = ("import sys; sys.argv = ['minismoe', 'chat', '--help']\n"
            "from minismoe.cli.script import main\n"
            "try: main()\nfinally: print({'torch', 'safetensors', 'tqdm'} & {*sys.modules})")
    done = python("-c", code)
    assert done.stdout.startswith("usage: ") and done.stdout.endswith("set()\n")


@pytest.mark.parametrize("error, code", [
    (KeyboardInterrupt(), 130), (Interrupted(number=signal.SIGTERM), 143)])
def test_an_interrupted_script_ends_with_the_signals_number(monkeypatch, error, code) -> None:
    def main(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        script.run_script(main)
    assert ended.value.code == code
