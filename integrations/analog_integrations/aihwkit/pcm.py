"""The PCM model of 'Analog Foundation Models' as one of aihwkit's noise models."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from aihwkit.inference import BaseNoiseModel, SinglePairConductanceConverter
from torch import Tensor

from analog_plugin.errors import AnalogError
from analog_plugin.noise import PCMNoise


class PCMNoiseModel(BaseNoiseModel):
    """:class:`~analog_plugin.noise.PCMNoise` (arXiv 2505.09663) for any configuration of aihwkit.

    The fit gives the error of a weight against the weight, both relative to the full conductance of
    its column. aihwkit maps a tile's largest weight to the full conductance, so this is the same
    error where ``mapping.weight_scaling_omega`` is 1 and ``mapping.weight_scaling_columnwise``
    true; otherwise it is relative to the tile's largest weight. The device that carries the weight
    gets the whole error, and the other one of the pair stays at its least conductance.

    Args:
        scale: Factor on the standard deviation; 1 is the measured chip.
        g_converter: aihwkit's ``SinglePairConductanceConverter``; None: from 0 to ``g_max``.
        g_max: Full conductance; None: 180, the units of the fit. It does not change the weights.

    Raises:
        AnalogError: ``scale`` is out of range, or the converter has more than one pair a weight,
            or one device: the fit is of a pair.

    Not modelled: drift and read noise. ``drift_analog_weights(t)`` leaves the weights as
    programmed.

    Example:
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> weights, _ = PCMNoiseModel().apply_programming_noise(torch.linspace(-1, 1, 10_000))
        >>> round(float((weights - torch.linspace(-1, 1, 10_000)).std()), 3)
        0.054
    """

    def __init__(
        self, scale: float = 1.0, g_converter: Any = None, g_max: float | None = None
    ) -> None:
        self.fit = PCMNoise(scale)
        if g_converter is None:
            g_converter = SinglePairConductanceConverter(g_max=180.0 if g_max is None else g_max)
        if not isinstance(g_converter, SinglePairConductanceConverter):
            raise AnalogError(
                f"g_converter is {type(g_converter).__name__}, but the fit is of one pair of "
                "devices a weight; give SinglePairConductanceConverter(g_max=25.0), or none."
            )
        super().__init__(deepcopy(g_converter))
        self.g_max = self.g_converter.g_max

    @torch.no_grad()
    def apply_programming_noise_to_conductance(self, g_target: Tensor) -> Tensor:
        """Programmed conductances for targets of any shape, both in the converter's units.

        Below the converter's least conductance stands what the other device of the pair carries.
        """
        least = self.g_converter.g_min
        full = self.g_converter.g_max - least
        target = (g_target - least) / full
        sigma = self.fit.standard_deviation(target)
        error = torch.randn_like(g_target) * sigma * full
        return torch.where(self.fit.is_left_out(target), least, g_target + error)

    @torch.no_grad()
    def apply_drift_noise_to_conductance(
        self, g_prog: Tensor, drift_noise_param: Tensor | None, t_inference: float
    ) -> Tensor:
        """The conductances as they are: the model has no drift."""
        return g_prog
