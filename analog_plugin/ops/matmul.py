"""The analog product: DAC, noisy weights, matrix product, ADC, tile by tile, with its gradients.

Notation (shapes): T tokens, K tiles; ``x`` [T, in], ``weight`` [out, in], ``input_range`` λ [K],
``column_max`` m [K, out]. Source: 'Analog Foundation Models' (arXiv 2505.09663), section 3, and the
semantics of aihwkit-lightning 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analog_plugin.ops.converters import (
    Digitized,
    adc_step,
    at_least_fp32,
    convert_outputs,
    count_clipped,
    digitize_inputs,
    input_full_scale,
)
from analog_plugin.ops.disturbance import Disturbances, disturb
from analog_plugin.ops.fused import fused_matmul, fuses
from analog_plugin.ops.memory import large_empty
from analog_plugin.ops.products import product
from analog_plugin.ops.weights import tile_bounds, training_weight
from analog_plugin.scheme import AnalogScheme


@dataclass
class MatmulContext:
    """What one analog product needs beside its tensors.

    Args:
        scheme: Converters and noise.
        tiles: Rows of each tile; they add up to ``in``.
        training: Whether weights are rounded and noisy as in training.
        generator: Source of the training noise; None: torch's global generator.
        keep_noise: False: the backward draws the noise again instead of keeping W̃; ``generator``
            is then needed, and the weights must not change in between.
        noisy: [out, in] W̃ drawn before, in ``dtype``; None: draw it now.
        row_mask: [T] bool, False where a token is padding; None: all count.
        clip_counts: [K, 2] int64, increased by (clipped, all) inputs; None: do not count.
        dtype: Type of the matrix products; None: the weight's.
        keep: Whether to keep what a backward needs.
        disturbances: Of each tile, what changes its outputs before the ADC, or None; empty: of no
            tile. No gradient passes through them.
    """

    scheme: AnalogScheme
    tiles: list[int]
    training: bool = False
    generator: torch.Generator | None = None
    keep_noise: bool = True
    noisy: Tensor | None = None
    row_mask: Tensor | None = None
    clip_counts: Tensor | None = None
    dtype: torch.dtype | None = None
    keep: bool = field(default_factory=torch.is_grad_enabled)
    disturbances: Sequence[Disturbances | None] = ()

    def tile_weights(self, weight: Tensor, column_max: Tensor) -> Tensor:
        """W̃ [out, in] in ``dtype``; W itself where nothing is to be done to it."""
        assert self.dtype is not None
        if self.noisy is not None:
            return self.noisy
        if not self.training:
            return weight.to(self.dtype)
        return training_weight(
            weight, column_max, self.tiles, self.scheme, self.generator, self.dtype
        )


def analog_matmul(
    x: Tensor, weight: Tensor, input_range: Tensor, column_max: Tensor, context: MatmulContext
) -> Tensor:
    """Multiply as analog tiles do, without the bias.

    Args:
        x: [..., in] inputs.
        weight: [out, in] weights, clean or programmed.
        input_range: [K] positive, fp32.
        column_max: [K, out] largest magnitude in each column of each tile, of the weights that
            scale the ADC and the noise.
        context: The scheme, the tiles and the noise of this call.

    Returns:
        [..., out], in ``context.dtype``. Gradients: straight through both roundings; zero for
        inputs beyond the range and for outputs beyond the ADC; the noise gets none.
    """
    if fuses(x, weight, context):
        return fused_matmul(x, weight, input_range, column_max, context)
    return _AnalogMatmul.apply(x, weight, input_range, column_max, context)


class _AnalogMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, input_range, column_max, context):  # type: ignore[no-untyped-def]
        scheme, tiles = context.scheme, context.tiles
        dtype = context.dtype = context.dtype or weight.dtype
        rows = x.reshape(-1, x.shape[-1])
        for_backward = context.keep and any(ctx.needs_input_grad[:3])
        again = for_backward and context.training and not context.keep_noise
        ctx.noise_state = context.generator.get_state() if again else None
        noisy = context.tile_weights(weight, column_max)

        made = digitize_inputs(rows, input_range, tiles, scheme, dtype, for_backward)
        if context.clip_counts is not None and made.clipped is not None:
            count_clipped(context.clip_counts, made.clipped, tiles, len(rows), context.row_mask)
        out, ctx.saturated = _tile_products(made, noisy, column_max, context, for_backward)
        ctx.analog, ctx.shape, ctx.x_dtype = context, x.shape, x.dtype
        ctx.weight_dtype = weight.dtype
        if for_backward:
            ctx.scales, ctx.clipped = made.scales, made.clipped
            needs_x = scheme.range_gradient == "lsq" and ctx.needs_input_grad[2]
            ctx.save_for_backward(
                made.codes,
                weight if again else noisy,
                column_max if again else None,
                # A copy: the range may be initialised again before this backward runs.
                input_range.clone(),
                rows if needs_x else None,
            )
        return out.to(dtype).view(*x.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        context, tiles = ctx.analog, ctx.analog.tiles
        codes, noisy, column_max, input_range, kept_x = ctx.saved_tensors
        if ctx.noise_state is not None:
            generator = torch.Generator(noisy.device)
            generator.set_state(ctx.noise_state)
            noisy = training_weight(
                noisy, column_max, tiles, context.scheme, generator, context.dtype
            )
        need_x, need_w, need_range = ctx.needs_input_grad[:3]
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(context.dtype)
        grad_x = grad_w = grad_range = None
        if need_x or need_range:
            grad_x = torch.empty(codes.shape, dtype=context.dtype, device=codes.device)
        if need_w:
            # fp32 weights under autocast get fp32 gradients from half-precision products.
            grad_w = large_empty(noisy.shape, ctx.weight_dtype, noisy.device)
            scales = [s.expand(s.shape[0], n) for s, n in zip(ctx.scales, tiles, strict=True)]
            inputs = torch.empty(codes.shape, dtype=context.dtype, device=codes.device)
            torch.mul(codes, ctx.scales[0] if len(tiles) == 1 else torch.cat(scales, 1), out=inputs)
        masked = any(marked is not None for marked in ctx.saturated)
        blocks = tile_bounds(tiles) if masked else [(0, codes.shape[1])]
        for k, (start, end) in enumerate(blocks):
            block = _without(grad, ctx.saturated[k] if masked else None)
            if grad_x is not None:
                product(block, noisy[:, start:end], grad_x[:, start:end])
            if grad_w is not None:
                product(block.t(), inputs[:, start:end], grad_w[:, start:end])
        if grad_x is not None and ctx.clipped is not None:
            grad_range = _clip_gradients(grad_x, codes, kept_x, input_range, ctx, need_range)
        if not need_x:
            grad_x = None
        elif grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.shape)
        return grad_x, grad_w, grad_range, None, None


def _tile_products(
    made: Digitized, noisy: Tensor, column_max: Tensor, context: MatmulContext, for_backward: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Sum of all tiles' outputs [T, out], and of each tile which are saturated."""
    scheme, full = context.scheme, input_full_scale(context.scheme, made.inputs.dtype)
    wide = at_least_fp32(noisy.dtype)
    out: Tensor | None = None
    saturated: list[Tensor | None] = []
    for k, (start, end) in enumerate(tile_bounds(context.tiles)):
        tile = made.inputs[:, start:end], noisy[:, start:end]
        block = tile[0] @ tile[1].t()
        disturbances = context.disturbances[k] if context.disturbances else None
        if disturbances is not None:
            block = disturb(block, *tile, scheme, disturbances)
        if scheme.output_bits is not None:
            block, marked = convert_outputs(block, column_max[k], scheme, for_backward)
            saturated.append(marked)
            factor = (column_max[k].to(wide) * adc_step(scheme)) * made.scales[k]
        else:
            factor = made.scales[k] * full
        if out is None:
            out = block.to(wide).mul_(factor)
        else:
            out.addcmul_(block.to(wide), factor.to(wide).expand(block.shape))
    assert out is not None  # a layer has at least one tile
    return out, saturated


