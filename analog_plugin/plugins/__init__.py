"""Plugins: what authors import is ``hookimpl`` and the records."""

from analog_plugin.plugins.hookspecs import hookimpl
from analog_plugin.plugins.manager import (
    PluginError,
    UnknownName,
    evaluators,
    exporters,
    get_plugin_manager,
    layer_types,
    lookup,
    modifiers,
    noise_models,
    presets,
)
from analog_plugin.plugins.types import (
    Evaluator,
    Exporter,
    LayerType,
    ModifierType,
    NoiseModel,
    Preset,
)

__all__ = [
    "Evaluator",
    "Exporter",
    "LayerType",
    "ModifierType",
    "NoiseModel",
    "PluginError",
    "Preset",
    "UnknownName",
    "evaluators",
    "exporters",
    "get_plugin_manager",
    "hookimpl",
    "layer_types",
    "lookup",
    "modifiers",
    "noise_models",
    "presets",
]
