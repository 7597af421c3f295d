"""Noise models against the figures published with them."""

import pytest
import torch

from analog_plugin import AnalogError
from analog_plugin.noise import GaussianNoise, PCMNoise, noise_label, resolve_noise
from analog_plugin.ops.clip import clip_to_sigma


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("target", "percent"),
    [(0.1, 3.10), (0.3, 4.66), (0.5, 4.69), (0.7, 5.10), (0.9, 7.83), (1.0, 10.67)],
)
def test_pcm_deviation_is_the_published_fit(target, percent):
    sigma = PCMNoise().standard_deviation(torch.tensor([target]))
    assert float(sigma) * 100 == pytest.approx(percent, abs=0.006)


@pytest.mark.parametrize(
    ("alpha", "percent"), [(None, 14.0), (3.0, 12.3), (2.5, 11.1), (2.0, 10.4)]
)
def test_pcm_weight_error_on_gaussian_rows(alpha, percent):
    torch.manual_seed(0)
    weight = torch.randn(512, 2048)
    if alpha is not None:
        clip_to_sigma(weight, alpha)
    # Another seed than the weights', or the errors would be the weights themselves.
    error = PCMNoise().program(weight, generator(1)) - weight
    assert float(error.norm() / weight.norm()) * 100 == pytest.approx(percent, abs=0.1)


def test_pcm_samples_have_the_stated_deviation():
    weight = torch.full((4000, 2), 0.05)
    weight[:, 1] = 0.1  # the column's maximum, so that the other is at one half
    error = PCMNoise(scale=1.5).program(weight, generator()) - weight
    assert float(error[:, 0].std() / 0.1) * 100 == pytest.approx(1.5 * 4.69, rel=0.05)
    assert float(error[:, 1].std() / 0.1) * 100 == pytest.approx(1.5 * 10.67, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pcm_leaves_zeros_and_tiny_targets_at_exactly_zero(dtype):
    weight = torch.zeros(3, 8, dtype=dtype)
    weight[0, 0], weight[0, 1], weight[0, 2] = 1.0, 0.003, 0.5
    out = PCMNoise().program(weight, generator())
    assert out[0, 1] == 0 and out[0, 2] != 0
    assert torch.equal(out[1:], torch.zeros(2, 8))


@pytest.mark.parametrize("per", ["column", "tile"])
def test_gaussian_deviation_is_relative_to_the_maximum(per):
    weight = torch.full((2, 20000), 0.1)
    weight[0, 0], weight[1, 0] = 1.0, 4.0
    error = GaussianNoise(0.02, per=per).program(weight, generator()) - weight
    expected = (1.0, 4.0) if per == "column" else (4.0, 4.0)
    for row, peak in zip(error, expected, strict=True):
        assert float(row.std()) == pytest.approx(0.02 * peak, rel=0.03)


def test_the_same_generator_gives_the_same_weights():
    weight = torch.randn(5, 7)
    for noise in (GaussianNoise(0.02), PCMNoise()):
        a, b, c = (noise.program(weight, generator(s)) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_noise_is_named_in_several_ways():
    assert resolve_noise("pcm:1.5").scale == 1.5
    assert resolve_noise("gaussian:0.02").sigma == 0.02
    assert resolve_noise({"name": "gaussian", "sigma": 0.1, "per": "tile"}).per == "tile"
    assert resolve_noise(None) is None and resolve_noise("none") is None
    own = PCMNoise()
    assert resolve_noise(own) is own
    assert noise_label({"name": "gaussian", "sigma": 0.1}) == "gaussian(sigma=0.1)"
    assert noise_label("pcm:1.5") == "pcm:1.5" and noise_label(None) == "none"


@pytest.mark.parametrize(
    "noise",
    ["pmc", "pcm:high", "pcm:-1", "gaussian:-0.1", {"sigma": 0.1}, {"name": "pcm", "x": 1}, 3,
     {"name": "gaussian", "per": "row"}],
    ids=str,
)  # fmt: skip
def test_a_wrong_name_or_level_is_one_sentence(noise):
    with pytest.raises(AnalogError) as caught:
        resolve_noise(noise)
    assert "\n" not in str(caught.value)
