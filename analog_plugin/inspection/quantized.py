"""Quantized layers of a directory: what ``config.json`` says of each, and whether it is there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.inspection.tensors import StoredTensor, and_more
from analog_plugin.scheme import fused_with

#: Tensors that belong to the quantization of a layer.
PARTS = (
    "weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
    "output_scale", "output_zero_point",
)  # fmt: skip

#: Modules with a matrix that is no linear layer's.
_NO_LINEAR = re.compile(r"embed|^wte$|^wpe$|^gate$|router|^shared$")

_FIELDS = ("weights", "input_activations", "output_activations")

# A pattern of a file is followed only where it cannot take forever.
_SLOW_PATTERN = re.compile(r"\)[*+{?]|(?:[*+{].*){4}|\\\d")
_LONGEST = 256

Modules = Mapping[str, Mapping[str, StoredTensor]]


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer that loaders are told to quantize.

    Args:
        name: Of the layer.
        arguments: Of ``weights``, ``input_activations`` and ``output_activations``, as
            compressed-tensors reads them; absent: not quantized.
        layout: The format of its weights.
        tensors: Its tensors, by the last part of their names.
        shape: (out, in) of its weight; None: not known.
        bits: Of its weights, as few as its codes need; None: full precision or no integers.
        largest: Magnitude of its codes; None: not looked at.
        input_range: Largest input that is not clipped; None: not static.
        output_range: Of its output.
    """

    name: str
    arguments: Mapping[str, Any]
    layout: str
    tensors: Mapping[str, StoredTensor]
    shape: tuple[int, int] | None = None
    bits: int | None = None
    largest: int | None = None
    input_range: float | None = None
    output_range: float | None = None

    @property
    def weights(self) -> int:
        """Their number."""
        return 0 if self.shape is None else math.prod(self.shape)

    def integer(self, part: str) -> Any | None:
        """The arguments of ``part`` where it is quantized to integers, else None."""
        found = self.arguments.get(part)
        return found if found is not None and found.type == "int" else None

    def is_static(self, part: str) -> bool:
        """Whether ``part`` has a scale in the file."""
        found = self.arguments.get(part)
        return found is not None and not found.dynamic


def modules_of(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by module and last part of their names."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    return modules


def read_quantization(values: Any) -> Any:
    """A ``quantization_config`` as compressed-tensors reads it.

    Raises:
        AnalogError: It does not.
    """
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AnalogError(
            f"quantization_config in config.json cannot be read: {one_line(error)}."
        ) from None


def quantized_layers(config: Any, modules: Modules) -> tuple[list[QuantizedLayer], list[str]]:
    """The layers that ``config`` quantizes, and sentences on those that are not as it says.

    Args:
        config: Of :func:`read_quantization`.
        modules: Of :func:`modules_of`.
    """
    targets = _Targets(
        {name: target for target, group in config.config_groups.items() for name in group.targets},
        config.ignore or [],
    )
    layers, faults = [], list(targets.faults)
    for key, group in config.config_groups.items():
        for field in _FIELDS:
            found = getattr(group, field)
            if found is not None and not 1 <= found.num_bits <= 16:
                raise AnalogError(
                    f"quantization_config: {shown(key)}: {field}: num_bits is "
                    f"{shown(found.num_bits)}, but must be from 1 to 16; export it again."
                )
    for name, parts in modules.items():
        key = targets.group_of(name, parts)
        leftover = sorted(part for part in PARTS if part in parts)
        if key is None and leftover:
            faults.append(
                f"{shown(f'{name}.{leftover[0]}')} is in the files, but quantization_config "
                "quantizes no such layer; export it again."
            )
        if key is not None:
            group = config.config_groups[key]
            arguments = {f: a for f in _FIELDS if (a := getattr(group, f)) is not None}
            layout = getattr(group.format, "value", group.format) or config.format
            layers.append(QuantizedLayer(name, arguments, str(layout), parts))
    there = {layer.name for layer in layers}
    lost = [name for name in targets.named if name not in there]
    if lost:
        faults.append(
            f"quantization_config names the layer {shown(lost[0])}{and_more(lost)}, but the "
            "files hold no weight of it; copy or export it again."
        )
    return layers, faults


class _Targets:
    """Which group a layer belongs to, by name before pattern before class."""

    def __init__(self, targets: Mapping[str, str], ignored: list[str]) -> None:
        self.faults: list[str] = []
        self.ignored_names = {entry for entry in ignored if not entry.startswith("re:")}
        self.ignored_patterns = [p for e in ignored if (p := self._pattern(e)) is not None]
        self.patterns = [
            (pattern, key)
            for target, key in targets.items()
            if (pattern := self._pattern(target)) is not None
        ]
        plain = {t: key for t, key in targets.items() if not t.startswith("re:")}
        self.all_linear = plain.pop("Linear", None)
        # Class names have no dot; names of layers in a model have one, but for its head.
        self.named = {t: key for t, key in plain.items() if "." in t or t.islower()}

    def group_of(self, name: str, parts: Mapping[str, StoredTensor]) -> str | None:
        weight = parts.get("weight_packed", parts.get("weight"))
        if weight is None or len(weight.shape) != 2 or name in self.ignored_names:
            return None
        short = name[:_LONGEST]
        if any(pattern.match(short) for pattern in self.ignored_patterns):
            return None
        if name in self.named:
            return self.named[name]
        for pattern, key in self.patterns:
            if pattern.match(short):
                return key
        return None if _NO_LINEAR.search(name.rpartition(".")[2]) else self.all_linear

    def _pattern(self, entry: str) -> re.Pattern[str] | None:
        if not entry.startswith("re:"):
            return None
        text = entry.removeprefix("re:")
        try:
            if len(text) <= _LONGEST and not _SLOW_PATTERN.search(text):
                return re.compile(text)
            problem = "could take forever to match"
        except (re.error, OverflowError, RecursionError) as error:
            problem = f"is no regular expression ({error})"
        self.faults.append(
            f"quantization_config holds the pattern {shown(text)}, which {problem}; write names."
        )
        return None


def split_groups(layers: list[QuantizedLayer], modules: Modules) -> list[str]:
    """Quantized members of groups that engines fuse, of which other members are not quantized."""
    names = {layer.name for layer in layers}
    return [name for name in names if not names.issuperset(fused_with(name, modules))]


def unequal_groups(layers: list[QuantizedLayer]) -> dict[str, list[str]]:
    """Groups that engines fuse whose members' scales differ, by ``input`` and ``output``."""
    by_name = {layer.name: layer for layer in layers}
    found: dict[str, list[str]] = {"input": [], "output": []}
    seen: set[str] = set()
    for name in by_name:
        group = fused_with(name, by_name)
        if name in seen or len(group) < 2:
            continue
        seen |= set(group)
        for part, names in found.items():
            ranges = {getattr(by_name[other], f"{part}_range") for other in group}
            if len(ranges) > 1:
                names.append(group[0])
    return found
