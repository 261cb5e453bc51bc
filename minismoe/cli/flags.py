"""The flags of train.py and probe.py, as the typed configurations that they become.

A configuration is made once, from the parsed flags, and never changed: `dataclasses.replace` makes
another. RunConfig is all three kinds of configuration at once, and is given wherever one is wanted.
"""

from dataclasses import dataclass

from ..io.flags import flag, natural, option, positive, seed, text, two_names
from ..method.allocate import STRATEGIES
from ..training.plan import TrainConfig

TOGETHER = ("--model and --data go together; without both, the built-in toy and its tasks are "
            "used")


@dataclass(frozen=True)
class InputConfig:
    """Which model and which data, and where they run."""

    model: str | None = flag(
        None, "checkpoint folder or hub name org/name; default: the built-in toy model", text)
    data: str | None = flag(
        None, "folder with a sub-folder (train.jsonl, valid.jsonl, test.jsonl) or one .jsonl or "
        ".csv file a task, or one such sub-folder or file; default: the tasks of the toy model",
        text)
    columns: str | None = flag(
        None, "the columns of .csv files that hold prompt and answer, such as question,answer "
        "(default: the names of one of the forms of lines)", two_names, metavar="PROMPT,ANSWER")
    only_tasks: str | None = flag(
        None, "comma list of task names; default: all of --data", text, metavar="NAMES")
    limit_train: int | None = flag(
        None, "use N training lines of each task, drawn by the seed; default: all", positive,
        metavar="N")
    limit_test: int | None = flag(
        None, "use N test lines of each task, drawn by the seed; 0 skips the test; default: all",
        natural, metavar="N")
    system: str | None = flag(None, "system prompt of the lines that have none; an export begins "
                              "its chats with it", text, metavar="TEXT")
    max_length: int = flag(1024, "longer lines are cut, in training and where their loss is "
                           "measured (default: %(default)s)", positive, metavar="TOKENS")
    seed: int = flag(0, "starts all random choices (default: %(default)s)", seed)
    show: int | None = flag(
        None, "print N examples a task as the model sees them before --max-length, supervised "
        "tokens in [[ ]], and stop", positive, metavar="N")
    device: str = flag("auto", "cpu, cuda, mps, or auto (default)")
    dtype: str = flag(
        "auto", "of the frozen weights and activations; experts are held, and routers and norms "
        "computed, in float32 anyway. auto (default): bfloat16 if the device multiplies it in "
        "hardware, and float32 for the toy model", choices=("auto", "float32", "bfloat16"))
    base_bits: int | None = flag(None, "hold the frozen linear layers in so many bits: less "
                                 "memory, a little slower, and below 16 less exact", int,
                                 choices=(16, 8, 4))


@dataclass(frozen=True)
class AllocationConfig:
    """How much the probe measures, and how votes give experts to matrices."""

    budget_params: int | None = flag(
        None, "at most N trainable parameters (default: as many as it takes if each task votes for "
        "60 %% of the matrices)", positive, metavar="N")
    rank: int = flag(8, "rank of each expert (default: %(default)s)", positive)
    samples: int = 32                   # of each task to probe: a flag of probe.py
    seed: int = 0                       # --seed, a flag of InputConfig


@dataclass(frozen=True)
class RunConfig(InputConfig, AllocationConfig, TrainConfig):
    """All that the flags of train.py ask for; a run's config.json holds it."""

    out: str | None = flag(None, "folder of the run (default: a new one in runs)", text,
                           metavar="RUN")
    strategy: str = flag("votes", "how experts are given to matrices: by votes of the tasks "
                         "(default; of one task, each matrix gets one), the same number everywhere "
                         "(uniform), or one everywhere (lora)", choices=STRATEGIES)
    allocation: str | None = flag(
        None, 'an allocation.json, or {"module": experts}, in place of a strategy', text,
        metavar="FILE")
    exact_match: str = flag(
        "auto", "whether the model answers all test lines, and answers are compared. auto "
        "(default): of all tasks but free text", choices=("auto", "on", "off"))
    init: str | None = flag(
        None, "begin with the experts of RUN, its model and system prompt and, unless --data names "
        "others, its lines; with --epochs 0 they are only judged", text, metavar="RUN")
    resume: bool = flag(False, "go on with the run in --out, from its checkpoint")


def clashing_flags(config: RunConfig) -> str:
    """The sentence that says which flags of train.py do not go together; "" if all do. config: the
    flags as they were typed."""
    def typed(*names: str) -> str:
        return ", ".join(option(name) for name in names
                         if getattr(config, name) != getattr(RunConfig, name))

    if config.resume:
        return "" if config.out else "--resume needs --out RUN"
    if config.init:
        idle = typed("strategy", "budget_params", "rank", "allocation")
        return idle and f"--init takes the experts of RUN as they are: leave out {idle}"
    if config.epochs == 0:
        return "--epochs 0 trains nothing: name a run to judge by --init RUN"
    if (config.model is None) != (config.data is None):
        return TOGETHER
    if config.allocation and (idle := typed("strategy", "budget_params")):
        return f"--allocation says what these would choose: leave out {idle}"
    if config.strategy != "votes" and config.budget_params:
        return f"--budget-params bounds votes: leave out --strategy {config.strategy}"
    return ""
