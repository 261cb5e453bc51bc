"""A second device for a machine that has none: "other", whose tensors the CPU computes.

    python tests/tools/other_device.py train.py --device other ...      run a script that may use it

PyTorch sees those tensors on a device of their own, and an operator that is given some of them and
some of the CPU's raises, as it would on CUDA or MPS. (Those forgive an index on the CPU; this one
does not.) It has no float64, like MPS. Kernels, memory and random numbers are the CPU's. At the end
the names of the operators that it was asked for are printed, on stderr.
"""

import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

asked: set[str] = set()                      # operators, such as "aten::add.Tensor"
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")       # between devices


class Other(Tensor):
    """A tensor on the device; `raw` is the CPU's that holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Other":
        if raw.dtype == torch.float64:
            raise TypeError("other has no float64")
        made = Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device="other:0")
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Sequence = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        return run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()


def raw(x: Any) -> Any:
    return x.raw if isinstance(x, Other) else x


def run(op: Any, args: Sequence, kwargs: Mapping[str, Any]) -> Any:
    """Do as the device does: the result lies where the arguments do, or where `device` says."""
    name, tensors = op._schema.name, [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
    here = any(isinstance(x, Other) for x in tensors)
    strangers = [x for x in tensors if not isinstance(x, Other) and x.dim()]   # scalars may mix
    if here and strangers and name not in COPIES:
        raise RuntimeError(f"{name} is given tensors of other and of {strangers[0].device}")
    if name == "aten::copy_":
        here = isinstance(args[0], Other)
    if (device := kwargs.get("device")) is not None:
        here = torch.device(device).type == "other"
        kwargs = {**kwargs, "device": torch.device("cpu") if here else device}
    if name == "aten::_fused_sdp_choice" and here:
        return 0                             # attention in plain operators: no kernel is fused
    if here:
        asked.add(f"{name}.{op._schema.overload_name}".rstrip("."))
    given = {id(raw(x)): x for x in tensors}             # what is changed in place stays itself

    def placed(x: Any) -> Any:
        if not torch.is_tensor(x) or id(x) in given:
            return given.get(id(x), x)
        return Other(x) if here else x

    return tree_map(placed, op(*tree_map(raw, args), **tree_map(raw, dict(kwargs))))


class Watch(TorchDispatchMode):
    """Sees operators that make tensors, which none of the device's own are given to."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False                         # or torch imports its compiler, for two seconds

    def __torch_dispatch__(self, op: Any, types: Any, args: Sequence = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        return run(op, args, kwargs or {})


class Backend(_DummyBackendModule):
    """torch.other, as far as torch itself asks for it."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> None:
    """Make the device known; once a process."""
    def empty(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, layout: Any = None,
              device: Any = None, pin_memory: Any = None) -> Tensor:
        return Other(torch.empty_strided(size, stride, dtype=dtype))

    def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        raw(target).copy_(raw(source))
        return target

    # torch.tensor(..., device="other") makes a tensor and fills it below what Watch sees.
    torch.library.impl("aten::empty_strided", "privateuseone", empty)
    torch.library.impl("aten::_copy_from", "privateuseone", copy)
    _setup_privateuseone_for_python_backend("other", Backend())


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    install()
    code: object = 0
    with Watch():
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code
        except Exception:
            traceback.print_exc()
            code = 1
    print(*sorted(asked), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(bool(code)))     # torch's threads for the device were seen to abort at an exit
