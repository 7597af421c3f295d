"""Evaluation under noise: seeds, metrics, tables."""

from analog_plugin.evaluation.fidelity import Reference
from analog_plugin.evaluation.noise import NoiseReport, evaluate_noise
from analog_plugin.evaluation.problems import Problem
from analog_plugin.evaluation.scaling import ScalingReport, evaluate_test_time_scaling

__all__ = [
    "NoiseReport",
    "Problem",
    "Reference",
    "ScalingReport",
    "evaluate_noise",
    "evaluate_test_time_scaling",
]
