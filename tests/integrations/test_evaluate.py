"""``optimum-cli analog evaluate`` and its Python twin."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig

from analog_integrations.optimum import evaluate, main_evaluate
from analog_integrations.optimum.cli_analog import _noises
from analog_plugin import (
    AnalogError,
    evaluate_noise,
    load_checkpoint,
)
from analog_plugin.data import evaluation_tokens
from analog_plugin.evaluation import Reference
from analog_plugin.layers import analog_layers
from analog_plugin.pretrained import load_causal_lm, load_tokenizer

CLI = Path(sys.executable).with_name("optimum-cli")
SMALL = {"blocks": 4, "length": 16}


def command(*arguments):
    return [str(CLI), "analog", "evaluate", *map(str, arguments)]


def run(*arguments, cwd, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, **options)


def table(directory):
    with (directory / "table.csv").open() as file:
        return {(r["model"], r["noise"], r["metric"]): r for r in csv.DictReader(file)}


def test_every_kind_of_model_is_measured(model_directory, checkpoints, corpus, tmp_path):
    models = {
        "original": str(model_directory),
        "analog": str(checkpoints / "analog-fp"),
        "int8": str(checkpoints / "w8a8"),
    }
    reports = main_evaluate(
        models, tmp_path / "out", noise=["pcm", "hermes"], time=["1h", "1d"], seeds=2,
        corpus=str(corpus), **SMALL,
    )  # fmt: skip
    noises = ["none", "pcm", "pcm", "hermes@1h", "hermes@1h", "hermes@1d", "hermes@1d"]
    assert [c.noise for c in reports["original"].cells] == noises
    assert [c.noise for c in reports["analog"].cells] == noises
    assert [c.noise for c in reports["int8"].cells] == ["none"]
    assert reports["original"].mean("none", "kl") == pytest.approx(0, abs=1e-9)
    assert reports["int8"].mean("none", "kl") > 1e-4

    tokens = evaluation_tokens(load_tokenizer(model_directory), 4, 16, str(corpus))
    reference = Reference.of(load_causal_lm(model_directory).float(), tokens)
    expected = evaluate_noise(
        load_checkpoint(checkpoints / "analog-fp"), tokens,
        [None, "pcm", "hermes@1h", "hermes@1d"], 2, reference=reference,
    )  # fmt: skip
    assert reports["analog"] == expected

    found = table(tmp_path / "out")
    row = found["analog", "hermes@1d", "kl"]
    assert float(row["mean"]) == expected.mean("hermes@1d", "kl") and row["seeds"] == "2"
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])
    assert ("analog − original", "pcm", "perplexity") in found
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| int8 | none |" in text and "4 blocks of 16 tokens" in text


def test_the_command_says_and_writes_its_table(model_directory, checkpoints, corpus, tmp_path):
    result = run(
        checkpoints / "analog-fp", "--original", model_directory, "--noise", "gaussian:0.01,0.02",
        "--seeds", 2, "--corpus", corpus, "--blocks", 2, "--length", 8, "-o", "report",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for noise in ("none", "gaussian:0.01", "gaussian:0.02"):
        assert f"| analog-fp | {noise} |" in result.stdout
    assert (tmp_path / "report" / "table.md").read_text() in result.stdout
    assert float(table(tmp_path / "report")["analog-fp", "none", "kl"]["mean"]) > 0


def test_a_killed_sweep_goes_on_and_ends_the_same(model_directory, corpus, tmp_path):
    arguments = (
        model_directory, "--seeds", 60, "--corpus", corpus, "--blocks", 8, "--length", 32, "-o",
    )  # fmt: skip
    whole = run(*arguments, "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    cells = tmp_path / "cut" / "cells.jsonl"
    process = subprocess.Popen(
        command(*arguments, "cut"), cwd=tmp_path, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if cells.exists() and len(cells.read_bytes().splitlines()) > 5:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = cells.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 5 < len(kept.splitlines()) < 62
    again = run(*arguments, "cut", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert cells.read_bytes().startswith(kept)
    for name in ("cells.jsonl", "table.csv", "table.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_output_in_the_models_own_directory_is_resumed(model_directory, corpus, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    options = {"seeds": 1, "corpus": str(corpus), **SMALL}
    for output in (model, model / "deep" / "report"):
        main_evaluate(str(model), output, **options)
        written = (output / "cells.jsonl").read_bytes()
        main_evaluate(str(model), output, noise=["none", "pcm"], **options)
        assert (output / "cells.jsonl").read_bytes() == written


def test_a_model_is_known_by_what_its_files_hold(model_directory, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    first = evaluate.identity(str(model))
    for path in model.glob("*"):
        os.utime(path, (1, 1))
    (model / "notes.txt").write_text("mine")
    (model / "folder.json").mkdir()
    assert evaluate.identity(str(model)) == evaluate.identity(str(model_directory)) == first
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")  # of the same size
    assert evaluate.identity(str(model)) != first


def test_hub_models_are_told_apart(monkeypatch):
    config = LlamaConfig()
    config._commit_hash = "abc"
    monkeypatch.setattr(evaluate, "read_model_config", lambda *_: config)
    assert evaluate.identity("one/llama") == "one/llama@abc" != evaluate.identity("two/llama")


def test_a_file_as_output_is_refused_and_kept(model_directory, corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(AnalogError, match="is a file; give a directory"):
            main_evaluate(
                str(model_directory), tmp_path / "file", corpus=str(corpus), overwrite=overwrite
            )
    assert (tmp_path / "file").read_text() == "mine"


def test_layers_are_measured_once(model_directory, analog_directory, corpus, tmp_path):
    models = {"original": str(model_directory), "analog": str(analog_directory)}
    options = {"seeds": 1, "corpus": str(corpus), "sensitivity": True, **SMALL}
    main_evaluate(models, tmp_path, **options)
    assert (tmp_path / "sensitivity-analog.png").exists()
    written = (tmp_path / "sensitivity.jsonl").read_bytes()
    head, record = [json.loads(line) for line in written.splitlines()]
    assert head["settings"]["noise"] == "pcm" and record["model"] == "analog"
    names = {name for name, _ in analog_layers(load_checkpoint(analog_directory))}
    assert {row["name"] for row in record["rows"]} == names
    main_evaluate(models, tmp_path, **options)
    assert (tmp_path / "sensitivity.jsonl").read_bytes() == written


def test_overwrite_begins_anew(model_directory, corpus, tmp_path):
    options = {"seeds": 1, "corpus": str(corpus), "length": 16}
    main_evaluate([str(model_directory)], tmp_path, blocks=2, **options)
    with pytest.raises(AnalogError, match="other settings"):
        main_evaluate([str(model_directory)], tmp_path, blocks=3, **options)
    main_evaluate([str(model_directory)], tmp_path, blocks=3, overwrite=True, **options)
    head = json.loads((tmp_path / "cells.jsonl").read_text().splitlines()[0])
    assert head["settings"]["shape"] == [3, 16]


def test_help_explains_the_command_without_loading_torch(tmp_path):
    poison = tmp_path / "torch.py"
    poison.write_text("raise ImportError('torch was imported')")
    result = run("--help", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    for text in ("--noise", "--time", "--original", "examples:", "cells.jsonl"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pcm", ["pcm"]),
        ("gaussian:0.01,0.02", ["gaussian:0.01", "gaussian:0.02"]),
        ("pcm,hermes@1d", ["pcm", "hermes@1d"]),
        ("hermes:1,1.5@1h,pcm:2", ["hermes:1", "hermes:1.5@1h", "pcm:2"]),
        ("gaussian:1e-2,2e-2", ["gaussian:1e-2", "gaussian:2e-2"]),
        ("gaussian:1e+0,2", ["gaussian:1e+0", "gaussian:2"]),
        ("gaussian:1,-2", ["gaussian:1", "gaussian:-2"]),
        ("pcm:1.5+stuck:0.1,0.2,pcm", ["pcm:1.5+stuck:0.1", "pcm:1.5+stuck:0.2", "pcm"]),
        ("hermes@1h+stuck:0.1,0.2", ["hermes@1h+stuck:0.1", "hermes+stuck:0.2@1h"]),
    ],
)
def test_levels_are_lists(text, expected):
    assert _noises([text]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "No model was given"),
        ({"models": ["no/such-model"]}, "neither a local model directory nor a hub model"),
        ({"noise": ["pcn"]}, "no noise model 'pcn'; did you mean 'pcm'"),
        ({"noise": ["reram_wan2022"], "time": ["1h"]}, "measured 1s, 1d and 2d"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": []}, "seeds is an empty list"),
        ({"blocks": 0}, "blocks is 0, but must be at least 1"),
        ({"length": 1}, "length is 1, but must be at least 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"time": ["soon"]}, "time is 'soon'"),
        ({"noise": ["hermes@1d"], "time": ["1h"]}, "'hermes@1d' has a time, and times were given"),
        ({"noise": [{"sigma": 1}]}, "must be a name, name:level or a mapping with a name"),
        ({"length": 1000, "blocks": 1}, "length is 1000.*at most 64"),
        ({"blocks": 10_000}, "10000 were asked for"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
        ({"corpus": "/no/such/file.txt"}, "no/such/file"),
    ],
)
def test_bad_input_is_one_sentence(changes, message, model_directory, corpus, tmp_path):
    arguments = {
        "models": [str(model_directory)], "output": tmp_path / "out", "corpus": str(corpus), **SMALL
    } | changes  # fmt: skip
    with pytest.raises(AnalogError, match=message):
        main_evaluate(arguments.pop("models"), arguments.pop("output"), **arguments)
    assert not (tmp_path / "out" / "cells.jsonl").exists()


def test_two_of_one_name_are_told_apart(model_directory, checkpoints, corpus, tmp_path):
    with pytest.raises(AnalogError, match="given twice"):
        main_evaluate([str(model_directory)] * 2, tmp_path, corpus=str(corpus), **SMALL)
    with pytest.raises(AnalogError, match="no full-precision model"):
        main_evaluate(
            [str(model_directory)], tmp_path, corpus=str(corpus),
            original=str(checkpoints / "w8a8"), **SMALL,
        )  # fmt: skip
