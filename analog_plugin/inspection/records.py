"""The records that an inspection gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from analog_plugin.inspection.analog_part import AnalogPart, Spread
from analog_plugin.inspection.loaders import Loader
from analog_plugin.inspection.sizes import Sizes


@dataclass(frozen=True)
class WeightGroup:
    """Quantized layers of so many bits: how many layers, and how many weights they hold."""

    bits: int | None
    layers: int
    weights: int


@dataclass(frozen=True)
class Converter:
    """How inputs or outputs of the quantized layers are quantized for plain loaders.

    Args:
        bits: Of each value.
        static: Whether with a scale from the file.
        ranges: Scale × largest code, over the layers; None: not static.
    """

    bits: int
    static: bool
    ranges: Spread | None


@dataclass(frozen=True)
class Inspection:
    """What a directory holds.

    Args:
        directory: That was looked at.
        kind: ``"analog-fp"`` (with the analog model), ``"digital"`` (a profile without it),
            ``"quantized"`` (by another tool), ``"plain"``, ``"adapter"``, ``"conductances"`` (for a
            chip) or ``"nothing"``.
        profile: A name of this package's, of a quantized directory the one it is laid out like;
            None: none.
        layout: The format of its weights in compressed-tensors, or the other method's name.
        architecture: The model's class.
        dtypes: Of everything that is not quantized, in safetensors' spelling.
        parameters: Their number.
        quantized: Names of the quantized layers.
        ignored: Names that the quantization leaves out.
        groups: The quantized layers by bits of their weights.
        average_bits: Of a weight of the quantized layers, without their scales.
        inputs: What plain loaders make of inputs; None: not quantized.
        outputs: And of outputs.
        analog: The analog model; None: there is none.
        sizes: In bytes.
        loaders: Which take it.
        problems: A sentence each.
        notes: What is no fault, but good to know.
    """

    directory: str
    kind: str
    profile: str | None = None
    layout: str | None = None
    architecture: str | None = None
    dtypes: tuple[str, ...] = ()
    parameters: int = 0
    quantized: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    groups: tuple[WeightGroup, ...] = ()
    average_bits: float | None = None
    inputs: Converter | None = None
    outputs: Converter | None = None
    analog: AnalogPart | None = None
    sizes: Sizes = field(default_factory=Sizes)
    loaders: tuple[Loader, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)
