"""Bits of each layer's weights: chosen by what each layer's rounding costs, within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.checkpoint.digital import plain_layers, tokens_of
from analog_plugin.errors import AnalogError, shown
from analog_plugin.evaluation.sensitivity import analyze_sensitivity
from analog_plugin.layers import analog_layers
from analog_plugin.ops.rounding import rounded_rows, row_scales
from analog_plugin.scheme import fused_with

#: Bits that a weight may have in a mixed profile.
WIDTHS = (2, 3, 4, 8)
#: Sequences that the cost of each layer's rounding is measured on.
_ROWS = 4


@dataclass(frozen=True)
class RowRounding:
    """A noise model that rounds weights as digital profiles do: one scale a row, over all tiles.

    Args:
        bits: Of a weight.
        scale: See :func:`~analog_plugin.ops.rounding.quantize_rows`.
        unit: [out, 1] scales of the layer; None: of what is programmed.
    """

    bits: int
    scale: str = "max"
    unit: Tensor | None = None
    random = False

    def for_layer(self, weight: Tensor) -> RowRounding:
        """With the scales of one layer's weight [out, in]."""
        return replace(self, unit=row_scales(weight, self.bits, self.scale))

    def program(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """One tile's weights [columns, rows], rounded, in fp32."""
        unit = row_scales(weight, self.bits, self.scale) if self.unit is None else self.unit
        return rounded_rows(weight, unit, self.bits)


def mixed_bits(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]] | None,
    weight_scale: str,
    bits: Mapping[str, int] | None,
    average_bits: float | None,
    max_bytes: int | None,
) -> dict[str, int]:
    """Bits of all layers that plain loaders quantize: as given, or chosen within the budget.

    Raises:
        AnalogError: As :func:`check_mixed`, or there is nothing to measure on.
    """
    check_mixed(model, bits, average_bits, max_bytes)
    layers = plain_layers(model)
    if bits is not None:
        return dict(bits)
    if batches is None:
        raise AnalogError(
            "Which layers need more bits is measured on data; give batches of tokens, or bits of "
            "each layer."
        )
    tokens = tokens_of(batches)
    costs = rounding_costs(model, tokens[:_ROWS], weight_scale)
    return choose_bits(
        {name: tuple(layer.weight.shape) for name, layer in layers.items()},
        costs,
        average_bits=average_bits,
        max_bytes=max_bytes,
    )


def check_mixed(
    model: nn.Module,
    bits: Mapping[str, int] | None,
    average_bits: float | None,
    max_bytes: int | None,
) -> None:
    """Refuse what :func:`mixed_bits` cannot choose from, before anything is measured.

    Raises:
        AnalogError: Neither or both of bits and a budget are given, a layer is missing or unknown,
            or the budget is too small.
    """
    layers = plain_layers(model)
    given = [v for v in (bits, average_bits, max_bytes) if v is not None]
    if len(given) != 1:
        raise AnalogError(
            "A mixed profile takes one of bits (of each layer), average_bits and max_bytes, but "
            f"{len(given)} were given; write for instance average_bits: 4.5."
        )
    if bits is not None:
        _check_bits(bits, layers)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    check_budget(shapes, average_bits, max_bytes)


def rounding_costs(
    model: nn.Module, tokens: Tensor, weight_scale: str = "max"
) -> dict[int, dict[str, float]]:
    """KL to the digital model, in nats a token, when a layer alone is rounded: by bits and name.

    Members of a group that serving engines fuse are rounded together, and have its cost in equal
    parts. 8 bits are taken to cost nothing.

    Args:
        model: An analog model; it is not changed.
        tokens: [N, S] token ids.
        weight_scale: See :func:`~analog_plugin.ops.rounding.quantize_rows`.
    """
    names = [name for name, _ in analog_layers(model)]
    costs = {max(WIDTHS): dict.fromkeys(names, 0.0)}
    for width in WIDTHS[:-1]:
        report = analyze_sensitivity(
            model,
            tokens,
            by="fused",
            parts=("noise",),
            noise=RowRounding(width, weight_scale),
            batch_size=len(tokens),
        )
        costs[width] = {}
        for row in report.rows:
            group = fused_with(row.name, names)
            costs[width] |= dict.fromkeys(group, max(row.kl, 0.0) / len(group))
    return costs


