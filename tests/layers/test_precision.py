"""Half precision and autocast: exact codes, fp32 ranges, outputs as good as the type allows."""

import pytest
import torch
from float64_reference import analog_reference
from torch import nn

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.noise import IRDrop

HALF = [torch.bfloat16, torch.float16]


def layer(inputs=96, outputs=33, dtype=torch.float32, **scheme):
    torch.manual_seed(0)
    settings = AnalogScheme(**({"weight_noise": 0.0} | scheme))
    made = AnalogLinear.from_linear(nn.Linear(inputs, outputs, bias=False).to(dtype), settings)
    made.set_input_range(torch.linspace(1.7, 2.9, len(made.tiles)))
    return made


def identity(size, dtype, value):
    """A layer whose output is its quantized input."""
    torch.manual_seed(0)
    linear = nn.Linear(size, size, bias=False).to(dtype)
    linear.weight.data.copy_(torch.eye(size))
    made = AnalogLinear.from_linear(linear, AnalogScheme(output_bits=None, weight_noise=0.0))
    made.set_input_range(value)
    return made.eval()


@pytest.mark.parametrize("value", [0.37, 1.1, 2.7, 19.3])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_codes_are_those_of_float64(dtype, value):
    made = identity(64, dtype, value)
    x = (torch.randn(200, 64) * value).to(dtype)
    scale = made.input_range.detach().double() / 127
    position = x.double() / scale
    tie = (position - position.floor() - 0.5).abs() < 1e-5
    codes = (made(x).detach().double() / scale).round()
    expected = position.clamp(-127, 127).round()
    assert torch.equal(codes[~tie], expected[~tie])
    assert int(tie.sum()) < tie.numel() / 1000


def test_lightning_gets_half_precision_codes_wrong_where_this_layer_does_not():
    # Why codes are not compared with aihwkit-lightning in half precision.
    from aihwkit_lightning.nn import AnalogLinear as LightningLinear
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig

    made = identity(64, torch.bfloat16, 2.7)
    config = TorchInferenceRPUConfig()
    config.forward.inp_res, config.forward.out_res, config.forward.out_noise = 254, -1, 0.0
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 0
    config.mapping.max_input_size = -1
    theirs = LightningLinear.from_digital(made.to_linear(), config).eval()
    theirs.input_range.data.fill_(2.7)
    x = torch.randn(200, 64).bfloat16()
    scale = made.input_range.detach().double() / 127
    expected = (x.double() / scale).clamp(-127, 127).round()
    wrong = [((m(x).double() / scale).round() != expected).double().mean() for m in (theirs, made)]
    assert float(wrong[0]) > 0.02 and float(wrong[1]) == 0


