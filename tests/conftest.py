"""Tiny checkpoints and a tiny tokenizer, made by the libraries that the tests compare with."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"       # set before transformers reads it: no test downloads
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")    # of torch, also in the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tiny import QUICK, finish, random_hf, save_bytes_model, write_lines  # noqa: E402

torch.set_num_threads(1)            # on tensors this small, threads wait for each other
settings.register_profile("minismoe", max_examples=50, deadline=None, database=None,
                          derandomize=True)
settings.load_profile("minismoe")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bfloat16", action="store_true", help="--dtype auto takes what it takes on "
                     "a device that multiplies bfloat16 (default: on one that does not)")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if a test was skipped for another reason than MINISMOE_MAY_SKIP, a pattern, allows."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    allowed = os.environ.get("MINISMOE_MAY_SKIP")
    if allowed and reporter and not hasattr(session.config, "workerinput"):
        reasons = {report.longrepr[2] for report in reporter.stats.get("skipped", ())}
        if strange := sorted(reason for reason in reasons if not re.search(allowed, reason)):
            reporter.write_line(f"skipped, which must run here: {strange}", red=True)
            session.exitstatus = 1


@pytest.fixture(scope="session", autouse=True)
def multiplies_bfloat16(request: pytest.FixtureRequest) -> Iterator[Callable[..., bool]]:
    """Dtypes do not follow the machine, but --bfloat16; the function that asks the machine."""
    from minismoe.cli import inputs

    asks = inputs._multiplies_bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_multiplies_bfloat16",
                      lambda device: request.config.getoption("bfloat16"))
        yield asks


@pytest.fixture
def signals() -> Iterator[None]:
    """SIGINT as at a terminal; a job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """family -> (the `transformers` model, the folder that its save_pretrained wrote)."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in made:
            model, folder = random_hf(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = model, folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of a BPE of bytes, with the usual special tokens."""
    from bpes import byte_level

    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    byte_level(size=330, corpus=[
        "the cat sat on the mat and the answer is yes or no, user and assistant say"] * 4, special=[
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>",
        "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]"]).save(str(file))
    return file


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as of Llama 2 and Mistral: a space before each text, bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *"▁hiko"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>",
                                byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                            normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--model and --data of a random byte-level checkpoint and two small tasks."""
    root = tmp_path_factory.mktemp("inputs")
    save_bytes_model(root / "model", max_position_embeddings=48)
    for name, low, high in (("train", 0, 22), ("valid", 22, 24), ("test", 24, 30)):
        write_lines(root / "data" / "upper" / f"{name}.jsonl",
                    ((f"say {i}", f"N{i}") for i in range(low, high)))
    (root / "data" / "sum.jsonl").write_text("".join(
        json.dumps({"instruction": "add", "input": f"{i}+1", "output": str(i + 1)}) + "\n"
        for i in range(30)))
    return ["--model", str(root / "model"), "--data", str(root / "data")]


@pytest.fixture(scope="session")
def finished(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of train.py on `inputs`, which no test changes."""
    import train

    run = tmp_path_factory.mktemp("finished") / "run"
    train.main([*inputs, *QUICK, "--dtype", "float32", "--out", str(run)])
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, which lacks its results: --resume goes on with it."""
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    (copied / "results.json").unlink()
    return copied


@pytest.fixture
def succeed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A script's main and its arguments -> what it prints on stdout; it ends with exit code 0."""
    def call(*command: Any) -> str:
        code, out, err = finish(*command, capsys=capsys)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """The same of a script that ends with exit code 1 and one line of error, which `says` so."""
    def call(*command: Any, says: str) -> None:
        code, _, err = finish(*command, capsys=capsys)
        last = err.splitlines()[-1]
        assert code == 1 and last.startswith("error: ") and says in last, err

    return call
