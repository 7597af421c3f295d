"""Noise models: what programming does to weights. One model a file."""

from analog_plugin.noise.chain import NoiseChain
from analog_plugin.noise.gaussian import GaussianNoise
from analog_plugin.noise.ir_drop import IRDrop
from analog_plugin.noise.pcm import PCMNoise
from analog_plugin.noise.programming import Programmed, program_tiles
from analog_plugin.noise.rounding import WeightRounding
from analog_plugin.noise.specification import at_times, noise_label, resolve_noise
from analog_plugin.noise.stuck import StuckDevices

__all__ = [
    "GaussianNoise",
    "IRDrop",
    "NoiseChain",
    "PCMNoise",
    "Programmed",
    "StuckDevices",
    "WeightRounding",
    "at_times",
    "noise_label",
    "program_tiles",
    "resolve_noise",
]
