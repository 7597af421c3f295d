"""The analog product: DAC, noisy weights, matrix product, ADC, tile by tile, with its gradients.

Notation (shapes): T tokens, K tiles; ``x`` [T, in], ``weight`` [out, in], ``input_range`` λ [K],
``column_max`` m [K, out]. Source: 'Analog Foundation Models' (arXiv 2505.09663), section 3, and the
semantics of aihwkit-lightning 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from analog_plugin.ops.disturbance import Disturbances, disturb
from analog_plugin.scheme import AnalogScheme

_TINY = torch.finfo(torch.float32).tiny


@dataclass
class MatmulContext:
    """What one analog product needs beside its tensors.

    Args:
        scheme: Converters and noise.
        tiles: Rows of each tile; they add up to ``in``.
        noise: Generator of the weight noise; None: no weight noise.
        row_mask: [T] bool, False where a token is padding; None: all count.
        clip_counts: [K, 2] int64, increased by (clipped, all) inputs; None: do not count.
        dtype: Type of the matrix products; None: the weight's.
        keep: Whether to keep what a backward needs.
        sampled: Draw noise from torch's global generator (``noise`` is then None).
        disturbances: Of each tile, what changes its outputs before the ADC, or None; empty: of no
            tile. No gradient passes through them.
    """

    scheme: AnalogScheme
    tiles: list[int]
    noise: torch.Generator | None = None
    sampled: bool = False
    row_mask: Tensor | None = None
    clip_counts: Tensor | None = None
    dtype: torch.dtype | None = None
    keep: bool = field(default_factory=torch.is_grad_enabled)
    disturbances: Sequence[Disturbances | None] = ()
    bounds: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        ends = list(accumulate(self.tiles))
        self.bounds = list(zip([0, *ends[:-1]], ends, strict=True))


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
    return _AnalogMatmul.apply(x, weight, input_range, column_max, context)


def column_maximum(weight: Tensor, tiles: list[int]) -> Tensor:
    """Largest magnitude per tile and column: ``weight`` [out, in] to [K, out]."""
    return torch.stack([_magnitude(block, 1) for block in weight.split(tiles, dim=1)])


def _magnitude(values: Tensor, *dims: int) -> Tensor:
    """Largest magnitude over ``dims``, or over all; faster than aminmax, abs or a norm."""
    return torch.maximum(values.amax(dims), -values.amin(dims))


def fake_quantize_columns(
    weight: Tensor, column_max: Tensor, tiles: list[int], bits: int
) -> Tensor:
    """Round weights [out, in] to symmetric codes, one scale per tile and column.

    The scale is ``column_max / (2**(bits-1) - 1)``; an all-zero column stays zero.
    """
    levels = 2 ** (bits - 1) - 1
    blocks = []
    for block, peak in zip(weight.split(tiles, dim=1), column_max, strict=True):
        scale = (peak.float() / levels).clamp_min(_TINY)[:, None]
        blocks.append((block / scale).round().clamp_(-levels, levels).mul_(scale).to(weight.dtype))
    return torch.cat(blocks, dim=1)


def _noisy_weight(weight: Tensor, column_max: Tensor, context: MatmulContext) -> Tensor:
    """W + γ · m · ε in the type of the products; W itself (no copy) where there is no noise."""
    scheme, dtype = context.scheme, context.dtype
    if scheme.weight_bits is not None and (context.sampled or context.noise is not None):
        weight = fake_quantize_columns(weight, column_max, context.tiles, scheme.weight_bits)
    if scheme.weight_noise == 0 or not (context.sampled or context.noise is not None):
        return weight.to(dtype)
    noise = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    noise.normal_(generator=context.noise)
    for (start, end), peak in zip(context.bounds, column_max, strict=True):
        sigma = (scheme.weight_noise * peak)[:, None]
        block = noise[:, start:end]
        if dtype == weight.dtype:
            torch.addcmul(weight[:, start:end], block, sigma, out=block)
        else:  # add in the weight's precision, round once
            block.copy_(torch.addcmul(weight[:, start:end], block.to(weight.dtype), sigma))
    return noise


class _AnalogMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, input_range, column_max, context):  # type: ignore[no-untyped-def]
        scheme = context.scheme
        dtype = context.dtype = context.dtype or weight.dtype
        rows = x.reshape(-1, x.shape[-1])
        noisy = _noisy_weight(weight, column_max, context)
        need_x, need_w, need_range = ctx.needs_input_grad[:3]
        training = context.keep and (need_x or need_w or need_range)

        inputs, codes, scales, clipped = _digitize_inputs(rows, input_range, context, training)
        full = 1.0 if scheme.input_bits is None else 2.0 ** (scheme.input_bits - 1)
        out, saturated = None, []
        for k, (start, end) in enumerate(context.bounds):
            block = inputs[:, start:end] @ noisy[:, start:end].t()
            disturbances = context.disturbances[k] if context.disturbances else None
            if disturbances is not None:
                tile = inputs[:, start:end], noisy[:, start:end]
                block = disturb(block, *tile, scheme, disturbances)
            if scheme.output_bits is not None:
                assert scheme.out_bound is not None  # a layer refuses to run without
                block, mask = _convert_outputs(block, column_max[k], full, scheme, training)
                saturated.append(mask)
                step = scheme.out_bound * scheme.input_levels / scheme.output_levels
                factor = (column_max[k].float() * step) * scales[k]
            else:
                factor = scales[k] * full
            if out is None:
                single = len(context.tiles) == 1
                out = torch.empty(
                    block.shape, dtype=dtype if single else torch.float32, device=block.device
                )
                torch.mul(block, factor, out=out)
            else:
                out.addcmul_(block.float(), factor.expand(block.shape))
        ctx.analog, ctx.shape, ctx.clipped, ctx.saturated = context, x.shape, clipped, saturated
        ctx.scales = scales
        if training:
            keep_x = rows if scheme.range_gradient == "lsq" and need_range else None
            # A copy: the range may be initialised again before this backward runs.
            ctx.save_for_backward(codes, noisy, input_range.clone(), keep_x)
        ctx.weight_dtype = weight.dtype
        ctx.x_dtype = x.dtype
        assert out is not None  # a layer has at least one tile
        return out.to(dtype).view(*x.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        context, scheme = ctx.analog, ctx.analog.scheme
        codes, noisy, input_range, kept_x = ctx.saved_tensors
        need_x, need_w, need_range = ctx.needs_input_grad[:3]
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(context.dtype)
        grad_x = grad_w = grad_range = None
        scales = torch.cat(
            [s.expand(s.shape[0], n) for s, n in zip(ctx.scales, context.tiles, strict=True)], dim=1
        )
        masked = any(mask is not None for mask in ctx.saturated)
        blocks = context.bounds if masked else [(0, codes.shape[1])]
        if need_x or need_range:
            grad_x = torch.empty(codes.shape, dtype=context.dtype, device=codes.device)
        if need_w:
            # fp32 weights under autocast get fp32 gradients from half-precision products.
            grad_w = torch.empty_like(noisy, dtype=ctx.weight_dtype)
            inputs = torch.empty(codes.shape, dtype=context.dtype, device=codes.device)
            torch.mul(codes, scales, out=inputs)
        for k, (start, end) in enumerate(blocks):
            mask = ctx.saturated[k] if masked else None
            block = grad if mask is None else grad.masked_fill(mask, 0)
            if grad_x is not None:
                _product(block, noisy[:, start:end], grad_x[:, start:end])
            if grad_w is not None:
                _product(block.t(), inputs[:, start:end], grad_w[:, start:end])
        if grad_x is not None and scheme.input_levels is not None and ctx.clipped is not None:
            grad_range = _clip_gradients(grad_x, codes, kept_x, input_range, ctx, need_range)
        if not need_x:
            grad_x = None
        elif grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.shape)
        return grad_x, grad_w, grad_range, None, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out[...] = a @ b``; ``out`` may be a strided block or of another type."""
    b = b.to(a.dtype)
    if out.dtype == a.dtype:
        torch.matmul(a, b, out=out)
    else:
        out.copy_(a @ b)


