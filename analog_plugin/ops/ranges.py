"""Input ranges from data: the paper's running standard deviation during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analog_plugin.scheme import AnalogScheme


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum ``values`` over all processes in place; alone, nothing happens."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


class RangeInitializer:
    """``λ ← (λ·n + κ·std(x)) / (n + 1)`` over the first N optimizer steps of training.

    A batch is one optimizer step's: micro-batches and processes are pooled. A recomputation under
    gradient checkpointing is recognised by its micro-batch and not counted again.
    """

    def __init__(self, scheme: AnalogScheme) -> None:
        self.batches = scheme.range_init_batches
        self.kappa = scheme.range_init_std
        self.step: int | None = None
        self.seen: set[int] = set()
        self.base: Tensor | None = None
        self.sums: Tensor | None = None

    @torch.no_grad()
    def update(
        self, layer: Any, x: Tensor, row_mask: Tensor | None, step: int | None, micro: int
    ) -> None:
        """Update ``layer.input_range`` from inputs ``x`` [..., in] of one micro-batch.

        Args:
            step: The optimizer step; None: every call is a batch of its own.
        """
        if step is None or step != self.step:
            if layer.range_batches >= self.batches:
                return
            self.step, self.seen, self.sums = step, set(), None
            self.base = layer.input_range.detach().clone()
            layer.range_batches += 1
        elif micro in self.seen:
            return
        if self.base is None:  # the step began after the last batch
            return
        self.seen.add(micro)
        sums = all_reduce_sum(_moments(x, row_mask, layer.tiles))
        self.sums = sums if self.sums is None else self.sums + sums
        count, total, squares = self.sums.unbind(1)
        variance = (squares - total * total / count.clamp_min(1)) / (count - 1).clamp_min(1)
        target = self.kappa * variance.clamp_min(0).sqrt()
        before = int(layer.range_batches) - 1
        new = (self.base.double() * before + target) / (before + 1)
        layer.input_range.copy_(torch.where(target > 0, new, self.base.double()))


def _moments(x: Tensor, row_mask: Tensor | None, tiles: list[int]) -> Tensor:
    """[K, 3] float64: count, sum and sum of squares of each tile's inputs."""
    rows = x.reshape(-1, x.shape[-1])
    if row_mask is not None:
        rows = rows[row_mask]
    return torch.stack(
        [
            torch.stack(
                (
                    torch.tensor(float(block.numel()), dtype=torch.float64, device=x.device),
                    block.sum(dtype=torch.float64),
                    block.double().square().sum(),
                )
            )
            for block in rows.split(tiles, dim=1)
        ]
    )
