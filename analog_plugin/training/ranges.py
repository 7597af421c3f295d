"""Range calibration: one pass over data without gradients finds every layer's input ranges."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers import analog_layers
from analog_plugin.layers.base import RANGE_FLOOR
from analog_plugin.layers.observe import observe_inputs, static_inputs, unreached
from analog_plugin.layers.prefix import without_prefix
from analog_plugin.ops.histogram import MagnitudeHistogram
from analog_plugin.scheme import AnalogScheme


@torch.no_grad()
def calibrate_ranges(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    total: int | None = None,
    *,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Set the input ranges of all analog layers from data.

    The inputs are those of the digital model (converters and noise off): what the ranges must hold
    when all layers before are good. Padding (``attention_mask`` 0) does not count. The criterion
    is the scheme's ``range_init``. Ranges tied over a group become equal. A tile that saw only
    zeros takes the largest range of its layer.

    Args:
        model: A model with analog layers.
        batches: Keyword arguments of the model's forward: ``input_ids`` [B, S] and, where there is
            padding, ``attention_mask`` [B, S].
        total: Number of batches, for the progress bar.
        names: The layers to calibrate; None: all.

    Returns:
        Each layer's ranges [n_tiles], by name.

    Raises:
        AnalogError: There is no batch, a layer was not reached by any, or ``range_init`` is
            ``"output"`` (see :func:`~analog_plugin.training.start.prepare_start`).
    """
    chosen = {name: layer for name, layer in analog_layers(model) if names is None or name in names}
    if any(layer.scheme.range_init == "output" for layer in chosen.values()):
        raise AnalogError(
            "Ranges of range_init: output depend on the ADC's bound; call prepare_start(model, "
            "batches, held_out, noise), which finds both."
        )
    layers = static_inputs(chosen.items())
    if not layers:
        return {}
    histograms = {
        name: MagnitudeHistogram(layer.tiles, layer.weight.device) for name, layer in layers.items()
    }
    observers = {name: histogram.update for name, histogram in histograms.items()}
    observe_inputs(model, layers, observers, batches, "Calibrating input ranges", total)
    shared: dict[int, Tensor] = {}
    for name, histogram in histograms.items():
        histogram.merge_processes()
        layer = layers[name]
        if not bool((histogram.moments[:, 0] > 0).all()):
            raise unreached(name)
        found = pick_range(histogram, layer.scheme)
        known = shared.get(id(layer.input_range))
        shared[id(layer.input_range)] = found if known is None else torch.maximum(found, known)
    for name in histograms:
        layers[name].set_input_range(shared[id(layers[name].input_range)])
    return {name: layers[name].input_range.detach().clone() for name in histograms}


@torch.no_grad()
def calibrate_plain_ranges(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Find one range a layer for plain loaders, which know neither tiles nor a digital prefix.

    The first token's massive activations are in it: the analog ranges, without them, would clip
    them and break the model. Least squared error, into ``plain_range`` of each layer.

    Raises:
        AnalogError: There is no batch.
    """
    layers = dict(analog_layers(model))
    histograms = {
        name: MagnitudeHistogram([layer.in_features], layer.weight.device)
        for name, layer in layers.items()
        if layer.scheme.input_levels is not None
    }
    observers = {name: histogram.update for name, histogram in histograms.items()}
    with without_prefix(model):
        observe_inputs(model, layers, observers, batches, "Calibrating plain ranges")
    for name, histogram in histograms.items():
        histogram.merge_processes()
        found = histogram.range_mse(layers[name].scheme.input_levels)
        # Plain loaders divide by it, also where a layer saw only zeros.
        layers[name].plain_range = found.clamp_min(RANGE_FLOOR)


def pick_range(histogram: MagnitudeHistogram, scheme: AnalogScheme) -> Tensor:
    """Ranges [K] by the scheme's criterion, positive and finite."""
    if scheme.range_init == "std":
        found = histogram.range_std(scheme.range_init_std)
    elif scheme.range_init == "max":
        found = histogram.range_max()
    elif scheme.range_init == "percentile":
        found = histogram.range_percentile(scheme.range_percentile)
    else:
        assert scheme.input_levels is not None
        found = histogram.range_mse(scheme.input_levels)
    found = torch.where(found > 0, found, found.max())
    return found.clamp_min(RANGE_FLOOR)
