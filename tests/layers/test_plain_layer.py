"""The layer against an unoptimized one of ours: the same draws, codes and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_layer import plain_forward
from torch import nn

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.layers import ForwardState
from analog_plugin.layers.state import keyed_generator


def compare(inputs, outputs, tokens, seed, **scheme):
    """Largest relative difference of output and gradients, ADC ties that fell otherwise apart."""
    torch.manual_seed(seed)
    settings = AnalogScheme(**({"weight_noise": 0.03} | scheme))
    layer = AnalogLinear.from_linear(nn.Linear(inputs, outputs, bias=False), settings).train()
    layer.set_input_range(torch.rand(len(layer.tiles)) * 2 + 0.5)
    layer.name, layer.state = "layer", ForwardState(seed=seed)
    x, grad = torch.randn(tokens, inputs), torch.randn(tokens, outputs)

    ours = [x.clone().requires_grad_(), layer.weight, layer.input_range]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    generator = keyed_generator(f"{seed}/layer/0/0")
    expected = plain_forward(*theirs, settings, layer.tiles, generator)
    y = layer(ours[0])
    # A product on the edge between two ADC codes may fall to either in fp32; where one does, no
    # gradient changes, but for a code at the very end, which saturates or does not.
    apart = (y - expected).detach().abs() > 1e-6 * expected.detach().abs().max()
    y.backward(grad)
    expected.backward(grad)
    # The terms of each sum are of the order of 1; a sum may be near 0 by cancellation.
    differences = [
        float((a.grad - b.grad).norm() / b.grad.norm().clamp_min(1.0))
        for a, b in zip(ours, theirs, strict=True)
    ]
    return int(apart.sum()), y.numel(), differences


@pytest.mark.parametrize("tile_rows", [None, 200, 512], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"out_bound": 3.0}, {"weight_noise": 0.2}], ids=["usual", "saturating", "noisy"]
)
def test_equals_the_unoptimized_layer_draw_for_draw(options, tile_rows):
    # 577 x 1030 weights are drawn in three portions, none of which ends with a tile.
    apart, of, differences = compare(577, 1030, 64, 0, tile_rows=tile_rows, **options)
    assert apart <= of / 20_000
    assert max(differences) < 1e-6 if apart == 0 else max(differences) < 1e-4


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(0, 10**6),
    st.sampled_from([None, 7, 16, 64]),
    st.sampled_from([2, 5, 8]),
)
def test_equals_it_in_any_shape(inputs, outputs, tokens, seed, tile_rows, bits):
    apart, _, differences = compare(
        inputs, outputs, tokens, seed, tile_rows=tile_rows, input_bits=bits
    )
    if apart == 0:
        assert max(differences) < 2e-6
