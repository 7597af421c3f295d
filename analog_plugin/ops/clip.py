"""Weight clipping to a multiple of each column's standard deviation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from analog_plugin.ops.shards import is_sharded, local_part, reduce_parts


def column_sigma(weight: Tensor) -> Tensor:
    """Standard deviation [out, 1] of each row of ``weight`` [out, in] (one output channel), fp32.

    From the norm and the mean, which cost a fraction of ``std``; unbiased, as aihwkit-lightning. Of
    a weight in parts: of the rows that this process has a part of, over the whole rows.
    """
    n, part = weight.shape[1], local_part(weight)
    if n < 2:
        return part.new_zeros((part.shape[0], 1), dtype=torch.float32)
    squares, mean = _norm(part).square(), _mean(part)
    if part.shape[1] != n:
        mean = (mean * (part.shape[1] / n)).nan_to_num_(0.0)  # of no columns: NaN
        mean = reduce_parts(mean, weight, 1)
        squares = reduce_parts(squares, weight, 1)
    return _deviation(squares, mean, n)


def _norm(part: Tensor) -> Tensor:
    return torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float32)


def _mean(part: Tensor) -> Tensor:
    return part.mean(dim=1, keepdim=True, dtype=torch.float32)


def _deviation(squares: Tensor, mean: Tensor, n: int) -> Tensor:
    return ((squares - n * mean.square()) / (n - 1)).clamp_min(0).sqrt()


@torch.no_grad()
def clip_to_sigma(weight: Tensor, alpha: float) -> None:
    """Clamp ``weight`` [out, in] in place to ±``alpha`` standard deviations of each row.

    Clipping contributes more robustness than noise injection, and both together are best (arXiv
    2505.09663). The deviation is taken over the full row, not per tile. A row without deviation,
    such as a single weight, is left as it is: a bound of zero would erase it. Of a weight in parts
    every process clamps its own.
    """
    bound = clip_bound(weight, alpha).to(weight.dtype)
    local_part(weight).clamp_(-bound, bound)


@torch.no_grad()
def clip_all(weights: Iterable[Tensor], alpha: float) -> None:
    """:func:`clip_to_sigma` of many weights: the steps of one number a row are taken together.

    A GPU is told of each step by Python, which takes longer than the step itself.
    """
    alike: dict[Any, list[Tensor]] = {}
    for weight in weights:
        if is_sharded(weight):
            clip_to_sigma(weight, alpha)
        elif weight.shape[1] > 1:
            alike.setdefault((weight.device, weight.dtype, weight.shape[1]), []).append(weight)
    for (_, dtype, n), group in alike.items():
        squares = torch.cat([_norm(weight) for weight in group]).square()
        sigma = _deviation(squares, torch.cat([_mean(weight) for weight in group]), n)
        bound = _bound(sigma, alpha).to(dtype)
        rows = [weight.shape[0] for weight in group]
        for weight, low, high in zip(group, (-bound).split(rows), bound.split(rows), strict=True):
            weight.clamp_(low, high)


def clip_bound(weight: Tensor, alpha: float) -> Tensor:
    """What :func:`clip_to_sigma` clamps each row of ``weight`` [out, in] to: [out, 1], fp32."""
    return _bound(column_sigma(weight), alpha)


def _bound(sigma: Tensor, alpha: float) -> Tensor:
    return torch.where(sigma > 0, alpha * sigma, torch.inf)


@torch.no_grad()
def peak_to_sigma(weight: Tensor) -> float:
    """The smallest α at which :func:`clip_to_sigma` leaves ``weight`` [out, in] as it is."""
    sigma, part = column_sigma(weight), local_part(weight)
    ratio = sigma.new_zeros(())
    if part.numel() > 0:
        peak = torch.maximum(part.amax(1, keepdim=True), -part.amin(1, keepdim=True))
        ratio = peak.float() / sigma.clamp_min(torch.finfo(torch.float32).tiny)
        ratio = torch.where(sigma > 0, ratio, 0.0).max()
    for dim in (0, 1):
        reduce_parts(ratio, weight, dim, "MAX")
    return float(ratio)
