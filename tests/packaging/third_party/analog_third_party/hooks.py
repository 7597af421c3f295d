"""Adds a noise model and a preset, as docs/plugins.md describes."""

import torch

from analog_plugin import AnalogScheme
from analog_plugin.plugins import NoiseModel, Preset, hookimpl


class UniformNoise:
    def __init__(self, width: float = 0.1) -> None:
        self.width = width

    def program(self, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        peak = weight.abs().amax(1, keepdim=True)
        error = torch.rand(weight.shape, generator=generator, device=weight.device) - 0.5
        return weight + self.width * peak * error


@hookimpl
def analog_noise_models():
    yield NoiseModel("uniform", UniformNoise, "uniform programming error")


@hookimpl
def analog_presets():
    yield Preset("THIRD_PARTY", lambda: AnalogScheme(tile_rows=256, output_bits=9))
