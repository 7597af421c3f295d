"""The start of training: all that makes a better analog model without a gradient, in its order.

Rescaling, input ranges, the ADC's bound, and which layers stay digital; each is switched by a field
of the scheme.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from analog_plugin.evaluation.sensitivity import analyze_sensitivity, choose_digital
from analog_plugin.layers import (
    analog_layers,
    digital_layers,
    keep_digital,
    model_scheme,
    scheme_changed,
)
from analog_plugin.layers.prefix import install_prefix, installed_prefix, prefix_tokens
from analog_plugin.scheme import AnalogScheme
from analog_plugin.training.bound import CANDIDATES, choose_out_bound, has_adc, set_ranges
from analog_plugin.training.outputs import RangeTable, search_output_ranges
from analog_plugin.training.ranges import calibrate_ranges
from analog_plugin.training.rescale import rescale_model

#: Rows of tokens on which the ADC's bound is chosen, and layers are judged one by one.
_BOUND_ROWS, _SENSITIVITY_ROWS = 8, 2


def prepare_start(
    model: Any, batches: Sequence[Mapping[str, Tensor]], held_out: Tensor, noise: Any | None
) -> dict[str, Any]:
    """Bring a freshly converted model to the best start that its scheme allows.

    Args:
        model: A model from ``convert_to_analog``, digital weights unchanged. A digital prefix that
            its scheme names is installed if it has none yet.
        batches: Calibration batches, keyword arguments of the model's forward.
        held_out: [N, S] token ids for what is chosen by its effect on the whole model.
        noise: The programming noise model to be prepared for; None: converters only.

    Returns:
        What was done, as plain values: ``rescaled`` groups, the KL at each ADC bound, and the
        ``digital`` layers with the KL that each would have cost.
    """
    record: dict[str, Any] = {}
    scheme = model_scheme(model)
    if scheme.prefix is not None and installed_prefix(model) is None:
        with digital_layers(model):
            install_prefix(model, prefix_tokens(model, scheme.prefix))
    if scheme.rescale is not None:
        found = rescale_model(model, batches, noise, len(batches))
        record["rescaled"] = [
            {"consumers": r.group.consumers, "exponents": r.exponents}
            | {"error_before": r.before, "error_after": r.after}
            for r in found
        ]
        prefix = installed_prefix(model)
        if found and prefix is not None:  # values were rescaled too
            with digital_layers(model):
                install_prefix(model, prefix.tokens)
    table = _ranges(model, batches)
    tokens = held_out[:_BOUND_ROWS]
    if _chooses_bound(model):
        record["kl_at_bound"] = choose_out_bound(model, tokens, ranges=table)
    if scheme.digital_share > 0:
        report = analyze_sensitivity(model, held_out[:_SENSITIVITY_ROWS], noise=noise)
        names = choose_digital(report, scheme.digital_share)
        record["digital"] = [asdict(row) for row in report.rows if row.name in names]
        record["sensitivity"] = report.to_dict()["rows"]
        if names:
            keep_digital(model, names)
            if _chooses_bound(model, scheme):  # those that are gone no longer count
                record["kl_at_bound"] = choose_out_bound(model, tokens, ranges=table)
    return record


def prepares(scheme: AnalogScheme) -> bool:
    """Whether ``scheme`` asks for more than input ranges by themselves."""
    own = (scheme.prefix, scheme.rescale, scheme.digital_share or None)
    by_output = scheme.range_init == "output"
    bound = scheme.out_bound is None and scheme.output_bits is not None
    return by_output or bound or any(lever is not None for lever in own)


@contextlib.contextmanager
def published_start(
    model: Any, batches: Sequence[Mapping[str, Tensor]], held_out: Tensor
) -> Iterator[None]:
    """Within this context a freshly converted model has no more than the published ranges.

    They are ``range_init_std`` standard deviations of the inputs (arXiv 2505.09663). Where the
    scheme leaves the ADC's bound open, it is the best one for these ranges.
    """
    bound = model_scheme(model).out_bound
    changes = {"range_init": "std", "out_bound": bound or CANDIDATES[-1]}
    with scheme_changed(model, changes):
        calibrate_ranges(model, batches, len(batches))
        if bound is None and has_adc(model):
            choose_out_bound(model, held_out[:_BOUND_ROWS])
        yield


def _chooses_bound(model: Any, scheme: AnalogScheme | None = None) -> bool:
    """Whether some layer has an ADC, and ``scheme`` (None: the model's) leaves its bound open."""
    scheme = model_scheme(model) if scheme is None else scheme
    return scheme.out_bound is None and has_adc(model)


def _ranges(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> RangeTable | None:
    """Set the input ranges; a table of them where they depend on an ADC bound still to choose."""
    layers = dict(analog_layers(model))
    others = [name for name, layer in layers.items() if layer.scheme.range_init != "output"]
    if others:
        calibrate_ranges(model, batches, len(batches), names=others)
    if len(others) == len(layers):
        return None
    bound = model_scheme(model).out_bound
    bounds = CANDIDATES if bound is None else (bound,)
    table = search_output_ranges(model, batches, bounds, len(batches))
    set_ranges(model, table[bounds[-1]])
    return table
