"""Streaming histograms of magnitudes, and the input range that each criterion picks from them."""

from __future__ import annotations

import torch
from torch import Tensor

from analog_plugin.processes import all_reduce

# A bin is what fp32 numbers share in their exponent and the first five bits of their mantissa: 32
# bins an octave, 1.6 to 3.1 % wide, from 2**-30 to 2**20. The index is a shift of the number's
# bits.
_SHIFT, _LOWEST, _HIGHEST = 18, -30, 20
_OFFSET = (127 + _LOWEST) << (23 - _SHIFT)
BINS = (_HIGHEST - _LOWEST) << (23 - _SHIFT)


class MagnitudeHistogram:
    """Counts, maximum and moments of the inputs of each tile of a layer; one pass, mergeable.

    Args:
        tiles: Rows of each tile.
        device: Where the statistics are kept.
    """

    def __init__(self, tiles: list[int], device: torch.device | str = "cpu") -> None:
        self.tiles = tiles
        self.counts = torch.zeros(len(tiles), BINS, dtype=torch.float64, device=device)
        self.maximum = torch.zeros(len(tiles), dtype=torch.float32, device=device)
        self.moments = torch.zeros(len(tiles), 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, row_mask: Tensor | None = None) -> None:
        """Add inputs [..., in]; rows that ``row_mask`` [T] marks False (padding) do not count."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if row_mask is not None:
            rows = rows[row_mask]
        if rows.numel() == 0:
            return
        for k, block in enumerate(rows.split(self.tiles, dim=1)):
            magnitude = block.abs()
            self.maximum[k] = torch.maximum(self.maximum[k], magnitude.max())
            # Below 2**-30, zero included, all share the lowest bin: no criterion tells them apart.
            index = (magnitude.view(torch.int32) >> _SHIFT).sub_(_OFFSET).clamp_(0, BINS - 1)
            self.counts[k] += torch.bincount(index.reshape(-1), minlength=BINS)
            self.moments[k, 0] += block.numel()
            self.moments[k, 1] += block.sum(dtype=torch.float64)
            self.moments[k, 2] += torch.linalg.vector_norm(block, dtype=torch.float64) ** 2

    def merge_processes(self) -> None:
        """Pool the statistics of all processes, so that all find the same ranges."""
        all_reduce(self.counts)
        all_reduce(self.moments)
        all_reduce(self.maximum, "MAX")

    def range_std(self, kappa: float) -> Tensor:
        """``kappa`` standard deviations [K]."""
        count, total, squares = self.moments.unbind(1)
        variance = (squares - total * total / count.clamp_min(1)) / (count - 1).clamp_min(1)
        return (kappa * variance.clamp_min(0).sqrt()).float()

    def range_max(self) -> Tensor:
        """The largest magnitude [K]."""
        return self.maximum.clone()

    def range_percentile(self, percent: float) -> Tensor:
        """The smallest bin edge that ``percent`` percent of magnitudes do not exceed [K]."""
        share = self.counts.cumsum(1) / self.counts.sum(1, keepdim=True).clamp_min(1)
        index = (share < percent / 100.0 - 1e-12).sum(1).clamp_max(BINS - 1)
        return torch.minimum(_edges(self.counts.device)[index + 1].float(), self.maximum)

    def range_mse(self, levels: int) -> Tensor:
        """The range with the least squared error of quantization to ``±levels`` codes [K].

        Squared error of a candidate λ with step s = λ/levels: (c - λ)² beyond λ, s²/12 inside, and
        c² for magnitudes below s/2, which round to zero. Candidates are the bins' upper edges.
        """
        edges = _edges(self.counts.device)
        centre, candidate = (edges[1:] + edges[:-1]) / 2, edges[1:]
        n = self.counts
        below = torch.stack([n, n * centre, n * centre**2]).cumsum(2)  # [3, K, BINS]
        over = below[:, :, -1:] - below
        clipped = over[2] - 2 * candidate * over[1] + candidate**2 * over[0]
        step = candidate / levels
        half = torch.searchsorted(centre, step / 2) - 1  # last bin that rounds to zero
        zero = torch.where(half >= 0, below[2][:, half.clamp_min(0)], 0.0)
        zero_count = torch.where(half >= 0, below[0][:, half.clamp_min(0)], 0.0)
        error = clipped + zero + (below[0] - zero_count) * step**2 / 12
        best = candidate[error.argmin(1)].float()
        return torch.minimum(best, self.maximum)


def _edges(device: torch.device) -> Tensor:
    """The BINS + 1 edges of the bins, float64, ascending."""
    bits = torch.arange(BINS + 1, dtype=torch.int32, device=device).add_(_OFFSET) << _SHIFT
    return bits.view(torch.float32).double()
