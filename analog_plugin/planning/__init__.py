"""What training and sampling will take on many GPUs: memory, time, communication, cost."""

from analog_plugin.planning.estimate import Assumptions, Estimate, Job, estimate
from analog_plugin.planning.hardware import GPUS, Gpu
from analog_plugin.planning.shapes import MODELS, ModelShape

__all__ = ["GPUS", "MODELS", "Assumptions", "Estimate", "Gpu", "Job", "ModelShape", "estimate"]
