"""Directories made by others: each fault is one AnalogError of one sentence, nothing is executed.

Unlike in ``test_layout.py`` the manifest fits the files here: whoever alters a checkpoint on
purpose writes the manifest again.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny, token_ids

from analog_plugin import (
    AnalogError,
    AnalogScheme,
    convert_to_analog,
    load_checkpoint,
    save_checkpoint,
)
from analog_plugin.checkpoint.layout import write_manifest
from analog_plugin.files import sha256_of
from analog_plugin.training.ranges import calibrate_plain_ranges, calibrate_ranges
from analog_plugin.training.start import prepare_start

LAYER = "model.layers.0.mlp.down_proj"
STATE = "analog/analog_state.safetensors"
MANIFEST = "analog/manifest.json"


@pytest.fixture
def directory(make_analog, tmp_path):
    return save_checkpoint(make_analog(), tmp_path / "out")


def refuse(directory, **options):
    with pytest.raises(AnalogError) as caught:
        load_checkpoint(directory, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def change_config(directory, change):
    path = directory / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    write_manifest(directory)


def change_analog(directory, **changes):
    change_config(directory, lambda values: values["analog_config"].update(changes))


def change_state(directory, change):
    state = load_file(directory / STATE)
    change(state)
    save_file(state, directory / STATE)
    seal_state(directory)


def seal_state(directory):
    digest = sha256_of(directory / STATE)
    change_config(directory, lambda v: v["analog_config"]["state"].update(sha256=digest))


def change_manifest(directory, change):
    values = json.loads((directory / MANIFEST).read_text())
    change(values)
    (directory / MANIFEST).write_text(json.dumps(values))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update({f"{LAYER}.input_range": torch.full((3,), float("nan"))}),
        lambda s: s.update({f"{LAYER}.input_range": torch.full((3,), float("inf"))}),
        lambda s: s.update({f"{LAYER}.input_range": torch.full((3,), -1.0)}),
        lambda s: s.update({f"{LAYER}.input_range": torch.zeros(3)}),
        lambda s: s.update({f"{LAYER}.input_range": torch.ones(2)}),
        lambda s: s.update({f"{LAYER}.input_range": torch.ones(3, 1)}),
        lambda s: s.update({f"{LAYER}.input_range": torch.ones(0)}),
        lambda s: s.update({f"{LAYER}.input_range": torch.ones(1)}),
        lambda s: s.pop(f"{LAYER}.input_range"),
        lambda s: s.update({"model.layers.9.mlp.down_proj.input_range": torch.ones(3)}),
    ],
    ids=["nan", "inf", "negative", "zero", "too few", "two dimensions", "empty", "one for three",
         "absent", "of no layer"],
)  # fmt: skip
def test_ranges_that_do_not_fit_are_refused(change, directory):
    change_state(directory, change)
    refuse(directory)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0nonsense"])
def test_a_state_that_is_no_safetensors_file_is_refused(content, directory):
    (directory / STATE).write_bytes(content)
    seal_state(directory)
    assert "analog_state.safetensors" in refuse(directory)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_a_missing_state_is_refused(verify, directory):
    (directory / STATE).unlink()
    change_manifest(directory, lambda v: v["files"].pop(STATE))
    assert "analog_state.safetensors" in refuse(directory, verify=verify)


def test_the_state_must_be_the_one_that_the_configuration_names(directory):
    state = load_file(directory / STATE)
    save_file({key: tensor * 2 for key, tensor in state.items()}, directory / STATE)
    write_manifest(directory)
    assert "analog_state.safetensors" in refuse(directory)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "empty", "garbage", "missing"],
)
def test_weights_that_cannot_be_read_are_refused(damage, verify, directory):
    damage(directory / "model.safetensors")
    write_manifest(directory)
    refuse(directory, verify=verify)


def test_weights_that_lack_a_tensor_are_refused(directory):
    """transformers would fill the layer with random numbers."""
    state = load_file(directory / "model.safetensors")
    del state[f"{LAYER}.weight"]
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    write_manifest(directory)
    assert LAYER in refuse(directory)


def test_weights_of_another_shape_are_refused(directory):
    state = load_file(directory / "model.safetensors")
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"][:, :-1].contiguous()
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    write_manifest(directory)
    refuse(directory)


def shard(directory, place="{}"):
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(state)}
    for name in set(names.values()):
        part = {key: tensor for key, tensor in state.items() if names[key] == name}
        save_file(part, directory / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: place.format(name) for k, name in names.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(directory)


def test_shards_are_read_and_must_be_in_the_manifest(directory):
    shard(directory)
    assert load_checkpoint(directory) is not None
    change_manifest(directory, lambda values: values["files"].pop("model-1.safetensors"))
    assert "model-1.safetensors" in refuse(directory)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("place", ["../{}", "/tmp/{}", "sub/../../{}", ".."])
def test_shards_outside_the_directory_are_refused(place, verify, directory):
    shard(directory, place)
    for path in directory.glob("model-*"):
        shutil.copy(path, directory.parent)
    assert "index.json" in refuse(directory, verify=verify)


def test_an_adapter_in_the_directory_is_refused(directory):
    """transformers would load the base model that it names."""
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    assert "adapter" in refuse(directory)


def test_the_configuration_cannot_name_other_weights(directory):
    expected = load_checkpoint(directory).lm_head.weight
    state = {k: v * 2 for k, v in load_file(directory / "model.safetensors").items()}
    save_file(state, directory / "other.safetensors", {"format": "pt"})
    change_config(directory, lambda v: v.update(transformers_weights="other.safetensors"))
    assert torch.equal(load_checkpoint(directory).lm_head.weight, expected)


TILES = {
    "too few rows": {LAYER: [32, 32, 31]},
    "one tile": {LAYER: [96]},
    "negative": {LAYER: [-32, 64, 64]},
    "unknown layer": {"model.layers.7.mlp.down_proj": [32]},
    "not linear": {"model.norm": [64]},
    "the model itself": {"": [64]},
    "a pattern": {"*": [32]},
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
def test_tiles_that_do_not_fit_are_refused(tiles, directory):
    change_config(directory, lambda values: values["analog_config"]["tiles"].update(tiles))
    refuse(directory)


def test_a_layer_without_tiles_is_refused(directory):
    """It has ranges in the state: it would come back digital without a word."""
    change_config(directory, lambda values: values["analog_config"]["tiles"].pop(LAYER))
    refuse(directory)


ANALOG = {
    "version as text": {"version": "1"},
    "version below": {"version": 0},
    "no tiles": {"tiles": {}},
    "tiles as a list": {"tiles": [LAYER]},
    "scheme as text": {"scheme": "AFM"},
    "unknown scheme field": {"scheme": {"clip_sgima": 3}},
    "huge number": {"scheme": {"clip_sigma": 10**400}},
    "huge tile": {"scheme": {"tile_rows": 10**400}},
    "not a number": {"scheme": {"out_bound": float("nan")}},
    "impossible prefix": {"scheme": {"prefix": 2}},
    "state as text": {"state": "analog/analog_state.safetensors"},
    "state in a parent": {"state": {"file": "../analog_state.safetensors", "sha256": "0" * 64}},
    "state by a detour": {
        "state": {"file": "analog/../../analog_state.safetensors", "sha256": "0" * 64}
    },
    "absolute state": {"state": {"file": "/etc/passwd", "sha256": "0" * 64}},
    "short hash": {"state": {"file": STATE, "sha256": "0"}},
    "null": {"state": None},
}


@pytest.mark.parametrize("changes", ANALOG.values(), ids=ANALOG.keys())
def test_an_altered_analog_config_is_refused(changes, directory):
    change_analog(directory, **changes)
    refuse(directory)


CONFIGURATIONS = {
    "unknown model": {"model_type": "nonsense"},
    "another kind of model": {"model_type": "t5"},
    "type of a field": {"hidden_size": "wide"},
    "other sizes": {"hidden_size": 32},
    "more layers": {"num_hidden_layers": 3},
    "layers without end": {"num_hidden_layers": 10**12},
    "analog_config a list": {"analog_config": [1]},
    "analog_config null": {"analog_config": None},
}


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_configuration_that_does_not_fit_the_weights_is_refused(changes, directory):
    change_config(directory, lambda values: values.update(changes))
    refuse(directory)


@pytest.mark.parametrize("file", ["config.json", MANIFEST])
@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"5", b"[]", b'"text"', b"{", b"\xff\xfe\0", b"[" * 200_000, b'{"a":' * 200_000,
     b"9" * 5000],
    ids=["empty", "null", "number", "list", "text", "cut", "no text", "deep lists", "deep objects",
         "long number"],
)  # fmt: skip
def test_json_garbage_is_refused(content, file, directory):
    (directory / file).write_bytes(content)
    refuse(directory)


ENTRIES = {
    "parent": ("../config.json", {"size": 1, "sha256": "0"}),
    "detour": ("analog/../../x", {"size": 1, "sha256": "0"}),
    "absolute": ("/etc/passwd", {"size": 1, "sha256": "0"}),
    "folder": ("analog", {"size": 1, "sha256": "0"}),
    "no name": ("", {"size": 1, "sha256": "0"}),
    "long name": ("x" * 5000, {"size": 1, "sha256": "0"}),
    "zero byte": ("a\0b", {"size": 1, "sha256": "0"}),
    "two lines": ("a\nb", {"size": 1, "sha256": "0"}),
    "infinite size": ("config.json", {"size": float("inf"), "sha256": "0"}),
    "size as text": ("config.json", {"size": "x", "sha256": "0"}),
    "no size": ("config.json", {"sha256": "0"}),
    "no mapping": ("config.json", None),
}


@pytest.mark.parametrize(("name", "entry"), ENTRIES.values(), ids=ENTRIES.keys())
def test_an_entry_of_the_manifest_that_makes_no_sense_is_refused(name, entry, directory):
    change_manifest(directory, lambda values: values["files"].update({name: entry}))
    refuse(directory)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", STATE])
def test_a_manifest_that_leaves_out_a_file_is_refused(file, directory):
    """Damage of that file would go unseen."""
    change_manifest(directory, lambda values: values["files"].pop(file))
    refuse(directory)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", STATE])
def test_a_pickle_is_never_opened(name, directory, tmp_path):
    (directory / "model.safetensors").unlink()
    with (directory / name).open("wb") as file:
        pickle.dump(Touch(tmp_path / "executed"), file)
    seal_state(directory)
    refuse(directory)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("known", [False, True], ids=["own type", "known type"])
@pytest.mark.parametrize(
    "classes", [{"AutoConfig": "own.Own"}, {"AutoModelForCausalLM": "own.Own"}],
    ids=["config", "model"],
)  # fmt: skip
def test_code_in_the_directory_is_never_executed(classes, known, directory, tmp_path, monkeypatch):
    """Nor is the user asked: transformers would take a ``y`` for consent."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n"
    code += (
        "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    (directory / "own.py").write_text(code)
    changes = {"auto_map": classes} | ({} if known else {"model_type": "own"})
    change_config(directory, lambda values: values.update(changes))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))
    with contextlib.nullcontext() if known else pytest.raises(AnalogError):
        load_checkpoint(directory)
    assert not (tmp_path / "executed").exists()


