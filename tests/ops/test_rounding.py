"""Weights to integer codes with one scale a row."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from analog_plugin.ops.rounding import quantize_rows, rounded_rows, row_scales

BITS = st.sampled_from([2, 3, 4, 8])


def weights(seed, rows=5, columns=33, heavy=False):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator)
    return made**3 if heavy else made


def error(weight, bits, scale):
    codes, unit = quantize_rows(weight, bits, scale)
    return (codes.double() * unit.double() - weight.double()).square().sum(1)


@given(BITS, st.integers(0, 999), st.sampled_from(["max", "mse"]))
@settings(max_examples=60, deadline=None)
def test_codes_are_whole_symmetric_and_the_nearest(bits, seed, scale):
    weight, levels = weights(seed), 2 ** (bits - 1) - 1
    codes, unit = quantize_rows(weight, bits, scale)
    assert codes.dtype == torch.int8 and unit.shape == (5, 1) and unit.dtype == torch.float32
    assert codes.abs().max() <= levels
    every = torch.arange(-levels, levels + 1).double() * unit.double()[..., None]
    nearest = (every - weight.double()[..., None]).abs().amin(-1)
    found = (codes.double() * unit.double() - weight.double()).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-6, atol=1e-6)


@given(BITS, st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_the_largest_weight_is_the_largest_code(bits, seed):
    weight = weights(seed)
    codes, unit = quantize_rows(weight, bits)
    assert torch.equal(codes.abs().amax(1), torch.full((5,), 2 ** (bits - 1) - 1, dtype=torch.int8))
    torch.testing.assert_close(unit[:, 0] * (2 ** (bits - 1) - 1), weight.abs().amax(1))


@given(BITS, st.integers(0, 999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_clipping_never_makes_the_squared_error_greater(bits, seed, heavy):
    weight = weights(seed, heavy=heavy)
    assert (error(weight, bits, "mse") <= error(weight, bits, "max") * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clipped_scale_is_within_a_percent_of_the_best_one(bits):
    weight, levels = weights(1, rows=16, columns=512), 2 ** (bits - 1) - 1
    exact, largest = weight.double(), weight.abs().amax(1, keepdim=True).double()
    tried = []
    for share in torch.linspace(0.05, 1, 2000).double():
        unit = largest * share / levels
        rounded = (exact / unit).round().clamp(-levels, levels) * unit
        tried.append((rounded - exact).square().sum(1))
    best = torch.stack(tried).amin(0)
    assert (error(weight, bits, "mse") <= best * 1.01).all()
    assert (error(weight, bits, "mse") < error(weight, bits, "max") * 0.9).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_scales_are_what_compressed_tensors_makes_of_them(bits):
    weight = weights(3)
    codes, unit = quantize_rows(weight, bits)
    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    zero = torch.zeros_like(unit)
    theirs = quantize(x=weight, scale=unit, zero_point=zero, args=arguments, dtype=torch.int8)
    assert torch.equal(codes, theirs)
    stored = dequantize(x_q=codes, scale=unit, zero_point=zero, args=arguments)
    assert torch.equal(stored, codes.float() * unit)


@pytest.mark.parametrize("scale", ["max", "mse"])
def test_rows_of_zeros_and_half_precision(scale):
    weight = weights(4).bfloat16()
    weight[2] = 0
    codes, unit = quantize_rows(weight, 4, scale)
    assert not codes[2].any() and bool((unit > 0).all()) and unit.dtype == torch.float32
    assert torch.equal(rounded_rows(weight, row_scales(weight, 4, scale), 4), codes.float() * unit)
