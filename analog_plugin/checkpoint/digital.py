"""Digital profiles, and what each layer becomes in one: bits, and scales of plain loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers import AnalogConv1D, analog_layers
from analog_plugin.ops.rounding import WEIGHT_SCALES, quantize_rows
from analog_plugin.scheme import fused_with

#: A plain range so many times the analog one would leave a layer's usual inputs four of its bits.
OUTLIERS = 8.0


@dataclass(frozen=True)
class DigitalProfile:
    """What a directory holds for loaders without this package.

    Args:
        name: In recipes and commands.
        weight_bits: Of each weight; None: full precision; ``"mixed"``: chosen layer by layer.
        packed: Codes of fewer than 8 bits are packed into 32-bit words; False: one int8 each.
        output_bits: Of each layer's output, behind the bias; None: not quantized.
        summary: One line for help texts.
    """

    name: str
    weight_bits: int | str | None
    packed: bool = False
    output_bits: int | None = None
    summary: str = ""

    @property
    def layout(self) -> str:
        """The format's name in compressed-tensors."""
        if self.weight_bits is None:
            return "dense"
        return "pack-quantized" if self.packed else "int-quantized"


ANALOG_FP = DigitalProfile("analog-fp", None)
DIGITAL_PROFILES = (
    DigitalProfile("w8a8", 8, summary="8-bit weights, static 8-bit inputs"),
    DigitalProfile("w8a8o8", 8, output_bits=8, summary="w8a8 with 8-bit outputs"),
    DigitalProfile("w4-in-w8", 4, summary="4-bit weights, one byte each: runs as w8a8"),
    DigitalProfile("w4a8", 4, packed=True, summary="4-bit weights, packed"),
    DigitalProfile("w4a8o8", 4, packed=True, output_bits=8, summary="w4a8 with 8-bit outputs"),
    DigitalProfile("w3-in-w8", 3, summary="3-bit weights, one byte each: runs as w8a8"),
    DigitalProfile("w3a8", 3, packed=True, summary="3-bit weights, packed"),
    DigitalProfile("w2-in-w8", 2, summary="2-bit weights, one byte each: runs as w8a8"),
    DigitalProfile("w2a8", 2, packed=True, summary="2-bit weights, packed"),
    DigitalProfile("mixed", "mixed", packed=True, summary="bits layer by layer, packed"),
    DigitalProfile("mixed-in-w8", "mixed", summary="bits layer by layer, one byte a weight"),
)


