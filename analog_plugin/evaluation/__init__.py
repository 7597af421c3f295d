"""Evaluation under noise: seeds, metrics, tables."""

from analog_plugin.evaluation.fidelity import Reference
from analog_plugin.evaluation.noise import NoiseReport, evaluate_noise

__all__ = ["NoiseReport", "Reference", "evaluate_noise"]
