"""``optimum-cli export analog`` as a user runs it: another process, its output, its exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from analog_plugin.checkpoint.layout import verify_manifest
from analog_plugin.layers import analog_layers
from optimum.analog import AnalogModelForCausalLM

CLI = Path(sys.executable).with_name("optimum-cli")


def command(*arguments):
    return [str(CLI), "export", "analog", *map(str, arguments)]


def environment():
    return {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}


def run(*arguments, cwd):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), cwd=cwd
    )


def test_help_explains_the_command_without_loading_torch(tmp_path):
    poison = tmp_path / "torch.py"
    poison.write_text("raise ImportError('torch was imported')")
    result = subprocess.run(
        command("--help"), capture_output=True, text=True,
        env=environment() | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for text in ("--recipe", "--profile", "--overwrite", "examples:", "analog_modifiers:"):
        assert text in result.stdout


def test_a_run_over_an_old_checkpoint_shows_its_table_and_replaces_it(
    model_directory, corpus, fields, write_recipe, tmp_path
):
    fields["evaluation"] = {
        "corpus": str(corpus), "blocks": 4, "length": 16, "seeds": 2, "noise": ["pcm"],
    }  # fmt: skip
    recipe, out = write_recipe(fields), tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    result = run(
        "-m", model_directory, "--recipe", recipe, "--dataset", corpus, "--seed", 5, "--overwrite",
        "--device", "cpu", "out", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not (out / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    verify_manifest(out)

    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    rows = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("|")]
    assert table == rows and len(table) == 2 + 3 * 2 + 1 + 1
    assert {line.split("|")[1].strip() for line in table[2:]} == {
        "original, digital", "original", "analog-trained", "loaded plainly",
        "*original − trained, per seed*",
    }  # fmt: skip
    assert "seed: 5 (the recipe says 0)" in result.stdout
    record = json.loads((out / "analog" / "training.json").read_text())
    assert record["seed"] == 5 and record["steps"] == 2
    assert record["versions"]["torch"] == torch.__version__
    measured = record["evaluation"]["analog-trained"]
    assert measured

    ids = torch.arange(3, 11)[None]
    digital = AutoModelForCausalLM.from_pretrained(out)
    analog = AnalogModelForCausalLM.from_pretrained(out, noise="pcm", seed=0)
    assert not dict(analog_layers(digital)) and dict(analog_layers(analog))
    for model in (digital, analog):
        with torch.no_grad():
            assert model(ids).logits.isfinite().all()
        generate = pipeline(
            "text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(out)
        )
        assert "w5" in generate("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"]


BAD = {
    "recipe that the host ignores": (
        ["--recipe", "ignored.yaml", "out"], "holds no AnalogModifier that llm-compressor can see"
    ),
    "unknown profile": (
        ["--recipe", "recipe.yaml", "--profile", "w9a9", "out"], "no deploy profile 'w9a9'"
    ),
    "missing dataset": (["--recipe", "recipe.yaml", "--dataset", "none.txt", "out"], "none.txt"),
    "late error of the training": (
        ["--recipe", "rate.yaml", "out"], "learning"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_one_line_and_exit_status_1(
    case, model_directory, fields, write_recipe, tmp_path
):
    write_recipe(fields)
    fields["training"]["learning_rate"] = -1.0
    write_recipe(fields, "rate.yaml")
    (tmp_path / "ignored.yaml").write_text("AnalogModifier: {scheme: AFM}")
    arguments, message = BAD[case]
    result = run("--model", model_directory, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0].lower() + errors[0]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["ignored.yaml", "rate.yaml", "recipe.yaml"]


def test_an_argument_that_does_not_exist_is_exit_status_2(tmp_path):
    result = run("--model", "x", "--recipe", "y", "--colour", "red", "out", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_writes_no_output_and_says_how_it_goes_on(
    model_directory, fields, write_recipe, tmp_path
):
    fields["training"]["max_steps"] = 1_000_000
    recipe = write_recipe(fields)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command("--model", model_directory, "--recipe", recipe, "out"),
            stdout=log, stderr=log, env=environment(), cwd=tmp_path,
            # Where the tests themselves run in the background, Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not re.search(r"[1-9]\d*/1000000", (tmp_path / "log").read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "log").read_text()
    assert "interrupted: nothing was written" in text and "Traceback" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out.training", "recipe.yaml"]
    assert "The prepared model is kept in out.training." in text
    assert re.search(r"Go on with: optimum-cli export analog .* --resume$", text, re.MULTILINE)