def test_links_are_followed_as_in_a_hub_cache(directory, tmp_path):
    copied = tmp_path / "snapshot"
    for path in sorted(directory.rglob("*")):
        target = copied / path.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.symlink_to(path)
    assert load_checkpoint(copied) is not None


numbers = st.one_of(
    st.integers(), st.just(10**400), st.floats(allow_nan=True, allow_infinity=True), st.booleans()
)
values = st.recursive(
    st.none() | numbers | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip
SCHEME_FIELDS = [
    "input_bits", "input_range", "range_init", "range_init_std", "range_init_batches",
    "range_init_in_training", "range_percentile", "range_decay", "range_gradient", "output_bits",
    "out_bound", "adc_bound", "weight_noise", "weight_bits", "clip_sigma", "clip_schedule",
    "tile_rows", "tile_columns", "tie_ranges", "prefix", "rescale", "overrides",
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    from tiny_models import tiny, token_ids

    from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog

    model = convert_to_analog(tiny(num_hidden_layers=1), AnalogScheme(tile_rows=32))
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    return save_checkpoint(model, tmp_path_factory.mktemp("fuzz") / "out")


changes = st.one_of(
    st.tuples(
        st.just("scheme"), st.dictionaries(st.sampled_from(SCHEME_FIELDS), values, min_size=1)
    ),
    st.tuples(
        st.just("tiles"),
        st.dictionaries(
            st.sampled_from(["model.layers.0.mlp.down_proj", "lm_head", "model", ""]),
            st.lists(st.integers(-1, 100), max_size=4) | values,
            min_size=1,
        ),
    ),
    st.tuples(st.just("state"), st.dictionaries(st.sampled_from(["file", "sha256"]), values)),
    st.tuples(st.sampled_from(["version", "profile", "tiles", "scheme", "state", "more"]), values),
)


@settings(
    deadline=None, max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(changes, min_size=1, max_size=2))
def test_a_directory_with_any_analog_config_loads_or_is_refused(valid, tmp_path, made):
    target = tmp_path / "copy"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(valid, target, copy_function=os.link)
    config = json.loads((valid / "config.json").read_text())
    for key, value in made:
        part = config["analog_config"].get(key)
        if isinstance(part, dict) and isinstance(value, dict):
            part.update(value)
        else:
            config["analog_config"][key] = value
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    try:
        load_checkpoint(target, verify=False)
    except AnalogError as error:
        assert str(error)


@pytest.fixture
def with_prefix(tmp_path):
    scheme = AnalogScheme(prefix=1, tile_rows=32, range_init="max")
    model = convert_to_analog(tiny(), scheme)
    batches = [{"input_ids": token_ids()}]
    prepare_start(model, batches, token_ids(), None)
    calibrate_plain_ranges(model, batches)
    return save_checkpoint(model, tmp_path / "prefix")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 5.0, 0.5])
def test_prefix_tokens_of_no_sense_are_refused(value, with_prefix):
    change_state(with_prefix, lambda s: s["prefix.tokens"].fill_(value))
    refuse(with_prefix)


@pytest.mark.parametrize("name", ["self_attn.prefix_key", "self_attn.prefix_value", "hidden"])
def test_a_prefix_that_is_not_finite_is_refused(name, with_prefix):
    name = "prefix.hidden" if name == "hidden" else f"model.layers.0.{name}"
    change_state(with_prefix, lambda s: s[name].fill_(float("nan")))
    assert "not finite" in refuse(with_prefix)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_plain_ranges_of_no_sense_are_refused(value, with_prefix):
    change_state(with_prefix, lambda s: s[f"{LAYER}.plain_range"].fill_(value))
    assert "plain_range" in refuse(with_prefix)


def test_a_prefix_for_a_model_that_can_have_none_is_refused(tmp_path):
    model = convert_to_analog(tiny("gpt2"), AnalogScheme())
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    directory = save_checkpoint(model, tmp_path / "gpt2")
    scheme = AnalogScheme(prefix=1).to_dict()
    change_analog(directory, scheme=scheme)
    assert "rotary" in refuse(directory)
