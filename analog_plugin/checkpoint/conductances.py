"""The profile ``conductances``: what a chip's programming software is given, tile by tile.

A weight is a pair of conductances, ``w = (G⁺ − G⁻) · scale``. Of each column of a tile the largest
magnitude is mapped to ``g_max``, as :class:`~analog_plugin.noise.PCMNoise` programs it; one device
of each pair is always at zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analog_plugin import __version__
from analog_plugin.errors import AnalogError, is_number, shown
from analog_plugin.files import sha256_of
from analog_plugin.layers import analog_layers, model_scheme
from analog_plugin.layers.prefix import installed_prefix
from analog_plugin.ops.weights import tile_bounds

#: The manifest's name, and its ``format``.
CONDUCTANCES_FILE = "conductances.json"
FORMAT = "analog-plugin conductances"
FORMAT_VERSION = 1
#: Microsiemens; the full scale of phase-change memory in aihwkit's models.
G_MAX = 25.0
_FOLDER = "layers"


@dataclass(frozen=True)
class ConductancePlan:
    """How weights become conductances.

    Args:
        g_max: In µS, of the largest weight of a column.
        usage: Lines of the model card on how to read the directory.
        notes: Sentences for the model card.
    """

    g_max: float
    usage: tuple[str, ...] = (
        "## Use",
        "",
        f"`{CONDUCTANCES_FILE}` lists layers and tiles; `{_FOLDER}/*.npz` hold their arrays "
        "(`numpy.load`). Of a tile, `(g_plus - g_minus) * column_scale` are the weights [rows, "
        "columns].",
        "",
    )
    notes: list[str] = field(
        default_factory=lambda: [
            "What is digital (embeddings, norms, attention, a digital prefix) stands in the "
            "profile analog-fp of the same model, not here."
        ]
    )


def check_conductances(model: nn.Module, g_max: float = G_MAX) -> None:
    """Refuse a model whose tiles have no static settings, and a ``g_max`` that is none.

    Raises:
        AnalogError: See above.
    """
    if not is_number(g_max) or not 0 < g_max <= 1e6:
        raise AnalogError(
            f"g_max is {shown(g_max)}, but must be a number of microsiemens above 0; write 25."
        )
    for name, layer in analog_layers(model):
        if layer.scheme.input_bits is not None and layer.scheme.input_range == "dynamic":
            raise AnalogError(
                f"The input range of {name} is dynamic, and no static DAC can do that; calibrate "
                "the model with input_range: static or learned."
            )
        if not re.fullmatch(r"[\w.-]{1,200}", name):
            raise AnalogError(f"{shown(name)} is no name for a file; rename the module.")
        if not bool(layer.tile_weight.isfinite().all()):
            raise AnalogError(f"The weights of {name} are not all finite; nothing can hold them.")


def plan_conductances(
    model: nn.Module,
    *,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    g_max: float = G_MAX,
) -> ConductancePlan:
    """Take ``g_max`` in µS; ``batches`` are not needed."""
    return ConductancePlan(float(g_max))


def write_conductances(model: Any, directory: Path, plan: ConductancePlan) -> None:
    """Write one ``.npz`` a layer and the manifest that describes them.

    The clean weights are the targets: programming noise is the chip's own.
    """
    (directory / _FOLDER).mkdir()
    layers = {}
    for name, layer in analog_layers(model):
        file = f"{_FOLDER}/{name}.npz"
        tiles = list(_tiles(layer, plan.g_max))
        arrays: dict[str, Any] = {
            f"{t['prefix']}{part}": a for t, found in tiles for part, a in found.items()
        }
        if layer.bias is not None:
            arrays["bias"] = _numpy(layer.bias)
        np.savez(directory / file, **arrays)
        layers[name] = {
            "file": file,
            "sha256": sha256_of(directory / file),
            "inputs": sum(layer.tiles),
            "outputs": len(layer.tile_weight),
            "input_bits": layer.scheme.input_bits,
            "output_bits": layer.scheme.output_bits,
            "bias": layer.bias is not None,
            "tiles": [tile for tile, _ in tiles],
        }
    prefix = installed_prefix(model)
    has_adc = any(layer.scheme.output_bits is not None for _, layer in analog_layers(model))
    written = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "versions": {
            "analog-plugin": __version__,
            "numpy": np.__version__,
            "torch": str(torch.__version__),
        },
        "unit": "microsiemens",
        "g_max": plan.g_max,
        "out_bound": model_scheme(model).out_bound if has_adc else None,
        "digital_prefix": None if prefix is None else prefix.to_tensors()["prefix.tokens"].tolist(),
        "layers": layers,
    }
    (directory / CONDUCTANCES_FILE).write_text(json.dumps(written, indent=2) + "\n")


def _tiles(layer: Any, g_max: float) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Of each crossbar its coordinates and its arrays."""
    weight, scheme = layer.tile_weight.detach(), layer.scheme
    width = scheme.tile_columns or len(weight)
    for k, rows in enumerate(tile_bounds(layer.tiles)):
        for c, first in enumerate(range(0, len(weight), width)):
            columns = first, min(first + width, len(weight))
            block = weight[slice(*columns), slice(*rows)].double().T
            arrays = tile_conductances(block, g_max)
            if scheme.input_bits is not None:
                arrays["input_range"] = _numpy(layer.input_range[k])
            if scheme.output_bits is not None:
                reach = scheme.out_bound * layer.input_range[k].double()
                arrays["adc_bound"] = _numpy(reach * block.abs().amax(0))
            place = {"prefix": f"tile_{k}_{c}_", "row": k, "column": c}
            yield place | {"rows": list(rows), "columns": list(columns)}, arrays


def tile_conductances(weight: Tensor, g_max: float = G_MAX) -> dict[str, np.ndarray]:
    """Target conductances of one crossbar.

    Args:
        weight: [rows, columns]: inputs run along rows, outputs along columns.
        g_max: In µS, of each column's largest weight.

    Returns:
        ``g_plus`` and ``g_minus`` [rows, columns] in µS, and ``column_scale`` [columns] in weight
        per µS, all fp32: ``weight = (g_plus - g_minus) * column_scale``, within fp32 rounding. A
        column of zeros has a scale of 0.
    """
    exact = weight.double()
    peak = exact.abs().amax(0)
    signed = exact * torch.where(peak > 0, g_max / peak, 0.0)
    return {
        "g_plus": _numpy(signed.clamp_min(0)),
        "g_minus": _numpy((-signed).clamp_min(0)),
        "column_scale": _numpy(peak / g_max),
    }


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()
