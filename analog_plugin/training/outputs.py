"""Input ranges that give the least error of a tile's outputs, DAC and ADC together.

The ADC's full scale is proportional to the input range: a range that suits the inputs alone can
saturate the ADC, or waste its codes. Both are weighed on what counts, the tile's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.layers import analog_layers
from analog_plugin.layers.observe import Observer, observe_inputs, static_inputs, unreached
from analog_plugin.ops.weights import column_maximum
from analog_plugin.progress import progress_bar
from analog_plugin.scheme import AnalogScheme

#: Candidates for a range, relative to the largest input: half octaves from 1/11 to 4 times it.
_FACTORS = tuple(2.0 ** (step / 2) for step in range(-7, 5))
#: Inputs kept of each layer: memory does not grow with the calibration data.
SAMPLES = 512

#: Ranges [K] by ADC bound and layer name.
RangeTable = dict[float, dict[str, Tensor]]


@torch.no_grad()
def search_output_ranges(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    bounds: Sequence[float],
    total: int | None = None,
) -> RangeTable:
    """Find the ranges of the ``range_init: output`` layers for several ADC bounds β; none is set.

    Args:
        model: A model with analog layers, whose inputs are observed in digital operation.
        batches: Keyword arguments of the model's forward; padding does not count.
        bounds: The ADC bounds; without an ADC all give the same ranges.
        total: Number of batches, for the progress bar.

    Raises:
        AnalogError: No input reached a layer.
    """
    layers = static_inputs(
        (name, layer) for name, layer in analog_layers(model) if layer.scheme.range_init == "output"
    )
    samples = sample_inputs(model, layers, batches, total)
    # Layers that share a range read the same input, and choose together.
    shared: dict[int, list[str]] = {}
    for name, layer in layers.items():
        shared.setdefault(id(layer.input_range), []).append(name)
    for names in shared.values():
        if names[0] not in samples:
            raise unreached(names[0])
    table: RangeTable = {bound: {} for bound in bounds}
    for names in progress_bar(list(shared.values()), desc="Searching input ranges"):
        found = best_ranges([layers[name] for name in names], samples.pop(names[0]), bounds)
        for bound, ranges in zip(bounds, found, strict=True):
            table[bound] |= dict.fromkeys(names, ranges)
    return table


def best_ranges(layers: Sequence[Any], inputs: Tensor, bounds: Sequence[float]) -> list[Tensor]:
    """λ [K] for each bound, with the least squared error of the outputs of ``layers``.

    Each layer's error is taken relative to its outputs' energy.

    Args:
        layers: Analog layers with equal tiles that read the same input.
        inputs: [T, in].
    """
    tiles, scheme = layers[0].tiles, layers[0].scheme
    weights = [layer.tile_weight.detach().float() for layer in layers]
    energies = [float((inputs @ weight.t()).square().sum()) for weight in weights]
    found = [torch.ones(len(tiles), device=inputs.device) for _ in bounds]
    pieces = [weight.split(tiles, 1) for weight in weights]
    for k, block in enumerate(inputs.split(tiles, 1)):
        top = float(block.abs().max())
        if top == 0:  # nothing to quantize; as wide as the widest tile
            for ranges in found:
                ranges[k] = float(inputs.abs().max()) or 1.0
            continue
        errors = torch.zeros(len(_FACTORS), len(bounds))
        for piece, energy in zip(pieces, energies, strict=True):
            weight = piece[k]
            errors += _errors(block, weight, top, scheme, bounds) / max(energy, 1e-30)
        for i, ranges in enumerate(found):
            ranges[k] = top * _FACTORS[int(errors[:, i].argmin())]
    return found


def _errors(
    inputs: Tensor, weight: Tensor, top: float, scheme: AnalogScheme, bounds: Sequence[float]
) -> Tensor:
    """Squared output error of one tile [factors, bounds]."""
    levels, exact = scheme.input_levels, inputs @ weight.t()
    assert levels is not None
    peak = column_maximum(weight, [weight.shape[1]])[0].clamp_min(1e-30)
    errors = torch.zeros(len(_FACTORS), len(bounds))
    for i, factor in enumerate(_FACTORS):
        step = top * factor / levels
        rounded = (inputs / step).round_().clamp_(-levels, levels) @ (weight.t() * step)
        for j, bound in enumerate(bounds):
            made = rounded
            if scheme.output_levels is not None:
                size = bound * top * factor / scheme.output_levels * peak
                made = (rounded / size).round_().clamp_(-scheme.output_levels, scheme.output_levels)
                made.mul_(size)
            errors[i, j] = (made - exact).square_().sum()
    return errors


@torch.no_grad()
def sample_inputs(
    model: nn.Module,
    layers: Mapping[str, Any],
    batches: Iterable[Mapping[str, Tensor]],
    total: int | None = None,
) -> dict[str, Tensor]:
    """Evenly spaced inputs [T, in] of each layer in digital operation, fp32; T is bounded.

    Args:
        layers: Analog layers of ``model`` by name.
        total: Number of batches; None: counted as 16.
    """
    share = max(SAMPLES // max(total or 16, 1), 2)
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Observer:
        def observe(x: Tensor, row_mask: Tensor | None) -> None:
            rows = x.detach().reshape(-1, x.shape[-1])
            rows = rows if row_mask is None else rows[row_mask]
            count = min(share, len(rows), SAMPLES - sum(map(len, kept[name])))
            if count > 0:
                index = torch.arange(count, device=rows.device) * len(rows) // count
                kept[name].append(rows[index].float())

        return observe

    observers = {name: keep(name) for name in layers}
    observe_inputs(model, layers, observers, batches, "Observing inputs", total)
    return {name: torch.cat(rows) for name, rows in kept.items() if rows}
