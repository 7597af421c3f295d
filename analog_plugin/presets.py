"""Presets: named schemes. Further ones come through the hook ``analog_presets``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analog_plugin.errors import shown
from analog_plugin.scheme import FUSED_GROUPS, AnalogScheme, SchemeError, check_names

#: The recipe shipped with 'Analog Foundation Models' (arXiv 2505.09663) for Llama-3.2-1B: 8-bit
#: learned inputs and a globally static 8-bit ADC, 3 % noise per channel, clipping at 2.5 σ, ranges
#: initialised over the first 500 training steps, one tile a layer.
AFM = AnalogScheme(range_init_in_training=True)

#: Ours: the same hardware in 512-row tiles, and all that makes a better start: a digital prefix,
#: noise-aware rescaling, ranges and ADC bound chosen by their effect on the outputs, 5 % of the
#: multiply-accumulates digital where they cost most. Nothing is clipped: on a short budget that
#: costs more than it gives; for a long one, ``clip_sigma`` anneals from where nothing is clipped.
AFM_PLUS = AnalogScheme(
    tile_rows=512,
    prefix=1,
    rescale="noise-aware",
    range_init="output",
    range_init_batches=16,
    out_bound=None,
    digital_share=0.05,
    clip_sigma=None,
    clip_schedule="anneal",
    tie_ranges=FUSED_GROUPS,
)

#: LLM-QAT-style baseline (arXiv 2305.17888) for digital SI8-W4: static 8-bit inputs, weights
#: fake-quantized to 4 bits per column in training; neither noise, ADC nor clipping.
DIGITAL_SI8_W4 = AnalogScheme(
    weight_bits=4,
    weight_noise=0.0,
    output_bits=None,
    clip_sigma=None,
    range_init="mse",
    range_init_batches=16,
    tie_ranges=FUSED_GROUPS,
)


def resolve_scheme(scheme: str | Mapping[str, Any] | AnalogScheme) -> AnalogScheme:
    """Return the scheme that a recipe names.

    Args:
        scheme: A preset's name, a mapping of fields (``preset`` names the scheme that the other
            fields change; without it they change the defaults), or a scheme.

    Raises:
        UnknownName: No such preset.
        SchemeError: A field is unknown or out of range.

    Example:
        >>> resolve_scheme({"preset": "AFM", "tile_rows": 512}).tile_rows
        512
    """
    from analog_plugin.plugins import presets

    if isinstance(scheme, AnalogScheme):
        return scheme
    if isinstance(scheme, str):
        from analog_plugin.plugins import lookup

        return lookup(presets(), scheme, "preset").scheme()
    if not isinstance(scheme, Mapping):
        raise SchemeError(
            f"scheme is {shown(scheme)}, but must be a preset's name or a mapping; write "
            "scheme: AFM or scheme: {preset: AFM, tile_rows: 512}."
        )
    fields = dict(scheme)
    name = fields.pop("preset", None)
    if name is None:
        return AnalogScheme.from_dict(fields)
    check_names(fields)
    return resolve_scheme(name).replace(**fields)
