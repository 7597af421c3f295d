"""What programming leaves of one tile, and when it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, shown

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "y": 365 * 86_400.0}


class Programmed(NamedTuple):
    """One tile as its devices hold it.

    Args:
        weight: [columns, rows].
        output_scale: Factor on the tile's digital outputs, behind its ADC; a drift compensation
            chooses it once for the whole tile.
        disturbances: What the array does to its outputs, before the ADC: each is called with inputs
            [T, rows] as fractions of the DAC's range and weights [columns, rows] as fractions of
            the column's full scale, and gives what is added to their product [T, columns].
    """

    weight: Tensor
    output_scale: float = 1.0
    disturbances: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()

    @classmethod
    def of(cls, made: Tensor | Programmed) -> Programmed:
        """What a noise model's ``program`` gave."""
        return made if isinstance(made, Programmed) else cls(made)


def program_tiles(
    noise: Any, weight: Tensor, tiles: Sequence[int], generator: torch.Generator
) -> list[Programmed]:
    """Program a layer's ``weight`` [columns, in], tile by tile.

    Args:
        noise: A noise model. Its ``program(weight [columns, rows], generator)`` gives a tensor or a
            :class:`Programmed`. Where it has ``for_layer(weight)``, that is asked first for the
            model of this layer's tiles.
        tiles: Rows of each tile; they add up to ``in``.
    """
    if hasattr(noise, "for_layer"):
        noise = noise.for_layer(weight)
    blocks = weight.split(list(tiles), dim=1)
    return [Programmed.of(noise.program(block, generator)) for block in blocks]


def parse_time(time: float | str | None) -> float | None:
    """Seconds from a number of them or a text such as ``"1h"``; None stays None.

    Units are s, min, h, d and y (365 days).

    Raises:
        AnalogError: It is neither, or not a time from 0 to 1000 years.

    Example:
        >>> parse_time("1d")
        86400.0
    """
    if time is None:
        return None
    factor, number = 1.0, time
    if isinstance(time, str):
        text = time.strip()
        unit = next((u for u in ("min", "s", "h", "d", "y") if text.endswith(u)), "")
        factor, number = SECONDS.get(unit, 1.0), text.removesuffix(unit)
    try:
        seconds = float(number) * factor if not isinstance(number, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds <= 1000 * SECONDS["y"]:
        raise AnalogError(
            f"time is {shown(time)}, but must be a time after programming from 0 to 1000 years; "
            "write time: 1h (units s, min, h, d, y)."
        )
    return seconds
