"""Gaussian programming noise, the generic model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, is_number, shown


class GaussianNoise:
    """``W + σ · max|W| · ε`` with ε ~ N(0, 1), independent for each device.

    Args:
        sigma: σ, standard deviation relative to the maximum, no unit; 0.02 to 0.03 is what analog
            foundation models are trained with (arXiv 2505.09663).
        per: Over what the maximum is taken: ``"column"`` (one output channel of one tile),
            ``"tile"`` or ``"tensor"`` (the whole layer).

    Not modelled: dependence on the conductance, drift, read noise.
    """

    def __init__(
        self, sigma: float = 0.03, per: Literal["column", "tile", "tensor"] = "column"
    ) -> None:
        if not (is_number(sigma) and 0 <= sigma < 10):
            raise AnalogError(
                f"gaussian: sigma is {shown(sigma)}, but must be a number from 0 to below 10; "
                "write gaussian:0.03."
            )
        if not isinstance(per, str) or per not in ("column", "tile", "tensor"):
            raise AnalogError(
                f"gaussian: per is {shown(per)}, but must be column, tile or tensor; write "
                "per: column."
            )
        self.sigma, self.per = float(sigma), per
        self._peak: Tensor | None = None

    def for_layer(self, weight: Tensor) -> GaussianNoise:
        """The model of the tiles of a layer with ``weight`` [columns, in]."""
        if self.per != "tensor":
            return self
        own = GaussianNoise(self.sigma, self.per)
        own._peak = weight.float().abs().max()
        return own

    def program(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy copy of one tile's weights [columns, rows], in fp32; alone, it is the layer."""
        exact = weight.float()
        if self.per == "column":
            peak = exact.abs().amax(1, keepdim=True)
        else:
            peak = exact.abs().max() if self._peak is None else self._peak
        error = torch.empty_like(exact, memory_format=torch.contiguous_format)
        return exact + error.normal_(generator=generator).mul_(self.sigma * peak)