def choose_bits(
    shapes: Mapping[str, tuple[int, ...]],
    costs: Mapping[int, Mapping[str, float]],
    *,
    average_bits: float | None = None,
    max_bytes: int | None = None,
) -> dict[str, int]:
    """Spend a budget where it helps most: KL saved for each byte, step by step.

    All layers begin with the fewest bits. The layers' costs are taken to add up. Members of a group
    that serving engines fuse get the same bits.

    Args:
        shapes: Of each layer's weight, (out, in).
        costs: By bits and layer; see :func:`rounding_costs`.
        average_bits: Of a weight, over all layers; or
        max_bytes: of their packed codes and scales.

    Raises:
        AnalogError: Not even the fewest bits fit the budget.
    """
    widths = sorted(costs)
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    groups = list(dict.fromkeys(tuple(fused_with(name, shapes)) for name in shapes))

    def price(group: tuple[str, ...], width: int) -> int:
        if average_bits is not None:
            return sum(weights[name] * width for name in group)
        return sum(packed_bytes(shapes[name], width) for name in group)

    def cost(group: tuple[str, ...], width: int) -> float:
        return sum(costs[width][name] for name in group)

    check_budget(shapes, average_bits, max_bytes)
    # In bits or bytes of all layers: whole numbers, which add up exactly.
    budget = max_bytes if average_bits is None else average_bits * sum(weights.values())
    assert budget is not None
    everywhere = {width: sum(price(group, width) for group in groups) for width in widths}
    spent = everywhere[widths[0]]
    chosen = dict.fromkeys(groups, widths[0])
    while True:
        steps = [
            ((cost(group, width) - cost(group, wider)) / extra, group, wider, extra)
            for group, width in chosen.items()
            for wider in widths
            if wider > width
            and spent + (extra := price(group, wider) - price(group, width)) <= budget
        ]
        best = max(steps, key=lambda step: step[0], default=None)
        if best is None or best[0] <= 0:
            break
        _, group, wider, extra = best
        chosen[group] = wider
        spent += extra
    # What the last steps leave over may have been worth more elsewhere.
    alike = [dict.fromkeys(groups, width) for width in widths if everywhere[width] <= budget]
    found = min([chosen, *alike], key=lambda bits: sum(cost(g, width) for g, width in bits.items()))
    return {name: found[group] for group in groups for name in group}


def check_budget(
    shapes: Mapping[str, tuple[int, ...]], average_bits: float | None, max_bytes: int | None
) -> None:
    """Refuse a budget that not even the fewest bits keep to.

    Raises:
        AnalogError: It is too small.
    """
    fewest = min(WIDTHS)
    least = sum(packed_bytes(shape, fewest) for shape in shapes.values())
    if average_bits is not None and average_bits < fewest:
        raise AnalogError(
            f"The budget is {average_bits:g} bits a weight, but the fewest are {fewest}; give at "
            "least that."
        )
    if max_bytes is not None and max_bytes < least:
        raise AnalogError(
            f"The budget is {max_bytes} bytes, but {fewest} bits everywhere already take {least}; "
            "give at least that."
        )


def packed_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of a weight [out, in] in packed codes, with its fp32 scales and its shape (int64)."""
    rows, columns = shape
    return rows * (math.ceil(columns * bits / 32) * 4 + 4) + 16


def _check_bits(bits: Mapping[str, int], layers: Mapping[str, Any]) -> None:
    for name in [*layers, *bits]:
        if name not in layers or bits.get(name) not in WIDTHS:
            raise AnalogError(
                f"bits of {shown(name)} are {shown(bits.get(name))}, but each quantized layer of "
                f"the model needs one of {', '.join(map(str, WIDTHS))}."
            )
