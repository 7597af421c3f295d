"""The analog product: its gradients against automatic differentiation, and what never changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analog_plugin import AnalogScheme
from analog_plugin.ops.matmul import MatmulContext, analog_matmul
from analog_plugin.ops.weights import column_maximum, fake_quantize_columns


def product(x, weight, ranges, scheme, tiles):
    """The analog product with the maxima of ``weight`` itself."""
    peaks = column_maximum(weight.detach(), tiles)
    return analog_matmul(x, weight, ranges, peaks, MatmulContext(scheme, tiles))


def straight_through(value):
    return value + (value.round() - value).detach()


def differentiable(x, weight, ranges, scheme, tiles):
    """The same forward in float64 from operations that autograd differentiates by itself."""
    y = 0
    splits = zip(x.split(tiles, 1), weight.split(tiles, 1), ranges, strict=True)
    for block, w, value in splits:
        if scheme.input_levels is not None:
            scale = value / scheme.input_levels
            inside = (block / scale).clamp(-scheme.input_levels, scheme.input_levels)
            block = straight_through(inside) * scale
        out = block @ w.T
        if scheme.output_levels is not None:
            peak = w.detach().abs().amax(1)
            step = scheme.out_bound * value.detach() * peak / scheme.output_levels
            code = straight_through(out / step)
            out = code.clamp(-scheme.output_levels, scheme.output_levels) * step
        y = y + out
    return y


def draw(seed, inputs=48, outputs=13, tokens=19):
    generator = torch.Generator().manual_seed(seed)
    x, weight, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    return x, weight, grad


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_bits": None},
        {"output_bits": 6, "out_bound": 3.1},
        {"input_bits": 4},
        {"input_bits": 12, "output_bits": None},
        {"input_bits": None, "output_bits": None},
    ],
    ids=["8 bits", "no ADC", "saturating ADC", "4-bit DAC", "12-bit DAC", "no converters"],
)
@pytest.mark.parametrize("tiles", [[48], [16, 16, 16]], ids=["one tile", "3 tiles"])
def test_lsq_gradients_are_those_of_automatic_differentiation(tiles, options):
    # A learned range in LSQ is an ordinary parameter: autograd needs no formula of the paper.
    scheme = AnalogScheme(range_gradient="lsq", **options)
    compared = 0
    for seed in range(8):
        x, weight, grad = draw(seed)
        ranges = torch.linspace(1.1, 1.7, len(tiles))
        ours = [t.clone().requires_grad_() for t in (x, weight, ranges)]
        theirs = [t.double().requires_grad_() for t in (x, weight, ranges)]
        y = product(*ours, scheme, tiles)
        expected = differentiable(*theirs, scheme, tiles)
        y.backward(grad)
        expected.backward(grad.double())
        if float((y.double() - expected).detach().abs().max()) > 1e-4:
            continue  # an ADC or DAC tie fell differently in fp32; another draw has none
        compared += 1
        for mine, other in zip(ours, theirs, strict=True):
            if scheme.input_bits is None and mine is ours[2]:
                continue
            difference = (mine.grad.double() - other.grad).norm()
            assert float(difference) < 3e-5 * float(other.grad.norm())
    assert compared >= 4


@pytest.mark.parametrize("output_bits", [None, 8], ids=["no ADC", "ADC"])
@pytest.mark.parametrize("tiles", [[48], [16, 16, 16]], ids=["one tile", "3 tiles"])
def test_dynamic_inputs_are_converted_token_by_token(tiles, output_bits):
    scheme = AnalogScheme(input_range="dynamic", output_bits=output_bits)
    compared = 0
    for seed in range(8):
        x, weight, grad = draw(seed)
        x[3] = 0
        ours = [t.clone().requires_grad_() for t in (x, weight)]
        theirs = [t.double().requires_grad_() for t in (x, weight)]
        y = product(*ours, torch.ones(len(tiles)), scheme, tiles)
        tokens = []
        for row in theirs[0].split(1):
            # A hair wider, so that the clamp passes the gradient of the maximum itself.
            peaks = [b.detach().abs().max() * (1 + 1e-12) + 1e-30 for b in row.split(tiles, 1)]
            tokens.append(differentiable(row, theirs[1], peaks, scheme, tiles))
        expected = torch.cat(tokens)
        assert torch.equal(y[3], torch.zeros(13))
        if float((y.double() - expected).detach().abs().max()) > 1e-4:
            continue  # an ADC or DAC tie fell differently in fp32; another draw has none
        compared += 1
        y.backward(grad)
        expected.backward(grad.double())
        for mine, other in zip(ours, theirs, strict=True):
            difference = (mine.grad.double() - other.grad).norm()
            assert float(difference) < 3e-5 * float(other.grad.norm())
    assert compared >= 4


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 12), st.floats(0.05, 30))
def test_output_stays_within_the_bound_of_its_converters(seed, input_bits, output_bits, value):
    scheme = AnalogScheme(input_bits=input_bits, output_bits=output_bits, out_bound=2.0)
    tiles = [16, 16, 16]
    x, weight, _ = draw(seed)
    y = product(x * 10, weight, torch.full((3,), value), scheme, tiles)
    bound = 2.0 * value * column_maximum(weight, tiles).sum(0)
    assert bool((y.abs() <= bound * (1 + 1e-5)).all())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(-20, 20))
def test_scaling_the_weights_by_a_power_of_two_scales_the_outputs(seed, exponent):
    x, weight, _ = draw(seed)
    args = (torch.tensor([2.0, 1.0]), AnalogScheme(), [24, 24])
    scaled = product(x, weight * 2.0**exponent, *args)
    assert torch.equal(scaled, product(x, weight, *args) * 2.0**exponent)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_the_product_is_odd_in_its_inputs(seed):
    x, weight, _ = draw(seed)
    args = (weight, torch.tensor([2.0]), AnalogScheme(), [48])
    assert torch.equal(product(-x, *args), -product(x, *args))


def test_tiles_of_zero_weights_or_zero_inputs_add_nothing():
    x, weight, _ = draw(0)
    weight[:, 16:32] = 0
    x[:, 32:] = 0
    ranges = torch.tensor([1.0, 2.0, 3.0])
    three = product(x, weight, ranges, AnalogScheme(), [16, 16, 16])
    alone = product(x[:, :16], weight[:, :16], ranges[:1], AnalogScheme(), [16])
    assert torch.equal(three, alone)


def test_dimensions_before_the_last_are_tokens():
    x, weight, _ = draw(0, tokens=24)
    args = (weight, torch.tensor([2.0]), AnalogScheme(), [48])
    flat = product(x, *args)
    assert torch.equal(product(x.view(2, 3, 4, 48), *args), flat.view(2, 3, 4, 13))
    assert product(x[0], *args).shape == (13,)


@pytest.mark.parametrize("tiles", [[48], [16, 16, 16]], ids=["one tile", "3 tiles"])
def test_the_memory_order_of_inputs_does_not_matter(tiles):
    x, weight, grad = draw(0)
    ranges = torch.ones(len(tiles))
    results = []
    for rows in (x.clone(), x.t().contiguous().t()):  # equal values, other strides
        leaf = rows.requires_grad_()
        y = product(leaf, weight, ranges, AnalogScheme(), tiles)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    for plain, transposed in zip(*results, strict=True):
        torch.testing.assert_close(transposed, plain)


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48)], ids=["no rows", "no positions"])
def test_an_empty_batch_gives_an_empty_output(shape):
    # An expert of a mixture that no token was routed to.
    _, weight, _ = draw(0)
    weight.requires_grad_()
    y = product(torch.zeros(shape), weight, torch.ones(3), AnalogScheme(), [16, 16, 16])
    assert y.shape == (*shape[:-1], 13)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(13, 48))


def test_the_incoming_gradient_is_left_as_it_is():
    x, weight, grad = draw(0)
    x.requires_grad_()
    kept = grad.clone()
    scheme = AnalogScheme(out_bound=0.5)  # saturates, so that gradients are masked
    product(x, weight, torch.tensor([0.5]), scheme, [48]).backward(grad)
    assert torch.equal(grad, kept)


def test_gradients_can_be_taken_twice_from_one_forward():
    x, weight, grad = draw(0)
    x.requires_grad_()
    weight.requires_grad_()
    y = product(x, weight, torch.ones(3), AnalogScheme(), [16, 16, 16])
    first = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight), grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_an_input_on_the_range_counts_into_its_gradient_and_one_inside_does_not():
    weight = torch.ones(1, 2)
    for inputs, expected in (((2.0, 0.0), -2.0), ((-2.0, 0.0), 0.0), ((1.99, -1.99), 0.0)):
        ranges = torch.tensor([2.0], requires_grad=True)
        scheme = AnalogScheme(output_bits=None)
        y = product(torch.tensor([inputs]), weight, ranges, scheme, [2])
        y.backward(torch.tensor([[-1.0]]))  # g = -1: growing the output lowers the loss
        assert float(ranges.grad) == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from([[48], [16, 16, 16]]))
def test_fake_quantized_columns_hold_few_values_and_their_maximum(seed, bits, tiles):
    _, weight, _ = draw(seed)
    weight[2] = 0
    peaks = column_maximum(weight, tiles)
    out = fake_quantize_columns(weight, peaks, tiles, bits)
    assert torch.equal(out[2], torch.zeros(48))
    torch.testing.assert_close(column_maximum(out, tiles), peaks, rtol=1e-6, atol=0)
    blocks = zip(out.split(tiles, 1), weight.split(tiles, 1), peaks, strict=True)
    for block, exact, peak in blocks:
        assert all(len(row.unique()) <= 2**bits - 1 for row in block)
        step = (peak / (2 ** (bits - 1) - 1))[:, None]
        assert bool(((block - exact).abs() <= step / 2 * (1 + 1e-5)).all())


def test_column_maxima_are_those_of_each_tile():
    _, weight, _ = draw(0)
    weight[0] = -weight[0].abs()
    expected = torch.stack([weight[:, :5].abs().amax(1), weight[:, 5:].abs().amax(1)])
    assert torch.equal(column_maximum(weight, [5, 43]), expected)


def test_a_nan_in_one_row_leaves_the_gradients_of_others_alone():
    scheme, ranges = AnalogScheme(out_bound=0.5), torch.tensor([2.0])
    x, weight, grad = draw(0)
    grad[0] = 0
    made = []
    for first in (x[0], x[0] * float("nan")):
        rows = torch.cat([first[None], x[1:]]).requires_grad_()
        product(rows, weight, ranges, scheme, [48]).backward(grad)
        made.append(rows.grad[1:])
    assert torch.equal(*made)


def test_float64_keeps_its_precision():
    x, weight, _ = (t.double() for t in draw(0))
    scheme = AnalogScheme(input_bits=None, output_bits=None)
    for tiles in ([48], [16, 32]):
        y = product(x, weight, torch.ones(len(tiles)), scheme, tiles)
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bound", [0.05, 0.8, 3.0], ids=["most", "many", "few"])
def test_however_many_outputs_saturate_their_gradient_is_zero(bound):
    scheme, ranges = AnalogScheme(out_bound=bound), torch.tensor([2.0])
    x, weight, grad = draw(3, inputs=48, outputs=16, tokens=32)
    leaf = x.clone().requires_grad_()
    y = product(leaf, weight, ranges, scheme, [48])
    y.backward(grad)
    limit = bound * 2.0 * column_maximum(weight, [48])[0]
    codes = (x.clamp(-2, 2) / (2 / 127)).round() * (2 / 127)
    passed = ((codes @ weight.T) * 127 / limit).round().abs() <= 127
    expected = ((grad * passed) @ weight) * (x.abs() <= 2)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)
