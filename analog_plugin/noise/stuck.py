"""Stuck devices: a share of them holds a value of its own, whatever is programmed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, is_number, shown
from analog_plugin.noise.programming import Programmed


class StuckDevices:
    """A share of the weights, chosen at random and independently, cannot be programmed.

    As aihwkit's ``corrupt_devices_prob``. A weight is meant, not one of the devices that make it
    up. Drift compensation, where another model has it, does not see them.

    Args:
        fraction: Share of the weights, 0 to 1.
        at: What they hold: ``"random"`` (uniform between ± the column's largest weight),
            ``"zero"`` or ``"full"`` (the column's largest weight, with either sign).
    """

    def __init__(
        self, fraction: float = 0.001, at: Literal["random", "zero", "full"] = "random"
    ) -> None:
        if not (is_number(fraction) and 0 <= fraction <= 1):
            raise AnalogError(
                f"stuck: fraction is {shown(fraction)}, but must be a number from 0 to 1; write "
                "stuck:0.001."
            )
        if not isinstance(at, str) or at not in ("random", "zero", "full"):
            raise AnalogError(
                f"stuck: at is {shown(at)}, but must be random, zero or full; write at: zero."
            )
        self.fraction, self.at = float(fraction), at

    def program(self, weight: Tensor, generator: torch.Generator) -> Programmed:
        """One tile's weights [columns, rows], exact but for the stuck ones."""
        return self.follow(Programmed(weight.float()), weight, generator)

    def follow(self, made: Programmed, weight: Tensor, generator: torch.Generator) -> Programmed:
        """``made``, the devices of ``weight`` as another model leaves them, some of them stuck."""
        draws = [
            torch.empty(made.weight.shape, device=weight.device).uniform_(generator=generator)
            for _ in range(2)
        ]
        value = 2 * draws[1] - 1
        if self.at == "zero":
            value = torch.zeros_like(value)
        elif self.at == "full":
            value = value.sign()
        stuck = value * weight.float().abs().amax(1, keepdim=True)
        return made._replace(weight=torch.where(draws[0] < self.fraction, stuck, made.weight))
