"""What every noise model keeps, whatever the weights; and its invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analog_plugin import AnalogError, AnalogLinear, AnalogScheme
from analog_plugin.evaluation.noise import noise_cells
from analog_plugin.noise import GaussianNoise, PCMNoise, WeightRounding, noise_label, resolve_noise

MODELS = {
    "gaussian": GaussianNoise(0.03),
    "gaussian per tile": GaussianNoise(0.03, per="tile"),
    "gaussian per tensor": GaussianNoise(0.03, per="tensor"),
    "pcm": PCMNoise(),
    "pcm, doubled": PCMNoise(2.0),
    "rtn": WeightRounding(4),
}
each_model = pytest.mark.parametrize("noise", MODELS.values(), ids=MODELS.keys())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(seed=0, columns=6, inputs=40):
    return torch.randn(columns, inputs, generator=generator(seed))


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_clean_weights_are_left_as_they_are(noise, dtype):
    weight = rows().to(dtype)
    before = weight.clone()
    out = noise.program(weight, generator())
    assert torch.equal(weight, before)
    assert out.dtype == torch.float32 and out.shape == weight.shape
    assert not torch.equal(out, weight.float())


@each_model
@settings(deadline=None, max_examples=30)
@given(exponent=st.integers(-60, 60), seed=st.integers(0, 100))
def test_noise_is_relative_to_the_weights(noise, exponent, seed):
    weight = rows(seed)
    scaled = noise.program(weight * 2.0**exponent, generator(1))
    plain = noise.program(weight, generator(1)) * 2.0**exponent
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)


@each_model
def test_zero_weights_stay_exactly_zero(noise):
    assert torch.equal(noise.program(torch.zeros(3, 5), generator()), torch.zeros(3, 5))


@pytest.mark.parametrize("noise", [GaussianNoise(0.03), PCMNoise()], ids=["gaussian", "pcm"])
def test_a_zero_column_stays_zero_beside_others(noise):
    weight = rows()
    weight[2] = 0
    out = noise.program(weight, generator())
    assert torch.equal(out[2], torch.zeros(40)) and out.isfinite().all()


@each_model
def test_the_smallest_numbers_give_no_nan(noise):
    weight = torch.full((2, 4), 1e-42)  # a denormal
    assert noise.program(weight, generator()).isfinite().all()


@pytest.mark.parametrize("noise", [GaussianNoise(0.0), PCMNoise(0.0)], ids=["gaussian", "pcm"])
def test_a_level_of_zero_programs_what_devices_can_hold(noise):
    weight = rows()
    out = noise.program(weight, generator())
    unprogrammed = out == 0  # PCM leaves targets below 0.33 % of full scale out
    assert torch.equal(out[~unprogrammed], weight[~unprogrammed])
    small = weight.abs() < 0.6 / 180 * weight.abs().amax(1, keepdim=True)
    assert torch.equal(unprogrammed, small if isinstance(noise, PCMNoise) else weight == 0)


def test_pcm_error_grows_with_its_scale():
    weight = torch.rand(4, 50, generator=generator()) + 0.1  # nothing is left unprogrammed
    error = PCMNoise().program(weight, generator(1)) - weight
    twice = PCMNoise(2.0).program(weight, generator(1)) - weight
    torch.testing.assert_close(twice, 2 * error, rtol=1e-3, atol=1e-6)


def test_pcm_error_does_not_depend_on_the_sign():
    weight = torch.rand(4, 50, generator=generator()) + 0.1  # nothing is left unprogrammed
    plus = PCMNoise().program(weight, generator(1)) - weight
    minus = PCMNoise().program(-weight, generator(1)) + weight
    torch.testing.assert_close(minus, plus, rtol=1e-4, atol=1e-5)


def test_pcm_deviation_is_zero_below_the_smallest_target_and_positive_above():
    sigma = PCMNoise().standard_deviation(torch.linspace(0, 1, 1801))
    assert torch.equal(sigma[:6], torch.zeros(6))  # below 0.6 of 180
    assert bool((sigma[7:] > 0.014).all())


def test_pcm_deviation_is_continuous_at_the_knee_of_its_fit():
    knee = 52.5 / 180
    left, right = PCMNoise().standard_deviation(torch.tensor([knee, knee + 1e-6]))
    assert float(left) == pytest.approx(float(right), abs=2e-4)


@pytest.mark.parametrize("noise", [GaussianNoise(0.03), PCMNoise()], ids=["gaussian", "pcm"])
def test_each_tile_is_programmed_on_its_own_scale(noise):
    linear = nn.Linear(40, 6, bias=False)
    linear.weight.data[:, 20:] *= 1000
    layer = AnalogLinear.from_linear(linear, AnalogScheme(tile_rows=20))
    layer.program(noise, 0)
    relative = (layer.programmed_weight - linear.weight.detach()) / linear.weight.detach()
    first, second = relative[:, :20].abs().median(), relative[:, 20:].abs().median()
    assert 0.2 < float(first / second) < 5


def test_gaussian_noise_per_tensor_follows_the_whole_layers_maximum():
    linear = nn.Linear(400, 60, bias=False)
    with torch.no_grad():
        linear.weight.mul_(0.01)
        linear.weight[0, 0] = 2.0
    layer = AnalogLinear.from_linear(linear, AnalogScheme(tile_rows=200))
    layer.program(resolve_noise({"name": "gaussian", "sigma": 0.03, "per": "tensor"}), 0)
    error = layer.programmed_weight - linear.weight.detach()
    for tile in error.split(200, dim=1):
        assert float(tile.std()) == pytest.approx(0.03 * 2.0, rel=0.03)


def test_only_gaussian_noise_per_column_follows_each_columns_maximum():
    weight = rows()
    weight[0] *= 100
    column = GaussianNoise(0.03).program(weight, generator()) - weight
    tile = GaussianNoise(0.03, per="tile").program(weight, generator()) - weight
    assert float(column[1:].std()) < 0.2 and float(tile[1:].std()) > 2


@pytest.mark.parametrize(
    ("form", "label"),
    [
        (None, "none"),
        ("none", "none"),
        ("pcm", "pcm"),
        ("gaussian:0.02", "gaussian:0.02"),
        ({"name": "pcm"}, "pcm"),
        ({"name": "gaussian", "sigma": 0.02, "per": "tile"}, "gaussian(sigma=0.02,per=tile)"),
        pytest.param(PCMNoise(), "PCMNoise", id="a noise model itself"),
    ],
    ids=str,
)
def test_every_form_that_resolves_has_a_label(form, label):
    resolved = resolve_noise(form)
    assert (resolved is None) == (label == "none")
    assert noise_label(form) == label


def test_a_mapping_is_left_as_it_was():
    form = {"name": "gaussian", "sigma": 0.02}
    resolve_noise(form)
    assert form == {"name": "gaussian", "sigma": 0.02}


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("pmc", ["no noise model 'pmc'", "did you mean 'pcm'"]),
        ("nonsense", ["no noise model 'nonsense'", "gaussian", "pcm"]),
        ("pcm:", ["is not a number", "pcm:1.5"]),
        ("pcm:nan", ["scale is nan", "write pcm:1.5"]),
        ("pcm:inf", ["scale is inf"]),
        ("gaussian:-1", ["sigma is -1.0", "write gaussian:0.03"]),
        ({"name": "gaussian", "sigma": True}, ["sigma is True"]),
        ({"name": "gaussian", "sigma": "high"}, ["sigma is 'high'"]),
        ({"name": "gaussian", "per": "row"}, ["per is 'row'", "column, tile or tensor"]),
        ({"name": "pcm", "sigma": 1}, ["no argument 'sigma'", "it takes scale"]),
        ("rtn:1", ["bits is 1.0", "2 to 16", "write rtn:4"]),
        ("rtn:4.5", ["bits is 4.5"]),
        ({"name": "rtn", "bits": True}, ["bits is True"]),
        ({"sigma": 1}, ["a mapping with a name"]),
        ({"name": 3}, ["a mapping with a name"]),
        (3, ["noise is 3", "write noise: pcm"]),
        (True, ["noise is True"]),
    ],
    ids=str,
)
def test_a_form_that_resolves_to_nothing_says_what_to_write(form, words):
    with pytest.raises(AnalogError) as caught:
        resolve_noise(form)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_class_in_place_of_a_model_is_refused():
    with pytest.raises(AnalogError):
        resolve_noise(PCMNoise)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_weights_are_the_nearest_codes_of_their_column(bits):
    weight = rows()
    made = WeightRounding(bits).program(weight, generator())
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = made / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert bool(((made - weight).abs() <= step / 2 * (1 + 1e-5)).all())
    torch.testing.assert_close(made.abs().amax(1), weight.abs().amax(1))


@pytest.mark.parametrize("name", ["rtn:4", "ir_drop", "rtn+ir_drop"])
def test_what_draws_nothing_is_measured_once(name):
    cells = noise_cells([name, "pcm+ir_drop"], [3, 4])
    assert [(cell.label, cell.seed) for cell in cells] == [
        (name, 3), ("pcm+ir_drop", 3), ("pcm+ir_drop", 4)
    ]  # fmt: skip
