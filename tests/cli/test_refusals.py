"""What the scripts refuse in one line, before any work: wrong flags (2) and what they name (1)."""

import json

import pytest
from tiny import finish

import export
import probe
import train
from minismoe.runtime import __main__ as runtime

UP = "model.layers.0.mlp.up_proj"
FORM = {"format": "minismoe.allocation/1"}
WRONG_FLAGS = {              # {script: [(flags, what the last line says)]}
    train: [
        ("--no-such-flag", "unrecognized arguments"), ("--resume", "--resume needs --out"),
        ("--model .", "--model and --data go"), ("--data .", "--model and --data go together"),
        ("--init x --data . --strategy lora --rank 8", "are: leave out --strategy (--help"),
        ("--allocation x --strategy lora --rank 2", "would choose: leave out --strategy (--help"),
        ("--strategy uniform --budget-params 9", "bounds votes: leave out --strategy uniform"),
        ("--epochs 0", "--epochs 0 trains nothing: name a run to judge by --init RUN"),
        ("--init x --rank 4 --budget-params 9", "leave out --budget-params, --rank"),
        ("--lr -0.001", "argument --lr"), ("--lr nan", "argument --lr"),
        ("--lr inf", "argument --lr"),
        ("--batch-size auto", "argument --batch-size"), ("--batch-size 0", "argument --batch-size"),
        ("--model=", "argument --model"),
        ("--out=", "argument --out"), ("--seed 18446744073709551616", "argument --seed"),
        ("--only-tasks=", "argument --only-tasks"), ("--allocation=", "argument --allocation")],
    probe: [("--model .", "--model and --data go together"), ("--samples 0", "argument --samples"),
            ("--samples auto", "argument --samples")],
    export: [
        ("RUN --static 1x1x8", "--static needs --target portable or npu"),
        ("RUN --static 1xtwo", "invalid 1xTxP value"),
        ("RUN --layout hf --routing dynamic", "holds no graph: leave out --routing dynamic"),
        ("RUN --layout hf --precision int4", "holds no graph"),
        ("RUN --layout web --target portable", "--layout web needs --target ort"),
        ("RUN --precision q8 --target portable", "--precision q8 needs --target ort"),
        ("RUN --precision q8 --block 32", "--precision q8 of --target ort has no blocks"),
        ("RUN --target npu --block 32", "of --target npu has no blocks: leave out --block"),
        ("RUN --precision fp32 --block 32", "--precision fp32 of --target ort has no blocks"),
        ("RUN --layout peft --model x", "a base has no adapters (--prompts FILE calibrates 4 bits "
         "and NPUs): leave out RUN and --layout peft"),
        ("RUN --static 1x1x9 --target portable --layout genai", "onnx: leave out --layout genai"),
        ("RUN --layout hf --routing freeze", "holds no graph: leave out --routing freeze"),
        ("RUN --layout peft --context 64 --block 32", "graph: leave out --context and --block"),
        ("RUN --target npu --precision int4", "--precision int4 needs --target ort or portable"),
        ("RUN --precision w8a16", "--precision w8a16 needs --target npu"),
        ("RUN --provider qnn:60", "--provider qnn needs --target npu"),
        ("RUN --layout hf --provider webgpu", "holds no graph: leave out --provider"),
        ("RUN --target npu --static 2x8x64", "invalid 1xTxP value: '2x8x64'"),
        ("RUN --target npu --static 1x8x64 --context 64", "leave out --context"),
        ("RUN --target npu --layout genai", "--layout genai needs --target ort or portable"),
        ("RUN --target npu --routing dynamic", "--target npu holds one merged model"),
        *((f"--model x {flags}", f"leave out {flags.split()[0]}") for flags in (
            "--routing freeze", "--layout peft", "--limit-test 5")),
        *((f"--model x --prompts x {flags}", "calibrates 4 bits and NPUs): leave out ") for flags in
          ("--precision int8", "--precision q8", "--precision fp32", "--layout hf"))],
    runtime: [
        ("F --serve web", "--serve: invalid int value: 'web'"), ("F --serve=-1", "-1 is below 0"),
        ("F --chat --lines", "--chat cannot be beside --lines"),
        ("F --serve --stats", "--serve cannot be beside --stats"),
        ("F --chat --choices f", "--choices cannot be beside --chat"),
        ("F x --max-tokens 3 --choices f", "--choices cannot be beside --max-tokens"),
        ("F x --temperature 1 --choices f", "--choices cannot be beside --temperature"),
        ("F x --schema f --choices g", "--schema cannot be beside --choices"),
        ("F x --schema f --tools g", "--schema cannot be beside --tools"),
        ("F --chat --task t", "--task cannot be beside --chat"),
        ("F x --repetition-penalty 0", "0 is not in [0.01, 100]"),
        ("F x --lines", "--lines cannot be beside PROMPT"), ("F --json", "--json needs --lines"),
        ("F x --threads 0", "is not at least 1"),
        ("F x --choices=", "it is empty"),
        ("F x --temperature nan", "nan is no number of at least 0"),
        ("F x --top-p 2", "2 is not in (0, 1]"),
        ("F x --top-p 0", "0 is not in (0, 1]"),
        ("F x --top-p 0.5", "--top-p needs --temperature"), ("F x --best 2", "--best needs --cho"),
        ("F x --chat", "--chat cannot be beside PROMPT"),
        ("F y --serve --threads 2", "--serve cannot be beside PROMPT, --threads"),
        ("F --serve --best 2", "--best needs --choices")]}
