"""DAC and ADC of analog tiles, and what the backward needs to know of their clipping."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from analog_plugin.ops.weights import largest_magnitude, tile_bounds
from analog_plugin.scheme import AnalogScheme

_TINY = torch.finfo(torch.float32).tiny


class Clipped(NamedTuple):
    """The inputs of one tile at the ends of its range or beyond.

    Args:
        places: Their flat indices in the tile's inputs [T, rows].
        beyond: Whether each lies beyond the range, rather than on it.
    """

    places: Tensor
    beyond: Tensor


class Digitized(NamedTuple):
    """What a DAC made of inputs.

    Args:
        inputs: [T, in] what is multiplied: codes over :func:`input_full_scale`, exact in bf16 up
            to 8 bits and in fp16 up to 11.
        codes: [T, in] whole codes, one byte each up to 8 bits; None: not asked for.
        scales: Of each tile, [1, 1] or [T, 1], at least fp32: what one code stands for.
        clipped: Of each tile; None: not asked for, or inputs that are never clipped.
    """

    inputs: Tensor
    codes: Tensor | None
    scales: list[Tensor]
    clipped: list[Clipped] | None


def digitize_inputs(
    rows: Tensor,
    input_range: Tensor,
    tiles: list[int],
    scheme: AnalogScheme,
    dtype: torch.dtype,
    for_backward: bool,
) -> Digitized:
    """DAC: inputs [T, in] to codes, tile by tile.

    Codes are computed in at least fp32: half precision gets several percent of them wrong.
    """
    levels = scheme.input_levels
    if scheme.input_bits is None or levels is None:
        one = rows.new_ones((1, 1), dtype=torch.float32)
        unchanged = rows.to(dtype)
        return Digitized(unchanged, unchanged, [one] * len(tiles), None)
    full = input_full_scale(scheme, dtype)
    whole = torch.int8 if scheme.input_bits <= 8 else torch.int16
    dynamic = scheme.input_range == "dynamic"
    wide = at_least_fp32(dtype)
    inputs: list[Tensor] = []
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    clipped: list[Clipped] = []
    for k, (start, end) in enumerate(tile_bounds(tiles)):
        block = rows[:, start:end]
        if dynamic:
            scale = (block.to(wide).abs().amax(1, keepdim=True) / levels).clamp_min_(_TINY)
        else:
            scale = (input_range[k].to(wide) / levels).view(1, 1)
        scales.append(scale)
        code = torch.div(block.to(wide), scale).round_().clamp_(-levels, levels)
        if for_backward:
            codes.append(code.to(whole))
            if not dynamic:
                clipped.append(_find_clipped(block, codes[-1], input_range[k], levels))
        inputs.append((code if full == 1.0 else code.div_(full)).to(dtype))
    return Digitized(
        _joined(inputs),
        _joined(codes) if for_backward else None,
        scales,
        clipped if for_backward and not dynamic else None,
    )


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _find_clipped(block: Tensor, codes: Tensor, input_range: Tensor, levels: int) -> Clipped:
    # Only codes at the ends can be clipped inputs; few are, so look at those alone.
    index = _indices(codes.abs().clamp_min_(levels - 1).sub_(levels - 1))
    if block.is_contiguous():
        values = block.view(-1)[index].float().abs()
    else:
        values = block[index // block.shape[1], index % block.shape[1]].float().abs()
    on_or_beyond = values >= input_range
    return Clipped(index[on_or_beyond], values[on_or_beyond] > input_range)


def _indices(marks: Tensor) -> Tensor:
    """Flat indices of the few entries of ``marks``, one or two bytes each, that are not zero.

    Whole words are searched first: comparing and searching byte by byte takes ten times as long.
    """
    per_word = 8 // marks.itemsize
    flat = marks.contiguous().view(-1)
    narrow = torch.int32 if len(flat) < 2**31 else torch.int64  # half the memory
    if len(flat) % per_word:
        return flat.nonzero().squeeze(1).to(narrow)
    words = flat.view(torch.int64).nonzero().squeeze(1)
    word, place = flat.view(-1, per_word)[words].nonzero().unbind(1)
    return words[word].mul_(per_word).add_(place).to(narrow)


def count_clipped(
    counts: Tensor, clipped: list[Clipped], tiles: list[int], tokens: int, row_mask: Tensor | None
) -> None:
    """Add (clipped, all) inputs to ``counts`` [K, 2]; ``row_mask`` [T] tells which tokens count."""
    if row_mask is None:
        numbers = [
            (f.places.numel(), tokens * width) for f, width in zip(clipped, tiles, strict=True)
        ]
        counts += counts.new_tensor(numbers)
        return
    for count, found, width in zip(counts, clipped, tiles, strict=True):
        count[0] += row_mask[found.places // width].sum()
        count[1] += row_mask.sum() * width


def convert_outputs(
    block: Tensor, column_max: Tensor, scheme: AnalogScheme, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """ADC: products [T, out] of :func:`digitize_inputs`' inputs to ADC codes, in at least fp32.

    ``block`` is overwritten unless it is of half precision.

    Returns:
        The codes, and which are saturated: their flat indices, or where they are many a mark for
        each output (int8). None: there are none, or not asked for.
    """
    levels = scheme.output_levels
    assert levels is not None
    gain = adc_gain(column_max, scheme, block.dtype)
    code = block.to(at_least_fp32(block.dtype)).mul_(gain).round_()
    saturated = None
    if for_backward and code.is_cuda:  # where a search would have to be waited for
        saturated = (code.abs() > levels).to(torch.int8)
    elif for_backward and code.numel():
        if largest_magnitude(code) <= levels:
            return code, None
        saturated = _saturated(code, levels)  # NaN is not small either
    return code.clamp_(-levels, levels), saturated


def _saturated(code: Tensor, levels: int) -> Tensor:
    # Arithmetic on whole numbers: a CPU compares several times more slowly.
    marks = code.abs().clamp_(levels, levels + 1).sub_(levels).nan_to_num_(0.0).to(torch.int8)
    many = int(marks.sum(dtype=torch.int64)) > marks.numel() // 8
    return marks if many else _indices(marks)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type of what follows the products: theirs, but no half precision."""
    return torch.promote_types(dtype, torch.float32)


def adc_gain(column_max: Tensor, scheme: AnalogScheme, dtype: torch.dtype) -> Tensor:
    """ADC codes for a product of 1 [out], of columns with ``column_max``; 0 where that is 0.

    ``dtype`` is that of the products.
    """
    wide = at_least_fp32(dtype)
    unit = column_max.to(wide) * (adc_step(scheme) / input_full_scale(scheme, dtype))
    return unit.clamp_min(_TINY).reciprocal().mul_(unit > 0)


def adc_step(scheme: AnalogScheme) -> float:
    """What one ADC code stands for, in products of whole DAC codes and column maxima."""
    assert scheme.input_levels is not None and scheme.output_levels is not None
    assert scheme.out_bound is not None  # a layer refuses to run without
    return scheme.out_bound * scheme.input_levels / scheme.output_levels


def input_full_scale(scheme: AnalogScheme, dtype: torch.dtype) -> float:
    """How many codes an input of 1 of :func:`digitize_inputs` is, in products of ``dtype``.

    Whole codes are multiplied, but not in fp16, whose range their products leave.
    """
    if scheme.input_bits is None or dtype != torch.float16:
        return 1.0
    return 2.0 ** (scheme.input_bits - 1)
