"""Checkpoints that others wrote, whose manifests and hashes fit."""

import json

import pytest
from fuzzing import altered, fuzzed, garbled, garbled_json, json_bytes, survived
from hypothesis import strategies as st
from tiny_models import tiny, token_ids

from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog, save_checkpoint
from analog_plugin.checkpoint.layout import verify_manifest
from analog_plugin.checkpoint.load import read_analog_config, read_state
from analog_plugin.checkpoint.save import plan_export
from analog_plugin.files import sha256_of
from analog_plugin.inspection import inspect_checkpoint

STATE, MANIFEST = "analog/analog_state.safetensors", "analog/manifest.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each kind, and one in shards."""
    root = tmp_path_factory.mktemp("saved")
    model = convert_to_analog(tiny(num_hidden_layers=1), AnalogScheme(tile_rows=32))
    batches = [{"input_ids": token_ids()}]
    calibrate_ranges(model, batches)
    for name in ("analog-fp", "w8a8", "mixed"):
        options = {"average_bits": 4} if name == "mixed" else {}
        plan = plan_export(model, name, batches=batches, **options)
        save_checkpoint(model, root / name, profile=name, plan=plan)
    tiny(num_hidden_layers=1).save_pretrained(root / "shards", max_shard_size="60KB")
    return root


@fuzzed(st.data())
def test_analog_configs(saved, copied, data):
    config = json.loads((saved / "analog-fp" / "config.json").read_text())
    config["analog_config"] = data.draw(altered(config["analog_config"]))
    directory = copied("analog-fp", "config.json", json_bytes(config))
    with survived(directory):
        read_state(directory, read_analog_config(directory))


@fuzzed(st.data())
def test_manifests(saved, copied, data):
    content = (saved / "analog-fp" / MANIFEST).read_bytes()
    directory = copied("analog-fp", MANIFEST, data.draw(garbled_json(content)))
    with survived(directory):
        verify_manifest(directory)


@fuzzed(st.data())
def test_analog_states(saved, copied, data):
    content = (saved / "analog-fp" / STATE).read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    made = data.draw(garbled(content, within=header) | garbled(content))
    directory = copied("analog-fp", STATE, made)
    config = json.loads((saved / "analog-fp" / "config.json").read_text())
    config["analog_config"]["state"]["sha256"] = sha256_of(directory / STATE)
    (directory / "config.json").unlink()
    (directory / "config.json").write_bytes(json_bytes(config))
    with survived(directory):
        read_state(directory, read_analog_config(directory))


@fuzzed(st.sampled_from(["analog-fp", "w8a8", "mixed"]), st.data())
def test_headers_of_weights(saved, copied, name, data):
    content = (saved / name / WEIGHTS).read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    directory = copied(name, WEIGHTS, data.draw(garbled(content, within=header)))
    with survived(directory):
        inspect_checkpoint(directory, verify=False)


@fuzzed(st.sampled_from(["analog-fp", "w8a8", "mixed", "shards"]), st.data())
def test_configurations(saved, copied, name, data):
    content = (saved / name / "config.json").read_bytes()
    directory = copied(name, "config.json", data.draw(garbled_json(content)))
    with survived(directory):
        inspect_checkpoint(directory, verify=False)


@fuzzed(st.data())
def test_indices_of_weights(saved, copied, data):
    content = (saved / "shards" / INDEX).read_bytes()
    directory = copied("shards", INDEX, data.draw(garbled_json(content)))
    with survived(directory):
        inspect_checkpoint(directory, verify=False)