@pytest.mark.parametrize("output_bits", [None, 8], ids=["no ADC", "ADC"])
@pytest.mark.parametrize("tile_rows", [None, 32], ids=["one tile", "3 tiles"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_outputs_are_within_their_types_resolution(dtype, tile_rows, output_bits):
    made = layer(dtype=dtype, tile_rows=tile_rows, output_bits=output_bits).train()
    x, grad = torch.randn(50, 96).to(dtype), torch.randn(50, 33).to(dtype)
    leaf = x.clone().requires_grad_()
    y = made(leaf)
    y.backward(grad)
    expected = analog_reference(
        x, made.weight.detach(), made.input_range.detach(), grad, tiles=made.tiles,
        output_bits=output_bits,
    )  # fmt: skip
    assert y.dtype == leaf.grad.dtype == made.weight.grad.dtype == dtype
    resolution = torch.finfo(dtype).eps
    # The product is rounded to half precision before the ADC, which may move it to the next code.
    steps = made.weight.detach().double().split(made.tiles, 1)
    step = sum(
        14.0 * float(value) * block.abs().amax(1) / 127
        for value, block in zip(made.input_range.detach(), steps, strict=True)
    )
    tolerance = resolution * float(expected.y.abs().max()) + (step if output_bits else 0.0)
    assert bool(((y.double() - expected.y).abs() <= tolerance).all())
    if output_bits:
        flips = (y.double() - expected.y).abs() > resolution * float(expected.y.abs().max())
        assert int(flips.sum()) <= flips.numel() * 0.05
    for ours, exact in ((leaf.grad, expected.grad_x), (made.weight.grad, expected.grad_w)):
        assert float((ours.double() - exact).norm() / exact.norm()) < resolution


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_the_range_are_fp32_in_half_precision(dtype):
    made = layer(dtype=dtype, output_bits=None).train()
    x, grad = torch.randn(50, 96).to(dtype), torch.randn(50, 33).to(dtype)
    made(x).backward(grad)
    expected = analog_reference(
        x, made.weight.detach(), made.input_range.detach(), grad, tiles=made.tiles, output_bits=None
    )
    assert made.input_range.grad.dtype == torch.float32
    error = (made.input_range.grad.double() - expected.grad_range).abs()
    assert bool((error < torch.finfo(dtype).eps * expected.range_terms).all())


def test_fp16_products_of_codes_do_not_overflow_where_the_output_fits():
    # 2048 inputs of 1 by weights of 0.5 are 1024; the same in DAC codes is 130 048.
    linear = nn.Linear(2048, 3, bias=False).half()
    nn.init.constant_(linear.weight, 0.5)
    made = AnalogLinear.from_linear(linear, AnalogScheme(output_bits=None, weight_noise=0.0))
    made.set_input_range(1.0)
    y = made.eval()(torch.ones(1, 2048).half())
    torch.testing.assert_close(y, torch.full((1, 3), 1024.0).half())


@pytest.mark.parametrize("tile_rows", [None, 32], ids=["one tile", "3 tiles"])
def test_autocast_gives_half_outputs_and_fp32_gradients(tile_rows):
    made = layer(tile_rows=tile_rows, weight_noise=0.02).train()
    x = torch.randn(50, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for tensor in (x, made.weight, made.input_range):
        assert tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all()


def test_autocast_takes_codes_from_the_full_precision_inputs():
    made = identity(64, torch.float32, 2.7)
    x = torch.randn(200, 64)
    scale = made.input_range.detach().double() / 127
    with torch.autocast("cpu", torch.bfloat16):
        codes = (made(x).detach().double() / scale).round()
    assert torch.equal(codes, (x.double() / scale).clamp(-127, 127).round())


def test_autocast_and_a_bf16_model_agree():
    made = layer().eval()
    x = torch.randn(50, 96).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        casted = made(x)
    # Not exactly: autocast keeps the ADC's column maxima of the fp32 weights.
    step = 14.0 * 1.7 * made.weight.detach().abs().amax(1) / 127
    difference = (casted - made.to(torch.bfloat16)(x)).float().abs()
    assert bool((difference <= step * 1.02 + 0.01 * casted.float().abs()).all())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_training_noise_has_its_deviation_in_half_precision(dtype):
    made = layer(256, 128, dtype=dtype, weight_noise=0.05, output_bits=None).train()
    x = torch.eye(256).to(dtype) * made.input_range.item()
    with torch.no_grad():
        noise = made(x).double() / made.input_range.item() - made.weight.double().t()
    peaks = made.weight.detach().double().abs().amax(1)
    assert float((noise / peaks).std()) == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "in a graph"])
@pytest.mark.parametrize("output_bits", [None, 8], ids=["no ADC", "ADC"])
@pytest.mark.parametrize("tile_rows", [None, 32], ids=["one tile", "3 tiles"])
def test_float64_is_computed_in_float64(tile_rows, output_bits, graph):
    made = layer(tile_rows=tile_rows, output_bits=output_bits).double().eval()
    x = torch.randn(500, 96).double()
    ranges = made.input_range.detach()
    assert ranges.dtype == torch.float32
    with torch.no_grad():
        y = (torch.compile(made, backend="eager") if graph else made)(x)
    expected = analog_reference(
        x, made.weight.detach(), ranges, y, tiles=made.tiles, output_bits=output_bits
    )
    torch.testing.assert_close(y, expected.y, rtol=0, atol=1e-13)


def test_disturbances_of_float64_are_computed_in_float64():
    made = layer(output_bits=None).double().eval()
    x = torch.randn(500, 96).double()
    with torch.no_grad():
        clean = made(x)
        made.program(IRDrop(scale=0.0), 0)
        torch.testing.assert_close(made(x), clean, rtol=0, atol=1e-13)
