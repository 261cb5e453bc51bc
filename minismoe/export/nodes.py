"""Nodes and tensors of an ONNX graph; large tensors stream to a data file beside it."""

import copy
import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

IR = 10                         # version of the file format
SMALL = 1 << 10                 # a tensor of at most so many bytes stays in the graph file
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16,
         torch.int64: TensorProto.INT64, torch.uint8: TensorProto.UINT8,
         torch.int8: TensorProto.INT8, torch.bool: TensorProto.BOOL}


class Graph:
    """Nodes and tensors; the bytes of large ones are written to `data` at once, and not kept."""

    def __init__(self, data: BinaryIO | None = None, dtype: torch.dtype = torch.float32,
                 opset: int = 21):
        """dtype: of the activations."""
        self.data, self.dtype, self.opset = data, dtype, opset
        self.real = TYPES[dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def node(self, op: str, module: str, *inputs: str | int | Sequence[int], outputs: int = 1,
             named: Sequence[str] = (), **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or a list of several.

        inputs: names, or whole numbers as constants. `named` names the outputs; "" leaves one out.
        """
        name = "/" + re.sub(r"\.(?!\d)", "/", module) + "/" + op
        named = named or [f"{name}/output_{i}" for i in range(outputs)]
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self.nodes.append(helper.make_node(op, names, named, name, **attributes))
        return named[0] if len(named) == 1 else list(named)

    def cast(self, module: str, x: str, to: int) -> str:
        """Cast x to an ONNX type, unless all activations are float32."""
        return x if self.dtype == torch.float32 else self.node("Cast", module, x, to=to)

    def constant(self, values: Any, dtype: torch.dtype = torch.int64) -> str:
        """Add a small tensor of these values; equal ones are stored once."""
        name = f"/constants/{str(dtype)[6:]}/{values}".replace(" ", "")
        return name if name in self.tensors else self.tensor(
            name, torch.tensor(values, dtype=dtype))

    def tensor(self, name: str, values: Tensor, data_type: int | None = None,
               shape: Sequence[int] | None = None) -> str:
        """Add a tensor, whose bytes may be of another type and shape; returns its name."""
        proto = self.tensors[name] = TensorProto(
            name=name, data_type=data_type or TYPES[values.dtype], dims=shape or values.shape)
        values, size = values.contiguous(), values.nbytes
        raw = (ctypes.c_char * size).from_address(values.data_ptr()) if size else b""
        if self.data is None or size <= SMALL:
            proto.raw_data = bytes(raw)
            return name
        # onnxruntime maps from the start of a page; on Windows that is 64 KiB.
        align = 1 << (16 if size >= 1 << 20 else 12)
        start = self.data.seek(-(-self.data.tell() // align) * align)
        self.data.write(raw)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", Path(self.data.name).name), ("offset", start),
                           ("length", size)):
            proto.external_data.add(key=key, value=str(value))
        return name

    def alias(self, tensor: str, shape: Sequence[int], data_type: int | None = None) -> str:
        """Add a tensor of the same bytes in another shape or type; returns its name."""
        proto = copy.deepcopy(self.tensors[tensor])
        proto.name, proto.dims[:] = f"{tensor}.flat", shape
        proto.data_type = data_type or proto.data_type
        self.tensors[proto.name] = proto
        return proto.name

    def save(self, file: Path) -> None:
        """Write the graph beside its data file."""
        graph = helper.make_graph(self.nodes, file.stem, self.inputs, self.outputs,
                                  list(self.tensors.values()))
        opsets = [helper.make_opsetid(domain, 1 if domain else self.opset)
                  for domain in sorted({"", *(n.domain for n in self.nodes)})]
        onnx.save(helper.make_model(graph, producer_name="minismoe", ir_version=IR,
                                    opset_imports=opsets), str(file))
