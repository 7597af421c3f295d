"""Input ranges in an optimizer step: their decay before it, their relative update after it.

A range is one number, and a model has hundreds: what is done to them is done to all at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from analog_plugin.layers.base import RANGE_FLOOR, AnalogLayer
from analog_plugin.ops.ranges import decay_gradient
from analog_plugin.ops.shards import is_sharded
from analog_plugin.processes import all_reduce

#: No step changes a range by more than this share of it.
_MAX_CHANGE = 0.5


class RangeSteps:
    """The ranges of a model in each optimizer step."""

    def __init__(self) -> None:
        self._before: list[tuple[list[Tensor], Tensor]] = []

    @torch.no_grad()
    def begin(self, layers: Iterable[AnalogLayer], world_size: int, whole: bool) -> None:
        """Add the decay to the gradients, from counts over all processes, and forget the counts.

        Args:
            layers: All analog layers.
            world_size: Number of processes.
            whole: Whether every process has all ranges and nothing else reduces their gradients;
                so it is of sharded layers, whatever this says.
        """
        alike: dict[Any, list[AnalogLayer]] = {}
        counts = []
        for layer in layers:
            counts.append(layer.clip_counts)
            if layer.input_range.requires_grad and layer.owns_range:
                own, scheme = whole or is_sharded(layer.weight), layer.scheme
                decays = scheme.range_decay, scheme.range_min_percentage
                alike.setdefault((own, layer.input_range.device, decays), []).append(layer)
        self._before = []
        for (own, *_), group in alike.items():
            ranges: list[Tensor] = [layer.input_range for layer in group]
            before = torch.cat([parameter.detach() for parameter in ranges])
            counted = all_reduce(torch.cat([layer.clip_counts for layer in group]))
            decay = decay_gradient(before, counted, group[0].scheme)
            _add(ranges, decay, world_size if own else None)
            self._before.append((ranges, before))
        forget_counts(counts)

    @torch.no_grad()
    def end(self) -> None:
        """Take what the optimizer added to a range as a share of it.

        Adam divides a gradient by its own size, and with it by the factor λ that it has.
        """
        for ranges, before in self._before:
            now = torch.cat([parameter.detach() for parameter in ranges])
            change = now.sub_(before).clamp_(-_MAX_CHANGE, _MAX_CHANGE)
            new = change.add_(1).mul_(before).clamp_min_(RANGE_FLOOR)
            torch._foreach_copy_(ranges, _apart(new, ranges))


def forget_counts(counts: list[Tensor]) -> None:
    """Begin to count clipped inputs anew, in ``clip_counts`` of layers."""
    if counts:
        torch._foreach_zero_(counts)


def _add(ranges: list[Tensor], decay: Tensor, processes: int | None) -> None:
    """Add ``decay`` to the gradients, which are first averaged over ``processes`` if any."""
    for parameter in ranges:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in ranges if parameter.grad is not None]
    if processes is not None:
        mean = all_reduce(torch.cat(grads)) / processes
        torch._foreach_copy_(grads, _apart(mean, ranges))
    torch._foreach_add_(grads, _apart(decay, ranges))


def _apart(values: Tensor, ranges: list[Tensor]) -> list[Tensor]:
    return list(values.split([parameter.numel() for parameter in ranges]))
