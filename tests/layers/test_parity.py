"""The layer against aihwkit-lightning 2.1 and an independent float64 reference."""

import pytest
import torch
from float64_reference import analog_reference
from torch import nn

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.layers.state import ForwardState, keyed_generator
from analog_plugin.ops.ranges import decay_gradient

SHAPES = [(576, 192, None), (577, 65, None), (577, 65, 256), (1536, 576, 512)]
IDS = ["one tile", "odd", "odd, 3 tiles", "3 tiles"]


def lightning_layer(linear: nn.Linear, tile_rows, init_batches=0, clip=1e6):
    from aihwkit_lightning.nn import AnalogLinear as LightningLinear
    from aihwkit_lightning.simulator.configs import (
        TorchInferenceRPUConfig,
        WeightClipType,
        WeightNoiseInjectionType,
    )

    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound, config.forward.out_noise = 14.0, 0.0
    # Only with this clip type does it take the ADC's maximum per column.
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, clip
    config.modifier.noise_type = WeightNoiseInjectionType.NONE
    ranges = config.pre_post.input_range
    ranges.enable, ranges.learn_input_range, ranges.fast_mode = True, True, False
    ranges.init_from_data, ranges.init_std_alpha = init_batches, 18.0
    ranges.decay, ranges.input_min_percentage = 0.01, 0.95
    config.mapping.max_input_size = tile_rows or -1
    return LightningLinear.from_digital(linear, config)


def pair(inputs, outputs, tile_rows, seed=0, dtype=torch.float32, **scheme):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs).to(dtype)
    theirs = lightning_layer(linear, tile_rows)
    settings = {"weight_noise": 0.0, "tile_rows": tile_rows} | scheme
    return AnalogLinear.from_linear(linear, AnalogScheme(**settings)).train(), theirs.train()


def run(layer, x, grad):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad.clone())
    ranges = layer.input_range.grad
    if isinstance(layer, AnalogLinear):
        ranges = ranges + decay_gradient(layer.input_range, layer.clip_counts, layer.scheme)
    ranges = ranges.detach()
    return y.detach(), x.grad, layer.weight.grad.clone(), ranges.clone(), layer.bias.grad.clone()


def relative(a, b):
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("value", [6.0, 3.0, 0.8], ids=["wide", "usual", "clipping"])
@pytest.mark.parametrize(("inputs", "outputs", "tile_rows"), SHAPES, ids=IDS)
def test_forward_and_gradients_equal_lightning(inputs, outputs, tile_rows, value):
    ours, theirs = pair(inputs, outputs, tile_rows)
    ours.set_input_range(value)
    theirs.input_range.data.fill_(value)
    x, grad = torch.randn(3, 41, inputs), torch.randn(3, 41, outputs)
    (y, *grads), (z, *reference) = run(ours, x, grad), run(theirs, x, grad)
    splits = ours.weight.detach().split(ours.tiles, dim=1)
    step = torch.stack([14.0 * value * block.abs().amax(1) / 127 for block in splits]).amax(0)
    difference = (y - z).abs()
    flips = difference > 1e-6 * z.abs().max()
    assert bool((difference <= step * len(ours.tiles) * 1.001).all())
    assert int(flips.sum()) < flips.numel() / 1000
    for ours_grad, theirs_grad in zip(grads, reference, strict=True):
        assert relative(ours_grad, theirs_grad) < 1e-5


@pytest.mark.parametrize("tile_rows", [None, 200], ids=["one tile", "3 tiles"])
def test_range_initialisation_in_training_equals_lightning(tile_rows):
    scheme = {"range_init_in_training": True, "range_init_batches": 4}
    ours, _ = pair(577, 65, tile_rows, **scheme)
    theirs = lightning_layer(nn.Linear(577, 65), tile_rows, init_batches=4).train()
    for _batch in range(6):  # two more than are looked at
        x = torch.randn(2, 50, 577) * torch.rand(1) * 3
        with torch.no_grad():
            ours(x)
            theirs(x)
        torch.testing.assert_close(
            ours.input_range.data, theirs.input_range.data, rtol=1e-6, atol=0
        )
    assert int(ours.range_batches) == 4


@pytest.mark.parametrize("alpha", [1.5, 2.5, 4.0])
def test_clipping_equals_lightning(alpha):
    from analog_plugin.ops.clip import clip_to_sigma

    torch.manual_seed(1)
    linear = nn.Linear(333, 77)
    theirs = lightning_layer(linear, None, clip=alpha)
    theirs.clip_weights()
    clip_to_sigma(linear.weight, alpha)
    torch.testing.assert_close(linear.weight.data, theirs.weight.data, rtol=2e-6, atol=1e-9)


def off_dac_ties(x, layer):
    """Move inputs off the boundaries between two codes: fp32 and float64 may part there."""
    if layer.scheme.input_bits is None:
        return x
    step = (layer.input_range.detach() / layer.scheme.input_levels).double()
    step = torch.cat([s.expand(n) for s, n in zip(step, layer.tiles, strict=True)])
    position = x.double() / step
    tie = (position - position.floor() - 0.5).abs() < 1e-3
    return torch.where(tie, x + 0.01 * step, x).float()


