"""Analog layers by the kernels for GPUs: the numbers of the layers by torch's operators."""

import copy

import pytest
import torch
from plain_layer import plain_forward
from torch import nn
from transformers.pytorch_utils import Conv1D

from analog_plugin import AnalogScheme
from analog_plugin.layers import AnalogConv1D, AnalogLinear, ForwardState

IN, OUT = 100, 37  # no whole block of any kernel
SCHEMES = {
    "one tile": AnalogScheme(out_bound=3.0),
    "uneven tiles": AnalogScheme(out_bound=3.0, tile_rows=40),
    "even tiles": AnalogScheme(out_bound=3.0, tile_rows=50),
    "lsq": AnalogScheme(out_bound=3.0, tile_rows=60, range_gradient="lsq"),
    "no ADC": AnalogScheme(output_bits=None, tile_rows=60),
    "no DAC": AnalogScheme(output_bits=None, input_bits=None, tile_rows=60),
    "dynamic ranges": AnalogScheme(input_range="dynamic", out_bound=3.0),
    "few bits": AnalogScheme(input_bits=4, output_bits=3, out_bound=3.0),
    "many bits": AnalogScheme(input_bits=12, output_bits=12, out_bound=3.0),
    "rounded weights": AnalogScheme(out_bound=3.0, weight_bits=4),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make(scheme, device, dtype=torch.float32, kind=AnalogLinear):
    torch.manual_seed(1)
    if kind is AnalogLinear:
        layer = AnalogLinear.from_linear(nn.Linear(IN, OUT, device=device), scheme)
    else:
        layer = AnalogConv1D.from_conv1d(Conv1D(OUT, IN).to(device), scheme)
    nn.init.normal_(layer.weight, std=0.1)
    if scheme.input_range != "dynamic" and scheme.input_bits is not None:
        layer.set_input_range([1.0 + 0.01 * k for k in range(len(layer.tiles))])
    layer.state = ForwardState(seed=7)
    return layer.to(dtype).train()


def inputs(device, dtype, shape=(3, 4, IN)):
    torch.manual_seed(2)
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def run(layer, x, autocast=None):
    """Output, gradients and counts of one training pass."""
    layer = copy.deepcopy(layer)
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape).to(y))
    ranges = layer.input_range.grad
    return {
        "output": y.detach(),
        "of the input": x.grad,
        "of the weight": layer.weight.grad,
        "of the range": torch.zeros(()) if ranges is None else ranges,
        "clipped": layer.clip_counts,
    }


def assert_equal(found, expected, rtol=1e-6):
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        largest = max(float(value.double().abs().max()), 1e-30)
        error = float((found[name].double() - value.double()).abs().max()) / largest
        # A range's gradient is a sum of many terms of both signs, in another order.
        assert error <= (10 * rtol if name == "of the range" else rtol), (name, error)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_without_noise_the_numbers_are_those_of_torchs_operators(scheme, dtype, device, plainly):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter cuts off what a GPU rounds to bfloat16")
    layer = make(scheme.replace(weight_noise=0.0), device, dtype)
    x = inputs(device, dtype)
    found, expected = run(layer, x), plainly(lambda: run(layer, x))
    # Torch adds tiles by fused multiplication, so that rounding to half precision may differ.
    step = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert_equal(found, expected, 1e-6 + step)
    if scheme.tile_rows is None:
        assert torch.equal(found["output"], expected["output"])
        assert torch.equal(found["of the input"], expected["of the input"])
        assert torch.equal(found["clipped"], expected["clipped"])


@pytest.mark.parametrize("name", ["one tile", "uneven tiles", "few bits"])
def test_without_noise_it_is_the_plain_reference_layer(name, device):
    scheme = SCHEMES[name].replace(weight_noise=0.0)
    layer = make(scheme, device)
    x = inputs(device, torch.float32, (12, IN))
    found = run(layer, x)
    weight = layer.weight.detach().cpu().requires_grad_()
    ranges = layer.input_range.detach().cpu().requires_grad_()
    plain_x = x.detach().cpu().requires_grad_()
    y = plain_forward(plain_x, weight, ranges, scheme, layer.tiles, None)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape))
    made = found["output"].cpu() - layer.bias.detach().cpu()
    assert torch.allclose(made, y.detach(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found["of the input"].cpu(), plain_x.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found["of the weight"].cpu(), weight.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found["of the range"].cpu(), ranges.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AnalogLinear, AnalogConv1D])
