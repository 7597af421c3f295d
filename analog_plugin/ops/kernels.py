"""Kernels for GPUs: what surrounds the matrix products of analog tiles, each in one pass.

Written in Triton, which comes with torch's builds for GPUs; :mod:`~analog_plugin.ops.fused` calls
them. Arithmetic is that of the plain operators: fp32, division and rounding as IEEE 754 has them,
no products contracted into sums. Notation as in :mod:`~analog_plugin.ops.matmul`; a tile's first
row comes from ``base`` and ``extra``: the first ``extra`` tiles have ``base + 1`` rows, the others
``base``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Adding and taking it away rounds to a whole number, half to even, what is smaller than 2**22.
_ROUND = tl.constexpr(12582912.0)
_TINY = tl.constexpr(1.1754943508222875e-38)
# No product is contracted into a sum: codes are to be those of the plain operators.
_EXACT = {"enable_fp_fusion": False}
_compiled: dict[Any, Any] = {}


def launch(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """Run ``kernel`` on the device of its first argument.

    Triton's own way to a compiled kernel takes longer than most of these kernels run.
    """
    device = args[0].device
    if device.type == "cpu":
        kernel[grid](*args, **constants)  # interpreted
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, *args, **constants)
    values = tuple(constants.values())
    # By its address: to hash a kernel takes as long as to launch it.
    key = (id(kernel), device.index, values, *map(_specialized, args))
    if key not in _compiled:
        _compiled[key] = kernel.warmup(*args, *values, grid=grid, **_EXACT)
    _compiled[key][grid](*args, *values)


def _specialized(value: Any) -> Any:
    """What Triton compiles anew for: types, and what sizes and addresses are divisible by."""
    kind = type(value)
    if kind is int:
        return value == 1, value % 16 == 0, value < 2**31
    if kind is float or not isinstance(value, torch.Tensor):
        return float
    return value.dtype, value.data_ptr() % 16 == 0


@triton.jit
def _whole(x, levels):
    """``x`` rounded, as far as ``levels + 1``; NaN stays."""
    end = levels + 1.0
    x = tl.where(x > end, end, tl.where(x < -end, -end, x))
    return (x + _ROUND) - _ROUND


@triton.jit
def _clamped(x, end):
    return tl.where(x > end, end, tl.where(x < -end, -end, x))


@triton.jit
def draw(weight, peaks, seed, out, gamma, length, columns, base, extra, TILES: tl.constexpr,
         BY_ROW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``out = weight + gamma · peak · ε``, line by line as ``weight`` [lines, length] is stored.

    A line is a column of the tiles, or with ``BY_ROW``, as Conv1D stores weights, a row of them.
    Four normal numbers come of one Philox-4x32-10 by Box and Muller, for the four quarters of a
    line.
    """
    line = tl.program_id(0)
    quarter = (length + 63) // 64 * 16
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randn4x(tl.load(seed), line * quarter + place)
    for part in tl.static_range(4):
        if part == 0:
            noise = a
        elif part == 1:
            noise = b
        elif part == 2:
            noise = c
        else:
            noise = d
        along = part * quarter + place
        inside = (place < quarter) & (along < length)
        if BY_ROW:
            peak = tl.load(peaks + _tile(line, base, extra) * columns + along, mask=inside, other=0)
        elif TILES == 1:
            peak = tl.load(peaks + line)
        else:
            peak = tl.load(peaks + _tile(along, base, extra) * columns + line, mask=inside, other=0)
        at = line.to(tl.int64) * length + along
        clean = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, clean + (gamma * peak.to(tl.float32)) * noise, mask=inside)