@dataclass(frozen=True)
class DigitalLayer:
    """One layer as plain loaders see it.

    Args:
        input_bits: Of its inputs; None: not quantized.
        input_scale: [1] fp32, of one code of its inputs; None: every token by its own maximum.
        weight_bits: Of its weights; None: full precision.
        weight_scale: How the weights' scales are found; see ``quantize_rows``.
        output_bits: Of its outputs; None: not quantized.
        output_scale: [1] fp32, of one code of its outputs.
    """

    input_bits: int | None
    input_scale: Tensor | None = None
    weight_bits: int | None = None
    weight_scale: str = "max"
    output_bits: int | None = None
    output_scale: Tensor | None = None

    def weight_codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes [out, in] of ``weight`` and their fp32 scales [out, 1]."""
        assert self.weight_bits is not None
        return quantize_rows(weight, self.weight_bits, self.weight_scale)


@dataclass(frozen=True)
class DigitalPlan:
    """A model in one profile.

    Args:
        profile: Which.
        layers: The quantized layers by name; others stay in full precision.
        notes: Sentences for the model card on what the profile cost.
    """

    profile: DigitalProfile
    layers: dict[str, DigitalLayer]
    notes: list[str] = field(default_factory=list)


def check_digital(profile: DigitalProfile, model: nn.Module, **options: Any) -> None:
    """Refuse a model that ``profile`` cannot hold, and options that can be seen to be wrong.

    Raises:
        AnalogError: The model has ``Conv1D`` layers, or its inputs are not static 8-bit ones, or a
            budget of bits is missing or too small.
    """
    from analog_plugin.checkpoint.bits import check_mixed

    layers = [layer for _, layer in analog_layers(model)]
    if any(isinstance(layer, AnalogConv1D) for layer in layers):
        raise AnalogError(
            f"{type(model).__name__} has Conv1D layers, which compressed-tensors does not "
            "quantize; write profile: analog-fp."
        )
    for scheme in (layer.scheme for layer in layers):
        if scheme.input_bits != 8 or scheme.input_range == "dynamic":
            raise AnalogError(
                f"The profile {profile.name} needs static 8-bit inputs, but the scheme has "
                f"input_bits {scheme.input_bits} and input_range {scheme.input_range}; write "
                "profile: analog-fp."
            )
    if profile.weight_bits == "mixed":
        check_mixed(model, *(options.get(name) for name in ("bits", "average_bits", "max_bytes")))


def plan_profile(
    model: nn.Module,
    profile: DigitalProfile = ANALOG_FP,
    *,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    weight_scale: str = "max",
    bits: Mapping[str, int] | None = None,
    average_bits: float | None = None,
    max_bytes: int | None = None,
) -> DigitalPlan:
    """Decide bits and scales of every layer.

    Plain loaders know neither tiles nor a digital prefix. Their input range is the largest of the
    layer's tiles; with a prefix it is one that holds the first token too: found on ``batches`` with
    the profile's rounded weights, or without batches ``plain_range`` of the layer. Serving engines
    have one scale for each fused group (q/k/v, gate/up): the largest of the group.

    Args:
        model: An analog model; it is not changed.
        profile: What to make of it.
        batches: Keyword arguments of the model's forward, for calibration; asked for only where
            they are needed: for outputs, bits that are to be chosen, models with a prefix.
        weight_scale: ``"max"`` or ``"mse"``; see :func:`~analog_plugin.ops.rounding.quantize_rows`.
        bits: Of a mixed profile: each layer's bits, by name.
        average_bits, max_bytes: Of a mixed profile without ``bits``: the budget in bits a weight
            of the quantized layers, or in bytes of their codes and scales.

    Raises:
        AnalogError: Something is missing, or does not fit the profile.
    """
    from analog_plugin.checkpoint.bits import mixed_bits
    from analog_plugin.checkpoint.scales import plain_ranges, with_scales

    if weight_scale not in WEIGHT_SCALES:
        raise AnalogError(
            f"weight_scale is {weight_scale!r}, but must be {' or '.join(WEIGHT_SCALES)}."
        )
    rows = None if batches is None else _Kept(batches)
    layers = plain_layers(model)
    widths: Mapping[str, Any] = dict.fromkeys(layers, profile.weight_bits)
    if profile.weight_bits == "mixed":
        widths = mixed_bits(model, rows, weight_scale, bits, average_bits, max_bytes)
    plan = DigitalPlan(
        profile,
        {
            name: DigitalLayer(
                layer.scheme.input_bits,
                weight_bits=widths[name],
                weight_scale=weight_scale,
                output_bits=profile.output_bits,
            )
            for name, layer in layers.items()
        },
    )
    if any(layer.scheme.input_range == "dynamic" for layer in layers.values()):
        return plan
    return with_scales(model, plan, plain_ranges(model, plan, rows), rows)


def tokens_of(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Token ids [N, S] of batches.

    Raises:
        AnalogError: There are none, or of several lengths.
    """
    ids = [batch["input_ids"] for batch in batches if "input_ids" in batch]
    if not ids or len(ids) < len(batches) or len({rows.shape[1] for rows in ids}) > 1:
        raise AnalogError(
            "Batches must hold input_ids, sequences of one length; give at least one such batch."
        )
    return torch.cat(ids)


class _Kept(Sequence[Mapping[str, Tensor]]):
    """Batches, read when they are first needed and then kept."""

    def __init__(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self._source = batches

    @cached_property
    def _batches(self) -> list[Mapping[str, Tensor]]:
        return list(self._source)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]


def plain_layers(model: nn.Module) -> dict[str, Any]:
    """The analog layers whose inputs plain loaders are told to quantize, by name.

    None where the analog model has no DAC or DACs of several kinds (in resolution, or static beside
    dynamic), of which a file describes one, nor where a layer is a ``Conv1D``, which
    compressed-tensors leaves alone.

    With a digital prefix, not those layers whose plain range has to hold massive activations of the
    first token, more than :data:`OUTLIERS` times the analog range: they stay in full precision for
    plain loaders (in Llama-shaped models a few down projections), unless these were all layers.
    Members of a group that serving engines fuse stay together: where one is digital, all are.
    """
    modules = dict(model.named_modules())
    layers = {
        name: layer
        for name, layer in analog_layers(model)
        if not any(type(modules[other]) is nn.Linear for other in fused_with(name, modules))
    }
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
        for other in fused_with(name, layers)
    }
    if len(kept) == len(layers):  # to a digital profile nothing would be left
        return layers
    return {name: layer for name, layer in layers.items() if name not in kept}
