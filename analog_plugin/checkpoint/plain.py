"""What a loader without this package computes: fake quantization around plain layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.checkpoint.digital import DigitalLayer, DigitalPlan
from analog_plugin.layers import analog_layers
from analog_plugin.layers.prefix import remove_prefix, without_prefix


class PlainLinear(nn.Module):
    """A linear layer within compressed-tensors' quantization of weights, inputs and outputs.

    Its integer range is asymmetric, [-128, 127] for 8 bits, unlike the DAC's ±127: a value clipped
    below the range differs by one code. Outputs are quantized behind the bias.

    Args:
        linear: The layer in full precision.
        digital: What becomes of it.
    """

    input_scale: Tensor | None
    output_scale: Tensor | None

    def __init__(self, linear: nn.Linear, digital: DigitalLayer) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        if digital.weight_bits is not None:
            codes, scale = digital.weight_codes(linear.weight)
            dtype = linear.weight.dtype  # loaders cast scales to the model's type
            rounded = codes.to(dtype) * scale.to(dtype)
            self.weight = nn.Parameter(rounded, requires_grad=False)
        self.input_bits, self.output_bits = digital.input_bits, digital.output_bits
        self.register_buffer("input_scale", digital.input_scale)
        self.register_buffer("output_scale", digital.output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        if self.input_bits is not None:
            x = _fake_quantize(x, self.input_scale, self.input_bits)
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.output_bits is not None:
            y = _fake_quantize(y, self.output_scale, self.output_bits)
        return y


def _fake_quantize(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """As compressed-tensors does; without a scale every token by its maximum."""
    high = 2 ** (bits - 1)
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) / (high - 0.5)
        scale = torch.where(scale > 0, scale, torch.finfo(x.dtype).eps)
    else:
        scale = scale.to(x.dtype)
    return (x / scale).clamp(-high, high - 1).round() * scale


@contextlib.contextmanager
def plain_reading(model: Any, plan: DigitalPlan) -> Iterator[None]:
    """Within this context ``model``, analog, computes what a plain loader makes of ``plan``."""
    layers = list(analog_layers(model))
    try:
        _make_plain(model, plan)
        with without_prefix(model):
            yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)


def plain_view(model: nn.Module, plan: DigitalPlan) -> nn.Module:
    """A copy of ``model`` that is for good what :func:`plain_reading` makes of it for a while."""
    copied: Any = copy.deepcopy(model)
    _make_plain(copied, plan)
    remove_prefix(copied)
    return copied.eval()


def _make_plain(model: nn.Module, plan: DigitalPlan) -> None:
    for name, layer in list(analog_layers(model)):
        linear = layer.to_linear()
        if name in plan.layers:
            linear = PlainLinear(linear, plan.layers[name]).to(linear.weight.device)
        model.set_submodule(name, linear)
