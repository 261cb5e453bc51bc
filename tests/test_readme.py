"""The READMEs' commands and code do what they say."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, save_bytes_model

# What needs the hub, another repository or a device, or is not ended by itself.
LEFT_OUT = ("pip install", "HuggingFace", "runs/mine", " mine ", "llama.cpp/", "npm ", "qnn",
            "--serve", "runs/support", "answer.c", "./answer", "scp ", "apt-get", "pip download",
            "unzip ")


def test_its_python_leads_from_data_to_an_answer(inputs, tmp_path, monkeypatch, capsys) -> None:
    """As it stands, on a tiny checkpoint and task."""
    text = (ROOT / "minismoe" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    save_bytes_model(tmp_path / "FOLDER", hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
    (tmp_path / "DATA").symlink_to(inputs[3], target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    generator, said = found["generator"], capsys.readouterr().out
    assert said.endswith("".join(generator.text(generator.generate(found["prompt"], 32))) + "\n")


def commands(name: str) -> list[str]:
    """The lines of the shell blocks of a README that this machine can run, without comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [re.sub(r"\s+# .*", "", line.replace("pip install . && ", ""))
             for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
             for line in block.splitlines()]
    return [line for line in lines if line and not any(part in line for part in LEFT_OUT)]


@pytest.mark.slow
def test_commands_work_in_their_order_in_an_empty_folder(tmp_path: Path) -> None:
    """RUN is the run that the first command made, and OUT its export."""
    for script in "train.py", "probe.py", "export.py":
        (tmp_path / script).symlink_to(ROOT / script)
    (tmp_path / "questions.txt").write_text("Which is less, 52 or 37?\nWhich is less, 28 or 61?\n")
    (tmp_path / "answers.txt").write_text("37\n28\n")
    seen = dict[str, str]()
    for line in (line for room in ("", "minismoe/export/", "minismoe/runtime/")
                 for line in commands(f"{room}README.md")):
        if line in seen:                     # the same step on another system
            continue
        run = next((tmp_path / "runs").glob("*"), None) if (tmp_path / "runs").exists() else ""
        command = re.sub(r"\bRUN\b", str(run), re.sub(r"\bOUT\b", "toy", line))
        command = command.replace("TASK", "count").replace('"..."', '"Count the letters."')
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, input="Which is less, 28 or 61?\n", text=True,
            capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=600)
        assert done.returncode == 0, (command, done.stderr)
        seen[line] = done.stdout
    assert [*seen][:3] == ["python train.py", "python export.py --out toy",
                           'python -m minismoe.runtime toy "Which is less, 52 or 37?"']
    assert seen[[*seen][2]].strip() == "37"
    assert seen["python -m minismoe.runtime OUT --lines < questions.txt"].split() == ["37", "28"]
    assert seen['python -m minismoe.runtime OUT "..." --choices TASK'].strip() in "34567"
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert (tmp_path / "web" / "index.html").exists()
