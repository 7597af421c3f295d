"""The paper's PCM model inside aihwkit, against the same model here."""

import copy

import pytest
import torch
from aihwkit.inference import (
    BaseNoiseModel,
    DualPairConductanceConverter,
    SinglePairConductanceConverter,
)
from aihwkit.nn import AnalogLinear as AihwkitLinear
from aihwkit.simulator.configs import TorchInferenceRPUConfig

from analog_integrations.aihwkit import PCMNoiseModel
from analog_plugin import AnalogError
from analog_plugin.noise import PCMNoise

CONVERTERS = {
    "units of the fit": {},
    "25 µS": {"g_max": 25.0},
    "5 to 25 µS": {"g_converter": SinglePairConductanceConverter(g_max=25.0, g_min=5.0)},
}
each_converter = pytest.mark.parametrize("options", CONVERTERS.values(), ids=CONVERTERS.keys())


def programmed_by_aihwkit(weight, noise_model, times=()):
    """Weights of a layer of aihwkit with one tile, as programmed or at the last time."""
    config = TorchInferenceRPUConfig(noise_model=noise_model, drift_compensation=None)
    config.mapping.weight_scaling_omega = 1.0
    config.mapping.weight_scaling_columnwise = True
    config.mapping.max_input_size = config.mapping.max_output_size = -1
    layer = AihwkitLinear(weight.shape[1], weight.shape[0], bias=False, rpu_config=config).eval()
    layer.set_weights(weight, None)
    torch.manual_seed(5)
    layer.program_analog_weights()
    for time in times:
        layer.drift_analog_weights(time)
    return layer.get_weights()[0]


def column(target, count=60_000):
    """A column of equal weights, and the full conductance beside them."""
    weight = torch.full((1, count), target)
    weight[0, 0] = 1.0
    return weight * 0.037


def relative_error(made, weight):
    return float((made - weight)[0, 1:].norm() / weight[0, 1:].norm())


@each_converter
@pytest.mark.parametrize("target", [0.004, 0.1, 0.29, 0.3, 0.5, -0.7, 0.9, -1.0])
def test_the_error_of_a_weight_is_that_of_the_same_model_here(target, options):
    weight = column(target)
    here = PCMNoise().program(weight, torch.Generator().manual_seed(1))
    there = programmed_by_aihwkit(weight, PCMNoiseModel(**options))
    expected = relative_error(here, weight)
    assert relative_error(there, weight) == pytest.approx(expected, rel=0.02)
    assert float((there - weight)[0, 1:].mean()) == pytest.approx(0.0, abs=0.02 * 0.037 * 0.1)


@each_converter
def test_small_weights_become_zero_without_noise(options):
    there = programmed_by_aihwkit(column(0.003, 1000), PCMNoiseModel(**options))
    assert there[0, 1:].abs().max() <= 1e-6 * 0.037  # the rounding of a converter with g_min


@pytest.mark.parametrize(
    ("clip", "expected"), [(None, 14.0), (3.0, 12.3), (2.5, 11.1), (2.0, 10.4)]
)
def test_golden_figures_of_gaussian_rows(clip, expected):
    weight = torch.randn(400, 2048, generator=torch.Generator().manual_seed(2))
    if clip is not None:
        weight = weight.clamp(-clip, clip)
    there = programmed_by_aihwkit(weight, PCMNoiseModel())
    assert 100 * float((there - weight).norm() / weight.norm()) == pytest.approx(expected, rel=0.02)


def test_level_scales_the_error():
    weight = column(0.5)
    once, thrice = (programmed_by_aihwkit(weight, PCMNoiseModel(s)) for s in (1.0, 3.0))
    ratio = relative_error(thrice, weight) / relative_error(once, weight)
    assert ratio == pytest.approx(3.0, rel=1e-3)
    assert relative_error(programmed_by_aihwkit(weight, PCMNoiseModel(0.0)), weight) < 1e-6


def test_weights_stay_as_programmed_at_every_time():
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    before = programmed_by_aihwkit(weight, PCMNoiseModel())
    after = programmed_by_aihwkit(weight, PCMNoiseModel(), times=(0.0, 3600.0, 3.15e7))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)


def test_it_is_one_of_aihwkit_s_noise_models_and_copies():
    model = PCMNoiseModel(1.5)
    assert isinstance(model, BaseNoiseModel) and copy.deepcopy(model).fit.scale == 1.5


def test_converters_of_several_pairs_and_bad_levels_are_refused():
    with pytest.raises(AnalogError, match=r"DualPair.*one pair.*SinglePairConductanceConverter"):
        PCMNoiseModel(g_converter=DualPairConductanceConverter([1.0, 3.0]))
    with pytest.raises(AnalogError, match=r"scale is -1"):
        PCMNoiseModel(-1)
