"""Weights to integer codes, one scale a row, as digital hardware stores them."""

from __future__ import annotations

import torch
from torch import Tensor

#: How a row's scale is found: from its largest magnitude, or with the least squared error.
WEIGHT_SCALES = ("max", "mse")

# Candidates for a clipped maximum, as shares of it: first these, then finer ones about the best.
_COARSE = tuple(0.9**k for k in range(25))
_FINE = tuple(0.9 ** (k / 5) for k in (-4, -3, -2, -1, 1, 2, 3, 4))


def quantize_rows(weight: Tensor, bits: int, scale: str = "max") -> tuple[Tensor, Tensor]:
    """Round ``weight`` [out, in] to the nearest of ``2**bits - 1`` symmetric codes.

    Args:
        weight: [out, in].
        bits: 2 to 8; codes are within ±(2**(bits - 1) - 1).
        scale: ``"max"``: each row's largest magnitude is its largest code; ``"mse"``: rows are
            clipped where that makes their squared error least.

    Returns:
        int8 codes [out, in] and fp32 scales [out, 1]; the rounded weights are their product.
    """
    unit = row_scales(weight, bits, scale)
    levels = 2 ** (bits - 1) - 1
    return _codes(weight.detach().float(), unit, levels).to(torch.int8), unit


def row_scales(weight: Tensor, bits: int, scale: str = "max") -> Tensor:
    """The fp32 scales [out, 1] of :func:`quantize_rows`."""
    levels = 2 ** (bits - 1) - 1
    exact = weight.detach().float()
    largest = exact.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, float(levels))  # rows of zeros: any scale does
    unit = largest / levels
    return unit if scale == "max" else _least_error(exact, unit, levels)


def rounded_rows(weight: Tensor, unit: Tensor, bits: int) -> Tensor:
    """``weight`` [out, in] rounded to multiples of ``unit`` [out, 1] within ``bits``, fp32."""
    return _codes(weight.detach().float(), unit, 2 ** (bits - 1) - 1).mul_(unit)


def _codes(weight: Tensor, unit: Tensor, levels: int) -> Tensor:
    return (weight / unit).round_().clamp_(-levels, levels)


def _least_error(weight: Tensor, unit: Tensor, levels: int) -> Tensor:
    """Of the candidates, each row's scale [out, 1] with the least squared error."""
    best, least = unit, torch.full_like(unit, torch.inf)
    for shares in (_COARSE, _FINE):
        about = best
        for share in shares:
            # Never beyond the largest magnitude: its codes would go unused.
            candidate = torch.minimum(about * share, unit)
            error = _codes(weight, candidate, levels).mul_(candidate).sub_(weight).square_()
            error = error.sum(1, keepdim=True)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.minimum(error, least)
    return best
