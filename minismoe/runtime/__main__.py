"""The command line of the runtime: one prompt, a pipe, or a chat."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tools import Function, Message, functions, with_tools
from ..io.files import naming, read_json
from ..io.flags import as_flags, from_flags, natural, new_parser, option, positive, text
from ..io.process import peak_resident
from ..io.text import clean, error_line, open_streams, print_error
from .api import Api
from .choices import answer_tokens
from .folder import lines_of, read_choices, read_info, read_prefix, trained_system
from .grammar import json_grammar
from .sampling import Sampling

if TYPE_CHECKING:
    from .generator import Generator

# A browser keeps a page and its model by port, so that a folder is best found at the same one.
PORT, PORTS = 8471, 100                      # the first that --serve tries, and how many
NEEDS = {**dict.fromkeys(("api_key", "cors", "cache", "quiet"), "serve"), "host": "api_key",
         "best": "choices",
         **dict.fromkeys(("top_p", "top_k", "min_p", "seed"), "temperature")}    # above 0
CONFLICTS = {                                # a flag, and what cannot stand beside it
    "chat": "prompt raw lines", "tools": "raw choices", "schema": "choices tools",
    "choices": "chat raw max_tokens temperature stop repetition_penalty "        # a whole answer
               "frequency_penalty presence_penalty",
    "serve": "prompt chat raw instructions tools schema choices lines stop stats"}   # of a request


def _answer(generator: Generator, question: str | Sequence[Message], options: Mapping[str, Any],
            stop: Sequence[str], stats: bool) -> tuple[Message, bool]:
    """Print the answer to a prompt or a chat as it comes; returns it, and whether Ctrl-C ended it.

    options: of `Generator.generate`; stop: as of `Generator.text`. Where the chat offers tools, the
    answer is printed at its end: as calls, one a line, or as text.
    """
    is_raw = isinstance(question, str)
    chat: Sequence[Message] = [{}] if isinstance(question, str) else question
    prompt = question if isinstance(question, str) else generator.tokenizer.render(question, True)
    times, answer, offers_tools = [time.perf_counter()], "", "tools" in chat[0]
    interrupted = False

    def show(text: str) -> None:             # a model can write control characters
        print(clean(text, "\n\t") if sys.stdout.isatty() else text, end="", flush=True)

    def timed(token: int) -> int:
        times.append(time.perf_counter())
        return token

    try:
        tokens = map(timed, generator.generate(prompt, **options))
        for piece in generator.text(tokens, stop, strip=not is_raw):
            answer += piece
            show("" if offers_tools else piece)
    except KeyboardInterrupt:
        interrupted = True
    message = generator.tokenizer.parse(chat, answer)
    if offers_tools:
        show("\n".join(json.dumps(call["function"], ensure_ascii=False)
                       for call in message.get("tool_calls", ())) or message["content"])
    print(flush=True)
    if generator.ended == "context":
        print(f"[the context of {generator.context} tokens is full]", file=sys.stderr)
    if generator.ended == "max_tokens" and options.get("grammar"):
        print(f"[the answer was cut at {options['max_tokens']} tokens]", file=sys.stderr)
    if stats and len(times) > 1:
        first, rest, count = times[1] - times[0], times[-1] - times[1], len(times) - 2
        print(f"[first token {first:.3f} s, prompt {generator.prompt_tokens / first:.0f} tokens/s "
              f"and {generator.cached_tokens} from the cache, {count + 1} tokens at "
              f"{count / rest if rest else 0:.0f} tokens/s, "
              f"peak memory {peak_resident() / 1e6:.0f} MB]", file=sys.stderr)
    return message, interrupted


def _choose(generator: Generator, prompts: Sequence[str], name: str, best: int | None,
            stats: bool) -> None:
    """Print the likeliest of --choices to each prompt; with --best N of them, and probabilities."""
    choices, start = read_choices(generator.folder, name), time.perf_counter()
    longest = max(map(len, answer_tokens(generator.tokenizer, tuple(choices))))
    for tokens in generator.encoded(prompts, longest):       # before the first answer: it may fail
        for answer in generator.choose(tokens, choices, best or 1):
            text = clean(answer.text) if sys.stdout.isatty() else answer.text
            print(f"{math.exp(answer.logprob):.4f}\t{text}" if best else text, flush=True)
    if stats:
        seconds = (time.perf_counter() - start) / len(prompts)
        print(f"[one of {len(choices)} answers in {seconds:.3f} s, "
              f"peak memory {peak_resident() / 1e6:.0f} MB]", file=sys.stderr)


def _chat(generator: Generator, options: Mapping[str, Any], stop: Sequence[str], stats: bool,
          system: Sequence[Message] = (), tools: Sequence[Function] = ()) -> None:
    """Answer line by line until the input ends; Ctrl-C ends an answer, not the chat."""
    history, results = [*system], 0          # results of calls that are still to be typed
    ask = "> " if sys.stdin.isatty() else ""
    if ask:
        with suppress(ImportError):          # lines can be edited, and exceed 4,095 bytes
            import readline  # noqa: F401
        print("Ctrl-C stops an answer, /clear forgets, /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input(ask)
            command = line.strip()
            if command == "/exit":
                return
            if command in ("", "/clear"):
                history, results = ([*system], 0) if command else (history, results)
                continue
            turn = {"role": "tool" if results else "user", "content": line}
            if results > 1:
                history, results = [*history, turn], results - 1
                continue
            chat = with_tools([*history, turn], tools)
            answer, _ = _answer(generator, chat, options, stop, stats)
            history, results = [*chat, answer], len(answer.get("tool_calls", ()))
        except EOFError:
            return
        except KeyboardInterrupt:            # of a line, or while the template was rendered
            print()
        except ValueError as e:              # too long, or refused by the template
            anew = "; /clear begins anew" if history else ""
            print(f"error: {error_line(e)}{anew}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    """The flags and their help."""
    parser = new_parser("Generate from a folder that export.py wrote, without PyTorch.",
                        {"how answers are chosen": Sampling})
    parser.prog = "python -m minismoe.runtime"
    add = parser.add_argument
    add("folder", help="an exported folder of layout onnx, genai or web")
    add("prompt", nargs="?", help="default: standard input, or --chat at a terminal")
    add("--chat", action="store_true", help="a conversation, line by line")
    add("--serve", nargs="?", type=natural, const=-1, metavar="PORT", help="answer OpenAI's "
        "protocol at http://127.0.0.1:PORT/v1, and show the page of layout web, until Ctrl-C "
        f"(default: {PORT}, or the next that is free; 0: any free one)")
    add("--host", help="with --serve: another address of this machine, for whoever has --api-key")
    add("--api-key", type=text, metavar="KEY", help="with --serve: what requests must show; better "
        "as MINISMOE_API_KEY in the environment, as others see the flags of a process")
    add("--cors", type=text, action="append", default=[], metavar="ORIGIN", help="with --serve: a "
        "site whose pages may ask, as https://example.com; *: all (with a key, the key decides)")
    add("--cache", type=natural, default=1000, metavar="MB", help="with --serve: memory for chats "
        "that were read earlier, beside that of the last one (default: 1000)")
    add("--quiet", action="store_true", help="with --serve: no line for each request")
    add("--raw", action="store_true", help="read the prompt as it is, without a chat template")
    add("--instructions", type=text, metavar="FILE|TASK", help="begin with a file's "
        "text as the system prompt (with --raw, as text before the prompt), or with a task's own")
    add("--tools", type=text, metavar="FILE", help="offer the functions of a JSON list of schemas; "
        "prints calls as JSON lines; in a chat, the lines after calls are what they returned")
    add("--schema", type=text, metavar="FILE", help="answer with JSON that this JSON schema "
        "describes; needs pip install 'llguidance>=1.5'")
    add("--choices", type=text, metavar="FILE|TASK", help="answer with one of these: the lines of "
        "a file, or the answers of a task that the folder knows")
    add("--best", type=positive, metavar="N", help="with --choices: the N likeliest answers, each "
        "after its probability")
    add("--lines", action="store_true", help="each line is a prompt of its own")
    add("--task", help="use the adapter of this task, if the folder has adapters")
    add("--stop", type=text, action="append", default=[], metavar="TEXT", help="end the answer "
        "before this text; may be given again")
    add("--provider", help="cpu (default), cuda, webgpu, tensorrt, mlx, openvino[:GPU|NPU|CPU] or, "
        "for target npu, qnn[:SOC]; NAME:N is device N; auto: the best of those export.py checked")
    add("--threads", type=positive, metavar="N", help="default: the CPU's physical cores")
    add("--stats", action="store_true", help="print speed and memory to standard error")
    add("--verify", action="store_true", help="compare the files' hashes with export.json")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; exits with 2 if some contradict others."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)      # a prompt may come last
    if args.serve is not None and not args.api_key:
        args.api_key = os.environ.get("MINISMOE_API_KEY")
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name, needed in NEEDS.items():
        if name in given and needed not in given:
            parser.error(f"{option(name)} needs {option(needed)}")
    for name, others in CONFLICTS.items():
        if name in given and (wrong := sorted(given & {*others.split()})):
            names = ["PROMPT" if other == "prompt" else option(other) for other in wrong]
            parser.error(f"{option(name)} cannot be beside {', '.join(names)}")
    return args


def _open(args: argparse.Namespace) -> Generator:
    """The folder's generator; where it runs is printed if asked for, or if that is slow."""
    from .generator import Generator  # here, since --help needs no onnxruntime
    from .providers import CPU

    generator = Generator(args.folder, args.provider, args.threads, args.task, args.verify,
                          args.cache * 1_000_000 if args.serve is not None else 0)
    nodes = generator.nodes                  # slow ones on the CPU are shown in any case
    if nodes.keys() != {CPU} and (args.stats or any(
            op in nodes.get(CPU, "") for op in ("Attention", "MatMul", "Gemm"))):
        print(f"[{'; '.join(map(': '.join, nodes.items()))}]", file=sys.stderr)
    return generator