# (script, flags, what the error says). INPUTS are --model and --data that work; a dict is the
# content of a file of --allocation.
REFUSED = [
    *((script, "INPUTS --rank 40", {}, "more than the matrix itself has: model.layers.0.")
      for script in (train, probe)),
    (train, "INPUTS", {UP: 0}, "experts must give some module an expert"),
    (train, "INPUTS", FORM | {"rank": 65, "experts": {UP: 1}}, "rank 65 is more than the matrix"),
    (train, "INPUTS", FORM | {"top_k": 1, "experts": {UP: 2}}, "top_k 1 would teach routers"),
    *((train, "INPUTS", {"model.layers.9.x": 1, "lm_head": 1, "nope": 2}, name)
      for name in ("model.layers.9.x", "lm_head", "nope")),
    (train, "INPUTS --model nowhere-at-all", {}, "no such model folder"),
    (train, "INPUTS --max-length 3", {},
     "within 3 tokens (--max-length, or what the model was made for)"),
    (train, "INPUTS --only-tasks sum,sum", {}, "named twice"),
    *((train, f"INPUTS --only-tasks {name}", {}, f"has no task {name}; it has sum, upper")
      for name in ("no", "../model", "..", "a/b")),
    (train, "--only-tasks count,count", {}, "named twice"),
    (train, "--only-tasks no", {}, "no task no; it has capitals"),
    *((export, flags, {}, f"leave out {flags.split()[0]}") for flags in (
        "--routing freeze", "--layout peft", "--limit-test 5")),
    *((export, f"--prompts x {flags}", {}, "calibrates 4 bits and NPUs): leave out ") for flags in
      ("--precision int8", "--precision q8", "--precision fp32", "--layout hf")),
    (export, ".", {}, "is no run of train.py"),
]


@pytest.mark.parametrize("script, flags, says", [
    (script, *row) for script, rows in WRONG_FLAGS.items() for row in rows])
def test_wrong_flags(script, flags, says, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = finish(script.main, *flags.split(), capsys=capsys)
    assert code == 2 and says in err and not list(tmp_path.iterdir())
    assert err.count("\n") == 1 and err.endswith(" (--help explains the flags)\n")


@pytest.mark.parametrize("script, flags, settings, says", REFUSED)
def test_bad_input(script, flags, settings, says, inputs, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minismoe.method.sensitivity.sample_norms",
                        lambda *_: pytest.fail("it probes"))
    words = [given for word in flags.split() for given in (inputs if word == "INPUTS" else [word])]
    if settings:
        (tmp_path / "a.json").write_text(json.dumps(settings))
        words += ["--allocation", "a.json"]
    code, _, err = finish(script.main, *words, capsys=capsys)
    last = err.splitlines()[-1]
    assert code == 1 and last.startswith("error: ") and says in last and "Traceback" not in err
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"] * bool(settings)
