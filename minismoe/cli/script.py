"""The installed command, how a script ends, and how it keeps others out of its folder.

In a clone, train.py, probe.py and export.py at the top are the scripts themselves; an installation
holds them as the package minismoe.scripts. Chat starts without torch and without safetensors.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..io.files import locked
from ..io.process import bound_memory
from ..io.signals import handling, interrupt
from ..io.text import clean, print_error, replace_unknown_characters

COMMANDS = {"train": "fine-tune a model on your tasks",
            "probe": "measure how sensitive each weight matrix is to each task",
            "export": "export a run for onnxruntime, a browser, PEFT or transformers",
            "chat": "ask an exported model, with onnxruntime and without PyTorch"}


def main() -> None:
    """minismoe train|probe|export|chat: run what the first argument names; exit with 2 if it names
    nothing."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        listing = "\n".join(f"  minismoe {word:7} {about}" for word, about in COMMANDS.items())
        asked = name in ("-h", "--help")
        print(f"{'' if asked else f'no command {clean(name)}; '}one of these, each with --help:\n"
              f"{listing}", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    sys.argv = [f"minismoe {name}", *flags]
    if name == "chat":
        sys.exit(import_module("minismoe.runtime.__main__").run())
    installed = find_spec("minismoe.scripts") is not None
    if not installed:                    # pip install -e: the scripts stay in the clone
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    run_script(import_module(f"minismoe.scripts.{name}" if installed else name).main)


def command(name: str) -> str:
    """How a script is called: by the installed command, if that is how this process was."""
    return f"minismoe {name}" if sys.argv[0].startswith("minismoe ") else f"python {name}.py"


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's main and exit: 0 done, 1 failed with one line on stderr, 128 + the signal's
    number after Ctrl-C (130) and SIGTERM (143)."""
    from safetensors import SafetensorError  # chat, which does not come here, does without it
    argv = sys.argv[1:]
    bound_memory()
    replace_unknown_characters()
    try:
        with handling(interrupt):
            main(argv)
            sys.stdout.flush()           # raises here if the pipe is closed or the disk full
        return
    except KeyboardInterrupt as e:
        print(f"\ninterrupted{f': {clean(e)}' if str(e) else ''}", file=sys.stderr)
        code = 128 + getattr(e, "number", signal.SIGINT)
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, SafetensorError,
            ValueError) as e:
        print_error(e, "--debug" in argv)
        code = 1
    sys.exit(code)


@contextmanager
def working_in(folder: Path, command: str) -> Iterator[None]:
    """Hold a folder for this run; an interruption meanwhile names the command that goes on."""
    with locked(folder):
        try:
            yield
        except KeyboardInterrupt as e:
            if " --resume " not in command or (folder / "config.json").exists():
                e.args = ("; ".join([*filter(None, e.args), f"go on with: {command}"]),)
            raise
