"""What the array of a tile does to its outputs before they reach the ADC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from analog_plugin.ops.converters import at_least_fp32, input_full_scale
from analog_plugin.scheme import AnalogScheme

_TINY = torch.finfo(torch.float32).tiny


class Disturbances(NamedTuple):
    """What the array of one tile does to its outputs; see :class:`~analog_plugin.noise.Programmed`.

    Args:
        changes: From inputs [T, rows] and weights [out, rows], both as fractions of their full
            scale, to what is added to their product [T, out].
        full_scale: [out] weight that has the full conductance in each column.
    """

    changes: Sequence[Callable[[Tensor, Tensor], Tensor]]
    full_scale: Tensor


def disturb(
    block: Tensor, inputs: Tensor, weight: Tensor, scheme: AnalogScheme, disturbances: Disturbances
) -> Tensor:
    """Products [T, out] of one tile with what its array does to them, in at least fp32."""
    wide = at_least_fp32(block.dtype)
    x, w = inputs.to(wide), weight.to(wide)
    if scheme.input_bits is not None and scheme.input_levels is not None:
        full = x.new_tensor(scheme.input_levels / input_full_scale(scheme, inputs.dtype))
    else:
        full = x.abs().amax(1, keepdim=True)
    peak = disturbances.full_scale.to(w)
    x = x / full.clamp_min(_TINY)
    w = w / peak.clamp_min(_TINY)[:, None]
    with torch.autocast(x.device.type, enabled=False):
        change = torch.stack([change(x, w) for change in disturbances.changes]).sum(0)
    return (block.to(wide) + change * full * peak).to(block.dtype)
