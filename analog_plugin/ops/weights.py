"""Weights as a tile multiplies by them: column maxima, rounding, training noise."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from analog_plugin.ops.device import has_kernels
from analog_plugin.ops.memory import large_empty
from analog_plugin.scheme import AnalogScheme

_TINY = torch.finfo(torch.float32).tiny
# Numbers drawn at a time on a CPU: they are still in its cache when the weights are added. Draws
# in portions of a multiple of 16 are those of a single draw.
_PORTION = 2**18


def tile_bounds(tiles: list[int]) -> list[tuple[int, int]]:
    """First and last + 1 row of each tile."""
    ends = list(accumulate(tiles))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def column_maximum(weight: Tensor, tiles: list[int]) -> Tensor:
    """Largest magnitude per tile and column: ``weight`` [out, in] to [K, out]."""
    if weight.is_cuda:  # one pass
        if len(tiles) == 1:
            return torch.linalg.vector_norm(weight, torch.inf, 1)[None]
        blocks = weight.split(tiles, dim=1)
        return torch.stack([torch.linalg.vector_norm(block, torch.inf, 1) for block in blocks])
    blocks = weight.split(tiles, dim=1)
    if weight.device.type != "cpu" or weight.dtype.itemsize > 2:
        return torch.stack([largest_magnitude(block, 1) for block in blocks])
    maximum = torch.empty(len(tiles), len(weight), dtype=weight.dtype)
    for part in _portions(weight):  # a CPU compares fp32 several times faster than half precision
        for k, block in enumerate(blocks):
            maximum[k, part] = largest_magnitude(block[part].float(), 1)
    return maximum


def _portions(weight: Tensor) -> list[slice]:
    """Columns of ``weight`` [out, in] that are drawn or compared at a time; at least one slice."""
    columns, rows = weight.shape
    portion = max(_PORTION // max(rows, 1) // 16, 1) * 16
    return [slice(i, min(i + portion, columns)) for i in range(0, max(columns, 1), portion)]


def largest_magnitude(values: Tensor, *dims: int) -> Tensor:
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


def training_weight(
    weight: Tensor,
    column_max: Tensor,
    tiles: list[int],
    scheme: AnalogScheme,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Tensor:
    """W̃ = W + γ · m · ε [out, in] in ``dtype``, of weights rounded to ``weight_bits`` if any.

    Args:
        weight: W [out, in].
        column_max: m [K, out].
        tiles: Rows of each tile.
        scheme: γ (``weight_noise``) and ``weight_bits``.
        generator: Source of ε; None: torch's global one.
        dtype: Type of the products.

    Returns:
        W itself, not a copy, where it is neither rounded nor noisy nor of another type.
    """
    if scheme.weight_bits is not None:
        weight = fake_quantize_columns(weight, column_max, tiles, scheme.weight_bits)
    if scheme.weight_noise == 0:
        return weight.to(dtype)
    if torch.float64 not in (dtype, weight.dtype) and has_kernels(weight.device, tiles):
        return _noisy_by_kernel(weight, column_max, tiles, scheme.weight_noise, generator, dtype)
    if weight.device.type == "cpu":
        return _noisy_in_portions(weight, column_max, tiles, scheme.weight_noise, generator, dtype)
    noise = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    noise.normal_(generator=generator)
    for (start, end), peak in zip(tile_bounds(tiles), column_max, strict=True):
        sigma = (scheme.weight_noise * peak)[:, None]
        block = noise[:, start:end]
        if dtype == weight.dtype:
            torch.addcmul(weight[:, start:end], block, sigma, out=block)
        else:  # add in the weight's precision, round once
            block.copy_(torch.addcmul(weight[:, start:end], block.to(weight.dtype), sigma))
    return noise


def _noisy_by_kernel(
    weight: Tensor,
    column_max: Tensor,
    tiles: list[int],
    gamma: float,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Tensor:
    """Draw and add in fp32, from a seed that ``generator`` draws on the device; round once."""
    from analog_plugin.ops import kernels

    by_row = not weight.is_contiguous() and weight.t().is_contiguous()
    stored = weight.t() if by_row else weight.contiguous()
    noisy = torch.empty(stored.shape, dtype=dtype, device=weight.device)
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=weight.device)
    lines, length = stored.shape
    quarter = -(-length // 64) * 16
    block = min(1024, 1 << (quarter - 1).bit_length())
    kernels.launch(
        kernels.draw, (lines, -(-quarter // block), 1),
        stored, column_max.contiguous(), seed, noisy, gamma, length, weight.shape[0],
        *divmod(weight.shape[1], len(tiles)), TILES=len(tiles), BY_ROW=by_row, BLOCK=block,
    )  # fmt: skip
    return noisy.t() if by_row else noisy


def _noisy_in_portions(
    weight: Tensor,
    column_max: Tensor,
    tiles: list[int],
    gamma: float,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Tensor:
    """Draw and add at least in fp32, which draws half precision faster than itself; round once."""
    rows = weight.shape[1]
    exact = torch.promote_types(dtype, torch.float32)
    noisy = large_empty(weight.shape, dtype, weight.device)
    parts = _portions(weight)
    drawn = noisy if exact == dtype else torch.empty(parts[0].stop, rows, dtype=exact)
    sigma = (gamma * column_max.to(exact))[..., None]
    bounds = tile_bounds(tiles)
    for part in parts:
        noise = drawn[part] if exact == dtype else drawn[: part.stop - part.start]
        noise.normal_(generator=generator)
        for k, (start, end) in enumerate(bounds):
            block = noise[:, start:end]
            if weight.dtype == exact:
                torch.addcmul(weight[part, start:end], block, sigma[k, part], out=block)
            else:
                block.mul_(sigma[k, part]).add_(weight[part, start:end])
        if exact != dtype:
            noisy[part] = noise
    return noisy
