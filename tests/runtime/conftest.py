"""A random `model`, exports of each kind, and a generator of the first."""

from pathlib import Path

import pytest
from exported import KINDS, export, random_model

from minismoe.model.decoder import CausalLM
from minismoe.runtime import Generator


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def folders(model: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {kind: export(model, root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def generator(folders: dict[str, Path]) -> Generator:
    return Generator(folders["ort"], threads=1)
