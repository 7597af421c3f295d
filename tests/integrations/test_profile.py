"""``optimum-cli analog profile``: digital checkpoints from an analog one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import token_ids
from transformers import AutoModelForCausalLM

from analog_integrations.optimum import main_export, main_profile
from analog_plugin import AnalogError, load_checkpoint
from analog_plugin.data import evaluation_tokens
from analog_plugin.evaluation.fidelity import fidelity
from analog_plugin.pretrained import load_tokenizer

CLI = Path(sys.executable).with_name("optimum-cli")


def tensors(directory):
    return load_file(directory / "model.safetensors")


@pytest.fixture
def measured(corpus):
    return {"corpus": str(corpus), "blocks": 3, "length": 12, "device": "cpu"}


def test_the_command_derives_and_measures_several_profiles(analog_directory, corpus, tmp_path):
    result = subprocess.run(
        [str(CLI), "analog", "profile", str(analog_directory), "--profile", "w4-in-w8,w8a8o8",
         "--profile", "w4a8", "--corpus", str(corpus), "--blocks", "3", "--length", "12",
         "--device", "cpu", "out"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ")[0] for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["| profile", "| w4-in-w8", "| w8a8o8", "| w4a8"]
    for profile in ("w4-in-w8", "w8a8o8", "w4a8"):
        directory = tmp_path / "out" / profile
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(directory)(token_ids()).logits
        assert found.isfinite().all() and load_tokenizer(directory) is not None
        assert "top-1 agreement" in (directory / "README.md").read_text()


@pytest.mark.parametrize("profile", ["w8a8", "w4a8o8"])
def test_what_is_reported_is_what_transformers_loads(
    profile, analog_directory, measured, corpus, tmp_path
):
    found = main_profile(analog_directory, tmp_path / "out", profile=profile, **measured)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = evaluation_tokens(load_tokenizer(analog_directory), 3, 12, str(corpus))
    assert found[profile]["perplexity"] == fidelity(model, tokens, None)["perplexity"]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found[profile]["megabytes"] == size / 1e6
    assert found[profile]["kl"] > 1e-6


def test_what_stays_in_full_precision_may_be_stored_in_half(analog_directory, measured, tmp_path):
    main_profile(analog_directory, tmp_path / "a", profile="w4-in-w8", **measured)
    main_profile(analog_directory, tmp_path / "b", profile="w4-in-w8", dtype="bfloat16", **measured)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        kept = not name.endswith(("_proj.weight", "_scale"))
        assert tensor.dtype == (torch.bfloat16 if kept else first[name].dtype), name
    # The codes of weights that bfloat16 moved over an edge differ by one.
    codes = [name for name in first if name.endswith("_proj.weight")]
    apart = torch.cat([(first[n].int() - second[n].int()).abs().flatten() for n in codes])
    assert apart.max() <= 1 and apart.float().mean() < 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.dtype == torch.bfloat16


def test_deriving_again_gives_the_same_tensors(analog_directory, measured, tmp_path):
    for name in ("a", "b"):
        main_profile(
            analog_directory, tmp_path / name, profile="mixed", average_bits=3.5, **measured
        )
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dataset_takes_the_place_of_sampled_tokens(analog_directory, corpus, measured, tmp_path):
    main_profile(analog_directory, tmp_path / "a", profile="w8a8o8", **measured)
    cache = Path(os.environ["ANALOG_PLUGIN_CACHE"])
    assert any(cache.rglob("tokens.safetensors"))
    given = measured | {"dataset": str(corpus)}
    main_profile(analog_directory, tmp_path / "b", profile="w8a8o8", **given)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    changed = {
        name.rpartition(".")[2] for name in first if not torch.equal(first[name], second[name])
    }
    assert changed == {"output_scale"}


def test_an_export_writes_several_profiles_at_once(model_directory, fields, corpus, tmp_path):
    fields["evaluation"] = {
        "corpus": str(corpus),
        "blocks": 2,
        "length": 12,
        "noise": [],
        "seeds": 1,
    }
    result = main_export(
        str(model_directory), tmp_path / "out", fields, profile=["analog-fp", "w4-in-w8"],
        device="cpu",
    )  # fmt: skip
    assert {"loaded plainly, analog-fp", "loaded plainly, w4-in-w8"} <= result.reports.keys()
    main_profile(
        tmp_path / "out" / "analog-fp", tmp_path / "again", profile="w4-in-w8", blocks=0,
        device="cpu",
    )  # fmt: skip
    first, second = tensors(tmp_path / "out" / "w4-in-w8"), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profile": "w4a9"}, "no deploy profile 'w4a9'; did you mean 'w4a8"),
        ({"profile": []}, "a name or a list of names"),
        ({"profile": "w8a8", "average_bits": 4}, "average_bits is no option of the profile w8a8"),
        ({"profile": "mixed", "average_bits": 1.5}, r"budget is 1\.5 bits a weight"),
        ({"profile": ["w8a8o8", "mixed"]}, "takes one of bits"),
        ({"profile": ["analog-fp", "w8a8"]}, "analog-fp is what profiles are derived from"),
        ({"profile": "mixed", "average_bits": -1}, "average_bits is -1"),
        ({"profile": "w8a8", "weight_scale": "l1"}, "weight_scale is 'l1'"),
        ({"profile": "w8a8", "blocks": -1}, "blocks is -1"),
        ({"profile": "w8a8", "length": 99}, "length"),
        ({"profile": "w8a8", "device": "tpu9"}, "device 'tpu9' cannot be used"),
        ({"profile": "w8a8", "dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    given, message, analog_directory, measured, tmp_path
):
    with pytest.raises(AnalogError, match=message):
        main_profile(analog_directory, tmp_path / "out", **(measured | given))
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_itself_is_never_replaced(analog_directory, measured, tmp_path):
    shutil.copytree(analog_directory, tmp_path / "all" / "fp")
    for output in (tmp_path / "all" / "fp", tmp_path / "all"):
        with pytest.raises(AnalogError, match="is or holds the checkpoint itself"):
            main_profile(
                tmp_path / "all" / "fp", output, profile="w4a8", overwrite=True, **measured
            )
    assert load_checkpoint(tmp_path / "all" / "fp") is not None


def test_a_digital_directory_is_refused_with_the_reason(checkpoints, measured, tmp_path):
    with pytest.raises(AnalogError, match="full-precision weights are gone"):
        main_profile(checkpoints / "w8a8", tmp_path / "out", profile="w4a8", **measured)


def test_help_explains_the_command_without_loading_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    result = subprocess.run(
        [str(CLI), "analog", "profile", "--help"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--average-bits" in result.stdout and "w4-in-w8" in result.stdout


def test_an_export_writes_conductances_of_what_it_trained(
    model_directory, fields, corpus, tmp_path
):
    fields["deploy"] = {"profile": ["analog-fp", "conductances"], "g_max": 30.0}
    fields["evaluation"] = {"corpus": str(corpus), "blocks": 2, "length": 12, "noise": []}
    main_export(str(model_directory), tmp_path / "out", fields, device="cpu")
    told = json.loads((tmp_path / "out" / "conductances" / "conductances.json").read_text())
    model = load_checkpoint(tmp_path / "out" / "analog-fp")
    for name, layer in told["layers"].items():
        arrays = np.load(tmp_path / "out" / "conductances" / layer["file"])
        first = layer["tiles"][0]["prefix"]
        largest = np.maximum(arrays[first + "g_plus"], arrays[first + "g_minus"]).max(0)
        np.testing.assert_allclose(largest, 30.0, rtol=1e-6)
        assert arrays[first + "input_range"] == model.get_submodule(name).input_range[0].item()
