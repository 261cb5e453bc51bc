"""A tiny exported folder, written without export.py, for the tests of the runtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tiny import BYTES

from minismoe.export import graph
from minismoe.export.mixture import AdapterInput
from minismoe.model.decoder import CausalLM

CONFIG = BYTES | {"hidden_size": 64, "max_position_embeddings": 96}
KINDS = {"ort": ("ort", None), "portable": ("portable", None),
         "static": ("portable", (1, 1, 96)), "chunks": ("portable", (2, 4, 96))}


def export(model: CausalLM, folder: Path, kind: str = "ort", context: int = 96,
           **beside: AdapterInput) -> Path:
    """An exported folder of layout onnx."""
    target, static = KINDS[kind]
    weights, c = dict(model.named_parameters()), model.config
    folder.mkdir()
    graph.write_decoder(folder / "model.onnx", c, lambda name: weights[name].detach(), beside,
                        target=target, precision="fp32", context=context, static=static)
    graph.write_sampler(folder / "sampler.onnx", c.vocab_size)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    describe(folder, target=target, context=context, static=static, layers=c.num_hidden_layers,
             kv_heads=c.num_key_value_heads, head_dim=c.head_dim, vocab_size=c.vocab_size,
             cache_type="float32", format="minismoe.export/1", adapters={})
    return folder


def describe(folder: Path, **info: object) -> None:
    """Write export.json, or change what it says."""
    file = folder / "export.json"
    old = json.loads(file.read_text()) if file.is_file() else {}
    files = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes())
                      .hexdigest()} for p in folder.iterdir() if p != file}
    file.write_text(json.dumps({"files": files, **old, **info}))
