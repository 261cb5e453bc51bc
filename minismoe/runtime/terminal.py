"""A terminal or a pipe, where a generator answers: one prompt, a prompt a line, or a chat."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tools import Function, Message, functions, with_tools
from ..io.files import naming, read_json
from ..io.flags import as_flags, from_flags
from ..io.process import peak_resident
from ..io.text import clean, error_line
from .choices import Answer, answer_tokens, as_json
from .folder import instructed, instruction_of, known_tasks, read_choices, trained_system
from .grammar import json_grammar
from .sampling import Sampling

if TYPE_CHECKING:
    from .generation import Generation
    from .generator import Generator


class Terminal:
    """A generator, and how it answers by the flags of the command line."""

    def __init__(self, generator: Generator, args: argparse.Namespace):
        self.generator, self.args, self.tools = generator, args, list[Function]()
        self.options = as_flags(from_flags(Sampling, vars(args)))        # of `Generator.generate`
        self.system, self.before = trained_system(generator.folder), self._instruction()
        if args.tools:
            with naming(args.tools, ValueError):
                schemas = Path(args.tools).read_text(encoding="utf-8-sig")
                self.tools = functions(schemas, "the file")
        if self.tools:
            self.options["grammar"] = generator.call_grammar(self.tools)
        if args.schema:
            self.options["grammar"] = json_grammar(read_json(args.schema))
            generator.matcher(self.options["grammar"])       # refuses a wrong one before any line
        self.choices = args.choices and read_choices(generator.folder, args.choices)
        if self.choices:
            answer_tokens(generator.tokenizer, tuple(self.choices))      # as well

    def _instruction(self) -> str:
        """That of --task, or of the task of --choices, which goes before a question."""
        args, folder = self.args, self.generator.folder
        if args.tools or args.chat:
            return ""
        named = args.choices if args.choices in known_tasks(folder) else None
        return instruction_of(folder, args.task or named)

    def once(self, text: str) -> None:
        """Print the answer to a prompt. Raises KeyboardInterrupt if Ctrl-C ended it."""
        if self.choices:
            _show("".join(f"{self._shown(answer)}\n" for answer in self._choose(text)))
        elif self._answer(self._chat(text), _show)[2].ended == "interrupted":
            raise KeyboardInterrupt

    def lines(self) -> None:
        """Print the answer to each line of the standard input in one line, as it comes. The answer
        to a line that is empty or too long is empty; if there was any, ValueError at the end."""
        number = bad = 0
        for number, given in enumerate(sys.stdin.buffer, 1):
            try:
                with naming("the line is not UTF-8 text", UnicodeDecodeError):
                    line = given.decode("utf-8-sig")     # of files that were put together, too
                said, record = self._line(line.strip())
            except ValueError as e:
                said, record, bad = "", {"text": "", "error": error_line(e)}, bad + 1
                print(f"line {number}: {error_line(e)}", file=sys.stderr)
            said = said.replace("\r", "\\r").replace("\n", "\\n")
            _show((json.dumps(record, ensure_ascii=False) if self.args.json else said) + "\n")
        if bad or not number:
            raise ValueError(f"{bad} of {number} lines have no answer" if bad else
                             "the standard input has no line")

    def _line(self, text: str) -> tuple[str, dict[str, Any]]:
        """The answer to a line: as text, and as an object for --json."""
        if not text:
            raise ValueError("the line is empty")
        if self.choices:
            found = self._choose(text)
            return "\t".join(map(self._shown, found)), {
                "text": found[0].text, "likeliest": as_json(found)}
        said, message, answer = self._answer(self._chat(text))
        if answer.ended == "interrupted":
            raise KeyboardInterrupt
        calls = {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
        return said, {"text": message["content"] if calls else said, "ended": answer.ended,
                      "logprob": answer.logprob} | calls

    def talk(self) -> None:
        """Answer line by line until the input ends; Ctrl-C ends an answer, not the chat."""
        history, results = [*self.system], 0         # results of calls that are still to be typed
        ask = _prompt()
        while True:
            try:
                line = input(ask)
                command = line.strip()
                if command == "/exit":
                    return
                if command in ("", "/clear"):
                    history, results = ([*self.system], 0) if command else (history, results)
                    continue
                turn = {"role": "tool" if results else "user", "content": line}
                if results > 1:
                    history, results = [*history, turn], results - 1
                    continue
                chat = self._fitting([*history, turn])
                answer = self._answer(chat, _show)[1]
                history, results = [*chat, answer], len(answer.get("tool_calls", ()))
            except EOFError:
                return
            except KeyboardInterrupt:        # of a line, or while the template was rendered
                print()
            except ValueError as e:          # too long, or refused by the template
                anew = "; /clear begins anew" if history else ""
                print(f"error: {error_line(e)}{anew}", file=sys.stderr)

    def _fitting(self, chat: list[Message]) -> list[Message]:
        """A chat without its oldest turns, if the context cannot hold all of it and an answer."""
        generator, first = self.generator, len(self.system)
        later = (i for i in range(first + 1, len(chat)) if chat[i]["role"] == "user")
        for start in (first, *later):
            kept = with_tools([*chat[:first], *chat[start:]], self.tools)
            with suppress(ValueError):
                generator.encoded(kept, generator.context // 8)
                if start > first:
                    print("[the oldest turns are forgotten: the context is full]", file=sys.stderr)
                return kept
        return with_tools(chat, self.tools)  # which is refused, if the last turn alone is too long

    def _chat(self, text: str) -> list[Message]:
        """The chat that asks a text."""
        user = {"role": "user", "content": instructed(self.before, text)}
        return with_tools([*self.system, user], self.tools)

    def _answer(self, chat: Sequence[Message], show: Callable[[str], None] = lambda piece: None,
                ) -> tuple[str, Message, Generation]:
        """Answer a chat; returns the answer as text, with calls one a line, as a message, and as it
        came about. Its `ended` may be "interrupted", too.

        show: takes the text as it comes or, if it may hold calls, at its end.
        """
        answer, said = self.generator.generate(chat, **self.options), ""
        times = [time.perf_counter()]

        def timed() -> Iterator[int]:
            for token in answer:
                times.append(time.perf_counter())
                yield token

        try:
            for piece in self.generator.text(timed(), strip=True):
                said += piece
                show("" if self.tools else piece)
        except KeyboardInterrupt:
            answer.ended = "interrupted"
        message = self.generator.tokenizer.parse(chat, said)
        if self.tools:
            said = "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in
                             message.get("tool_calls", ())) or message["content"]
            show(said)
        show("\n")
        self._note(answer, times)
        return said, message, answer

    def _note(self, answer: Generation, times: Sequence[float]) -> None:
        """Print why an answer was cut and, with --stats, how fast it was."""
        if answer.ended == "context":
            print(f"[the context of {self.generator.context} tokens is full]", file=sys.stderr)
        if answer.ended == "max_tokens" and self.options.get("grammar"):
            print(f"[the answer was cut at {self.args.max_tokens} tokens]", file=sys.stderr)
        if self.args.stats and len(times) > 1:
            _print_speed(answer, times)

    def _choose(self, text: str) -> list[Answer]:
        """The likeliest of --choices, as many as --best says."""
        start = time.perf_counter()
        found = self.generator.choose(self._chat(text), self.choices, self.args.best or 1)
        if self.args.stats:
            seconds = time.perf_counter() - start
            _print_stats(f"one of {len(self.choices)} answers in {seconds:.3f} s")
        return found

    def _shown(self, answer: Answer) -> str:
        """An answer of --choices, with --best after its probability."""
        odds = f"{math.exp(answer.logprob):.4f}\t" if self.args.best else ""
        return odds + answer.text


def _prompt() -> str:
    """What stands before each line that a user types; "" for a pipe."""
    if not sys.stdin.isatty():
        return ""
    with suppress(ImportError):              # lines can be edited, and exceed 4,095 bytes
        import readline  # noqa: F401
    print("Ctrl-C stops an answer, /clear forgets, /exit or Ctrl-D ends.", file=sys.stderr)
    return "> "


def _show(text: str) -> None:
    """Print a part of a line; to a terminal without control characters, as models write some."""
    print(clean(text, "\n\t") if sys.stdout.isatty() else text, end="", flush=True)


def _print_speed(answer: Generation, times: Sequence[float]) -> None:
    """Print how fast an answer was, of which the first of the times is the beginning."""
    first, rest, count = times[1] - times[0], times[-1] - times[1], len(times) - 2
    cached = answer.reader.cached_tokens
    read = len(answer.reader.prompt) - cached
    steps = (count + (answer.ended == "stop")) / max(1, answer.steps)
    _print_stats(f"first token {first:.3f} s, prompt {read / first:.0f} tokens/s and {cached} from "
                 f"the cache, {count + 1} tokens at {count / rest if rest else 0:.0f} tokens/s, "
                 f"{steps:.2f} tokens a step")


def _print_stats(text: str) -> None:
    print(f"[{text}, peak memory {peak_resident() / 1e6:.0f} MB]", file=sys.stderr)
