"""The installed command: minismoe train|probe|export|chat ...

In a clone, train.py, probe.py and export.py at the top are the scripts themselves; an installation
holds them as the package minismoe.scripts. chat is python -m minismoe.runtime.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

SCRIPTS = {"train": "fine-tune a model on your tasks",
           "probe": "measure how sensitive each weight matrix is to each task",
           "export": "export a run for onnxruntime, a browser, PEFT or transformers",
           "chat": "ask an exported model, with onnxruntime and without PyTorch"}


def main() -> None:
    """Run the script that the first argument names; exit with 2 if it names none."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in SCRIPTS:
        listing = "\n".join(f"  minismoe {script:7} {about}" for script, about in SCRIPTS.items())
        wrong = "" if name in ("-h", "--help") else f"no command {name}; "
        print(f"{wrong}one of these, each with --help:\n{listing}",
              file=sys.stdout if name in ("-h", "--help") else sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    sys.argv = [f"minismoe {name}", *sys.argv[2:]]
    if name == "chat":
        import_module("minismoe.runtime.__main__").run()
    else:                                # torch is imported here, so that chat does without it
        import_module("minismoe.io.signals").end_quietly()
        installed = find_spec("minismoe.scripts") is not None
        if not installed:                # pip install -e: the scripts stay in the clone
            sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        script = import_module(f"minismoe.scripts.{name}" if installed else name)
        import_module("minismoe.cli.script").run_script(script.main)
