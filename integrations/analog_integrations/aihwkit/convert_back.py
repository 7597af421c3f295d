"""``from_aihwkit``: a model on aihwkit's tiles as an analog model of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from aihwkit.nn import AnalogLinear
from aihwkit.nn.conversion import convert_to_digital
from aihwkit.nn.modules.base import AnalogLayerBase
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from analog_integrations.aihwkit.configuration import HELD, scheme_fields
from analog_plugin.errors import AnalogError
from analog_plugin.layers import analog_layers, convert_to_analog
from analog_plugin.layers.prefix import installed_prefix
from analog_plugin.noise import Programmed
from analog_plugin.scheme import AnalogScheme


class _Layer(NamedTuple):
    """What one of aihwkit's layers holds.

    Args:
        weight: [out, in], clean.
        fields: Those of its scheme that aihwkit knows.
        tiles: Rows of each tile.
        ranges: One for each of them, or None.
        programmed: What the devices of each of them hold, or None.
        is_conv1d: Whether its place is one of a ``Conv1D``.
    """

    weight: Tensor
    fields: Mapping[str, Any]
    tiles: list[int]
    ranges: list[float] | None
    programmed: list[Programmed] | None
    is_conv1d: bool


def from_aihwkit(model: nn.Module, **training: Any) -> nn.Module:
    """Make an analog model of ours from one with aihwkit's linear layers, which stays as it is.

    Weights, input ranges, tiles, DAC and ADC compute what aihwkit's compute. A model that is
    programmed stays so: the layers hold the clean weights, and as programmed weights what the
    devices hold, with the factor of the drift compensation.

    Args:
        model: A model whose analog layers are aihwkit's ``AnalogLinear`` on inference tiles.
        **training: Fields of an :class:`~analog_plugin.AnalogScheme` that concern training alone,
            such as ``weight_noise``, ``clip_sigma`` or ``tie_ranges``. aihwkit's own settings of
            training (``modifier``, ``clip``, ``remap``) are not read.

    Returns:
        The model with analog layers, in evaluation mode.

    Raises:
        AnalogError: The model has no such layer, or one that no scheme of ours can describe; one
            sentence says which and why.
    """
    for field in training:
        if field in (*HELD, "adc_bound", "prefix", "overrides"):
            raise AnalogError(
                f"{field} is what the model itself says; give fields that concern training alone, "
                "such as weight_noise=0.03."
            )
    found = {
        name: _read(layer, name)
        for name, layer in model.named_modules()
        if isinstance(layer, AnalogLayerBase) and not layer.IS_CONTAINER
    }
    if not found or "" in found:
        raise AnalogError(
            f"{type(model).__name__} is no model that holds analog layers of aihwkit; convert one "
            "with aihwkit.nn.conversion.convert_to_analog first."
        )
    scheme = _scheme(found, training)
    plain = convert_to_digital(model)  # a copy
    for name, held in found.items():
        _give_weight(plain, name, held)
    prefix = installed_prefix(plain)
    if prefix is not None:
        scheme = scheme.replace(prefix=prefix.tokens)
    analog = convert_to_analog(plain, scheme, ignore=(), targets=tuple(found)).eval()
    layers = dict(analog_layers(analog))
    if layers.keys() != found.keys():
        raise AnalogError(
            "The model has layers whose names end alike and of which only some are analog "
            f"({', '.join(sorted(layers.keys() - found.keys()))}); rename one."
        )
    for name, held in found.items():
        if held.ranges is not None:
            layers[name].set_input_range(held.ranges)
    for name, held in found.items():
        if held.ranges is not None and layers[name].input_range.tolist() != held.ranges:
            raise AnalogError(
                f"{name} has other input ranges than the layers that tie_ranges ties it to; leave "
                "tie_ranges out."
            )
        if held.programmed is not None:
            layers[name].program(_Held(held.programmed), 0)
    return analog


class _Held:
    """A noise model that leaves what another one has left already."""

    random = False

    def __init__(self, tiles: list[Programmed]) -> None:
        self.tiles = iter(tiles)

    def program(self, weight: Tensor, generator: torch.Generator) -> Programmed:
        made = next(self.tiles)
        return made._replace(weight=made.weight.to(weight))


def _read(layer: Any, name: str) -> _Layer:
    if not isinstance(layer, AnalogLinear):
        raise AnalogError(
            f"{name} is an {type(layer).__name__}, but only AnalogLinear has a counterpart; keep "
            "it digital."
        )
    module = layer.analog_module
    array = [list(row) for row in module.array] if hasattr(module, "array") else [[module]]
    fields = scheme_fields(array[0][0].rpu_config, name)
    if any(scheme_fields(tile.rpu_config, name) != fields for row in array for tile in row):
        raise AnalogError(f"{name} has tiles of different configurations; give them one.")
    if any(tile.analog_bias for row in array for tile in row):
        raise AnalogError(
            f"{name} has its bias on the tile, which no scheme of ours can say; set "
            "mapping.digital_bias to True."
        )
    ranges = None
    if array[0][0].input_range is not None:
        ranges = [_common([tile.input_range.item() for tile in row], name) for row in array]
    rows = [_clean(row, name, has_adc=fields["output_bits"] is not None) for row in array]
    programmed = None
    if all(tile.reference_combined_weights is not None for row in array for tile in row):
        programmed = [
            Programmed(
                torch.cat([tile.get_weights()[0] for tile in row]),
                _common([_alpha(tile) for tile in row], name),
            )
            for row in array
        ]
    tiles = [row.shape[1] for row in rows]
    is_conv1d = getattr(layer, "is_conv1d", False)
    return _Layer(torch.cat(rows, dim=1), fields, tiles, ranges, programmed, is_conv1d)


def _clean(row: list[Any], name: str, has_adc: bool) -> Tensor:
    """Weights [out, rows] of the tiles of some inputs, before they were programmed."""
    blocks = []
    for tile in row:
        unit = tile.reference_combined_weights
        unit = (tile.tile.get_weights() if unit is None else unit).detach().cpu()
        peak = unit.abs().amax(1)
        if has_adc and not bool(((peak - 1).abs() <= 1e-6).logical_or(peak == 0).all()):
            raise AnalogError(
                f"{name} has columns whose largest weight is not at the full conductance, to which "
                "the ADC of ours is scaled; set mapping.weight_scaling_omega to 1.0 and "
                "weight_scaling_columnwise to True, and call model.remap_analog_weights()."
            )
        scales = tile.get_scales()
        blocks.append(unit if scales is None else unit * scales.detach().cpu().view(-1, 1))
    return torch.cat(blocks)


def _alpha(tile: Any) -> float:
    """The factor of the drift compensation; 1 where there is none."""
    compensated = tile.rpu_config.drift_compensation is not None
    if compensated and tile.alpha.numel() != 1:
        raise AnalogError(
            "A drift compensation of each column has no counterpart; use GlobalDriftCompensation."
        )
    return tile.alpha.item() if compensated else 1.0


def _common(values: list[float], name: str) -> float:
    if len(set(values)) > 1:
        raise AnalogError(
            f"{name} has tiles beside each other with different input ranges or drift "
            "compensations, but ours has one for all columns; set mapping.max_output_size to -1."
        )
    return values[0]


def _scheme(found: Mapping[str, _Layer], training: Mapping[str, Any]) -> AnalogScheme:
    """One scheme for all layers, with those that differ from most as exceptions."""
    bounds = {held.fields["out_bound"] for held in found.values()} - {None}
    if len(bounds) > 1:
        raise AnalogError(
            f"The layers have different forward.out_bound ({', '.join(map(str, sorted(bounds)))}), "
            "but ours is one constant for the whole model; set one."
        )
    own = {
        name: {key: value for key, value in held.fields.items() if key != "out_bound"}
        for name, held in found.items()
    }
    most, _ = Counter(tuple(fields.items()) for fields in own.values()).most_common(1)[0]
    overrides = {
        name: {key: value for key, value in fields.items() if value != dict(most)[key]}
        for name, fields in own.items()
        if tuple(fields.items()) != most
    }
    bound = {"out_bound": bounds.pop()} if bounds else {}
    fields = {**training, **dict(most), **bound, "overrides": overrides}
    scheme = AnalogScheme.from_dict(fields)
    for name, held in found.items():
        layer_scheme = scheme.for_layer(name)
        assert layer_scheme is not None
        tiles = layer_scheme.tiles(held.weight.shape[1])
        if tiles != held.tiles:
            raise AnalogError(
                f"{name} has tiles of {held.tiles} rows, but its mapping.max_input_size says "
                f"{tiles}; convert it with that mapping."
            )
    return scheme


def _give_weight(plain: nn.Module, name: str, held: _Layer) -> None:
    """Put the clean weight into a digital layer, stored as its place in the model wants it."""
    linear: Any = plain.get_submodule(name)
    weight = held.weight.to(linear.weight)
    if not held.is_conv1d:
        linear.weight.data = weight
        return
    conv = Conv1D(*weight.shape)
    conv.weight = nn.Parameter(weight.t().contiguous())
    conv.bias = linear.bias
    plain.set_submodule(name, conv)
