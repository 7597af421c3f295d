"""The analog product for ``torch.compile``: whole tensors and no step that depends on values.

What :mod:`~analog_plugin.ops.matmul` does in place and from few indices would break a graph; here
the compiler fuses the operations, and decides what to keep for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analog_plugin.ops.converters import adc_gain, adc_step, at_least_fp32, input_full_scale
from analog_plugin.ops.disturbance import disturb
from analog_plugin.ops.matmul import MatmulContext

_TINY = torch.finfo(torch.float32).tiny


def traced_matmul(
    x: Tensor,
    weight: Tensor,
    input_range: Tensor,
    column_max: Tensor,
    context: MatmulContext,
) -> Tensor:
    """As :func:`~analog_plugin.ops.matmul.analog_matmul`, but of weights as the tiles have them.

    ``weight`` [out, in] is noisy already where it is to be noisy.
    """
    scheme, tiles = context.scheme, context.tiles
    dtype = context.dtype or weight.dtype
    wide = at_least_fp32(dtype)
    rows = x.reshape(-1, x.shape[-1])
    blocks = weight.split(tiles, dim=1)
    out: Tensor | None = None
    start = 0
    for k, width in enumerate(tiles):
        part = slice(start, start + width)
        start += width
        inputs, scale = _digitize(rows[:, part].to(wide), input_range[k].to(wide), k, context)
        peak, block = column_max[k].to(wide), blocks[k]
        full = input_full_scale(scheme, dtype)
        inputs = (inputs / full).to(dtype)
        product = inputs @ block.to(dtype).t()
        disturbances = context.disturbances[k] if context.disturbances else None
        if disturbances is not None:
            disturbed = disturb(product, inputs, block, scheme, disturbances)
            product = product + (disturbed - product).detach()
        product = product.to(wide)
        if scheme.output_levels is None:
            product = product * (scale * full)
        else:
            code = _round(product * adc_gain(peak, scheme, dtype))
            code = code.clamp(-scheme.output_levels, scheme.output_levels)
            product = code * (peak * adc_step(scheme) * scale)
        out = product if out is None else out + product
    assert out is not None  # a layer has at least one tile
    return out.to(dtype).view(*x.shape[:-1], out.shape[1])


def _digitize(
    block: Tensor, input_range: Tensor, k: int, context: MatmulContext
) -> tuple[Tensor, Tensor]:
    """Codes [T, rows], and what one code stands for."""
    scheme, levels = context.scheme, context.scheme.input_levels
    if levels is None:
        return block, block.new_ones((1, 1))
    if scheme.input_range == "dynamic":
        peak = block.detach().abs().amax(1, keepdim=True).clamp_min(_TINY * levels)
        inputs = _round(block / (peak / levels)).clamp(-levels, levels)
        return inputs, peak / levels
    if context.clip_counts is not None:
        at_end = (block.detach().abs() >= input_range).sum(1)
        counted = torch.ones_like(at_end) if context.row_mask is None else context.row_mask
        context.clip_counts[k, 0] += (at_end * counted).sum()
        context.clip_counts[k, 1] += counted.sum() * block.shape[1]
    scale = input_range.detach() / levels
    codes = _Digitize.apply(block, input_range, levels, scheme.range_gradient == "lsq")
    return codes, scale.view(1, 1)


def _round(values: Tensor) -> Tensor:
    """Round; the gradient passes straight through. The sum is exact."""
    return values + (values.round() - values).detach()


class _Digitize(torch.autograd.Function):
    """Codes of inputs [T, rows], with the gradients of :mod:`~analog_plugin.ops.matmul`."""

    @staticmethod
    def forward(ctx: Any, x, input_range, levels, lsq):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, input_range)
        ctx.levels, ctx.lsq = levels, lsq
        return (x / (input_range / levels)).round().clamp(-levels, levels)

    @staticmethod
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        x, input_range = ctx.saved_tensors
        scale = input_range / ctx.levels
        grad = grads[0] / scale  # that at the quantized input
        outward, outside = grad * x.sign(), x.abs() >= input_range
        if ctx.lsq:
            residual = ((x / scale).round() - x / scale) / ctx.levels
            grad_range = torch.where(outside, outward, grad * residual).sum()
        else:
            grad_range = torch.where(outside, outward, 0.0).clamp(max=0).sum() * input_range
        return torch.where(x.abs() > input_range, 0.0, grad), grad_range, None, None
