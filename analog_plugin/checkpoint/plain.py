"""What a loader without this package computes: input quantization around plain layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers import AnalogConv1D, analog_layers
from analog_plugin.layers.prefix import installed_prefix, remove_prefix
from analog_plugin.scheme import FUSED_GROUPS


def plain_quantizes_inputs(model: nn.Module) -> bool:
    """Whether plain loaders are told to quantize inputs.

    Not where the analog model has no DAC or DACs of several kinds (in resolution, or static beside
    dynamic), of which a file describes one, nor where a layer is a ``Conv1D``, which
    compressed-tensors leaves alone.
    """
    layers = [layer for _, layer in analog_layers(model)]
    kinds = {(la.scheme.input_bits, la.scheme.input_range == "dynamic") for la in layers}
    one_dac = len(kinds) == 1 and layers[0].scheme.input_bits is not None
    return one_dac and not any(isinstance(layer, AnalogConv1D) for layer in layers)


def plain_input_scales(model: nn.Module) -> dict[str, Tensor]:
    """One scale [1] for each analog layer: its largest tile range over the DAC's levels.

    Plain loaders know one range a layer, and serving engines one for each fused group (q/k/v,
    gate/up), so the largest range of a group stands for all of it. They know no digital prefix
    either: with one, the range is ``plain_range``, which holds the first token too. Empty where
    inputs are not quantized, or each token by its own maximum.

    Raises:
        AnalogError: The model has a prefix, and its plain ranges were not calibrated.
    """
    layers = dict(analog_layers(model))
    dynamic = next(iter(layers.values())).scheme.input_range == "dynamic"
    if dynamic or not plain_quantizes_inputs(model):
        return {}
    ranges: dict[str, Tensor] = {}
    groups: dict[tuple[str, int], list[str]] = {}
    for name, layer in layers.items():
        if layer.plain_range is not None:
            ranges[name] = layer.plain_range
        elif installed_prefix(model) is None:
            ranges[name] = layer.input_range.detach().max().reshape(1)
        else:
            raise AnalogError(
                "The model has a digital prefix, which plain loaders do not know; call "
                "calibrate_plain_ranges(model, batches) before it is saved."
            )
        parent, _, last = name.rpartition(".")
        for index, group in enumerate(FUSED_GROUPS):
            if last in group:
                groups.setdefault((parent, index), []).append(name)
    for names in groups.values():
        largest = torch.stack([ranges[name] for name in names]).amax(0)
        for name in names:
            ranges[name] = largest
    return {name: ranges[name] / layers[name].scheme.input_levels for name in ranges}


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round ``weight`` [out, in] to nearest: int8 codes and fp32 scales [out, 1], symmetric."""
    levels = 2 ** (bits - 1) - 1
    scale = weight.detach().float().abs().amax(1, keepdim=True) / levels
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (weight.detach().float() / scale).round_().clamp_(-levels, levels)
    return codes.to(torch.int8), scale


class PlainLinear(nn.Module):
    """A linear layer behind compressed-tensors' input quantization.

    Its integer range is asymmetric, [-128, 127] for 8 bits, unlike the DAC's ±127: a value clipped
    below the range differs by one code.

    Args:
        linear: The layer.
        scale: Of one code, [1]; None: every token's maximum over 127.5 (for 8 bits).
        bits: Of the codes.
    """

    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, scale: Tensor | None, bits: int) -> None:
        super().__init__()
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits
        self.register_buffer("input_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        high = 2 ** (self.bits - 1)
        if self.input_scale is None:
            scale = x.abs().amax(-1, keepdim=True) / (high - 0.5)
            scale = torch.where(scale > 0, scale, torch.finfo(x.dtype).eps)
        else:
            scale = self.input_scale.to(x.dtype)
        x = (x / scale).clamp(-high, high - 1).round() * scale
        return nn.functional.linear(x, self.weight, self.bias)


def plain_view(model: nn.Module, weight_bits: int | None = None) -> nn.Module:
    """A copy of ``model`` that computes what a plain loader makes of its checkpoint.

    Args:
        model: An analog model.
        weight_bits: Round the weights per channel, as the profile ``w8a8`` does; None: keep them.
    """
    scales, quantized = plain_input_scales(model), plain_quantizes_inputs(model)
    copied: Any = copy.deepcopy(model)
    remove_prefix(copied)
    for name, layer in list(analog_layers(copied)):
        linear = layer.to_linear()
        if weight_bits is not None:
            codes, scale = quantize_rows(linear.weight, weight_bits)
            linear.weight = nn.Parameter((codes.float() * scale).to(linear.weight.dtype))
        if quantized:
            linear = PlainLinear(linear, scales.get(name), layer.scheme.input_bits)
        copied.set_submodule(name, linear)
    return copied.eval()
