"""Where a directory's bytes are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analog_plugin.checkpoint.layout import STATE_FILE
from analog_plugin.inspection.quantized import PARTS, QuantizedLayer
from analog_plugin.inspection.tensors import StoredTensor

_EMBEDDING = re.compile(r"(embed\w*|wte|wpe|lm_head)\.\w+$")
_CODES = ("weight", "weight_packed", "weight_shape")


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk.

    Args:
        weight_files: All files with the model's tensors, their headers in them.
        codes: Of these, integer weights.
        layers: Full-precision weights of quantized and analog layers.
        scales: Scales and zero-points.
        embeddings: Embeddings and head, where they are not among the layers.
        other: All other tensors: norms, biases, layers left out.
        analog_state: The analog model's ranges and prefix.
        parameters: Weights of the model, however they are stored.
        dtypes: Types of tensors that are neither codes nor scales.
        bits_per_weight: Of quantized and analog layers, with their scales; None: there are none.
    """

    weight_files: int = 0
    codes: int = 0
    layers: int = 0
    scales: int = 0
    embeddings: int = 0
    other: int = 0
    analog_state: int = 0
    parameters: int = 0
    dtypes: tuple[str, ...] = ()
    bits_per_weight: float | None = None


def sizes_of(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    layers: Sequence[QuantizedLayer],
    analog: Iterable[str],
) -> Sizes:
    """Sum up ``tensors``; ``analog`` names the layers of the analog model."""
    by_name = {layer.name: layer for layer in layers}
    names = by_name.keys() | set(analog)
    found = dict.fromkeys(("codes", "layers", "scales", "embeddings", "other"), 0)
    dtypes, parameters, weights, stored = set(), 0, 0, 0
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        layer = by_name.get(module)
        quantized = layer is not None and "weights" in layer.arguments
        if quantized and part in _CODES:
            kind = "codes"
        elif part in PARTS:
            kind = "scales"
        elif module in names and part == "weight":
            kind = "layers"
        else:
            kind = "embeddings" if _EMBEDDING.search(name) else "other"
        found[kind] += tensor.bytes
        if kind in ("codes", "layers") or (part.startswith("weight_") and module in names):
            stored += tensor.bytes
        if kind == "codes":
            number = layer.weights if layer is not None and part != "weight_shape" else 0
        else:
            number = 0 if kind == "scales" else tensor.elements
            if kind != "scales":
                dtypes.add(tensor.dtype)
        parameters += number
        weights += number if kind in ("codes", "layers") else 0
    return Sizes(
        sum(_size(path) for path in {tensor.path for tensor in tensors.values()}),
        **found,
        analog_state=_size(directory / STATE_FILE),
        parameters=parameters,
        dtypes=tuple(sorted(dtypes)),
        bits_per_weight=8 * stored / weights if weights else None,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
