"""Kill training at random moments, resume until it is done, and compare with an undisturbed run.

    python tests/tools/kill_resume.py --runs 50
    python tests/tools/kill_resume.py --runs 5 -- --model SMOLLM2 --data DATA --only-tasks trec

Every run is killed (SIGKILL) a few times, at moments drawn at random, half of them as soon as a
file or folder is being written under its temporary name. What an undisturbed run wrote must come
out byte for byte, but for the fields of time. What follows -- goes to train.py. Processes are
forked, so that torch is imported once.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch._dynamo  # noqa: E402, F401 (the optimizer's, which each child would import anew)

import train  # noqa: E402
from minismoe.cli import script  # noqa: E402
from minismoe.training import loop  # noqa: E402
from minismoe.training.plan import TrainConfig  # noqa: E402

SHORT = "--limit-train 24 --limit-test 6 --epochs 2 --batch-size 8".split()
SAME = ("allocation.json", "sensitivity.json", "after.json", "adapter/adapter.json",
        "adapter/adapter.safetensors", "before.json")


def train_with_checkpoints(model: Any, examples: Any, cfg: TrainConfig, *more: Any) -> Any:
    """`train`, with a checkpoint after every second step."""
    return loop.train(model, examples, replace(cfg, checkpoint_every=2), *more)


def start(run: Path, flags: Sequence[str], prepare: Callable[[], Any] = lambda: None) -> int:
    """The number of a process that begins a run, or goes on with one; it speaks to RUN.txt."""
    if pid := os.fork():
        return pid
    code: Any = 1
    try:
        sys.stdout = sys.stderr = Path(f"{run}.txt").open("a", buffering=1)  # noqa: SIM115
        args = ["--resume"] if (run / "config.json").exists() else [*flags]
        train.train = train_with_checkpoints
        sys.argv = ["train.py", *args, "--out", str(run)]
        prepare()
        script.run_script(train.main)
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        os._exit(code)


def ended(pid: int, options: int = 0) -> int | None:
    """A process's exit code, negative where a signal ended it; with os.WNOHANG None if it lives."""
    done, status = os.waitpid(pid, options)
    return os.waitstatus_to_exitcode(status) if done else None


def finish(run: Path, flags: Sequence[str]) -> None:
    """Let a run come to its end. Raises RuntimeError with what it said where it fails."""
    if code := ended(start(run, flags)):
        raise RuntimeError(f"{run} ended with {code}:\n{Path(f'{run}.txt').read_text()}")


def killed(run: Path, flags: Sequence[str], after: float, in_write: bool) -> bool:
    """Kill a run `after` seconds, or in the first write from then on; False if it was faster."""
    pid, begun = start(run, flags), time.monotonic()
    while (code := ended(pid, os.WNOHANG)) is None:
        if time.monotonic() - begun >= after and (not in_write or any(run.rglob(".*tmp*"))):
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            break
        time.sleep(0.0005 if in_write else 0.005)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{run} ended with {code}:\n{Path(f'{run}.txt').read_text()}")
    return code != 0


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Files of `run` that are not what an undisturbed run wrote."""
    bad = [name for name in SAME if (undisturbed / name).exists()        # no probe, no sensitivity
           and (run / name).read_bytes() != (undisturbed / name).read_bytes()]
    metrics, results = ([re.sub(r', "tokens_per_second": [^,}]+', "", text) for text in (
        (folder / "metrics.jsonl").read_text() for folder in (run, undisturbed))], [
        {k: v for k, v in json.loads((folder / "results.json").read_text()).items()
         if k != "seconds"} for folder in (run, undisturbed)])
    bad += ["metrics.jsonl"] * (metrics[0] != metrics[1])
    bad += ["results.json"] * (results[0] != results[1])
    held = [{str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
            for folder in (run, undisturbed)]
    bad += [f"{name}, which one of them lacks" for name in sorted(held[0] ^ held[1])]
    return bad + [f"{p} is left" for p in run.rglob(".*tmp*")]


def finish_as(run: Path, undisturbed: Path, flags: Sequence[str]) -> None:
    """Finish a run. Raises RuntimeError if it fails, or differs from an undisturbed run."""
    finish(run, flags)
    if bad := differences(run, undisturbed):
        raise RuntimeError(f"{run} differs in {', '.join(bad)}")
    shutil.rmtree(run)


def disturbed(run: Path, undisturbed: Path, flags: Sequence[str], duration: float,
              rng: random.Random) -> int:
    """Kill a run one to four times, finish it, and compare; how often it was killed."""
    kills, most, latest = 0, rng.randint(1, 4), 0.6 * duration
    while kills < most:
        if killed(run, flags, rng.uniform(0, latest), rng.random() < 0.5):
            kills += 1
        elif kills:
            break
        else:                                # it was never killed: begin anew, earlier
            shutil.rmtree(run)
            latest /= 2
    finish_as(run, undisturbed, flags)
    return kills


def at_every_rename(folder: Path, undisturbed: Path, flags: Sequence[str]) -> int:
    """End a run, without a chance to clean up, at its first, second ... renamed file, finish it,
    and compare; the renames of an undisturbed run."""
    for lives in range(1000):
        replace, done, run = os.replace, list[None](), folder / f"rename-{lives}"

        def dying(*names: Any) -> None:
            if len(done) == lives:           # noqa: B023 (called in a child of this round alone)
                os._exit(9)
            done.append(replace(*names))     # noqa: B023

        code = ended(start(run, flags, lambda: setattr(os, "replace", dying)))   # noqa: B023
        if code == 0:
            return lives
        if code != 9:
            raise RuntimeError(f"{run} ended with {code}:\n{Path(f'{run}.txt').read_text()}")
        finish_as(run, undisturbed, flags)
    raise RuntimeError("a run renames more than 1,000 files")


def main(argv: Sequence[str]) -> None:
    argv, flags = ((argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv
                   else (argv, SHORT))
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N",
                        help="number of the first run; it seeds the moments (default: 0)")
    parser.add_argument("--renames", action="store_true",
                        help="end runs at every file that they rename, not at random moments")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    flags = [*flags, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, begun = Path(folder) / "undisturbed", time.monotonic()
        finish(undisturbed, flags)
        duration = time.monotonic() - begun
        print(f"an undisturbed run takes {duration:.1f} s", flush=True)
        if args.renames:
            print(f"the same after {at_every_rename(Path(folder), undisturbed, flags)} renames")
            return
        for number in range(args.first, args.first + args.runs):
            kills = disturbed(Path(folder) / str(number), undisturbed, flags, duration,
                              random.Random(number))
            print(f"{number}: the same, killed {kills} times", flush=True)
    print(f"{args.runs} of {args.runs} the same")


if __name__ == "__main__":
    main(sys.argv[1:])