def _api(args: argparse.Namespace) -> Api:
    """What --serve answers with. A folder with a page gets a generator once a request needs one."""
    folder, defaults = Path(args.folder), from_flags(Sampling, vars(args))
    if (folder / "index.html").is_file():
        read_info(folder, args.verify)
        if args.provider not in (None, "auto"):
            from .providers import find_device
            find_device(args.provider)
        return Api(folder, lambda: _open(args), defaults, args.task)
    generator = _open(args)
    return Api(folder, lambda: generator, defaults, args.task)


def main(argv: Sequence[str]) -> None:
    """The command line; errors are raised."""
    args = _parse(argv)
    if args.serve is not None:
        api, ports = _api(args), range(PORT, PORT + PORTS) if args.serve < 0 else [args.serve]
        from .serve import serve  # here, since nothing else needs its libraries
        serve(api, ports, args.host, args.api_key, args.cors, args.quiet)
        return
    generator = _open(args)
    options = as_flags(from_flags(Sampling, vars(args)))
    system, before = (trained_system(generator.folder), "") if args.instructions is None else (
        read_prefix(generator.folder, args.instructions, args.raw))
    with naming(args.tools, ValueError):
        schemas = args.tools and Path(args.tools).read_text(encoding="utf-8-sig")
        tools = functions(schemas, "the file")
    if tools:
        options["grammar"] = generator.call_grammar(tools)
    if args.schema:
        options["grammar"] = json_grammar(read_json(args.schema))

    def chat(prompt: str) -> list[Message]:
        return with_tools([*system, {"role": "user", "content": before + prompt}], tools)

    if args.chat or (sys.stdin.isatty() and args.prompt is args.choices is None and not args.raw):
        if before:
            raise ValueError("--instructions TASK is text before one prompt: give PROMPT; a chat "
                             "takes --instructions FILE, as its system prompt")
        _chat(generator, options, args.stop, args.stats, system, tools)
        return
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt is None else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty")
    prompts = lines_of(prompt, "the prompt", "question") if args.lines else [prompt]
    if args.prompt is None and not args.lines and (count := prompt.count("\n") + 1) > 1:
        print(f"[{count} lines are one prompt; --lines answers each line]", file=sys.stderr)
    if args.choices is not None:
        _choose(generator, [generator.tokenizer.render(chat(p), True) for p in prompts],
                args.choices, args.best, args.stats)
        return
    for prompt in prompts:
        question = before + prompt if args.raw else chat(prompt)
        if _answer(generator, question, options, args.stop, args.stats)[1]:
            raise KeyboardInterrupt


def run() -> None:
    """Call main and exit: 0 done, 1 failed with one line on stderr, 130 after Ctrl-C."""
    open_streams()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:                   # onnxruntime raises bare Exceptions
        expected = (ArithmeticError, ImportError, OSError, RuntimeError, ValueError)
        if isinstance(e, MemoryError):
            e = ValueError("out of memory: export again, with a smaller --context")
        if not isinstance(e, expected) and "onnxruntime" not in type(e).__module__:
            raise
        print_error(e, "--debug" in sys.argv)
        sys.exit(1)


if __name__ == "__main__":
    run()
