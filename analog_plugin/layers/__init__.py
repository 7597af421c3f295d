"""Analog layers, and the conversion of a model to them and back."""

from analog_plugin.layers.base import AnalogLayer
from analog_plugin.layers.conv1d import AnalogConv1D
from analog_plugin.layers.convert import (
    analog_layers,
    convert_to_analog,
    digital_layers,
    keep_digital,
    scheme_changed,
    to_digital,
)
from analog_plugin.layers.linear import AnalogLinear
from analog_plugin.layers.state import ForwardState, forward_state, model_scheme

__all__ = [
    "AnalogConv1D",
    "AnalogLayer",
    "AnalogLinear",
    "ForwardState",
    "analog_layers",
    "convert_to_analog",
    "digital_layers",
    "forward_state",
    "keep_digital",
    "model_scheme",
    "scheme_changed",
    "to_digital",
]
