"""More settings of aihwkit-lightning 2.1 on identical inputs: counted flips, other converters."""

import pytest
import torch
from float64_reference import analog_reference
from torch import nn

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.noise import PCMNoise
from analog_plugin.ops.ranges import decay_gradient


def pair(inputs, outputs, *, seed, tile_rows=None, input_bits=8, output_bits=8, **scheme):
    from aihwkit_lightning.nn import AnalogLinear as LightningLinear
    from aihwkit_lightning.simulator.configs import (
        TorchInferenceRPUConfig,
        WeightClipType,
        WeightNoiseInjectionType,
    )

    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = 2**input_bits - 2
    config.forward.out_res = -1 if output_bits is None else 2**output_bits - 2
    # Its bound clips even where it does not quantize.
    config.forward.out_bound = -1 if output_bits is None else 14.0
    config.forward.out_noise = 0.0
    # Only with this clip type does it take the ADC's maximum per column.
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 1e6
    config.modifier.noise_type = WeightNoiseInjectionType.NONE
    ranges = config.pre_post.input_range
    ranges.enable, ranges.learn_input_range, ranges.fast_mode = True, True, False
    ranges.init_from_data, ranges.decay, ranges.input_min_percentage = 0, 0.01, 0.95
    config.mapping.max_input_size = tile_rows or -1
    theirs = LightningLinear.from_digital(linear, config)
    settings = AnalogScheme(
        input_bits=input_bits, output_bits=output_bits, tile_rows=tile_rows, weight_noise=0.0,
        **scheme,
    )  # fmt: skip
    return AnalogLinear.from_linear(linear, settings), theirs


def flips(y, z, layer, bound=14.0):
    """Outputs that differ by more than fp32 rounding; none may differ by more than one code."""
    levels = layer.scheme.output_levels
    blocks = layer.tile_weight.detach().split(layer.tiles, 1)
    if layer.programmed_weight is not None:
        blocks = layer.programmed_weight.split(layer.tiles, 1)
    ranges = layer.input_range.detach()
    step = torch.stack(
        [bound * value * b.abs().amax(1) / levels for value, b in zip(ranges, blocks, strict=True)]
    )
    difference = (y - z).abs()
    rounding = 1e-6 * float(z.abs().max())
    flipped = difference > rounding
    assert bool((difference <= step.amax(0) + rounding).all())
    return int(flipped.sum()), flipped.numel()


def on_the_bound(x, layer):
    exact = analog_reference(
        x, layer.weight.detach(), layer.input_range.detach(), torch.zeros(len(x), 65),
        tiles=layer.tiles,
    )  # fmt: skip
    return sum(position.round().abs() == 127 for position in exact.adc_position).bool()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0], ids=["wide", "usual", "clipping hard"])
@pytest.mark.parametrize("tile_rows", [None, 256], ids=["one tile", "3 tiles"])
def test_fewer_than_one_output_in_a_thousand_falls_on_another_adc_code(tile_rows, spread):
    flipped = total = exact_draws = 0
    for seed in range(8):
        ours, theirs = pair(577, 65, seed=seed, tile_rows=tile_rows)
        ranges = torch.rand(len(ours.tiles)) * 2 + 0.5
        ours.set_input_range(ranges)
        theirs.input_range.data.copy_(ranges)
        x, grad = torch.randn(97, 577) * spread, torch.randn(97, 65)
        # At an output exactly on the ADC's bound its gradient depends on fp32 rounding.
        grad *= ~on_the_bound(x, ours)
        results = []
        for layer in (ours.train(), theirs.train()):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(grad.clone())
            decay = 0
            if layer is ours:
                ranges_now = layer.input_range.detach()
                decay = decay_gradient(ranges_now, layer.clip_counts, layer.scheme)
            results.append(
                (leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone(),
                 layer.input_range.grad + decay, y.detach())
            )  # fmt: skip
        (*mine, y), (*reference, z) = results
        count, outputs = flips(y, z, ours)
        flipped, total = flipped + count, total + outputs
        if count:
            continue
        exact_draws += 1
        assert float((y - z).abs().max()) <= 1e-6 * float(z.abs().max())
        for ours_grad, theirs_grad in zip(mine, reference, strict=True):
            assert relative(ours_grad, theirs_grad) < 1e-5
    assert flipped < total / 1000
    assert exact_draws > 0


@pytest.mark.parametrize("output_bits", [None, 6, 10], ids=["no ADC", "6-bit ADC", "10-bit ADC"])
@pytest.mark.parametrize("input_bits", [4, 6, 12], ids=["4-bit DAC", "6-bit DAC", "12-bit DAC"])
def test_other_resolutions_equal_lightnings(input_bits, output_bits):
    ours, theirs = pair(
        577, 65, seed=0, tile_rows=200, input_bits=input_bits, output_bits=output_bits
    )
    ours.set_input_range(1.5)
    theirs.input_range.data.fill_(1.5)
    x = torch.randn(97, 577)
    y, z = ours.eval()(x).detach(), theirs.eval()(x).detach()
    if output_bits is None:
        # A DAC tie may fall to either side; it moves an output by one DAC step of one weight.
        moved = ((y - z).abs() > 1e-6 * float(z.abs().max())).any(1)
        assert int(moved.sum()) <= 2
    else:
        count, total = flips(y, z, ours)
        assert count <= total / 200 if output_bits == 10 else count < total / 1000


def test_a_noisy_adc_bound_is_lightnings_with_the_programmed_weights():
    ours, theirs = pair(577, 65, seed=0, tile_rows=200, adc_bound="noisy")
    ours.set_input_range(1.5)
    theirs.input_range.data.fill_(1.5)
    ours.eval().program(PCMNoise(), 3)
    theirs.weight.data.copy_(ours.programmed_weight)
    x = torch.randn(97, 577)
    count, total = flips(ours(x).detach(), theirs.eval()(x).detach(), ours)
    assert count < total / 1000


def test_clean_adc_bounds_are_narrower_than_lightnings_after_programming():
    results = []
    for bound in ("clean", "noisy"):
        ours, _ = pair(577, 65, seed=0, adc_bound=bound, range_init="max")
        ours.set_input_range(0.01)
        ours.eval().program(PCMNoise(), 3)
        results.append((ours(torch.randn(97, 577) * 100) - ours.bias).detach().abs().amax(0))
    clean, noisy = results
    assert bool((clean <= noisy * (1 + 1e-6)).all()) and bool((clean < noisy).any())
