"""The command line of the runtime: its flags, and what they start."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.flags import natural, new_parser, option, positive, text
from ..io.text import print_error, replace_unknown_characters
from .folder import read_info
from .sampling import Sampling
from .terminal import Terminal

if TYPE_CHECKING:
    from .generator import Generator

PORTS = range(8471, 8571)    # browsers keep a model by its address: the first free one is best
NEEDS = {"best": "choices", "json": "lines", "top_p": "temperature"}         # which is above 0
CONFLICTS = {                                # a flag, and what cannot stand beside it
    "chat": "prompt lines", "lines": "prompt", "tools": "choices", "schema": "choices tools",
    "task": "chat tools", "choices": "chat max_tokens temperature repetition_penalty",
    "serve": "prompt chat tools schema choices lines task provider threads stats max_tokens "
             "temperature repetition_penalty"}


def _parser() -> argparse.ArgumentParser:
    """The flags and their help."""
    parser = new_parser("Generate from a folder that export.py wrote, without PyTorch.",
                        {"how answers are chosen": Sampling})
    parser.prog = "python -m minismoe.runtime"
    add = parser.add_argument
    add("folder", help="an exported folder of layout onnx, genai or web")
    add("prompt", nargs="?", help="default: standard input, or --chat at a terminal")
    add("--chat", action="store_true", help="a conversation, line by line")
    add("--serve", nargs="?", type=natural, const=-1, metavar="PORT", help="show the page of "
        "layout web at http://127.0.0.1:PORT until Ctrl-C (default: "
        f"{PORTS[0]}, or the next that is free; 0: any free one)")
    add("--tools", type=text, metavar="FILE", help="offer the functions of a JSON list of schemas; "
        "prints calls as JSON lines; in a chat, the lines after calls are what they returned")
    add("--schema", type=text, metavar="FILE", help="answer with JSON that this JSON schema "
        "describes; needs pip install 'llguidance>=1.5'")
    add("--choices", type=text, metavar="FILE|TASK", help="answer with one of these: the lines of "
        "a file, or the answers of a task that the folder knows")
    add("--best", type=positive, metavar="N", help="with --choices: the N likeliest answers, each "
        "after its probability")
    add("--lines", action="store_true", help="answer each line of the standard input in one line, "
        "as it comes; line ends in an answer are written as \\n")
    add("--json", action="store_true", help="with --lines: each answer as a JSON object")
    add("--task", help="put the instruction of this task before the question (default: that of the "
        "folder's only task)")
    add("--provider", help="cpu (default), cuda, webgpu, openvino[:GPU|NPU|CPU] or, for target "
        "npu, qnn[:SOC]; NAME:N is device N")
    add("--threads", type=positive, metavar="N", help="default: the CPU's physical cores")
    add("--stats", action="store_true", help="print speed and memory to standard error")
    add("--verify", action="store_true", help="compare the files' hashes with export.json")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; exits with 2 if some contradict others."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)      # a prompt may come last
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

    generator = Generator(args.folder, args.provider, args.threads, args.verify)
    nodes = generator.nodes                  # slow ones on the CPU are shown in any case
    if nodes.keys() != {CPU} and (args.stats or any(
            op in nodes.get(CPU, "") for op in ("Attention", "MatMul", "Gemm"))):
        print(f"[{'; '.join(map(': '.join, nodes.items()))}]", file=sys.stderr)
    return generator


def main(argv: Sequence[str]) -> None:
    """The command line; errors are raised."""
    args = _parse(argv)
    if args.serve is not None:
        read_info(Path(args.folder), args.verify)
        from .serve import serve  # here, since nothing else needs http.server
        serve(Path(args.folder), PORTS if args.serve < 0 else [args.serve])
        return
    terminal = Terminal(_open(args), args)
    signal.signal(signal.SIGINT, signal.default_int_handler)     # from now on it ends an answer
    at_terminal = sys.stdin.isatty() and args.prompt is args.choices is None and not args.lines
    if args.chat or at_terminal:
        terminal.talk()
    elif args.lines:
        terminal.lines()
    else:
        prompt = sys.stdin.read().removesuffix("\n") if args.prompt is None else args.prompt
        if not prompt:
            raise ValueError("the prompt is empty")
        if args.prompt is None and (count := prompt.count("\n") + 1) > 1:
            print(f"[{count} lines are one prompt; --lines answers each line]", file=sys.stderr)
        terminal.once(prompt)


def run() -> None:
    """Call main and exit: 0 done, 1 failed with one line on stderr, 130 after Ctrl-C."""
    replace_unknown_characters()
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
