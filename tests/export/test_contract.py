"""What export.json says to other programs: a graph is run by it alone, without our code."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from exported import ship
from tiny import DELTA, ROOT, save_bytes_model

import export
from minismoe.export.contract import ONNXRUNTIME
from minismoe.export.settings import ExportConfig, Source
from minismoe.export.write import export_model
from minismoe.io.files import read_json

LEGAL = "LICENSE.txt", "licence", "NOTICE", "COPYING", "USE_POLICY.md"
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}


def exported(root: Path, config: dict[str, Any], *flags: str) -> Path:
    """The export of a random checkpoint that has a licence."""
    save_bytes_model(root / "base", large=True, **config)
    for name in LEGAL:
        (root / "base" / name).write_text(f"{name}: do as you like")
    ship(root / "out", "--model", root / "base", *flags)
    return root / "out"


def replay(folder: Path, said: dict[str, Any]) -> None:
    """Run the golden vector by what the contract says."""
    assert said["padding"] == "none"
    named = {size for i in said["inputs"] for size in i["shape"] if isinstance(size, str)}
    assert named <= said["dimensions"].keys()
    assert all(said[name] for name in ("attention_mask", "past", "position_ids"))
    types = {"int64": np.int64, "float": np.float32, "float16": np.float16}
    session = ort.InferenceSession(folder / said["graph"])
    assert [i.name for i in session.get_inputs()] == [i["name"] for i in said["inputs"]]
    assert [o.name for o in session.get_outputs()] == [o["name"] for o in said["outputs"]]
    lengths = {"batch_size": 1, "past_sequence_length": 0}
    past = {i["name"]: np.zeros([lengths.get(d, d) for d in i["shape"]], types[i["type"]])
            for i in said["inputs"] if i["name"].startswith("past_")}
    golden = said["golden"]
    new, tokens, read = golden["input_ids"], [], 0
    for step in range(len(golden["tokens"])):
        read += len(new)
        given = {"input_ids": [new], "attention_mask": [[1] * read],
                 "position_ids": [[*range(read - len(new), read)]]}
        outputs = session.run(None, past | {
            i["name"]: np.array(given[i["name"]]) for i in said["inputs"] if i["name"] in given})
        found = dict(zip([o["name"] for o in said["outputs"]], outputs))
        logits = found["logits"][0, -1]
        if step == 0:
            wanted = golden["logits"]
            assert wanted["tolerance"] <= 0.1
            assert np.abs(logits[wanted["ids"]] - wanted["values"]).max() <= (
                wanted["tolerance"] * np.abs(logits).max())
            cache = sum(v.nbytes for name, v in found.items() if name.startswith("present."))
            assert said["cache_bytes_per_token"] * read == cache
            assert said["state_bytes"] == sum(
                v.nbytes for name, v in found.items() if name.startswith("present_"))
        new = [int(logits.argmax())]
        tokens += new
        past = {name: found[name.replace("past_key_values.", "present.").replace(
            "past_", "present_")] for name in past}
    assert tokens == golden["tokens"] and not set(tokens) & set(said["stop_ids"])


def replay_on_slots(folder: Path) -> None:
    """Run the golden vector of an NPU's graphs by what the contract says."""
    said = read_json(folder / "export.json")["contract"]
    assert said["padding"] == "left"
    options = ort.SessionOptions()
    for name, setting in said["cpu_session"].items():
        options.add_session_config_entry(name, setting)
    embed, prompt, one = (ort.InferenceSession(folder / name, options) for name in (
        said["embed_graph"]["graph"], said["prompt_graph"]["graph"], said["graph"]))
    past = {i["name"]: np.zeros(i["shape"], np.float16) for i in said["inputs"]
            if i["name"].startswith("past_key_values.")}
    slots, filled = next(iter(past.values())).shape[2], 0

    def run(new: list[int]) -> Any:
        """The logits (V,) after new tokens, at most T of them."""
        nonlocal filled
        session = one if len(new) == 1 else prompt
        pad = session.get_inputs()[0].shape[1] - len(new)
        hidden, = embed.run(None, {"input_ids": np.array([[0] * pad + new])})
        mask = [1] * filled + [0] * (slots - filled + pad) + [1] * len(new)
        outputs = dict(zip((o.name for o in session.get_outputs()), session.run(None, past | {
            "hidden": hidden, "attention_mask": np.array([mask]),
            "position_ids": np.array([[0] * pad + [*range(filled, filled + len(new))]])})))
        for name, cache in past.items():
            present = outputs[name.replace("past_key_values", "present")]
            cache[:, :, filled:filled + len(new)] = present[:, :, pad:]
        filled += len(new)
        return outputs["logits"][0, -1]

    golden, most = said["golden"], said["prompt_graph"]["inputs"][0]["shape"][1]
    ids, tokens, wanted = golden["input_ids"], [], golden["logits"]
    for start in range(0, len(ids), most):
        logits = run(ids[start:start + most])
    assert np.abs(logits[wanted["ids"]] - wanted["values"]).max() <= (
        wanted["tolerance"] * np.abs(logits).max())
    while len(tokens) < len(golden["tokens"]):
        tokens.append(int(logits.argmax()))
        logits = run(tokens[-1:])
    assert tokens == golden["tokens"]


