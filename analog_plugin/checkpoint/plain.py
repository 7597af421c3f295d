"""What a loader without this package computes: input quantization around plain layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers import AnalogConv1D, analog_layers
from analog_plugin.layers.prefix import installed_prefix, remove_prefix, without_prefix
from analog_plugin.scheme import FUSED_GROUPS

#: A plain range so many times the analog one would leave a layer's usual inputs four of its bits.
OUTLIERS = 8.0


def plain_layers(model: nn.Module) -> dict[str, Any]:
    """The analog layers whose inputs plain loaders are told to quantize, by name.

    None where the analog model has no DAC or DACs of several kinds (in resolution, or static beside
    dynamic), of which a file describes one, nor where a layer is a ``Conv1D``, which
    compressed-tensors leaves alone.

    With a digital prefix, not those layers whose plain range has to hold massive activations of the
    first token, more than :data:`OUTLIERS` times the analog range: they stay in full precision for
    plain loaders (in Llama-shaped models a few down projections), unless these were all layers.
    Members of a group that serving engines fuse stay together.
    """
    layers = dict(analog_layers(model))
    kinds = {(la.scheme.input_bits, la.scheme.input_range == "dynamic") for la in layers.values()}
    one_dac = len(kinds) == 1 and next(iter(kinds))[0] is not None
    if not one_dac or any(isinstance(layer, AnalogConv1D) for layer in layers.values()):
        return {}
    kept = {
        other
        for name, layer in layers.items()
        if layer.plain_range is not None
        and layer.scheme.input_range != "dynamic"
        and float(layer.plain_range) > OUTLIERS * float(layer.input_range.detach().max())
        for other in _fused_with(name, layers)
    }
    if len(kept) == len(layers):  # to the profile w8a8 nothing would be left
        return layers
    return {name: layer for name, layer in layers.items() if name not in kept}


def plain_input_scales(model: nn.Module) -> dict[str, Tensor]:
    """One scale [1] for each of the :func:`plain_layers`: its range over the DAC's levels.

    Plain loaders know one range a layer, so the largest of its tiles' is taken, and serving engines
    one for each fused group (q/k/v, gate/up), so the largest of the group. They know no digital
    prefix either: with one, the range is ``plain_range``, which holds the first token too. Empty
    where inputs are not quantized, or each token by its own maximum.

    Raises:
        AnalogError: The model has a prefix, and its plain ranges were not calibrated.
    """
    layers = plain_layers(model)
    ranges: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.scheme.input_range == "dynamic":
            return {}
        if layer.plain_range is not None:
            ranges[name] = layer.plain_range
        elif installed_prefix(model) is None:
            ranges[name] = layer.input_range.detach().max().reshape(1)
        else:
            raise AnalogError(
                "The model has a digital prefix, which plain loaders do not know; call "
                "calibrate_plain_ranges(model, batches) before it is saved."
            )
    return {
        name: torch.stack([ranges[other] for other in _fused_with(name, layers)]).amax(0)
        / layer.scheme.input_levels
        for name, layer in layers.items()
    }


def _fused_with(name: str, layers: Mapping[str, Any]) -> list[str]:
    """The layers that serving engines run as one with the layer ``name``, itself among them."""
    parent, _, last = name.rpartition(".")
    group = next((group for group in FUSED_GROUPS if last in group), (last,))
    names = [f"{parent}.{other}" if parent else other for other in group]
    return [other for other in names if other in layers]


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


@contextlib.contextmanager
def plain_reading(model: Any, weight_bits: int | None = None) -> Iterator[None]:
    """Within this context ``model`` computes what a plain loader makes of its checkpoint.

    Args:
        model: An analog model.
        weight_bits: Round the weights per channel, as the profile ``w8a8`` does; None: keep them.
    """
    layers = list(analog_layers(model))
    try:
        _make_plain(model, weight_bits)
        with without_prefix(model):
            yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)


def plain_view(model: nn.Module, weight_bits: int | None = None) -> nn.Module:
    """A copy of ``model`` that is for good what :func:`plain_reading` makes of it for a while."""
    copied: Any = copy.deepcopy(model)
    _make_plain(copied, weight_bits)
    remove_prefix(copied)
    return copied.eval()


def _make_plain(model: nn.Module, weight_bits: int | None) -> None:
    scales, quantized = plain_input_scales(model), plain_layers(model)
    for name, layer in list(analog_layers(model)):
        linear = layer.to_linear()
        if name in quantized:
            if weight_bits is not None:
                codes, scale = quantize_rows(linear.weight, weight_bits)
                linear.weight = nn.Parameter((codes.float() * scale).to(linear.weight.dtype))
            linear = PlainLinear(linear, scales.get(name), layer.scheme.input_bits)
        model.set_submodule(name, linear)
