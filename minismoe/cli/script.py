"""How a script ends, whatever happens, and how it keeps others out of its folder."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..io.process import bound_memory
from ..io.signals import handling, interrupt, locked
from ..io.text import clean, open_streams, print_error


def command(name: str) -> str:
    """How a script is called: by the installed command, if that is how this process was."""
    return f"minismoe {name}" if sys.argv[0].startswith("minismoe ") else f"python {name}.py"


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's main and exit: 0 done, 1 failed with one line on stderr, 128 + the signal's
    number after Ctrl-C (130), SIGTERM (143) and SIGHUP (129)."""
    argv = sys.argv[1:]
    bound_memory()
    open_streams()
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