def _without(grad: Tensor, saturated: Tensor | None) -> Tensor:
    """``grad`` [T, out] with zeros at what :func:`convert_outputs` found saturated."""
    if saturated is None:
        return grad
    if saturated.dtype == torch.int8:
        return grad.masked_fill(saturated.bool(), 0)
    return grad.contiguous().clone().view(-1).index_fill_(0, saturated.long(), 0).view(grad.shape)


def _clip_gradients(
    grad_x: Tensor,
    codes: Tensor,
    kept_x: Tensor | None,
    input_range: Tensor,
    ctx: Any,
    need_range: bool,
) -> Tensor | None:
    """Zero the gradient of inputs beyond their range (in place); return the range's gradient [K].

    Paper: ``λ · [Σ_{x≥λ} min(g, 0) - Σ_{x≤-λ} max(g, 0)]``, without the decay, which is applied
    once per optimizer step. LSQ: ``Σ g · sign(x)`` over clipped, ``Σ g · (q - x/s) / L`` over other
    inputs.
    """
    scheme, tiles = ctx.analog.scheme, ctx.analog.tiles
    grad_range = torch.zeros_like(input_range) if need_range else None
    flat_grad, flat_codes = grad_x.view(-1), codes.reshape(-1)
    for k, (start, end) in enumerate(tile_bounds(tiles)):
        places, width = ctx.clipped[k].places.long(), end - start
        at = (
            places if len(tiles) == 1 else places // width * codes.shape[1] + start + places % width
        )
        if grad_range is not None:
            outward = flat_grad[at].float() * flat_codes[at].sign()
            if scheme.range_gradient == "lsq":
                assert kept_x is not None
                residual = codes[:, start:end] - kept_x[:, start:end].float() / ctx.scales[k]
                residual.view(-1)[places] = 0
                inside = (residual * grad_x[:, start:end]).sum() / scheme.input_levels
                grad_range[k] = outward.sum() + inside
            else:
                grad_range[k] = outward.clamp_(max=0).sum() * input_range[k]
        flat_grad.index_fill_(0, at[ctx.clipped[k].beyond], 0)
    return grad_range
