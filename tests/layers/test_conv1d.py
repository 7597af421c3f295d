"""GPT-2's transposed linear layer computes what a linear layer with the same weights does."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.layers import AnalogConv1D, ForwardState
from analog_plugin.noise import GaussianNoise, PCMNoise
from analog_plugin.ops.clip import clip_to_sigma


def both(**scheme):
    """The two layers with equal weights, ranges, name and noise key."""
    torch.manual_seed(0)
    conv, linear = Conv1D(20, 48), nn.Linear(48, 20)
    linear.weight.data.copy_(conv.weight.data.t())
    linear.bias.data.copy_(conv.bias.data.normal_())
    settings = AnalogScheme(**scheme)
    layers = AnalogConv1D.from_conv1d(conv, settings), AnalogLinear.from_linear(linear, settings)
    for made in layers:
        made.name, made.state = "h.0.mlp", ForwardState(seed=3)
        made.set_input_range(torch.linspace(0.5, 1.5, len(made.tiles)))
    return layers


@pytest.mark.parametrize("estimator", ["paper", "lsq"])
@pytest.mark.parametrize("tile_rows", [None, 16], ids=["one tile", "3 tiles"])
@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["no noise", "noise"])
@pytest.mark.parametrize("weight_bits", [None, 4], ids=["full weights", "4-bit weights"])
def test_training_forward_and_gradients_equal_the_linear_layers(
    estimator, tile_rows, noise, weight_bits
):
    conv, linear = both(
        range_gradient=estimator, tile_rows=tile_rows, weight_noise=noise, weight_bits=weight_bits,
        out_bound=11.37,
    )  # fmt: skip
    x, results = torch.randn(7, 48), []
    for made in (conv, linear):
        leaf = x.clone().requires_grad_()
        y = made.train()(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, made.input_range.grad, made.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(conv.weight.grad.t(), linear.weight.grad)


@pytest.mark.parametrize("noise", [GaussianNoise(0.02), PCMNoise()], ids=["gaussian", "pcm"])
def test_the_same_key_programs_the_same_devices(noise):
    conv, linear = (made.eval() for made in both(tile_rows=16))
    for made in (conv, linear):
        made.program(noise, 5)
    assert torch.equal(conv.programmed_weight, linear.programmed_weight)
    x = torch.randn(7, 48)
    torch.testing.assert_close(conv(x), linear(x))


def test_clipping_acts_on_output_channels_not_stored_rows():
    conv, linear = both()
    for made in (conv, linear):
        clip_to_sigma(made.tile_weight, 1.5)
    torch.testing.assert_close(conv.weight.t(), linear.weight, rtol=1e-6, atol=0)


def test_sizes_are_those_of_the_product():
    conv, _ = both()
    assert (conv.in_features, conv.out_features) == (48, 20)
    assert conv.tile_weight.shape == (20, 48)


def test_turning_back_gives_the_same_conv1d():
    digital = Conv1D(20, 48)
    x = torch.randn(3, 48)
    before, shared = digital(x), copy.deepcopy(digital)
    back = AnalogConv1D.from_conv1d(digital, AnalogScheme()).to_linear()
    assert type(back) is Conv1D and back.weight is digital.weight and back.bias is digital.bias
    assert torch.equal(back(x), before)
    assert vars(back).keys() == vars(shared).keys()
