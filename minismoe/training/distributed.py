"""Several processes on one run, as torchrun starts them; a process alone is a world of one.

Each computes its share of every micro-batch and takes the same step from the same summed gradients.
CUDA's gradients go over nccl, all else over gloo, which raises at once if a process has ended: nccl
would wait for it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..io.text import out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
_joined = False                              # a group that another program made is not ours


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """This process's number; 0 prints and writes the files."""
    return dist.get_rank() if world() > 1 else 0


def _local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def per_process(count: int) -> int:
    """The most that one process gets of `count` things."""
    return -(-count // world())


def rank0_only(work: Callable[..., Any], *args: Any) -> None:
    """Call work(*args) in the first process only."""
    if rank() == 0:
        work(*args)


def print0(text: str) -> None:
    """Print in the first process only."""
    rank0_only(print, text)


@contextmanager
def _peers() -> Iterator[None]:
    """Raise a ConnectionError of one line if an exchange fails."""
    try:
        yield
    except RuntimeError as e:
        if out_of_memory(e):
            raise
        # gloo: "[its source file] reason. advice"; nccl: the reason is the last line.
        lines = str(e).splitlines() or ["no reason given"]
        reason = lines[-1] if "NCCL" in lines[0] else lines[0].rpartition("] ")[2].split(". ")[0]
        raise ConnectionError("another process of this run has ended, or cannot be reached "
                              f"({reason})") from e


def join_others(device: torch.device) -> None:
    """Join the processes that torchrun started, if it did."""
    global _joined
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _joined:
        return
    if device.type == "cuda":
        if (local := _local_rank()) >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine finds {torch.cuda.device_count()} "
                             "CUDA devices: start as many processes a machine as it has")
        if device.index not in (None, local):
            raise ValueError(f"--device {device}: each process takes a device of its own, so leave "
                             "out the number")
        torch.cuda.set_device(local)
    with _peers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    _joined = True


def exit_together(code: int) -> None:
    """End this process if it is one of several; with code 0, once all have come here."""
    if world() > 1:
        if code == 0:
            gather(None)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)                       # torch's threads abort some processes at a usual end


@contextmanager
def one_first() -> Iterator[None]:
    """The first process of each machine runs the block, then the others, who find what it left."""
    if _local_rank():
        gather(None)
    yield
    if not _local_rank():
        gather(None)
    gather(None)                             # nobody goes on before all have run the block


def all_sum(x: Tensor, times: float = 1.0) -> Tensor:
    """The sum of times * x over all processes, the same bits in each; a lone process returns x."""
    if world() == 1:
        return x
    y = times * x.cpu()
    with _peers():
        dist.all_reduce(y)
    return y.to(x.device)


def exchange(tensors: Sequence[Tensor], first: bool = False) -> None:
    """Replace tensors of one dtype, all at once, by their sums over the processes or, with `first`,
    by those of the first process."""
    if world() == 1:
        return
    together = torch.cat([t.detach().flatten() for t in tensors])
    if together.device.type != "cuda":       # MPS has no exchange of its own
        together = together.cpu()
    with _peers():
        dist.broadcast(together, src=0) if first else dist.all_reduce(together)
    with torch.no_grad():
        for t, part in zip(tensors, together.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in the order of their ranks."""
    if world() == 1:
        return [value]
    data = json.dumps(value).encode()
    size = torch.tensor(len(data))
    with _peers():
        dist.all_reduce(size, dist.ReduceOp.MAX)
        data = data.ljust(int(size))         # JSON may end in spaces
        values = [torch.empty(len(data), dtype=torch.uint8) for _ in range(world())]
        dist.all_gather(values, torch.tensor(list(data), dtype=torch.uint8))
    return [json.loads(bytes(row.tolist())) for row in values]


def map_over_ranks(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """work(item), a JSON value, for each item in order; each process works on one at a time."""
    for i in range(0, len(items), world()):
        turn = items[i:i + world()]
        yield from gather(work(turn[rank()]) if rank() < len(turn) else None)[:len(turn)]
