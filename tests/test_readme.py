"""The README's commands and code do what it says."""

import re
from pathlib import Path
from typing import Any

from tiny import save_bytes_model

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_its_python_leads_from_data_to_an_answer(inputs, tmp_path, monkeypatch, capsys) -> None:
    """As it stands, on a tiny checkpoint and task."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    save_bytes_model(tmp_path / "FOLDER", hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
    (tmp_path / "DATA").symlink_to(inputs[3], target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    generator, said = found["generator"], capsys.readouterr().out
    assert said.endswith("".join(generator.text(generator.generate(found["prompt"], 32))) + "\n")
