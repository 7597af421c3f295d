"""Make large language models run on analog in-memory computing hardware.

Public names load on first use: importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AnalogCallback": "analog_plugin.training",
    "AnalogError": "analog_plugin.errors",
    "AnalogLinear": "analog_plugin.layers",
    "AnalogRecipe": "analog_plugin.recipe",
    "AnalogScheme": "analog_plugin.scheme",
    "AnalogTrainer": "analog_plugin.training",
    "calibrate_ranges": "analog_plugin.training",
    "convert_to_analog": "analog_plugin.layers",
    "evaluate_noise": "analog_plugin.evaluation",
    "evaluate_test_time_scaling": "analog_plugin.evaluation",
    "generate_dataset": "analog_plugin.data",
    "analyze_sensitivity": "analog_plugin.evaluation.sensitivity",
    "inspect_checkpoint": "analog_plugin.inspection",
    "load_checkpoint": "analog_plugin.checkpoint",
    "prepare_start": "analog_plugin.training.start",
    "save_checkpoint": "analog_plugin.checkpoint",
    "to_digital": "analog_plugin.layers",
    "train_analog": "analog_plugin.training.pipeline",
}

__all__ = [
    "AnalogCallback",
    "AnalogError",
    "AnalogLinear",
    "AnalogRecipe",
    "AnalogScheme",
    "AnalogTrainer",
    "__version__",
    "analyze_sensitivity",
    "calibrate_ranges",
    "convert_to_analog",
    "evaluate_noise",
    "evaluate_test_time_scaling",
    "generate_dataset",
    "inspect_checkpoint",
    "load_checkpoint",
    "prepare_start",
    "save_checkpoint",
    "to_digital",
    "train_analog",
]

if TYPE_CHECKING:
    from analog_plugin.checkpoint import load_checkpoint, save_checkpoint
    from analog_plugin.data import generate_dataset
    from analog_plugin.errors import AnalogError
    from analog_plugin.evaluation import evaluate_noise, evaluate_test_time_scaling
    from analog_plugin.evaluation.sensitivity import analyze_sensitivity
    from analog_plugin.inspection import inspect_checkpoint
    from analog_plugin.layers import AnalogLinear, convert_to_analog, to_digital
    from analog_plugin.recipe import AnalogRecipe
    from analog_plugin.scheme import AnalogScheme
    from analog_plugin.training import AnalogCallback, AnalogTrainer, calibrate_ranges
    from analog_plugin.training.pipeline import train_analog
    from analog_plugin.training.start import prepare_start


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from analog_plugin.errors import torchvision_explained

    with torchvision_explained():
        return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
