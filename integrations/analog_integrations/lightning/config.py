"""aihwkit-lightning's configuration as plain values, read from records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from analog_integrations.lightning.pickles import Member, Record
from analog_plugin.errors import AnalogError, is_number, shown

_ROOT = "TorchInferenceRPUConfig"
#: Attributes that hold another record, by class: the attribute and the class that it must be of.
_PARTS = {
    _ROOT: {
        "forward": "IOParameters",
        "clip": "WeightClipParameter",
        "modifier": "WeightModifierParameter",
        "mapping": "MappingParameter",
        "pre_post": "PrePostProcessingParameter",
    },
    "PrePostProcessingParameter": {"input_range": "InputRangeParameter"},
}
#: Attributes whose names alone do not tell what they are of.
_OWN_NAMES = {
    ("WeightClipParameter", "type"): "clip_type",
    ("WeightClipParameter", "sigma"): "clip_sigma",
    ("WeightModifierParameter", "type"): "modifier_type",
    ("WeightModifierParameter", "res"): "weight_res",
}
NONE = "None"
_NOISES = ("AddNormal", "AddNormalPerChannel")
_ROUNDINGS = ("Discretize", "DiscretizePerChannel")
_MEMBERS = {
    "WeightNoiseInjectionType": (NONE, *_NOISES),
    "WeightQuantizationType": (NONE, *_ROUNDINGS),
    "WeightClipType": (
        NONE,
        "LayerGaussian",
        "LayerGaussianPerChannel",
        "LearnablePerChannel",
    ),
    "WeightModifierType": (
        NONE,
        *_NOISES,
        *_ROUNDINGS,
        "DiscretizeAddNormal",
        "DiscretizeAddNormalPerChannel",
    ),
}
#: The enumerations of the fields that hold a member of one.
ENUM_FIELDS = {
    "clip_type": "WeightClipType",
    "modifier_type": "WeightModifierType",
    "noise_type": "WeightNoiseInjectionType",
    "quantization_type": "WeightQuantizationType",
}
PER_CHANNEL = "LayerGaussianPerChannel"
LEARNABLE = "LearnablePerChannel"


@dataclass(frozen=True, kw_only=True)
class LightningConfig:
    """All values of a ``TorchInferenceRPUConfig``, flat; defaults are aihwkit-lightning 2.1's.

    Names are those of its attributes, but ``clip_type`` and ``clip_sigma`` (``clip.type``,
    ``clip.sigma``), ``modifier_type`` and ``weight_res`` (``modifier.type``, ``modifier.res``).
    Resolutions are numbers of steps or their inverse; 0 or less: infinite.
    """

    inp_res: float = -1
    out_noise: float = 0.0
    out_noise_per_channel: bool = False
    out_bound: float = 0.0
    out_res: float = -1
    clip_sigma: float = -1.0
    clip_type: str = NONE
    std_dev: float = 0.0
    weight_res: float = 0.0
    enable_during_test: bool = False
    modifier_type: str = NONE
    noise_type: str = NONE
    quantization_type: str = NONE
    max_input_size: int = -1
    fast_mode: bool = False
    act_range_momentum: float = 0.95
    enable: bool = False
    dynamic: bool = False
    learn_input_range: bool = True
    init_value: float = 3.0
    init_from_data: int = 100
    init_std_alpha: float = 3.0
    decay: float = 0.001
    input_min_percentage: float = 0.95

    @property
    def has_ranges(self) -> bool:
        """Whether every analog layer has an ``input_range``."""
        return self.enable and not self.dynamic

    @property
    def has_adc(self) -> bool:
        """Whether outputs are quantized."""
        return self.out_res > 0


#: Types of the fields by their names, as they are written above.
_KINDS = {field.name: str(field.type) for field in dataclasses.fields(LightningConfig)}


def config_of_record(record: Record) -> tuple[LightningConfig, list[str]]:
    """The values of a record, those of version 1 translated.

    Returns:
        The configuration, and a sentence on attributes that aihwkit-lightning 2.1 has not.

    Raises:
        AnalogError: Something is of a wrong kind, or a value that no version has.
    """
    found: dict[str, Any] = {}
    unknown = []
    for place, name, value in _attributes(record, _ROOT, ""):
        if name not in _KINDS:
            unknown.append((place, value))
        else:
            found[name] = _checked(place, name, value)
    notes = []
    if unknown:
        told = ", ".join(f"{place}={shown(value)}" for place, value in unknown[:10])
        notes.append(
            f"rpu_config also says {told}, which aihwkit-lightning 2.1 does not look at either."
        )
    return _translated(LightningConfig(**found)), notes


def _attributes(record: Any, name: str, place: str) -> Iterator[tuple[str, str, Any]]:
    """All attributes that are no records: place in the file, flat name, value."""
    if not isinstance(record, Record) or record.name != name:
        raise AnalogError(f"rpu_config: {place or 'it'} is {_kind(record)}, but must be {name}.")
    parts = _PARTS.get(name, {})
    for attribute, value in record.fields.items():
        inner = f"{place}.{attribute}" if place else attribute
        if attribute in parts:
            yield from _attributes(value, parts[attribute], inner)
        else:
            yield inner, _OWN_NAMES.get((name, attribute), attribute), value


def _kind(value: Any) -> str:
    return value.name if isinstance(value, (Record, Member)) else f"a {type(value).__name__}"


def _checked(place: str, name: str, value: Any) -> Any:
    kind = _KINDS[name]
    if kind == "str":
        enum = ENUM_FIELDS[name]
        member = value.value if isinstance(value, Member) and value.name == enum else None
        if member not in _MEMBERS[enum]:
            raise AnalogError(
                f"rpu_config: {place} is {_kind(value) if member is None else shown(member)}, but "
                f"must be of {enum}: {', '.join(_MEMBERS[enum])}."
            )
        return member
    if not (is_number(value) if kind == "float" else type(value).__name__ == kind):
        raise AnalogError(f"rpu_config: {place} is {_kind(value)}, but must be of type {kind}.")
    return value


def _translated(config: LightningConfig) -> LightningConfig:
    """With ``modifier.type`` of version 1 in the two fields that version 2 has instead."""
    old = config.modifier_type
    if old == NONE:
        return config
    per_channel = "PerChannel" if old.endswith("PerChannel") else ""
    return dataclasses.replace(
        config,
        modifier_type=NONE,
        noise_type=f"AddNormal{per_channel}" if "AddNormal" in old else NONE,
        quantization_type=f"Discretize{per_channel}" if "Discretize" in old else NONE,
    )
