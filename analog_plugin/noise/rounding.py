"""Weights rounded to few bits, as digital hardware would hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, is_number, shown
from analog_plugin.ops.weights import column_maximum, fake_quantize_columns


class WeightRounding:
    """Each weight becomes the nearest of the ``2**bits - 1`` symmetric codes of its column.

    The scale of a column (of a tile) is its largest magnitude over ``2**(bits - 1) - 1``. 4 bits
    are what 'Analog Foundation Models' (arXiv 2505.09663) rounds its models to for digital
    hardware. Nothing is drawn: every seed is the same.

    Args:
        bits: 2 to 16.
    """

    random = False

    def __init__(self, bits: int = 4) -> None:
        if not (is_number(bits) and bits in range(2, 17)):
            raise AnalogError(
                f"rtn: bits is {shown(bits)}, but must be a whole number from 2 to 16; write rtn:4."
            )
        self.bits = int(bits)

    def program(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """One tile's weights [columns, rows], rounded, in fp32."""
        exact, tiles = weight.float(), [weight.shape[1]]
        return fake_quantize_columns(exact, column_maximum(exact, tiles), tiles, self.bits)
