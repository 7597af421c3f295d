"""Weights whose parts lie in several processes (FSDP2): the local part, and sums over the parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analog_plugin.processes import Reduction, all_reduce


def local_part(values: Any) -> Tensor:
    """What this process holds of ``values``, as a view; all of it where it is whole."""
    return values.to_local() if is_sharded(values) else values


def is_sharded(values: Tensor) -> bool:
    """Whether ``values`` is in parts that several processes hold."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(values, DTensor)


def reduce_parts(reduced: Tensor, values: Any, dim: int, op: Reduction = "SUM") -> Tensor:
    """Complete, in place, what was reduced over dimension ``dim`` of a local part of ``values``.

    Args:
        reduced: Of the local part.
        values: The whole, in parts or not.
        dim: The dimension that was reduced; where the parts do not split it, nothing happens.
        op: How it was reduced.
    """
    if is_sharded(values):
        for i, placement in enumerate(values.placements):
            if placement.is_shard(dim):
                all_reduce(reduced, op, values.device_mesh.get_group(i))
    return reduced
