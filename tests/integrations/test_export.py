"""The main job, from the command line and from Python."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM, BertConfig, T5Config

from analog_plugin import AnalogError
from optimum.analog import AnalogModelForCausalLM, main_export

ROOT = Path(__file__).parents[2]
CLI = Path(sys.executable).with_name("optimum-cli")


def run_cli(*arguments, cwd):
    command = [CLI, "export", "analog", *map(str, arguments)]
    visible = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    return subprocess.run(command, capture_output=True, text=True, env=visible, cwd=cwd)


def test_the_command_writes_a_checkpoint_that_loads(
    model_directory, corpus, fields, write_recipe, tmp_path
):
    fields["evaluation"] = {
        "corpus": str(corpus), "blocks": 4, "length": 16, "seeds": 2, "noise": ["pcm"],
    }  # fmt: skip
    recipe = write_recipe(fields)
    out = tmp_path / "out"
    result = run_cli("--model", model_directory, "--recipe", recipe, out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    # Three models, without and with noise, and what training gained under noise.
    assert len(table) == 1 + 3 * 2 + 1 + 1
    assert all(line in (out / "README.md").read_text() for line in table)
    assert "± " in table[2] and "4 blocks of 16 tokens" in result.stdout
    for bar in ("Sampling training tokens", "Calibrating input ranges", "Evaluating original"):
        assert bar in result.stderr
    ids = torch.arange(3, 11)[None]
    for loader in (AutoModelForCausalLM, AnalogModelForCausalLM):
        model = loader.from_pretrained(out)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)
    record = json.loads((out / "analog/training.json").read_text())
    assert record["steps"] == 2 and record["tokens"] == 2 * 4 * 16
    assert "AnalogModifier" in (out / "analog/recipe.yaml").read_text()


def test_the_written_recipe_makes_the_same_checkpoint_again(
    model_directory, fields, write_recipe, tmp_path
):
    main_export(str(model_directory), tmp_path / "a", write_recipe(fields))
    main_export(str(model_directory), tmp_path / "b", tmp_path / "a/analog/recipe.yaml")
    first, second = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_argument_beats_the_recipe_and_says_so(model_directory, fields, tmp_path, capsys):
    main_export(
        str(model_directory), tmp_path / "out", fields, profile="w8a8", seed=3, no_train=True
    )
    printed = capsys.readouterr().out
    assert "profile: w8a8 (the recipe says analog-fp)" in printed
    assert "seed: 3 (the recipe says 0)" in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    record = json.loads((tmp_path / "out/analog/training.json").read_text())
    assert record["steps"] == 0 and record["seed"] == 3


def test_without_training_the_weights_stay(model_directory, fields, tmp_path):
    main_export(str(model_directory), tmp_path / "out", fields, no_train=True)
    before = load_file(model_directory / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_from_pretrained_can_export_on_the_way(model_directory, fields):
    model = AnalogModelForCausalLM.from_pretrained(
        model_directory, export=True, recipe=fields, noise="pcm", seed=1
    )
    assert model.generate(torch.arange(3, 9)[None], max_new_tokens=2).shape[1] <= 8
    with pytest.raises(AnalogError, match="needs a recipe"):
        AnalogModelForCausalLM.from_pretrained(model_directory, export=True)


def test_a_text_file_replaces_the_recipes_data(model_directory, corpus, fields, tmp_path):
    result = main_export(str(model_directory), tmp_path / "out", fields, dataset=str(corpus))
    assert result.training["dataset_tokens"] == 128


def scheme(**changes):
    return lambda fields: fields["scheme"].update(changes)


BAD_FIELDS = {
    "unknown preset": (scheme(preset="AFN"), "no preset 'AFN'"),
    "bits 1": (scheme(input_bits=1), "input_bits is 1"),
    "bits 17": (scheme(output_bits=17), "output_bits is 17"),
    "negative sigma": (scheme(clip_sigma=-2.0), "clip_sigma is -2.0"),
    "negative noise": (scheme(weight_noise=-0.1), "weight_noise is -0.1"),
    "tile of 0 rows": (scheme(tile_rows=0), "tile_rows is 0"),
    "unknown field": (lambda f: f.update(shceme="AFM"), "shceme"),
    "unknown data field": (lambda f: f["data"].update(token=3), "did you mean 'tokens'"),
    "unknown training field": (
        lambda f: f["training"].update(learning_rat=1),
        "did you mean 'learning_rate'",
    ),
    "unknown profile": (lambda f: f.update(deploy={"profile": "w9"}), "no deploy profile 'w9'"),
    "unknown noise": (lambda f: f.update(evaluation={"noise": ["pmc"]}), "did you mean 'pcm'"),
    "no such layer": (lambda f: f.update(ignore=["lm_haed"]), "matches no module"),
    "too long": (lambda f: f["data"].update(sequence_length=65), "at most 64"),
    "too few tokens": (lambda f: f["data"].update(tokens=3), "at least one sequence"),
    "wrong argument": (lambda f: f["training"].update(lr_scheduler_type="zigzag"), "training: "),
}


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_bad_recipe_is_one_sentence_and_writes_nothing(
    change, message, model_directory, fields, write_recipe, tmp_path
):
    change(fields)
    with pytest.raises(AnalogError) as caught:
        main_export(str(model_directory), tmp_path / "out", write_recipe(fields))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


SPELLINGS = {
    "bare": "AnalogModifier: {scheme: AFM}",
    "plain modifiers": "x_stage:\n  modifiers:\n    AnalogModifier: {scheme: AFM}",
    "numbered stage": "x_stage_0:\n  x_modifiers:\n    AnalogModifier: {scheme: AFM}",
    "empty": "",
    "list": "[1, 2]",
    "no modifier": "x_stage:\n  x_modifiers: {}",
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_a_spelling_that_the_host_ignores_is_caught(text, model_directory, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(AnalogError, match=r"write:\nanalog_stage:\n  analog_modifiers:"):
        main_export(str(model_directory), tmp_path / "out", tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a_stage:\n  a_modifiers:\n    AnalogModifier:\n", r"without a body; write AnalogMod"),
        ("a: [", "not valid YAML"),
        (
            "a_stage:\n  a_modifiers:\n    AnalogModifier: {}\n"
            "    QuantizationModifier: {targets: Linear, scheme: W8A8}\n",
            "holds QuantizationModifier too",
        ),
    ],
    ids=["no body", "broken", "second modifier"],
)
def test_other_faults_of_a_recipe_file(text, message, model_directory, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(AnalogError, match=message):
        main_export(str(model_directory), tmp_path / "out", tmp_path / "recipe.yaml")


def make_quantized(directory):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "neither a local model directory nor a hub model"),
        (lambda d: tiny().config.save_pretrained(d), "does not load"),
        (lambda d: BertConfig().save_pretrained(d), "no causal language model"),
        (lambda d: T5Config().save_pretrained(d), "has no causal language model"),
        (make_quantized, "quantized already"),
    ],
    ids=["missing", "no weights", "sees what follows", "not causal", "quantized"],
)
def test_a_model_that_cannot_be_used_is_one_sentence(
    prepare, message, model_directory, fields, tmp_path
):
    directory = tmp_path / "model"
    if prepare is make_quantized:
        shutil.copytree(model_directory, directory)
    prepare(directory)
    with pytest.raises(AnalogError, match=message) as caught:
        main_export(str(directory), tmp_path / "out", fields)
    assert "\n" not in str(caught.value)


def test_an_empty_dataset_is_one_sentence(model_directory, fields, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(AnalogError, match="is empty"):
        main_export(str(model_directory), tmp_path / "out", fields, dataset=tmp_path / "empty.txt")


@pytest.mark.parametrize(
    "case", ["full output", "no recipe", "bad field", "no model", "unknown demo"]
)
def test_the_command_fails_with_one_line_and_status_1(
    case, model_directory, fields, write_recipe, tmp_path
):
    out = tmp_path / "out"
    model, recipe = model_directory, write_recipe(fields)
    if case == "full output":
        out.mkdir()
        (out / "precious").write_text("x")
    elif case == "no recipe":
        recipe = tmp_path / "none.yaml"
    elif case == "bad field":
        fields["scheme"]["input_bits"] = 17
        recipe = write_recipe(fields)
    elif case == "no model":
        model = tmp_path / "none"
    else:
        model = "demo:gpt-5"
    before = sorted(out.rglob("*"))
    result = run_cli("--model", model, "--recipe", recipe, out, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert sorted(out.rglob("*")) == before


def test_shipped_recipes_parse():
    from analog_integrations.llmcompressor import read_recipe

    for path in sorted((ROOT / "examples/recipes").glob("*.yaml")):
        assert read_recipe(path).deploy.profile == "analog-fp"


def test_the_papers_recipes_hold_its_hyperparameters():
    from analog_integrations.llmcompressor import read_recipe

    recipe = read_recipe(ROOT / "examples/recipes/afm-llama.yaml")
    assert recipe.training["learning_rate"] == 4.8e-5
    assert (recipe.training["adam_beta1"], recipe.training["adam_beta2"]) == (0.9, 0.98)
    assert recipe.data.top_k == 50 and recipe.data.sequence_length == 4096
    assert read_recipe(ROOT / "examples/recipes/afm-phi3.yaml").data.top_k is None
