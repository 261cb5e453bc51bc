"""The command line of runtime.py: a prompt, a pipe or a conversation."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from ..io.flags import positive
from ..io.process import peak_resident
from ..io.text import clean, error_line, print_error
from . import Generator


def _say(generator: Generator, prompt: str, args: argparse.Namespace) -> str:
    """Print what follows a prompt as it comes, and give it; Ctrl-C ends it, and is said."""
    times, answer, terminal = [time.perf_counter()], "", sys.stdout.isatty()

    def timed(tokens: Iterable[int]) -> Iterator[int]:
        for token in tokens:
            times.append(time.perf_counter())
            yield token

    tokens = generator.generate(
        prompt, args.max_tokens, temperature=args.temperature, top_p=args.top_p,
        top_k=args.top_k, seed=args.seed)
    try:
        for piece in generator.text(timed(tokens)):
            answer += piece
            if terminal:                     # a model can write what commands a terminal
                piece = clean(piece, "\n\t")
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        generator.ended = "interrupted"
    print(flush=True)
    if generator.ended == "context":
        print(f"[the context of {generator.context} tokens is full]", file=sys.stderr)
    if args.stats and len(times) > 1:
        first, rest = times[1] - times[0], times[-1] - times[1]
        print(f"[first token {first:.3f} s, prompt {generator.prompt_tokens / first:.0f} tokens/s, "
              f"{len(times) - 1} tokens at {(len(times) - 2) / rest if rest else 0:.0f} tokens/s, "
              f"peak memory {peak_resident() / 1e6:.0f} MB]", file=sys.stderr)
    return answer


def _chat(generator: Generator, args: argparse.Namespace) -> None:
    """Read a line, answer, and so on until the input ends; Ctrl-C ends an answer, not the chat."""
    history: list[dict[str, str]] = []
    ask = "> " if sys.stdin.isatty() else ""
    if ask:
        with suppress(ImportError):          # lines may be edited, and longer than 4,095 bytes
            import readline  # noqa: F401
        print("Ctrl-C stops an answer, /clear forgets, /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input(ask)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() == "/exit":
            return
        if line.strip() == "/clear":
            history.clear()
        if not line.strip() or line.strip() == "/clear":
            continue
        history.append({"role": "user", "content": line})
        try:
            prompt = generator.tokenizer.render(history, add_generation_prompt=True)
            # as answers are in data: the template itself writes the space before one
            answer = _say(generator, prompt, args).strip()
            history.append({"role": "assistant", "content": answer})
        except ValueError as e:              # no longer fits, or the template refuses it
            anew = "; /clear begins anew" if len(history) > 1 else ""
            print(f"error: {error_line(e)}{anew}", file=sys.stderr)
            history.pop()
        except KeyboardInterrupt:            # while the template was rendered
            print()
            history.pop()


def main(argv: Sequence[str]) -> None:
    """The command line; errors are raised."""
    parser = argparse.ArgumentParser(prog="python -m minismoe.runtime", description=(
        "Generate from a folder that export.py wrote, without PyTorch."))
    add = parser.add_argument
    add("folder", help="an exported folder of layout onnx")
    add("prompt", nargs="?", help="default: standard input, or --chat at a terminal")
    add("--chat", action="store_true", help="a conversation, line by line")
    add("--raw", action="store_true", help="read the prompt as it is, without a chat template")
    add("--task", help="use the adapter of a task that the folder holds")
    add("--max-tokens", type=positive, metavar="N", help="default: until the context is full")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest tokens "
        "that together reach P (default: 1)")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens "
        "(default: as many as the folder's sampler gives, 64)")
    add("--seed", type=int, help="of the draws; default: another one each time")
    add("--provider", help="onnxruntime's execution provider, such as cuda (default: cpu)")
    add("--threads", type=positive, metavar="N", help="default: physical cores")
    add("--stats", action="store_true", help="print speed and memory to standard error")
    add("--verify", action="store_true", help="compare the files' hashes with export.json")
    args = parser.parse_intermixed_args(argv)      # a prompt may come last
    if args.chat and (args.prompt is not None or args.raw):
        parser.error("--chat reads line by line, through the template: leave out PROMPT and --raw")
    if not args.temperature and (0 < args.top_p < 1 or args.top_k > 0 or args.seed is not None):
        parser.error("--top-p, --top-k and --seed draw nothing without a --temperature above 0")
    generator = Generator(args.folder, args.provider, args.threads, args.task, args.verify)
    if args.chat or (args.prompt is None and sys.stdin.isatty()):
        _chat(generator, args)
        return
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt is None else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty")
    if not args.raw:
        prompt = generator.tokenizer.render([{"role": "user", "content": prompt}], True)
    _say(generator, prompt, args)
    if generator.ended == "interrupted":
        raise KeyboardInterrupt


def run() -> None:
    """As cli.run, which loads torch: exit with 0, with 1 and a line on stderr, or with 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if hasattr(sys.stdin, "reconfigure"):        # a line that is no UTF-8 does not end a chat
        sys.stdin.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:                   # onnxruntime's own are bare Exceptions
        expected = (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, ValueError)
        if isinstance(e, MemoryError):
            e = ValueError("out of memory: export again, with a smaller --context")
        if not isinstance(e, expected) and "onnxruntime" not in type(e).__module__:
            raise
        print_error(e)
        sys.exit(1)


if __name__ == "__main__":
    run()
