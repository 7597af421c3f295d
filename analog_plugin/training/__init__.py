"""Hardware-aware training: distillation, Trainer, callback, range calibration."""

from analog_plugin.training.callback import AnalogCallback, TrainingDiverged
from analog_plugin.training.divergence import TopTokens
from analog_plugin.training.loss import distillation_loss, kl_divergence
from analog_plugin.training.ranges import calibrate_ranges
from analog_plugin.training.stored import StoredTeacher, store_teacher
from analog_plugin.training.trainer import AnalogTrainer

__all__ = [
    "AnalogCallback",
    "AnalogTrainer",
    "StoredTeacher",
    "TopTokens",
    "TrainingDiverged",
    "calibrate_ranges",
    "distillation_loss",
    "kl_divergence",
    "store_teacher",
]