@pytest.mark.parametrize("config, flags", [
    (LLAMA, ["--precision", "int4-8"]), (LLAMA, ["--precision", "fp32", "--target", "portable"]),
    (LLAMA, ["--layout", "genai", "--precision", "fp32"]), (LLAMA, ["--layout", "web"]),
    (LLAMA | DELTA, ["--precision", "fp32"])], ids=["ort", "portable", "genai", "web", "delta"])
def test_the_golden_vector_by_plain_onnxruntime(config: dict[str, Any], flags: list[str],
                                                tmp_path: Path) -> None:
    folder = exported(tmp_path, config, *flags)
    info = read_json(folder / "export.json")
    said = info["contract"]
    replay(folder, said)
    assert said["cache"] == ("fixed" if "--static" in flags else "growing" if (
        "portable" in flags) else "shared")
    domains = {line.split(";")[0]: line.split(";")[2].split(",") for line in said["operators"]}
    assert ("com.microsoft" in domains) == ("portable" not in flags)
    assert ("MatMulNBits" in domains.get("com.microsoft", [])) == ("int4-8" in flags)
    for name in LEGAL:
        assert (folder / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_the_golden_vector_of_an_npu_by_plain_onnxruntime(tmp_path: Path) -> None:
    replay_on_slots(exported(tmp_path, LLAMA, "--target", "npu", "--precision", "fp16"))


def test_the_oldest_onnxruntime_is_that_of_the_package() -> None:
    assert f'"onnxruntime>={ONNXRUNTIME}"' in (ROOT / "pyproject.toml").read_text()


def base_in(folder: Path) -> Path:
    """A tiny checkpoint, whose files lie in `folder`."""
    save_bytes_model(folder, **LLAMA)
    for name, text in (("chat_template.jinja", "hi"), ("LICENSES/MIT.txt", "as you like"),
                       ("special_tokens_map.json", "{}"), ("tokenizer_config.json", "{}"),
                       ("generation_config.json", "{}")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", ["LICENSES/MIT.txt", "chat_template.jinja", "config.json",
                                  "special_tokens_map.json", "tokenizer_config.json",
                                  "generation_config.json", "model.safetensors"])
def test_a_file_of_the_base_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    base = base_in(tmp_path / "base")
    (base / name).rename(tmp_path / "secret")
    (base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of its folder"):
        export_model(ExportConfig(), source_of(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """A snapshot's files are links to its blobs; a folder of licences is copied, too."""
    base, blobs = base_in(tmp_path / "models--a" / "snapshots" / "1"), tmp_path / "models--a/blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(f for f in base.rglob("*") if f.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    export_model(ExportConfig(), source_of(base), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSES" / "MIT.txt").read_text() == "as you like"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hi"


def source_of(base: Path) -> Source:
    return export.load_base(ExportConfig(model=str(base)))
