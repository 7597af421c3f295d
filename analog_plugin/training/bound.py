"""The ADC's bound: one constant for the whole model, chosen on calibration data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.layers import analog_layers, digital_layers, forward_state, model_scheme
from analog_plugin.modes import evaluation_mode
from analog_plugin.progress import progress_bar

#: β from where the ADC saturates to where its step is coarse; 14 is the paper's.
CANDIDATES = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 14.0)


def set_out_bound(model: nn.Module, bound: float) -> None:
    """Give the model and all its analog layers the ADC bound β."""
    forward_state(model).scheme = model_scheme(model).replace(out_bound=bound)
    for _, layer in analog_layers(model):
        layer.scheme = layer.scheme.replace(out_bound=bound)


def set_ranges(model: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    """Give the analog layers that ``ranges`` names these input ranges [K]."""
    for name, layer in analog_layers(model):
        if name in ranges:
            layer.set_input_range(ranges[name])


def choose_out_bound(
    model: Any,
    tokens: Tensor,
    candidates: Sequence[float] = CANDIDATES,
    *,
    ranges: Mapping[float, Mapping[str, Tensor]] | None = None,
    batch_size: int = 8,
) -> dict[float, float]:
    """Set the β with the least KL to the digital model.

    A large β makes the ADC's step coarse, a small one saturates it. Noise-free: noise adds to the
    error at every bound alike.

    Args:
        model: A model with analog layers and calibrated ranges.
        tokens: [N, S] token ids.
        candidates: Bounds to try.
        ranges: The input ranges that go with each candidate; None: the same with all.
        batch_size: Rows evaluated together.

    Returns:
        The trade-off curve: KL (nats per token) at each candidate.

    Raises:
        AnalogError: The layers have no ADC.
    """
    if not has_adc(model):
        raise AnalogError("out_bound cannot be chosen without an ADC; write output_bits: 8.")

    def take(bound: float) -> None:
        set_out_bound(model, bound)
        if ranges is not None:
            set_ranges(model, ranges[bound])

    curve = {}
    with evaluation_mode(model):
        with digital_layers(model):
            reference = Reference.of(model, tokens, batch_size, keep_logits=True)
        for bound in progress_bar(candidates, desc="Choosing the ADC's bound"):
            take(bound)
            curve[bound] = fidelity(model, tokens, reference, batch_size)["kl"]
    take(min(curve, key=lambda bound: math.inf if math.isnan(curve[bound]) else curve[bound]))
    return curve


def has_adc(model: nn.Module) -> bool:
    """Whether some analog layer of the model has an ADC."""
    return any(layer.scheme.output_bits is not None for _, layer in analog_layers(model))
