"""Noise models: what programming does to weights. One model a file."""

from analog_plugin.noise.gaussian import GaussianNoise
from analog_plugin.noise.pcm import PCMNoise
from analog_plugin.noise.specification import noise_label, resolve_noise

__all__ = ["GaussianNoise", "PCMNoise", "noise_label", "resolve_noise"]
