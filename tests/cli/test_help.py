"""--help explains each flag, and says the default of each that has one."""

import re
from dataclasses import MISSING, fields
from typing import Any

import pytest
from tiny import finish

import export
import probe
import train
from minismoe.cli.flags import AllocationConfig, InputConfig, RunConfig
from minismoe.export.settings import ExportConfig
from minismoe.io.flags import option
from minismoe.runtime import __main__ as runtime
from minismoe.runtime.sampling import Sampling


@pytest.mark.parametrize(("script", "configs"), [
    (train, (RunConfig,)),
    (probe, (InputConfig, AllocationConfig)), (export, (ExportConfig,)), (runtime, (Sampling,))])
def test_each_flag_has_a_help_and_says_its_default(script: Any, configs: tuple[type, ...],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = finish(script.main, "--help", capsys=capsys)
    helps = {flag: " ".join(text.split()) for flag, text in re.findall(
        r"^  (--[\w-]+)(?: {[^}]*}| [A-Z\[][^ \n]*)?\s+(.*(?:\n {4}.*)*)", out, re.MULTILINE)}
    flags = {option(f.name): f.default for kind in configs for f in fields(kind) if f.metadata}
    assert code == 0 and {*flags} <= {*helps} and all(map(str.split, helps.values()))
    if script is train:
        assert re.findall(r"^([a-z ]+):$", out, re.MULTILINE) == [
            "options", "run", "model and data", "probe and allocation", "training"]
    assert not [flag for flag, text in helps.items() if "None" in text]
    assert not [flag for flag, default in flags.items() if default not in (None, False, MISSING)
                and "default" not in helps[flag]]
