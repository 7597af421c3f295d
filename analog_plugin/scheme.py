"""The analog scheme: how a linear layer is mapped onto analog hardware and trained for it."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.files import parse_yaml, read_yaml_text
from analog_plugin.patterns import matches
from analog_plugin.scheme_rules import SchemeError, validate

InputRange = Literal["learned", "static", "dynamic"]
RangeInit = Literal["std", "max", "percentile", "mse", "output"]

#: Projections that read the same input and that serving engines fuse into one matrix.
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class AnalogScheme:
    """Converters, tiles, weight noise and clipping of an analog model.

    The defaults are the values published with 'Analog Foundation Models' (arXiv 2505.09663)
    for Llama-3.2-1B. The value is frozen; derive another one with :meth:`replace`.

    Args:
        input_bits: DAC resolution in bits, 2 to 16; codes are symmetric, ``±(2**(bits-1) - 1)``.
            None: inputs are not quantized and no ADC is possible.
        input_range: ``"learned"`` in training, ``"static"`` (calibrated, then fixed) or
            ``"dynamic"`` (the maximum of each token, for comparison: no static DAC can do it).
        range_init: How ranges are found from data: ``"std"`` (``range_init_std`` standard
            deviations), ``"max"``, ``"percentile"`` (``range_percentile``), ``"mse"`` (least
            squared quantization error) or ``"output"`` (least squared error of the tile's outputs,
            DAC and ADC together).
        range_init_std: κ of ``range_init="std"``.
        range_init_batches: Batches that the initialisation looks at.
        range_init_in_training: Initialise during the first training steps, as the paper did,
            instead of in a calibration step of its own.
        range_percentile: Share of inputs inside the range for ``"percentile"``, in percent.
        range_decay: Weight of the decay that shrinks a range that hardly clips.
        range_min_percentage: The decay acts where more than this share of inputs is not clipped.
        range_gradient: ``"paper"`` (gradient of clipped inputs, scaled by the range) or ``"lsq"``
            (Esser et al., arXiv 1902.08153, eq. 3).
        output_bits: ADC resolution in bits, 2 to 16; None: no ADC.
        out_bound: β, the ADC's full scale in units of input range × column maximum. One constant
            for the whole model: a globally static ADC. None: chosen from calibration data.
        adc_bound: Take the column maximum from the ``"clean"`` weights, or from the ``"noisy"``
            (programmed) ones as aihwkit-lightning does.
        weight_noise: γ, standard deviation of the training noise relative to the column maximum.
        weight_bits: Fake-quantize weights per column in training (LLM-QAT style); None: do not.
        clip_sigma: α, weights are clipped to ±α standard deviations of their column after every
            optimizer step; None: no clipping.
        clip_schedule: ``"constant"``, or ``"anneal"``: from where nothing is clipped to
            ``clip_sigma``.
        clip_anneal_share: Share of the training steps over which ``"anneal"`` runs.
        tile_rows: Most rows (inputs) of one tile; None: one tile a layer. 512 is usual.
        tile_columns: Most columns (outputs) of one tile. Columns are independent of each other in
            all modelled effects, so this only counts tiles.
        tie_ranges: Groups of module names that read the same input and share one range per tile.
        prefix: Tokens whose keys and values are computed once in full precision and stand before
            every sequence: 1 for the beginning-of-sequence token, or token ids. See
            :mod:`analog_plugin.layers.prefix`.
        rescale: ``"noise-aware"``: fold per-channel scales into the layers before; see
            :mod:`analog_plugin.training.rescale`.
        digital_share: Share of the multiply-accumulates that may stay digital: the layers that
            cost most are chosen on calibration data and written into ``overrides``.
        overrides: Exceptions by module name or pattern: ``"digital"``, or fields of this scheme.
            Where several match, the last holds.

    Raises:
        SchemeError: A field is out of range; the message gives the allowed values.

    Example:
        >>> AnalogScheme(clip_sigma=3.0, tile_rows=512).replace(output_bits=None).output_bits
    """

    input_bits: int | None = 8
    input_range: InputRange = "learned"
    range_init: RangeInit = "std"
    range_init_std: float = 18.0
    range_init_batches: int = 500
    range_init_in_training: bool = False
    range_percentile: float = 99.99
    range_decay: float = 0.01
    range_min_percentage: float = 0.95
    range_gradient: Literal["paper", "lsq"] = "paper"
    output_bits: int | None = 8
    out_bound: float | None = 14.0
    adc_bound: Literal["clean", "noisy"] = "clean"
    weight_noise: float = 0.03
    weight_bits: int | None = None
    clip_sigma: float | None = 2.5
    clip_schedule: Literal["constant", "anneal"] = "constant"
    clip_anneal_share: float = 0.8
    tile_rows: int | None = None
    tile_columns: int | None = None
    tie_ranges: tuple[tuple[str, ...], ...] = ()
    prefix: int | tuple[int, ...] | None = None
    rescale: Literal["noise-aware"] | None = None
    digital_share: float = 0.0
    overrides: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        groups = self.tie_ranges
        if isinstance(groups, (list, tuple)) and all(isinstance(g, (list, tuple)) for g in groups):
            object.__setattr__(self, "tie_ranges", tuple(tuple(g) for g in groups))
        if isinstance(self.prefix, list):
            object.__setattr__(self, "prefix", tuple(self.prefix))
        object.__setattr__(self, "overrides", _frozen(self.overrides))
        validate(self)
        # Of two changes for one pattern the last holds, and files keep no more than one.
        last = {pattern: i for i, (pattern, _) in enumerate(self.overrides)}
        kept = tuple(pair for i, pair in enumerate(self.overrides) if last[pair[0]] == i)
        object.__setattr__(self, "overrides", kept)

    @property
    def input_levels(self) -> int | None:
        """L, DAC levels on each side of zero (127 for 8 bits)."""
        return None if self.input_bits is None else 2 ** (self.input_bits - 1) - 1

    @property
    def output_levels(self) -> int | None:
        """M, ADC levels on each side of zero (127 for 8 bits)."""
        return None if self.output_bits is None else 2 ** (self.output_bits - 1) - 1

    def tiles(self, in_features: int) -> list[int]:
        """Rows of each tile of a layer with ``in_features`` inputs, balanced.

        Example:
            >>> AnalogScheme(tile_rows=512).tiles(576)
            [288, 288]
        """
        if self.tile_rows is None:
            return [in_features]
        count = -(-in_features // self.tile_rows)
        base, extra = divmod(in_features, count)
        return [base + (i < extra) for i in range(count)]

    def for_layer(self, name: str) -> AnalogScheme | None:
        """The scheme of the layer called ``name``, its overrides applied; None: it stays digital.

        Example:
            >>> scheme = AnalogScheme(overrides={"o_proj": {"input_bits": 6}, "lm_head": "digital"})
            >>> scheme.for_layer("model.layers.0.o_proj").input_bits
            6
            >>> scheme.for_layer("lm_head") is None
            True
        """
        change = None
        for pattern, given in self.overrides:
            change = given if matches(name, pattern) else change
        if change == "digital":
            return None
        return self if change is None else self.replace(**dict(change))

    def replace(self, **changes: Any) -> AnalogScheme:
        """Return a scheme with ``changes`` applied and validated."""
        check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON/YAML values; :meth:`from_dict` reads them back to an equal scheme."""
        values = dataclasses.asdict(self)
        values["tie_ranges"] = [list(group) for group in self.tie_ranges]
        values["prefix"] = list(self.prefix) if isinstance(self.prefix, tuple) else self.prefix
        values["overrides"] = {
            pattern: change if isinstance(change, str) else dict(change)
            for pattern, change in self.overrides
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnalogScheme:
        """Build a scheme from plain values; unknown names are an error."""
        if not isinstance(values, Mapping):
            raise SchemeError(
                f"A scheme is a mapping of fields to values, not {type(values).__name__}; "
                "write for instance {clip_sigma: 3.0}."
            )
        check_names(values)
        return cls(**values)

    def to_json(self) -> str:
        """Return the scheme as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> AnalogScheme:
        """Read what :meth:`to_json` wrote."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SchemeError(f"The scheme is not valid JSON: {one_line(error)}.") from error
        return cls.from_dict(values)

    def to_yaml(self) -> str:
        """Return the scheme as YAML text."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str | Path) -> AnalogScheme:
        """Read YAML text, or the YAML file at a ``Path``."""
        try:
            if isinstance(text, Path):
                text = read_yaml_text(text)
            values = parse_yaml(text, "The scheme")
        except AnalogError as error:
            raise SchemeError(str(error)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise SchemeError(f"The scheme cannot be read: {one_line(error)}.") from None
        return cls.from_dict(values)


def check_names(values: Mapping[str, Any]) -> None:
    """Refuse names that are no fields of a scheme."""
    known = [field.name for field in dataclasses.fields(AnalogScheme)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}."
            raise SchemeError(f"The scheme has no field {shown(name)}; {hint}")


def _frozen(overrides: Any) -> Any:
    """Mappings and lists, as files hold them, to tuples of pairs."""
    if isinstance(overrides, Mapping):
        overrides = tuple(overrides.items())
    if not isinstance(overrides, (list, tuple)):
        return overrides
    pairs = (tuple(pair) if isinstance(pair, list) else pair for pair in overrides)
    return tuple(
        (pair[0], tuple(pair[1].items()))
        if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Mapping)
        else pair
        for pair in pairs
    )


def fused_with(name: str, layers: Container[str]) -> list[str]:
    """The layers that serving engines run as one with the layer ``name``, itself among them."""
    parent, _, last = name.rpartition(".")
    group = next((group for group in FUSED_GROUPS if last in group), (last,))
    names = [f"{parent}.{other}" if parent else other for other in group]
    return [other for other in names if other in layers]
