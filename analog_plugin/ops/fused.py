"""The analog product on a GPU: what surrounds the matrix products is one kernel for each pass.

Where :mod:`~analog_plugin.ops.matmul` keeps codes and the places of what was clipped, which a GPU
would have to search for and be waited for, this keeps the inputs, as a digital layer does, and
digitizes them again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analog_plugin.ops.converters import adc_step, input_full_scale
from analog_plugin.ops.device import has_kernels
from analog_plugin.ops.products import product, product_as
from analog_plugin.ops.weights import tile_bounds, training_weight

# Rows of a block, its columns, and its columns by eights.
_ROWS, _BLOCK, _GROUPS = 2, 1024, 128
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuses(x: Tensor, weight: Tensor, context: Any) -> bool:
    """Whether :func:`fused_matmul` computes this product."""
    scheme = context.scheme
    return (
        scheme.input_bits is not None
        and scheme.input_range != "dynamic"
        and not any(context.disturbances)
        and x.dtype in _TYPES
        and (context.dtype or weight.dtype) in _TYPES
        and x.numel() > 0
        and has_kernels(x.device, context.tiles)
    )


def fused_matmul(
    x: Tensor, weight: Tensor, input_range: Tensor, column_max: Tensor, context: Any
) -> Tensor:
    """The product of :func:`~analog_plugin.ops.matmul.analog_matmul`, with its gradients."""
    return _FusedMatmul.apply(x, weight, input_range, column_max, context)


class _FusedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, input_range, column_max, context):  # type: ignore[no-untyped-def]
        tiles, dtype = context.tiles, context.dtype or weight.dtype
        context.dtype = dtype
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        for_backward = context.keep and any(ctx.needs_input_grad[:3])
        again = for_backward and context.training and not context.keep_noise
        ctx.noise_state = context.generator.get_state() if again else None
        noisy = context.tile_weights(weight, column_max)
        inputs = _digitize(rows, input_range, context)
        if len(tiles) == 1:
            products = product_as(inputs, noisy.t(), dtype)
        else:
            products = torch.empty(len(tiles), len(rows), len(noisy), dtype=dtype, device=x.device)
            for k, (start, end) in enumerate(tile_bounds(tiles)):
                product(inputs[:, start:end], noisy[:, start:end].t(), products[k])
        out, marks = _convert(products, input_range, column_max, context, for_backward)
        ctx.analog, ctx.shape = context, x.shape
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        if for_backward:
            # A copy of the range: it may be initialised again before this backward runs.
            kept = (weight, column_max) if again else (noisy, None)
            ctx.save_for_backward(rows, *kept, input_range.clone(), marks)
        return out.view(*x.shape[:-1], len(noisy))

    @staticmethod
    def backward(ctx: Any, *outer):  # type: ignore[no-untyped-def]
        context = ctx.analog
        tiles, dtype = context.tiles, context.dtype
        rows, noisy, column_max, input_range, marks = ctx.saved_tensors
        if ctx.noise_state is not None:
            generator = torch.Generator(noisy.device)
            generator.set_state(ctx.noise_state)
            noisy = training_weight(noisy, column_max, tiles, context.scheme, generator, dtype)
        need_x, need_w, need_range = ctx.needs_input_grad[:3]
        grad = outer[0].reshape(-1, len(noisy)).to(dtype).contiguous()
        grads = [grad] if marks is None else [_masked(grad, marked) for marked in marks]
        grad_x = grad_w = inputs = None
        if need_x or need_range:
            grad_x = _by_tiles(grads, noisy, tiles, dtype)
        if need_w:
            inputs = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        grad_range = _undo(rows, grad_x, inputs, input_range, context, need_range)
        if inputs is not None:
            grad_w = _by_tiles([block.t() for block in grads], inputs, tiles, ctx.weight_dtype)
        if not need_x:
            grad_x = None
        elif grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.shape)
        return grad_x, grad_w, grad_range, None, None


def _by_tiles(lefts: list[Tensor], right: Tensor, tiles: list[int], dtype: torch.dtype) -> Tensor:
    """Products with each tile's columns of ``right``: ``lefts`` is one for each, or one for all."""
    if len(lefts) == 1:
        return product_as(lefts[0], right, dtype)
    out = torch.empty(lefts[0].shape[0], right.shape[1], dtype=dtype, device=right.device)
    for left, (start, end) in zip(lefts, tile_bounds(tiles), strict=True):
        product(left, right[:, start:end], out[:, start:end])
    return out