@triton.jit
def _tile(row, base, extra):
    """The tile that a row is in."""
    large = extra * (base + 1)
    return tl.where(row < large, row // (base + 1), extra + (row - large) // base)


@triton.jit
def digitize(x, ranges, row_mask, out, counts, tokens, rows, base, extra, levels, full,
             EVEN: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """DAC of x [T, in]: codes over ``full``, or ``WHOLE`` codes.

    ``counts`` [K, 2] grow by (clipped, all) inputs of the tokens that ``row_mask`` [T] has.
    """
    tile = tl.program_id(1)
    start, width = tile * base, base
    if not EVEN:  # the compiler reads several numbers at once where it knows them to be aligned
        start += tl.minimum(tile, extra)
        width += (tile < extra).to(tl.int32)
    place = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ranges + tile)
    scale = tl.div_rn(end, levels)
    clipped = tl.zeros([BLOCK], dtype=tl.int32)
    counted = 0
    for i in tl.static_range(ROWS):
        token = tl.program_id(0) * ROWS + i
        inside = (place < width) & (token < tokens)
        at = token.to(tl.int64) * rows + start + place
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        code = _clamped(_whole(tl.div_rn(value, scale), levels), levels)
        if not WHOLE:
            code = tl.div_rn(code, full)
        tl.store(out + at, code, mask=inside)
        if COUNT:
            counts_too = token < tokens
            if MASKED:
                counts_too = tl.load(row_mask + token, mask=counts_too, other=0) != 0
            clipped += (inside & counts_too & (tl.abs(value) >= end)).to(tl.int32)
            counted += tl.where(counts_too, 1, 0)
    if COUNT:  # sums of whole numbers are the same in any order
        tl.atomic_add(counts + 2 * tile, tl.sum(clipped).to(tl.int64))
        if tl.program_id(2) == 0:
            tl.atomic_add(counts + 2 * tile + 1, tl.cast(counted, tl.int64) * width)


@triton.jit
def convert(products, peaks, ranges, out, marks, tokens, columns, levels, unit, step, full,
            input_levels, TILES: tl.constexpr, ADC: tl.constexpr, MARK: tl.constexpr,
            ROWS: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """ADC of the tiles' products [K, T, out], and their sum [T, out] in what they stand for.

    ``marks`` [K, T, ceil(out / 8)]: a bit for each output that is saturated.
    """
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    place = tl.arange(0, 8)[None, None, :]
    column = group * 8 + place
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]).to(tl.int64)
    inside = (column < columns) & (token < tokens)
    bytes_ = (columns + 7) // 8
    total = tl.zeros([ROWS, GROUPS, 8], dtype=tl.float32)
    for tile in range(TILES):
        row = tile * tokens + token
        value = tl.load(products + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.div_rn(tl.load(ranges + tile), input_levels)
        if ADC:
            peak = tl.load(peaks + tile * columns + column, mask=column < columns, other=0.0)
            peak = peak.to(tl.float32)
            size = peak * unit
            gain = tl.where(size > 0, tl.div_rn(1.0, tl.maximum(size, _TINY)), 0.0)
            code = _whole(value * gain, levels)
            if MARK:
                beyond = (tl.abs(code) > levels).to(tl.int32)
                byte = tl.sum(beyond << place, axis=2, keep_dims=True)
                tl.store(marks + row * bytes_ + group, byte.to(tl.uint8),
                         mask=(group < bytes_) & (token < tokens))  # fmt: skip
            total += _clamped(code, levels) * ((peak * step) * scale)
        else:
            total += value * (scale * full)
    tl.store(out + token * columns + column, total, mask=inside)


@triton.jit
def mask_outputs(grad, marks, out, tokens, columns, ROWS: tl.constexpr,
                 GROUPS: tl.constexpr):  # fmt: skip
    """``grad`` [T, out] with zeros at the outputs that one tile's ``marks`` name."""
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    bytes_ = (columns + 7) // 8
    for i in tl.static_range(ROWS):
        token = (tl.program_id(0) * ROWS + i).to(tl.int64)
        inside = (column < columns) & (token < tokens)
        found = (group < bytes_) & (token < tokens)
        byte = tl.load(marks + token * bytes_ + group, mask=found, other=0).to(tl.int32)
        beyond = ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
        value = tl.load(grad + token * columns + column, mask=inside, other=0.0)
        tl.store(out + token * columns + column, tl.where(beyond, 0.0, value), mask=inside)


@triton.jit
def undo_inputs(x, grad, ranges, inputs, sums, tokens, rows, base, extra, levels,
                EVEN: tl.constexpr, INPUTS: tl.constexpr, GRAD: tl.constexpr, RANGE: tl.constexpr,
                LSQ: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """What a backward needs of inputs x [T, in].

    ``inputs`` [T, in]: them as quantized. ``grad`` [T, in]: zeros, in place, beyond the range.
    ``sums`` [K, programs]: this program's part of the range's gradient.
    """
    tile = tl.program_id(1)
    start, width = tile * base, base
    if not EVEN:  # the compiler reads several numbers at once where it knows them to be aligned
        start += tl.minimum(tile, extra)
        width += (tile < extra).to(tl.int32)
    place = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ranges + tile)
    scale = tl.div_rn(end, levels)
    part = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(ROWS):
        token = tl.program_id(0) * ROWS + i
        inside = (place < width) & (token < tokens)
        at = token.to(tl.int64) * rows + start + place
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        ratio = tl.div_rn(value, scale)
        code = _clamped(_whole(ratio, levels), levels)
        if INPUTS:
            tl.store(inputs + at, code * scale, mask=inside)
        if GRAD:
            slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            outside = tl.abs(value) >= end
            if RANGE:
                outward = tl.where(value < 0, -slope, slope)
                if LSQ:
                    within = slope * tl.div_rn(code - ratio, levels)
                    part += tl.where(inside, tl.where(outside, outward, within), 0.0)
                else:
                    pull = tl.where(outward < 0, outward, 0.0) * end
                    part += tl.where(inside & outside, pull, 0.0)
            # Only what changes is written.
            tl.store(grad + at, tl.zeros([BLOCK], dtype=tl.float32),
                     mask=inside & (tl.abs(value) > end))  # fmt: skip
    if RANGE:
        programs = tl.num_programs(0) * tl.num_programs(2)
        mine = tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
        tl.store(sums + tile * programs + mine, tl.sum(part))