def _digitize_inputs(
    rows: Tensor, input_range: Tensor, context: MatmulContext, training: bool
) -> tuple[Tensor, Tensor | None, list[Tensor], list[tuple[Tensor, Tensor]] | None]:
    """DAC: what is multiplied [T, in], its codes, each tile's scale, and which inputs were clipped.

    Multiplied are codes as fractions of ``2**(bits - 1)``, exact in every type: products of whole
    codes leave the range of fp16. Whole codes, one byte each up to 8 bits, are kept for a backward.
    A clipped input is kept as its flat index within the tile, and whether it lies beyond the range
    (rather than on it). Codes are computed in fp32: half precision gets several percent of them
    wrong.
    """
    scheme, levels = context.scheme, context.scheme.input_levels
    if scheme.input_bits is None or levels is None:
        one = rows.new_ones((1, 1), dtype=torch.float32)
        inputs = rows.to(context.dtype)
        return inputs, inputs, [one] * len(context.tiles), None
    inputs = torch.empty(rows.shape, dtype=context.dtype, device=rows.device)
    whole = torch.int8 if scheme.input_bits <= 8 else torch.int16
    codes = torch.empty(rows.shape, dtype=whole, device=rows.device) if training else None
    scales: list[Tensor] = []
    clipped: list[tuple[Tensor, Tensor]] = []
    dynamic = scheme.input_range == "dynamic"
    for k, (start, end) in enumerate(context.bounds):
        block = rows[:, start:end]
        if dynamic:
            scale = (block.float().abs().amax(1, keepdim=True) / levels).clamp_min_(_TINY)
        else:
            scale = (input_range[k].float() / levels).view(1, 1)
        scales.append(scale)
        code = torch.div(block.float(), scale).round_().clamp_(-levels, levels)
        torch.mul(code, 2.0 ** (1 - scheme.input_bits), out=inputs[:, start:end])
        if codes is not None:
            codes[:, start:end] = code
        if not training or dynamic:
            continue
        # Only codes at the ends can be clipped inputs; few are, so look at those alone.
        index = (code.abs_() >= levels).reshape(-1).nonzero().squeeze(1)
        values = block[index // (end - start), index % (end - start)].float().abs()
        on_or_beyond = values >= input_range[k]
        index = index[on_or_beyond]
        clipped.append((index, values[on_or_beyond] > input_range[k]))
        if context.clip_counts is not None:
            _count_clipped(context, k, index, end - start, rows.shape[0])
    return inputs, codes, scales, None if dynamic else clipped


def _count_clipped(context: MatmulContext, k: int, index: Tensor, width: int, tokens: int) -> None:
    assert context.clip_counts is not None
    if context.row_mask is None:
        context.clip_counts[k, 0] += index.numel()
        context.clip_counts[k, 1] += tokens * width
    else:
        context.clip_counts[k, 0] += context.row_mask[index // width].sum()
        context.clip_counts[k, 1] += context.row_mask.sum() * width


def _convert_outputs(
    block: Tensor, column_max: Tensor, full: float, scheme: AnalogScheme, training: bool
) -> tuple[Tensor, Tensor | None]:
    """ADC: products [T, out] of inputs that are codes / ``full`` to integer ADC codes.

    Also returns the mask of saturated ones, or None where there is none.
    """
    assert scheme.input_levels is not None and scheme.output_levels is not None
    assert scheme.out_bound is not None
    levels = scheme.output_levels
    unit = column_max.float() * (scheme.out_bound * scheme.input_levels / levels / full)
    inverse = torch.where(unit > 0, 1.0 / unit.clamp_min(_TINY), 0.0)
    block = (
        torch.mul(block, inverse).round_()
        if block.dtype != torch.float32
        else block.mul_(inverse).round_()
    )
    mask = None
    # Extremes cost a fraction of a mask, but on a GPU they would have to be waited for.
    if training and (block.is_cuda or (block.numel() and _magnitude(block) > levels)):
        mask = block.abs() > levels
    return block.clamp_(-levels, levels), mask


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
    context = ctx.analog
    levels = context.scheme.input_levels
    lsq = context.scheme.range_gradient == "lsq"
    grad_range = torch.zeros_like(input_range) if need_range else None
    for k, (start, end) in enumerate(context.bounds):
        index, beyond = ctx.clipped[k]
        row, column = index // (end - start), start + index % (end - start)
        if grad_range is not None:
            outward = grad_x[row, column].float() * codes[row, column].sign().float()
            if lsq:
                assert kept_x is not None
                residual = codes[:, start:end] - kept_x[:, start:end].float() / ctx.scales[k]
                residual[row, column - start] = 0
                inside = (residual * grad_x[:, start:end]).sum() / levels
                grad_range[k] = outward.sum() + inside
            else:
                grad_range[k] = outward.clamp_(max=0).sum() * input_range[k]
        grad_x[row[beyond], column[beyond]] = 0
    return grad_range
