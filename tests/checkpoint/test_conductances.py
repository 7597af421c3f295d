"""The profile ``conductances``: the weights of every tile as pairs of conductances."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from analog_plugin import AnalogError, inspect_checkpoint, save_checkpoint
from analog_plugin.checkpoint.conductances import tile_conductances
from analog_plugin.files import sha256_of
from analog_plugin.layers import analog_layers
from analog_plugin.ops.weights import column_maximum
from optimum.analog import main_profile

WEIGHTS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 7), st.integers(1, 7)),
    elements=st.one_of(
        st.floats(-1e4, 1e4, width=32), st.floats(-(2.0**-100), 2.0**-100, width=32), st.just(0.0)
    ),
)  # fmt: skip


@settings(deadline=None)
@given(WEIGHTS, st.floats(1e-3, 1e3))
def test_a_pair_of_conductances_gives_the_weight_back_within_fp32_rounding(weight, g_max):
    made = tile_conductances(torch.from_numpy(weight), g_max)
    plus, minus, scale = made["g_plus"], made["g_minus"], made["column_scale"]
    assert plus.dtype == minus.dtype == scale.dtype == np.float32
    assert plus.shape == minus.shape == weight.shape and scale.shape == weight.shape[1:]
    # One device of each pair is at zero, none beyond g_max.
    assert (plus >= 0).all() and (minus >= 0).all() and not (plus * minus).any()
    assert max(plus.max(), minus.max()) <= g_max * (1 + 2e-7)
    back = (plus.astype(np.float64) - minus) * scale
    peak = np.abs(weight).max(0)
    # A rounding of either factor; below fp32's normal numbers a whole step of either.
    step = 1.5e-45 * (g_max + peak.astype(np.float64) / g_max)
    error = 3e-7 * np.abs(weight).astype(np.float64) + step
    assert (np.abs(back - weight) <= error).all()
    normal = peak / g_max > 1e-37
    largest = np.abs(plus - minus).max(0)[normal]
    np.testing.assert_allclose(largest, g_max, rtol=2e-7)


def read(directory):
    """As the documents show: weights by layer from files alone, and what stands beside them."""
    told = json.loads((directory / "conductances.json").read_text())
    weights, beside = {}, {}
    for name, layer in told["layers"].items():
        arrays_ = np.load(directory / layer["file"], allow_pickle=False)
        weight = np.zeros((layer["outputs"], layer["inputs"]), dtype=np.float32)
        for tile in layer["tiles"]:
            (top, bottom), (left, right), prefix = tile["rows"], tile["columns"], tile["prefix"]
            pair = arrays_[prefix + "g_plus"] - arrays_[prefix + "g_minus"]
            weight[left:right, top:bottom] = (pair * arrays_[prefix + "column_scale"]).T
        weights[name], beside[name] = weight, arrays_
    return told, weights, beside


MODELS = {
    "one tile": ("llama", {"tile_rows": None}),
    "several tiles": ("llama", {}),
    "tiles of both kinds": ("llama", {"tile_rows": 24, "tile_columns": 20}),
    "biases": ("qwen2", {}),
    "a transposed layer": ("gpt2", {}),
    "half precision": ("llama", {"dtype": torch.bfloat16}),
    "no ADC": ("llama", {"output_bits": None}),
    "no converters": ("llama", {"input_bits": None, "output_bits": None}),
}


@pytest.mark.parametrize(("name", "changes"), MODELS.values(), ids=MODELS.keys())
def test_the_directory_holds_everything_of_every_tile(name, changes, make_analog, tmp_path):
    model = make_analog(name, **changes)
    save_checkpoint(model, tmp_path / "chip", profile="conductances", g_max=20.0)
    told, weights, beside = read(tmp_path / "chip")
    layers = dict(analog_layers(model))
    assert told["g_max"] == 20.0 and told["unit"] == "microsiemens"
    assert told["layers"].keys() == layers.keys()
    for layer_name, layer in layers.items():
        exact, arrays_ = layer.tile_weight.detach().float(), beside[layer_name]
        error = np.abs(weights[layer_name] - exact.numpy())
        assert (error <= 3e-7 * np.abs(exact.numpy())).all()
        entry = told["layers"][layer_name]
        assert entry["sha256"] == sha256_of(tmp_path / "chip" / entry["file"])
        assert (layer.bias is not None) == entry["bias"] == ("bias" in arrays_)
        if layer.bias is not None:
            np.testing.assert_array_equal(arrays_["bias"], layer.bias.detach().float())
        peaks = column_maximum(exact, layer.tiles)
        for tile in entry["tiles"]:
            (left, right), prefix, k = tile["columns"], tile["prefix"], tile["row"]
            assert tile["rows"] == [sum(layer.tiles[:k]), sum(layer.tiles[: k + 1])]
            assert (prefix + "input_range" in arrays_) == (layer.scheme.input_bits is not None)
            assert (prefix + "adc_bound" in arrays_) == (layer.scheme.output_bits is not None)
            if layer.scheme.output_bits is None:
                continue
            assert arrays_[prefix + "input_range"] == layer.input_range[k].item()
            bound = 14.0 * layer.input_range[k].item() * peaks[k, left:right].numpy()
            np.testing.assert_allclose(arrays_[prefix + "adc_bound"], bound, rtol=1e-6)
            # In conductances the ADC's full scale is the same for every column of the chip.
            per_scale = arrays_[prefix + "adc_bound"] / arrays_[prefix + "column_scale"]
            full = per_scale / arrays_[prefix + "input_range"]
            np.testing.assert_allclose(full, told["out_bound"] * told["g_max"], rtol=1e-6)


def test_the_arrays_alone_compute_what_the_analog_model_computes(make_analog, tmp_path):
    model = make_analog("llama", tile_rows=24, tile_columns=20).eval()
    save_checkpoint(model, tmp_path / "chip", profile="conductances")
    told, _, beside = read(tmp_path / "chip")
    name, layer = next(analog_layers(model))
    x = torch.randn(11, 64, generator=torch.Generator().manual_seed(0)).numpy().astype(np.float64)
    y = np.zeros((11, told["layers"][name]["outputs"]))
    for tile in told["layers"][name]["tiles"]:
        part = {
            key.removeprefix(tile["prefix"]): value.astype(np.float64)
            for key, value in beside[name].items() if key.startswith(tile["prefix"])
        }  # fmt: skip
        (top, bottom), (left, right) = tile["rows"], tile["columns"]
        dac = part["input_range"] / 127
        codes = np.clip(np.round(x[:, top:bottom] / dac), -127, 127)
        current = codes @ (part["g_plus"] - part["g_minus"])
        step = told["out_bound"] * told["g_max"]  # 127 codes on either side
        out = np.clip(np.round(current / step), -127, 127)
        y[:, left:right] += out * part["adc_bound"] / 127
    with torch.no_grad():
        expected = layer(torch.from_numpy(x).float()).double().numpy()
    steps = 14 * layer.input_range[0].item() * layer.weight.abs().amax(1).detach().numpy() / 127
    differs = np.abs(y - expected) > 1e-5 * np.abs(expected).max()
    assert differs.mean() < 0.005 and (np.abs(y - expected) <= 3 * steps * 1.01).all()


def test_programmed_noise_is_not_in_the_targets(make_analog, tmp_path):
    from analog_plugin.noise import PCMNoise

    model = make_analog("llama")
    save_checkpoint(model, tmp_path / "clean", profile="conductances")
    for _, layer in analog_layers(model):
        layer.program(PCMNoise(), 0)
    save_checkpoint(model, tmp_path / "programmed", profile="conductances")
    assert read(tmp_path / "clean")[0] == read(tmp_path / "programmed")[0]


REFUSED = {
    "no conductance": ({"g_max": 0}, {}, "g_max is 0, but must be a number of microsiemens"),
    "no number": ({"g_max": "25"}, {}, "g_max is '25', but must be a number of microsiemens"),
    "another option": ({"weight_scale": "mse"}, {}, "has no option weight_scale; it has g_max"),
    "dynamic": ({}, {"input_range": "dynamic"}, "is dynamic, and no static DAC can do that"),
}


@pytest.mark.parametrize(("options", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_chip_can_take_is_one_sentence(options, changes, message, make_analog, tmp_path):
    model = make_analog("llama", **changes)
    with pytest.raises(AnalogError, match=message):
        save_checkpoint(model, tmp_path / "chip", profile="conductances", **options)
    assert not (tmp_path / "chip").exists()


def test_weights_that_are_not_finite_are_refused(make_analog, tmp_path):
    model = make_analog("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(AnalogError, match="not all finite"):
        save_checkpoint(model, tmp_path / "chip", profile="conductances")
    assert not (tmp_path / "chip").exists()


def test_it_is_told_from_models_and_its_damage_is_seen(make_analog, tmp_path):
    save_checkpoint(make_analog("llama"), tmp_path / "chip", profile="conductances")
    found = inspect_checkpoint(tmp_path / "chip")
    assert found.kind == "conductances" and found.problems == ()
    assert not any(loader.takes for loader in found.loaders)
    file = next((tmp_path / "chip" / "layers").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = inspect_checkpoint(tmp_path / "chip").problems
    assert file.name in problem
    assert inspect_checkpoint(tmp_path / "chip", verify=False).problems == ()


def test_the_commands_write_it(make_analog, tmp_path, capsys):
    save_checkpoint(make_analog("llama"), tmp_path / "ours")
    main_profile(tmp_path / "ours", tmp_path / "chip", profile="conductances", g_max=50.0)
    told, weights, _ = read(tmp_path / "chip")
    assert told["g_max"] == 50.0 and len(weights) == 14
    assert "| conductances | 0." in capsys.readouterr().out
    with pytest.raises(AnalogError, match="g_max is no option of the profile w8a8"):
        main_profile(tmp_path / "ours", tmp_path / "int8", profile="w8a8", g_max=50.0)
    card = (tmp_path / "chip" / "README.md").read_text()
    assert "numpy.load" in card and "from_pretrained" not in card
