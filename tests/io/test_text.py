"""What is printed is aligned, short and free of control characters."""

import errno

import pytest

from minismoe.io.text import LONGEST, clean, error_line, print_error, table


def test_table_aligns_what_is_wide_on_a_terminal():
    rows = [["日本語", "ab"], ["é", "cd"], ["e\u0301", "ef"], ["abcdefg", "gh"]]
    lines = table(["task", "what"], rows).splitlines()[2:]
    assert lines == ["日本語     ab", "é          cd", "e\u0301          ef", "abcdefg    gh"]


def test_table_aligns_numbers_right_and_text_left():
    text = table(["task", "before", "mean"], [["trec", 3, "0.86"], ["a longer one", "-", "12.10%"]])
    assert text.splitlines() == ["task          before    mean",
                                 "------------  ------  ------",
                                 "trec               3    0.86",
                                 "a longer one       -  12.10%"]
    assert table(["a", "b"], []).splitlines() == ["a  b", "-  -"]


def test_clean_keeps_what_can_be_read_and_nothing_else() -> None:
    assert clean("naïve 試験 ✓ नि\u200dख") == "naïve 試験 ✓ नि\u200dख"
    assert clean("a\x1b[31mb\r\u202ec\n") == "a\ufffd[31mb\ufffd\ufffdc\ufffd"
    assert clean("a\nb", "\n") == "a\nb"


@pytest.mark.parametrize(("error", "line"), [
    (ValueError("two\n  lines\x1b"), "two lines\ufffd"), (KeyboardInterrupt(), "KeyboardInterrupt"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"),
     "a/b: No space left on device: free some space or choose another folder; earlier files are "
     "unchanged"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (OSError("plain"), "plain")])
def test_an_error_is_one_line_with_advice(error: BaseException, line: str) -> None:
    assert error_line(error) == line


def test_a_long_error_is_cut() -> None:
    assert error_line(ValueError("x" * 5000)) == "x" * LONGEST + "… (5,000 characters)"


def test_debug_prints_the_traceback_first(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("bad")
    except ValueError as e:
        print_error(e, True, " (process 1)")
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("\nerror (process 1): bad\n")
