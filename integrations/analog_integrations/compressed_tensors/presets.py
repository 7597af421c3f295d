"""Preset schemes: how a layer on analog hardware looks to digital tools."""

from __future__ import annotations

import importlib.util
from typing import Any

from analog_plugin.errors import AnalogError, require

#: By name: bits of the weights (None: full precision), and whether outputs are quantized.
PRESETS: dict[str, tuple[int | None, bool]] = {
    "AIMC_SI8": (None, False),
    "AIMC_SI8_O8": (None, True),
    "AIMC_SI8_W4": (4, False),
    "AIMC_SI8_W4_O8": (4, True),
    "AIMC_SI8_W8": (8, False),
    "AIMC_SI8_W8_O8": (8, True),
}

#: Observer of outputs; see :mod:`analog_integrations.llmcompressor.observers`.
OUTPUT_OBSERVER = "aimc_output"


def register_presets() -> None:
    """Make :data:`PRESETS` known to compressed-tensors, and so to llm-compressor's recipes.

    Inputs have one static symmetric 8-bit scale a layer, as a DAC has, outputs too, and integer
    weights one symmetric scale a channel. Again is harmless.

    Raises:
        AnalogError: Another scheme has one of the names already.
    """
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    ours = {name: preset_scheme(name) for name in PRESETS}
    for name, scheme in ours.items():
        there = PRESET_SCHEMES.get(name)
        if there is not None and there != scheme:
            raise AnalogError(
                f"compressed-tensors knows a preset scheme {name} already, {_shown(there)}, which "
                f"is not analog-plugin's, {_shown(scheme)}; register yours under another name."
            )
    PRESET_SCHEMES.update(ours)
    if importlib.util.find_spec("llmcompressor") is not None:
        require("analog_integrations.llmcompressor.observers", "llmcompressor")


def preset_scheme(name: str) -> dict[str, Any]:
    """The arguments of a preset, by part of the layer."""
    weight_bits, outputs = PRESETS[name]
    scheme = {"input_activations": _arguments(8, "tensor", observer="static_minmax")}
    if weight_bits is not None:
        scheme["weights"] = _arguments(weight_bits, "channel")
    if outputs:
        scheme["output_activations"] = _arguments(8, "tensor", observer=OUTPUT_OBSERVER)
    return scheme


def _arguments(bits: int, strategy: str, **options: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy=strategy, dynamic=False, **options
    )


def _shown(scheme: dict[str, Any]) -> str:
    parts = (f"{part}: {_bits(arguments)}" for part, arguments in sorted(scheme.items()))
    return f"({', '.join(parts)})"


def _bits(arguments: Any) -> str:
    bits, kind = getattr(arguments, "num_bits", "?"), getattr(arguments, "type", "?")
    strategy = getattr(arguments, "strategy", "?")
    return f"{bits}-bit {getattr(kind, 'value', kind)} a {getattr(strategy, 'value', strategy)}"
