"""What the fields of an :class:`~analog_plugin.scheme.AnalogScheme` may hold."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from analog_plugin.errors import AnalogError, is_number, shown

if TYPE_CHECKING:
    from analog_plugin.scheme import AnalogScheme


_CHOICES: dict[str, tuple[str, ...]] = {
    "input_range": ("learned", "static", "dynamic"),
    "range_init": ("std", "max", "percentile", "mse", "output"),
    "range_gradient": ("paper", "lsq"),
    "adc_bound": ("clean", "noisy"),
    "clip_schedule": ("constant", "anneal"),
}
_OPTIONS: dict[str, tuple[str, ...]] = {"rescale": ("noise-aware",)}
#: Fields that no single layer can have for itself.
_OF_THE_MODEL = ("out_bound", "tie_ranges", "prefix", "rescale", "digital_share", "overrides")
_BITS = ("input_bits", "output_bits", "weight_bits")
_COUNTS = ("tile_rows", "tile_columns", "range_init_batches")
_LARGEST_COUNT = 10**9
# field: (may be None, allowed interval in words, test)
_NUMBERS = {
    "range_init_std": (False, "greater than 0", lambda v: v > 0),
    "range_percentile": (False, "greater than 0 and at most 100", lambda v: 0 < v <= 100),
    "range_decay": (False, "0 or greater", lambda v: v >= 0),
    "range_min_percentage": (False, "between 0 and 1", lambda v: 0 <= v <= 1),
    "out_bound": (True, "greater than 0, or null to choose it from data", lambda v: v > 0),
    "weight_noise": (False, "0 or greater and less than 1", lambda v: 0 <= v < 1),
    "clip_sigma": (True, "greater than 0, or null for no clipping", lambda v: v > 0),
    "digital_share": (False, "0 or greater and less than 1", lambda v: 0 <= v < 1),
    "clip_anneal_share": (False, "greater than 0 and at most 1", lambda v: 0 < v <= 1),
}


class SchemeError(AnalogError):
    """A scheme's field is unknown or out of range."""


def validate(scheme: AnalogScheme) -> None:
    """Check all fields.

    Raises:
        SchemeError: The first one that is out of range; the message gives the allowed values.
    """

    def fail(name: str, allowed: str, write: str) -> None:
        given = getattr(scheme, name)
        raise SchemeError(
            f"{name} is {shown(given)}, but must be {allowed}; write {name}: {write}."
        )

    defaults = {field.name: field.default for field in dataclasses.fields(scheme)}
    for name, choices in _CHOICES.items():
        if getattr(scheme, name) not in choices:
            fail(name, "one of " + ", ".join(choices), choices[0])
    for name, choices in _OPTIONS.items():
        if getattr(scheme, name) not in (None, *choices):
            fail(name, "one of " + ", ".join(choices) + ", or null", choices[0])
    for name in _BITS:
        bits = getattr(scheme, name)
        if bits is None:
            continue
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
            fail(name, "a whole number from 2 to 16, or null to switch it off", "8")
    for name in _COUNTS:
        count = getattr(scheme, name)
        if count is None and name != "range_init_batches":
            continue
        whole = isinstance(count, int) and not isinstance(count, bool)
        if not whole or not 1 <= count <= _LARGEST_COUNT:
            null = "" if name == "range_init_batches" else ", or null for one tile"
            allowed = f"a whole number from 1 to {_LARGEST_COUNT}{null}"
            fail(name, allowed, "512" if null else "16")
    for name, (optional, allowed, test) in _NUMBERS.items():
        value = getattr(scheme, name)
        if value is None and optional:
            continue
        if not is_number(value) or not test(value):
            fail(name, f"a number {allowed}", str(defaults[name]))
    if not isinstance(scheme.range_init_in_training, bool):
        fail("range_init_in_training", "true or false", "false")
    if scheme.range_init_in_training and scheme.range_init != "std":
        fail("range_init_in_training", "false unless range_init is std", "false")
    if not isinstance(scheme.tie_ranges, tuple) or not all(
        isinstance(group, tuple) and len(group) > 1 and all(isinstance(n, str) for n in group)
        for group in scheme.tie_ranges
    ):
        fail("tie_ranges", "a list of groups of at least two names", "[[q_proj, k_proj, v_proj]]")
    if scheme.output_bits is not None and scheme.input_bits is None:
        fail("output_bits", "null where input_bits is null (the ADC is scaled by the DAC)", "null")
    first = type(scheme.prefix) is int and scheme.prefix == 1
    if not (scheme.prefix is None or first or _is_tokens(scheme.prefix)):
        fail("prefix", "1 (the beginning-of-sequence token), a list of token ids, or null", "1")
    for pattern, change in _pairs(scheme):
        _check_override(scheme, pattern, change)


def _is_tokens(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all(isinstance(t, int) and not isinstance(t, bool) and 0 <= t < 2**31 for t in value)
    )


def _pairs(scheme: AnalogScheme) -> list[tuple[str, Any]]:
    given = scheme.overrides
    fine = isinstance(given, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in given
    )
    if not fine:
        raise SchemeError(
            f"overrides is {shown(given)}, but must be a mapping of module names or patterns to "
            "digital or to fields; write overrides: {down_proj: digital}."
        )
    return list(given)


def _check_override(scheme: AnalogScheme, pattern: str, change: Any) -> None:
    if change == "digital":
        return
    if not (
        isinstance(change, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in change)
    ):
        raise SchemeError(
            f"overrides of {shown(pattern)} is {shown(change)}, but must be digital or a mapping "
            f"of fields; write overrides: {{{pattern}: digital}}."
        )
    for name, _ in change:
        if not isinstance(name, str):
            raise SchemeError(
                f"overrides of {shown(pattern)} names {shown(name)}, which is no field; write for "
                f"instance overrides: {{{pattern}: {{input_bits: 6}}}}."
            )
        if name in _OF_THE_MODEL:
            raise SchemeError(
                f"overrides of {shown(pattern)} changes {name}, which is one for the whole model; "
                f"write {name} beside overrides."
            )
    scheme.replace(overrides=(), **dict(change))
