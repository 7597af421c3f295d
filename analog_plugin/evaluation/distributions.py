"""How a model uses its devices and its converters: weights and input ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from analog_plugin.evaluation.sweep import SweepModel, once_each
from analog_plugin.layers import analog_layers
from analog_plugin.ops.weights import column_maximum

#: Bins of the weights' histogram, equally wide from 0 to 1.
BINS = 50


@dataclass(frozen=True)
class Distributions:
    """Of all analog layers of a model.

    Args:
        weights: Share of the weights in each of ``BINS`` bins of their magnitude relative to the
            largest of their column and tile, that is to the full conductance; columns of zeros are
            left out.
        mean: Mean of that magnitude: the higher, the smaller is noise beside the weights.
        ranges: Input range of each tile by the layer's name, in the units of its inputs; none where
            there is no DAC or it has no static range.
    """

    weights: tuple[float, ...]
    mean: float
    ranges: dict[str, list[float]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Distributions:
        """Measure the clean weights and the ranges of ``model``."""
        counts, total = torch.zeros(BINS, dtype=torch.float64), 0.0
        ranges: dict[str, list[float]] = {}
        for name, layer in analog_layers(model):
            weight = layer.tile_weight.detach().float()
            for block, peak in zip(
                weight.split(layer.tiles, dim=1), column_maximum(weight, layer.tiles), strict=True
            ):
                used = peak > 0
                # In doubles: histc in fp32 stops counting at 2**24.
                share = (block[used].abs() / peak[used, None]).cpu().double()
                counts += torch.histc(share, BINS, 0, 1)
                total += float(share.sum())
            if layer.scheme.input_bits is not None and layer.scheme.input_range != "dynamic":
                layer.require_ranges()
                ranges[name] = layer.input_range.tolist()
        number = float(counts.sum().clamp_min(1))
        return cls(tuple((counts / number).tolist()), total / number, ranges)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Distributions:
        """Read back what ``asdict`` gave."""
        weights = tuple(float(share) for share in values["weights"])
        if len(weights) != BINS:
            raise ValueError(f"there are {len(weights)} bins of weights instead of {BINS}")
        ranges = {str(n): [float(r) for r in found] for n, found in values["ranges"].items()}
        if not all(ranges.values()):
            raise ValueError("a layer has no tile")
        return cls(weights, float(values["mean"]), ranges)


def describe_models(
    models: Mapping[str, SweepModel], output: str | Path, *, overwrite: bool = False
) -> dict[str, Distributions]:
    """The distributions of each model; models that were described already are not loaded.

    Args:
        models: By the names that they have in the table; all have analog layers.
        output: Directory of ``distributions.jsonl``.
        overwrite: Forget what that holds.
    """
    return once_each(
        models,
        Path(output) / "distributions.jsonl",
        lambda model: asdict(Distributions.of(model)),
        Distributions.from_dict,
        settings={"bins": BINS},
        overwrite=overwrite,
    )
