"""Scales and codes of quantized layers: read tensor by tensor, and checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from analog_plugin.errors import AnalogError, shown
from analog_plugin.inspection.quantized import QuantizedLayer


def examined(layer: QuantizedLayer, *, symmetric: bool) -> tuple[QuantizedLayer, list[str]]:
    """``layer`` with its bits and ranges, and sentences on what is wrong with its tensors.

    Args:
        layer: Of :func:`quantized_layers`.
        symmetric: Codes are within ±(2**(bits - 1) - 1), as this package writes them.
    """
    faults: list[str] = []
    changes: dict[str, Any] = {}
    for field, part in (("input_activations", "input"), ("output_activations", "output")):
        if layer.is_static(field) and layer.integer(field) is not None:
            scale, fault = _scale(layer, f"{part}_scale")
            faults += fault
            if scale is not None:
                levels = 2 ** (layer.arguments[field].num_bits - 1) - 1
                changes[f"{part}_range"] = scale * levels
    if layer.integer("weights") is not None:
        try:
            changes |= _weights(layer, symmetric, faults)
        except AnalogError as error:
            faults.append(str(error))
    elif (weight := layer.tensors.get("weight")) is not None and len(weight.shape) == 2:
        changes["shape"] = weight.shape
    return replace(layer, **changes), faults


def _scale(layer: QuantizedLayer, part: str) -> tuple[float | None, list[str]]:
    """A scale of a whole tensor."""
    name, tensor = f"{layer.name}.{part}", layer.tensors.get(part)
    if tensor is None:
        return None, [f"The files lack {shown(name)}, a scale that loaders would make up."]
    if tensor.elements != 1:
        return None, [f"{shown(name)} has the shape {list(tensor.shape)}, but must hold one scale."]
    try:
        value = float(tensor.read())
    except AnalogError as error:
        return None, [str(error)]
    if not (0 < value < math.inf):
        return None, [f"{shown(name)} is {value:g}, but must be positive and finite."]
    return value, []


def _weights(layer: QuantizedLayer, symmetric: bool, faults: list[str]) -> dict[str, Any]:
    """Shape, bits and largest magnitude of a layer's codes."""
    arguments = layer.arguments["weights"]
    shape = _shape(layer, arguments.num_bits)
    if (fault := _weight_scale_fault(layer, arguments, shape)) is not None:
        faults.append(fault)
    low, high = 0, 0
    for codes in _codes(layer, arguments.num_bits, shape):
        if codes.numel():
            low, high = min(low, int(codes.min())), max(high, int(codes.max()))
    most = 2 ** (arguments.num_bits - 1) - 1
    least = -most if symmetric else -most - 1
    if low < least or high > most:
        faults.append(
            f"The codes of {shown(layer.name)} run from {low} to {high}, but {arguments.num_bits} "
            f"bits reach from {least} to {most}; export it again."
        )
    largest = max(-low, high)
    bits = arguments.num_bits
    if layer.layout == "int-quantized" and arguments.symmetric:
        bits = next((b for b in (2, 3, 4) if b < bits and largest < 2 ** (b - 1)), bits)
    return {"shape": shape, "bits": bits, "largest": largest}


def _shape(layer: QuantizedLayer, bits: int) -> tuple[int, int]:
    """(out, in) of the weight, whose tensors must fit it."""
    packed, weight = layer.tensors.get("weight_packed"), layer.tensors.get("weight")
    if layer.layout != "pack-quantized":
        if weight is None or weight.dtype != "I8":
            found = "absent" if weight is None else f"of type {weight.dtype}"
            raise AnalogError(
                f"{shown(layer.name + '.weight')} is {found}, but the format {layer.layout} holds "
                "int8 codes: it was saved again by another tool; export it again."
            )
        return weight.shape[0], weight.shape[1]
    stored = layer.tensors.get("weight_shape")
    if packed is None or packed.dtype != "I32" or stored is None or stored.shape != (2,):
        raise AnalogError(
            f"{shown(layer.name)} lacks a weight_packed of type I32 or a weight_shape of two "
            "numbers, which the format pack-quantized has; export it again."
        )
    rows, columns = (int(value) for value in stored.read())
    if columns < 1 or packed.shape != (rows, math.ceil(columns * bits / 32)):
        raise AnalogError(
            f"{shown(layer.name + '.weight_packed')} has the shape {list(packed.shape)}, which "
            f"{rows} × {columns} weights of {bits} bits do not have; export it again."
        )
    return rows, columns


def _weight_scale_fault(
    layer: QuantizedLayer, arguments: Any, shape: tuple[int, int]
) -> str | None:
    name, tensor = f"{layer.name}.weight_scale", layer.tensors.get("weight_scale")
    if tensor is None:
        return f"The files lack {shown(name)}, scales that loaders would make up."
    rows, columns = shape
    groups = math.ceil(columns / arguments.group_size) if arguments.group_size else 0
    allowed: dict[str, list[tuple[int, ...]]] = {
        "channel": [(rows, 1)],
        "tensor": [(1,), ()],
        "group": [(rows, groups)],
    }
    shapes = allowed.get(str(getattr(arguments.strategy, "value", arguments.strategy)))
    if shapes is not None and tensor.shape not in shapes:
        return f"{shown(name)} has the shape {list(tensor.shape)}, but must have {list(shapes[0])}."
    scales = tensor.read().float()
    if not bool((scales.isfinite() & (scales > 0)).all()):
        return f"{shown(name)} holds scales that are not positive and finite."
    return None


def _codes(layer: QuantizedLayer, bits: int, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Some rows of int8 codes at a time."""
    if layer.layout != "pack-quantized":
        yield from layer.tensors["weight"].blocks()
        return
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    for words in layer.tensors["weight_packed"].blocks():
        yield unpack_from_int32(words, bits, torch.Size((words.shape[0], shape[1])))
