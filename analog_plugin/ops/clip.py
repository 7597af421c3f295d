"""Weight clipping to a multiple of each column's standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor


def column_sigma(weight: Tensor) -> Tensor:
    """Standard deviation [out, 1] of each row of ``weight`` [out, in] (one output channel), fp32.

    From the norm and the mean, which cost a fraction of ``std``; unbiased, as aihwkit-lightning.
    """
    n = weight.shape[1]
    if n < 2:
        return weight.new_zeros((weight.shape[0], 1), dtype=torch.float32)
    squares = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float32).square()
    mean = weight.mean(dim=1, keepdim=True, dtype=torch.float32)
    return ((squares - n * mean.square()) / (n - 1)).clamp_min(0).sqrt()


@torch.no_grad()
def clip_to_sigma(weight: Tensor, alpha: float) -> None:
    """Clamp ``weight`` [out, in] in place to ±``alpha`` standard deviations of each row.

    Clipping contributes more robustness than noise injection, and both together are best (arXiv
    2505.09663). The deviation is taken over the full row, not per tile. A row without deviation,
    such as a single weight, is left as it is: a bound of zero would erase it.
    """
    sigma = column_sigma(weight)
    bound = torch.where(sigma > 0, alpha * sigma, torch.inf).to(weight.dtype)
    weight.clamp_(-bound, bound)


@torch.no_grad()
def peak_to_sigma(weight: Tensor) -> float:
    """The smallest α at which :func:`clip_to_sigma` leaves ``weight`` [out, in] as it is."""
    sigma = column_sigma(weight)
    peak = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
    ratio = peak.float() / sigma.clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.where(sigma > 0, ratio, 0.0).max())
