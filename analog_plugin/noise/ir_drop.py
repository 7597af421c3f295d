"""IR drop: the voltage that wires lose, in the steady state."""

from __future__ import annotations

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, is_number, shown
from analog_plugin.noise.programming import Programmed


class IRDrop:
    """Outputs shrink with the current that flows in their column.

    With inputs x [rows] as fractions of the DAC's range, weights w [columns, rows] as fractions of
    the column's full conductance and n rows, column i loses

        scale · c · Σ_j w_ij x_j (1 - (1 - j/n)²),  c = a (a (a/20 - 1/5) + 1/2),
        a = n / g_ratio · Σ_j |w_ij| |x_j|,

    aihwkit's approximation of the voltages along a column, as its C++ tiles compute it for
    ``forward.ir_drop`` (Rasch et al., Nature Communications 14, 2023). Without a DAC a token's
    inputs are taken relative to the largest of them. Nothing is drawn: every seed is the same.

    Args:
        scale: Factor on the loss; 1 is the wire.
        g_ratio: Conductance of the wire from one cell to the next over a device's largest: here
            0.35 Ω and 5 µS, whatever device model stands before it.
    """

    random = False

    def __init__(self, scale: float = 1.0, g_ratio: float = 1.0 / 0.35 / 5e-6) -> None:
        for name, value, low, usual in (("scale", scale, 0, 1), ("g_ratio", g_ratio, 1, 571_000)):
            if not (is_number(value) and low <= value < 1e12):
                raise AnalogError(
                    f"ir_drop: {name} is {shown(value)}, but must be a number from {low} to below "
                    f"1e12; write {name}: {usual}."
                )
        self.scale, self.g_ratio = float(scale), float(g_ratio)

    def program(self, weight: Tensor, generator: torch.Generator) -> Programmed:
        """One tile's exact weights [columns, rows], read through resistive wires."""
        return self.follow(Programmed(weight.float()), weight, generator)

    def follow(self, made: Programmed, weight: Tensor, generator: torch.Generator) -> Programmed:
        """``made``, the devices of ``weight`` as another model leaves them, behind the wires."""
        return made._replace(disturbances=(*made.disturbances, self.disturbance))

    def disturbance(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """What is added to the outputs [T, columns] of ``inputs`` [T, rows] and ``weight``."""
        rows = inputs.shape[1]
        current = (inputs.abs() @ weight.abs().t()) * (rows / self.g_ratio)
        factor = current * (current * (0.05 * current - 0.2) + 0.5)
        left = 1.0 - torch.arange(rows, dtype=inputs.dtype, device=inputs.device) / rows
        return -self.scale * factor * ((inputs * (1.0 - left * left)) @ weight.t())
