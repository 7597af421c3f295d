"""Input ranges from data: the paper's running standard deviation during training."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from analog_plugin.processes import all_reduce
from analog_plugin.scheme import AnalogScheme


class Moment(NamedTuple):
    """When a forward of training runs.

    Args:
        step: What identifies the optimizer step; None: every forward is one of its own.
        micro_batch: Its index within the step.
    """

    step: Hashable | None
    micro_batch: int


class RangeInitializer:
    """``λ ← (λ·n + κ·std(x)) / (n + 1)`` over the first N optimizer steps of training.

    A batch is one optimizer step's: micro-batches and processes are pooled. A recomputation under
    gradient checkpointing is recognised by its micro-batch and not counted again. Layers that share
    a range share its initializer.

    Attributes:
        known: Whether the range holds a value from data, a file or the user.
    """

    def __init__(self, scheme: AnalogScheme) -> None:
        self.batches = scheme.range_init_batches
        self.kappa = scheme.range_init_std
        self.known = scheme.input_range == "dynamic" or scheme.input_bits is None
        self.restart()

    def restart(self) -> None:
        """Forget the running step: the ranges and their count of batches were loaded anew."""
        self.step: Hashable | None = None
        self.seen: set[int] = set()
        self.base: Tensor | None = None
        self.sums: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        row_mask: Tensor | None,
        ranges: Tensor,
        batches: Tensor,
        tiles: list[int],
        moment: Moment,
    ) -> None:
        """Take a micro-batch of inputs ``x`` [..., in] into ``ranges`` and ``batches``, in place.

        Args:
            row_mask: [T] bool, False where a token does not count; None: all count.
            ranges, batches: The layer's ``input_range`` [K] and ``range_batches``.
            tiles: Rows of each tile.
            moment: When it is.
        """
        step, micro = moment
        if step is None or step != self.step:
            self.step, self.seen, self.sums = step, set(), None
            self.base = None if batches >= self.batches else ranges.clone()
        elif micro in self.seen:
            return
        if self.base is None:  # the step began after the last batch
            return
        self.seen.add(micro)
        sums = all_reduce(_moments(x, row_mask, tiles))
        if not sums[0, 0] > 0:  # no token came here: an expert that none was routed to
            return
        if self.sums is None:
            batches += 1
        self.sums = sums if self.sums is None else self.sums + sums
        count, total, squares = self.sums.unbind(1)
        variance = (squares - total * total / count.clamp_min(1)) / (count - 1).clamp_min(1)
        target = self.kappa * variance.clamp_min(0).sqrt()
        before = int(batches) - 1
        new = (self.base.double() * before + target) / (before + 1)
        ranges.copy_(torch.where(target > 0, new, self.base.double()))


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


def decay_gradient(ranges: Tensor, clip_counts: Tensor, scheme: AnalogScheme) -> Tensor:
    """The decay term of the gradient of ranges [K], from the inputs counted since the last step.

    ``range_decay · λ`` where the share of unclipped inputs exceeds ``range_min_percentage``, else
    0. It does not depend on the loss, so it is added once per optimizer step.

    Args:
        ranges: λ [K], of any number of layers.
        clip_counts: [K, 2] (clipped, all) inputs.
        scheme: Theirs.
    """
    clipped, total = clip_counts.unbind(1)
    unclipped = 1.0 - clipped / total.clamp_min(1)
    active = (unclipped > scheme.range_min_percentage) & (total > 0)
    return scheme.range_decay * ranges * active
