"""Programming noise of a phase-change-memory chip, as measured for 'Analog Foundation Models'."""

from __future__ import annotations

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, is_number, shown

# Fit of the standard deviation against the target, both in the fit's own units in which the largest
# weight of a column is 180 (they are not siemens). Coefficients of g³, g², g, 1; source: the noise
# model published with arXiv 2505.09663 for IBM's PCM chip ("Hermes").
_FULL_SCALE = 180.0
_KNEE = 52.5
_LOW = (2.939751381126213e-05, -0.00371581208142707, 0.22419685954327148, 2.5797410660159494)
_HIGH = (1.2329755395573392e-05, -0.003054993405157235, 0.2453487119885723, 2.110295720240385)
#: Smaller targets are left unprogrammed: exactly zero, without noise.
_SMALLEST = 0.6


class PCMNoise:
    """Weight-dependent Gaussian programming error of phase-change memory.

    Each column (of each tile) is mapped so that its largest magnitude becomes the full scale. The
    standard deviation is a cubic in the target: 3.1 % of full scale at a tenth of it, 4.7 % at one
    half, 10.7 % at full scale.

    Args:
        scale: Factor on the standard deviation; 1 is the measured chip.

    Not modelled: drift, read noise, temperature.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not (is_number(scale) and 0 <= scale < 100):
            raise AnalogError(
                f"pcm: scale is {shown(scale)}, but must be a number from 0 to below 100; "
                "write pcm:1.5."
            )
        self.scale = float(scale)

    def standard_deviation(self, target: Tensor) -> Tensor:
        """σ of programmed values with targets in [0, 1], both relative to full scale; fp32."""
        g = target.float() * _FULL_SCALE
        sigma = torch.where(g <= _KNEE, _cubic(g, _LOW), _cubic(g, _HIGH))
        return torch.where(self.is_left_out(target), 0.0, sigma) * (self.scale / _FULL_SCALE)

    def is_left_out(self, target: Tensor) -> Tensor:
        """Whether targets in [0, 1], relative to full scale, are so small that they become 0."""
        return target.float() * _FULL_SCALE < _SMALLEST

    def program(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy copy of one tile's weights [columns, rows], in fp32; zero columns stay zero."""
        exact = weight.float()
        peak = exact.abs().amax(1, keepdim=True)
        unit = torch.where(peak > 0, 1.0 / peak.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        target = exact.abs() * unit
        error = torch.empty_like(exact, memory_format=torch.contiguous_format)
        error.normal_(generator=generator).mul_(self.standard_deviation(target)).mul_(peak)
        return torch.where(self.is_left_out(target), 0.0, exact + error)


def _cubic(g: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    a, b, c, d = coefficients
    return ((a * g + b) * g + c) * g + d
