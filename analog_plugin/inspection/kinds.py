"""What quantized layers have in common: bits, converters, the profile that they look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from analog_plugin.checkpoint.digital import DIGITAL_PROFILES
from analog_plugin.inspection.analog_part import Spread
from analog_plugin.inspection.quantized import QuantizedLayer
from analog_plugin.inspection.records import Converter, WeightGroup


def digital_profile(layers: Sequence[QuantizedLayer]) -> str | None:
    """The profile that the layers are laid out like; None: none of this package's."""
    kinds = {
        (
            layer.layout,
            _converts(layer, "input_activations"),
            _converts(layer, "output_activations"),
        )
        for layer in layers
    }
    if len(kinds) != 1 or not all(_by_channel(layer) for layer in layers):
        return None
    layout, inputs, outputs = kinds.pop()
    # A layer of zeros fits any number of bits.
    widths = {layer.bits for layer in layers if layer.largest != 0} or {layers[0].bits}
    packed = layout == "pack-quantized"
    if not packed and any(layer.arguments["weights"].num_bits != 8 for layer in layers):
        return None
    width = "mixed" if len(widths) > 1 or (packed and widths == {8}) else widths.pop()
    for profile in DIGITAL_PROFILES:
        made = profile.layout, (8, True), (profile.output_bits, True)
        if made == (layout, inputs, outputs or (None, True)) and profile.weight_bits == width:
            return profile.name
    return None


def _converts(layer: QuantizedLayer, field: str) -> tuple[int, bool] | None:
    found = layer.integer(field)
    return None if found is None else (found.num_bits, layer.is_static(field))


def _by_channel(layer: QuantizedLayer) -> bool:
    weights = layer.integer("weights")
    strategy = None if weights is None else getattr(weights.strategy, "value", weights.strategy)
    return weights is not None and weights.symmetric and strategy == "channel"


def weight_groups(layers: Sequence[QuantizedLayer]) -> tuple[WeightGroup, ...]:
    """The layers by bits of their weights, full precision last."""
    number = Counter(layer.bits for layer in layers)
    weights: Counter[int | None] = Counter()
    for layer in layers:
        weights[layer.bits] += layer.weights
    order = sorted(number, key=lambda bits: 99 if bits is None else bits)
    return tuple(WeightGroup(bits, number[bits], weights[bits]) for bits in order)


def average_bits(layers: Sequence[QuantizedLayer]) -> float | None:
    """Of a weight; None where some are in full precision or not known."""
    total = sum(layer.weights for layer in layers)
    if not total or any(layer.bits is None for layer in layers):
        return None
    return sum(layer.weights * (layer.bits or 0) for layer in layers) / total


def converter(layers: Sequence[QuantizedLayer], part: str) -> Converter | None:
    """What happens to ``"input"`` or ``"output"``; None: nothing."""
    field = f"{part}_activations"
    found = [layer for layer in layers if field in layer.arguments]
    if not found:
        return None
    values = [getattr(layer, f"{part}_range") for layer in found]
    ranges = Spread.of([value for value in values if value is not None])
    return Converter(found[0].arguments[field].num_bits, found[0].is_static(field), ranges)


def method_of(quantization: Any) -> str | None:
    """The tool's name in a ``quantization_config``; None: there is none."""
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return method[:100] if isinstance(method, str) else "unknown"


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The model's class."""
    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and found else config.get("model_type")
    return name[:100] if isinstance(name, str) and name.isprintable() else None


def head_size(config: Mapping[str, Any]) -> int | None:
    """Of the attention."""
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    own = config.get("head_dim")
    if isinstance(own, int):
        return own
    known = isinstance(size, int) and isinstance(heads, int) and heads > 0
    return size // heads if known else None  # type: ignore[operator]
