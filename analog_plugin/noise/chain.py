"""A device model and the faults of its array, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError
from analog_plugin.noise.programming import Programmed


class NoiseChain:
    """The first noise model programs; each further one changes what the devices hold or give.

    Args:
        models: Noise models. All but the first have ``follow(made, weight, generator)``, which
            gets a tile as the models before left it and its exact weights [columns, rows], and
            gives the tile as it is then.
        names: What the user called them, for errors.

    Raises:
        AnalogError: A model that is not the first cannot follow another.
    """

    def __init__(self, models: Sequence[Any], names: Sequence[str]) -> None:
        for model, name in zip(models[1:], names[1:], strict=True):
            if not hasattr(model, "follow"):
                raise AnalogError(
                    f"noise {'+'.join(names)!r} has {name} behind another model, but it programs "
                    "devices itself and must be the first; only faults such as stuck and ir_drop "
                    "follow, as in pcm+stuck:0.001."
                )
        self.models, self.names = list(models), list(names)
        self.random = any(getattr(model, "random", True) for model in models)
        if hasattr(models[0], "time"):
            self.time = models[0].time

    def for_layer(self, weight: Tensor) -> NoiseChain:
        """The models of the tiles of a layer with ``weight`` [columns, in]."""
        own = [m.for_layer(weight) if hasattr(m, "for_layer") else m for m in self.models]
        return NoiseChain(own, self.names)

    def program(self, weight: Tensor, generator: torch.Generator) -> Programmed:
        """One tile's weights [columns, rows] as all models together leave them."""
        first, *faults = self.models
        made = Programmed.of(first.program(weight, generator))
        for fault in faults:
            made = fault.follow(made, weight, generator)
        return made
