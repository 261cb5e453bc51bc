"""Make the folder that ships: place the experts, round, write, and compare with PyTorch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch

from ..io.files import last_part, must_be_new, replacing, sha256, write_json
from ..method.experts import expert_layers
from ..model.checkpoint import versions
from ..model.decoder import CausalLM
from ..runtime import Generator
from ..runtime.drafts import DRAFTED, DRAFTS
from ..runtime.folder import FORMAT, TASKS
from . import layouts
from .calibration import shuffled_samples
from .check import check, tolerance
from .contract import golden, prompt
from .plan import check_prompts, in_words, resolved
from .ranges import refuse_float16
from .settings import ExportConfig, Source
from .ship import Part, in_float32, ship
from .table import splitting, write_port


def export_model(config: ExportConfig, source: Source,
                 out: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Make the folder `out` (default: one in the run); returns it and the content of export.json.

    It gets its name only if it works: a failure leaves nothing. Raises ValueError for settings that
    do not fit the model, or if the folder does not compute what PyTorch does; FileExistsError if
    the folder is there.
    """
    config = resolved(config, source)
    name = "-".join([config.routing, config.layout] + [config.precision] * config.graph)
    out = Path(out or config.out or source.run / "export" / name)
    must_be_new(out)
    samples = shuffled_samples(config, source)
    print(in_words(config, bool(samples)))
    with replacing(out, folder=True) as folder:
        layouts.copy_base_files(source.base, folder, whole=config.layout != "peft")
        if config.port:                      # may refuse the tokenizer, and the chat template
            splitting(folder)
            prompt(source)
        reference_fp32 = in_float32(source)
        if config.graph and config.form.dtype == torch.float16:
            refuse_float16(reference_fp32, check_prompts(source))
        part = ship(config, source, reference_fp32, samples)
        info = write(part, source, folder, reference_fp32)
        return out, record(info, folder)


def write(part: Part, source: Source, folder: Path, reference_fp32: CausalLM) -> dict[str, Any]:
    """Write a part into the folder, and check it; returns what export.json says of it."""
    config, graph = part.config, dict[str, Any]()
    info = about(config, source)
    if config.graph:
        graph = layouts.write_graph(part, folder)
        if source.tasks:
            write_json(folder / TASKS, {
                t.name: {"choices": t.choices, "instruction": t.instruction} for t in source.tasks})
        record(info | graph, folder)         # the runtime reads it
    else:
        layouts.write_weights(config.layout, source.base, source.name, source.trained, folder)
    checked = check(part, source, folder, reference_fp32)
    if config.graph:
        graph["contract"]["golden"] = golden(Generator(folder), tolerance(config))
        with suppress(*() if config.port else (ValueError,)):    # some templates cannot be split
            graph["contract"]["prompt"] = prompt(source)
        if steps := checked.pop("drafts", None):
            graph["contract"]["drafts"] = {"file": DRAFTS, "tokens": DRAFTED, **steps}
    if config.port:
        write_port(folder, graph, source.tokenizer)
    return info | graph | {"checked": checked}


def about(config: ExportConfig, source: Source) -> dict[str, Any]:
    """What export.json says of the settings, and of what was exported."""
    adapter = expert_layers(source.trained) and source.run / "adapter" / "adapter.safetensors"
    return {
        "format": FORMAT, "model": last_part(source.name), "layout": config.layout,
        "routing": config.routing, "arguments": {
            name: last_part(value) if name in ("run", "model", "prompts", "out") else value
            for name, value in asdict(config).items()},
        "base": source.trained.fingerprint, "adapter": sha256(adapter) if adapter else None,
        "versions": versions() | {"onnx": onnx.__version__, "onnxruntime": ort.__version__},
        **({"system": source.system} if source.system else {})}


def record(info: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write export.json: `info` and the files of the folder; returns its content."""
    files = dict[str, dict[str, Any]]()
    for f in sorted(folder.glob("**/*")):
        if f.is_file() and f != folder / "export.json":
            size, name = f.stat().st_size, f.relative_to(folder).as_posix()
            files[name] = {"bytes": size, "sha256": sha256(f)}
    content = {**info, "bytes": sum(file["bytes"] for file in files.values()), "files": files}
    write_json(folder / "export.json", content)
    return content