def reference_case(inputs, outputs, *, value=1.5, seed=3, noisy=True, **scheme):
    """Our layer and the reference on the same draw of everything, noise included."""
    torch.manual_seed(seed)
    settings = AnalogScheme(**({"weight_noise": 0.05 if noisy else 0.0} | scheme))
    layer = AnalogLinear.from_linear(nn.Linear(inputs, outputs, bias=False), settings)
    layer.name, layer.state = "layer", ForwardState(seed=11)
    ranges = torch.linspace(value, 2 * value, len(layer.tiles))
    layer.set_input_range(ranges)
    layer.train()
    x, grad = torch.randn(37, inputs), torch.randn(37, outputs)
    x = off_dac_ties(x, layer)
    noise = None
    if noisy:
        noise = torch.empty(outputs, inputs)
        noise.normal_(generator=keyed_generator("11/layer/0/0"))
    inputs_grad = x.clone().requires_grad_()
    y = layer(inputs_grad)
    y.backward(grad)
    expected = analog_reference(
        x, layer.weight.detach(), layer.input_range.detach(), grad, tiles=layer.tiles,
        input_bits=settings.input_bits, output_bits=settings.output_bits,
        out_bound=settings.out_bound, noise=noise, gamma=settings.weight_noise,
        estimator=settings.range_gradient, weight_bits=settings.weight_bits,
    )  # fmt: skip
    return layer, y.detach(), inputs_grad.grad, expected


CASES = {
    "noise": {},
    "no noise": {"noisy": False},
    "3 tiles": {"tile_rows": 30},
    "lsq": {"range_gradient": "lsq"},
    "lsq, tiles": {"range_gradient": "lsq", "tile_rows": 30},
    "no ADC": {"output_bits": None},
    "no converters": {"input_bits": None, "output_bits": None},
    "5-bit ADC that saturates": {"output_bits": 5, "out_bound": 1.0},
    "saturating tiles": {"out_bound": 0.5, "tile_rows": 30},
    "4-bit DAC": {"input_bits": 4},
    "12-bit DAC": {"input_bits": 12},
    # Integer weights and inputs meet ADC ties exactly at a bound of 14; not at this one.
    "4-bit weights": {"weight_bits": 4, "noisy": False, "out_bound": 11.37},
    "4-bit weights and noise": {"weight_bits": 4, "out_bound": 11.37},
    "clipping hard": {"value": 0.3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_gradients_equal_the_float64_reference(case):
    # Draws in which fp32 and float64 round an ADC input to different sides are set apart: their
    # count is bounded, and gradients are compared where there is none.
    compared = 0
    for seed in range(6):
        layer, y, grad_x, expected = reference_case(83, 29, seed=seed, **case)
        near = torch.zeros_like(expected.y, dtype=torch.bool)
        for position in expected.adc_position:
            near |= (position - position.floor() - 0.5).abs() < 1e-4
        assert int(near.sum()) <= near.numel() / 100
        torch.testing.assert_close(
            y.double()[~near], expected.y[~near], rtol=1e-5, atol=1e-6 * float(y.abs().max())
        )
        if near.any():
            continue
        compared += 1
        assert relative(grad_x.double(), expected.grad_x) < 1e-5
        assert relative(layer.weight.grad.double(), expected.grad_w) < 1e-5
        if layer.input_range.grad is not None:
            # Its terms may cancel, so the error is measured against the sum of their magnitudes.
            error = (layer.input_range.grad.double() - expected.grad_range).abs()
            assert bool((error < 1e-5 * expected.range_terms).all())
    assert compared > 0


def test_half_precision_layer_computes_exact_codes_where_half_arithmetic_does_not():
    torch.manual_seed(0)
    x = torch.randn(64, 96, dtype=torch.bfloat16)
    linear = nn.Linear(96, 96, bias=False).to(torch.bfloat16)
    linear.weight.data.copy_(torch.eye(96))  # the output is the quantized input
    scheme = AnalogScheme(output_bits=None, weight_noise=0.0)
    layer = AnalogLinear.from_linear(linear, scheme)
    layer.set_input_range(2.7)
    scale = torch.tensor(2.7).double() / 127
    expected = (x.double().clamp(-2.7, 2.7) / scale).round()
    codes = (layer(x).double() / scale).round()
    assert torch.equal(codes, expected)
    naive = (x / scale.bfloat16()).round().clamp(-127, 127).double()
    assert (naive != expected).double().mean() > 0.02


def test_autocast_gives_fp32_gradients_of_fp32_weights():
    layer, *_ = reference_case(64, 32)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(8, 64))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.input_range.grad.dtype == torch.float32


def test_noisy_adc_bound_is_that_of_the_programmed_weights():
    from analog_plugin.noise import PCMNoise

    torch.manual_seed(0)
    linear = nn.Linear(83, 29, bias=False)
    layer = AnalogLinear.from_linear(linear, AnalogScheme(adc_bound="noisy", tile_rows=30)).eval()
    layer.set_input_range(2.0)
    layer.program(PCMNoise(), 0)
    x = torch.randn(37, 83)
    expected = analog_reference(
        x, layer.programmed_weight, layer.input_range.detach(), torch.zeros(37, 29),
        tiles=layer.tiles,
    )  # fmt: skip
    difference = (layer(x).detach().double() - expected.y).abs()
    near = sum((p - p.floor() - 0.5).abs() < 1e-4 for p in expected.adc_position).bool()
    assert float(difference[~near].max()) < 1e-6 * float(expected.y.abs().max())