def _digitize(rows: Tensor, input_range: Tensor, context: Any) -> Tensor:
    """DAC of [T, in]; counts what is clipped."""
    from analog_plugin.ops import kernels

    made = torch.empty(rows.shape, dtype=context.dtype, device=rows.device)
    counts, mask = context.clip_counts, context.row_mask
    full = input_full_scale(context.scheme, context.dtype)
    kernels.launch(
        kernels.digitize, _grid(rows, context.tiles),
        rows, input_range, rows if mask is None else mask.to(torch.uint8).contiguous(), made,
        rows if counts is None else counts, *_sizes(rows, context),
        full, EVEN=_even(context), WHOLE=full == 1.0, COUNT=counts is not None,
        MASKED=mask is not None, ROWS=_ROWS, BLOCK=_BLOCK,
    )  # fmt: skip
    return made


def _convert(
    products: Tensor, input_range: Tensor, column_max: Tensor, context: Any, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """ADC of all tiles' products [K, T, out]: their sum [T, out], and marks of the saturated.

    Of one tile [T, out] will do.
    """
    from analog_plugin.ops import kernels

    scheme, tiles = context.scheme, len(context.tiles)
    tokens, columns = products.shape[-2:]
    adc = scheme.output_bits is not None
    full = input_full_scale(scheme, context.dtype)
    step = adc_step(scheme) if adc else 0.0
    out = torch.empty(tokens, columns, dtype=context.dtype, device=products.device)
    marks = None
    if adc and for_backward:
        size = tiles, tokens, -(-columns // 8)
        marks = torch.empty(size, dtype=torch.uint8, device=products.device)
    kernels.launch(
        kernels.convert, _grid_of_bytes(out),
        products, column_max.contiguous(), input_range, out, out if marks is None else marks,
        tokens, columns, float(scheme.output_levels or 0), step / full, step, full,
        float(scheme.input_levels), TILES=tiles, ADC=adc, MARK=marks is not None,
        ROWS=_ROWS, GROUPS=_GROUPS,
    )  # fmt: skip
    return out, marks


def _masked(grad: Tensor, marks: Tensor) -> Tensor:
    """``grad`` [T, out] with zeros where ``marks`` [T, ceil(out / 8)] has a bit."""
    from analog_plugin.ops import kernels

    out = torch.empty_like(grad)
    kernels.launch(
        kernels.mask_outputs, _grid_of_bytes(grad), grad, marks, out, *grad.shape, ROWS=_ROWS,
        GROUPS=_GROUPS,
    )  # fmt: skip
    return out


def _undo(
    rows: Tensor,
    grad_x: Tensor | None,
    inputs: Tensor | None,
    input_range: Tensor,
    context: Any,
    need_range: bool,
) -> Tensor | None:
    """Inputs [T, in] as quantized, into ``inputs``; zeros beyond the range, into ``grad_x``.

    Returns:
        The range's gradient [K], if needed.
    """
    from analog_plugin.ops import kernels

    grid = _grid(rows, context.tiles)
    # Summed in one order whatever runs first.
    sums = input_range.new_empty(grid[1], grid[0] * grid[2]) if need_range else None
    kernels.launch(
        kernels.undo_inputs, grid,
        rows, rows if grad_x is None else grad_x, input_range, rows if inputs is None else inputs,
        rows if sums is None else sums, *_sizes(rows, context), EVEN=_even(context),
        INPUTS=inputs is not None, GRAD=grad_x is not None, RANGE=need_range,
        LSQ=context.scheme.range_gradient == "lsq", ROWS=_ROWS, BLOCK=_BLOCK,
    )  # fmt: skip
    return None if sums is None else sums.sum(1)


def _sizes(rows: Tensor, context: Any) -> tuple[int, int, int, int, float]:
    """Tokens, inputs, the rows of a tile and how many tiles have one more, and DAC levels."""
    tokens, width = rows.shape
    return tokens, width, *divmod(width, len(context.tiles)), float(context.scheme.input_levels)


def _even(context: Any) -> bool:
    """Whether all tiles have as many rows."""
    return context.tiles[0] == context.tiles[-1]


def _grid(rows: Tensor, tiles: list[int]) -> tuple[int, int, int]:
    return -(-rows.shape[0] // _ROWS), len(tiles), -(-tiles[0] // _BLOCK)


def _grid_of_bytes(values: Tensor) -> tuple[int, int, int]:
    return -(-values.shape[0] // _ROWS), -(-values.shape[1] // (8 * _GROUPS)), 1