@pytest.mark.parametrize("tile_rows", [None, 40])
def test_backward_and_forward_meet_the_same_noise(kind, tile_rows, device):
    scheme = AnalogScheme(output_bits=None, input_bits=16, tile_rows=tile_rows, weight_noise=0.1)
    layer = make(scheme, device, kind=kind)
    with torch.no_grad():
        layer.bias.zero_()
    layer.set_input_range(1.0)
    clean = layer.tile_weight.detach()
    x = torch.eye(IN, device=device).requires_grad_()
    y = layer(x)  # the noisy weights, but for rounding of 1.0 to 16 bits
    assert torch.allclose(y.t(), clean, atol=0.5) and not torch.allclose(y.t(), clean, atol=1e-2)
    (grad,) = torch.autograd.grad(y.diagonal().sum(), x)
    assert torch.allclose(grad[:OUT], y.detach().t(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tile_rows", [None, 40])
def test_noise_drawn_again_gives_the_same_gradients(tile_rows, device):
    layer = make(AnalogScheme(out_bound=3.0, tile_rows=tile_rows), device)
    x = inputs(device, torch.float32)
    kept = run(layer, x)
    layer.state.keep_noise = False
    assert_equal(run(layer, x), kept, 0.0)


@pytest.mark.parametrize("kind", [AnalogLinear, AnalogConv1D])
def test_the_noise_is_normal_keyed_and_as_large_as_the_scheme_says(kind, device):
    scheme = AnalogScheme(output_bits=None, input_bits=None, weight_noise=0.05, tile_rows=40)
    layer = make(scheme, device, kind=kind)
    with torch.no_grad():
        layer.bias.zero_()
    clean = layer.tile_weight.detach()
    peaks = torch.cat(
        [b.abs().amax(1, keepdim=True).expand_as(b) for b in clean.split(layer.tiles, 1)], 1
    )
    x = torch.eye(IN, device=device)
    draws = []
    for step in range(8):
        layer.state.step = step
        with torch.no_grad():
            draws.append((layer(x).t() - clean) / (0.05 * peaks))
    assert torch.equal(layer(x).t().detach(), layer(x).t().detach())
    values = torch.stack(draws).double().cpu()
    number = values.numel()
    assert abs(values.mean()) < 5 / number**0.5
    assert abs(values.square().mean() - 1) < 5 * (2 / number) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / number) ** 0.5
    for dim in range(3):  # steps, columns and rows are independent
        a, b = (
            values.narrow(dim, 0, values.shape[dim] - 1),
            values.narrow(dim, 1, values.shape[dim] - 1),
        )
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
    quarters = values[..., :96].unflatten(2, (3, 32))
    assert (
        abs((quarters[:, :, 0] * quarters[:, :, 1]).mean()) < 5 / quarters[:, :, 0].numel() ** 0.5
    )


def test_padding_does_not_count_as_clipped(device, plainly):
    layer = make(AnalogScheme(out_bound=3.0, tile_rows=40), device)
    layer.state.attention_mask = torch.tensor(
        [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], device=device
    )
    x = inputs(device, torch.float32)
    found, expected = run(layer, x)["clipped"], plainly(lambda: run(layer, x)["clipped"])
    assert torch.equal(found, expected) and found[0, 1] == 6 * layer.tiles[0]


def test_autocast_keeps_fp32_gradients_of_fp32_weights(device, plainly):
    layer = make(AnalogScheme(out_bound=3.0, weight_noise=0.0), device)
    x = inputs(device, torch.float32)
    found = run(layer, x, torch.bfloat16)
    assert found["output"].dtype == torch.bfloat16 or device.type == "cpu"
    assert found["of the weight"].dtype == torch.float32
    assert_equal(found, plainly(lambda: run(layer, x, torch.bfloat16)), 2**-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value, device, plainly):
    layer = make(AnalogScheme(out_bound=3.0, weight_noise=0.0), device).eval()
    x = inputs(device, torch.float32).detach()
    x[0, 0, 0] = value
    found, expected = layer(x), plainly(lambda: layer(x))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (1, IN), (17, IN)])
def test_any_number_of_tokens(shape, device, plainly):
    layer = make(AnalogScheme(out_bound=3.0, weight_noise=0.0), device)
    x = inputs(device, torch.float32, shape)
    assert_equal(run(layer, x), plainly(lambda: run(layer, x)), 1e-6) if shape[0] else run(layer, x)


@pytest.mark.parametrize("part", ["input", "weight", "range"])
def test_what_needs_no_gradient_gets_none(part, device):
    layer = make(AnalogScheme(out_bound=3.0), device)
    x = inputs(device, torch.float32)
    whole = run(layer, x)
    layer.weight.requires_grad_(part != "weight")
    layer.input_range.requires_grad_(part != "range")
    x.requires_grad_(part != "input")
    layer(x).sum().backward()
    assert (x.grad is None) == (part == "input")
    assert (layer.weight.grad is None) == (part == "weight")
    assert (layer.input_range.grad is None) == (part == "range")
    assert torch.equal(layer(x).detach(), whole["output"])


def test_gradient_checkpointing_meets_the_same_noise(device):
    layer = make(AnalogScheme(out_bound=3.0), device)
    x = inputs(device, torch.float32)
    for seed in (7, None):  # keyed, and from torch's global generator
        layer.state.seed = seed
        grads = []
        for again in (False, True):
            torch.manual_seed(5)
            if again:
                y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                y = layer(x)
            grads.append(
                torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.input_range])
            )
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
