"""aihwkit: conversion to its tiles and back, our noise model in it, its noise models for us."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analog_integrations.aihwkit.convert import to_aihwkit
    from analog_integrations.aihwkit.convert_back import from_aihwkit
    from analog_integrations.aihwkit.measure import evaluate_drift
    from analog_integrations.aihwkit.pcm import PCMNoiseModel

__all__ = ["PCMNoiseModel", "evaluate_drift", "from_aihwkit", "to_aihwkit"]

_MODULES = {
    "PCMNoiseModel": "pcm",
    "evaluate_drift": "measure",
    "from_aihwkit": "convert_back",
    "to_aihwkit": "convert",
}


def __getattr__(name: str) -> object:
    # The hooks of this package are read at every start, with or without aihwkit.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from analog_plugin.errors import require, torchvision_explained

    require("aihwkit", "aihwkit")
    with torchvision_explained():
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
