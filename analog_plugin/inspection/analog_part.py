"""The analog model of a directory, as far as it can be told without building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from analog_plugin.checkpoint.layout import CONFIG_FILE, STATE_FILE, TRAINING_FILE, AnalogConfig
from analog_plugin.errors import AnalogError, is_number, shown
from analog_plugin.files import read_json
from analog_plugin.inspection.quantized import Modules
from analog_plugin.inspection.tensors import and_more
from analog_plugin.scheme import AnalogScheme

_AGAIN = "export the checkpoint again."
_PREFIX = ("prefix.tokens", "prefix.hidden")
_PREFIX_ENDS = (".prefix_key", ".prefix_value")


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """None where there are no numbers."""
        return cls(min(values), median(values), max(values)) if values else None


@dataclass(frozen=True)
class AnalogPart:
    """The analog model.

    Args:
        scheme: Converters, tiles, training noise: the scheme's fields.
        layers: How many layers it has.
        tiles: How many tiles they have.
        rows: Rows of the largest tile.
        input_ranges: Of the tiles, by kind of layer: the last part of the layers' names.
        prefix: Tokens of the digital prefix; 0: none.
        steps: Of the training; None: not recorded.
        tokens: That it was trained on.
        seed: Of the recipe.
    """

    scheme: Mapping[str, Any]
    layers: int
    tiles: int
    rows: int
    input_ranges: Mapping[str, Spread]
    prefix: int = 0
    steps: int | None = None
    tokens: int | None = None
    seed: int | None = None


def analog_part(
    directory: Path, config: AnalogConfig, state: Mapping[str, Tensor] | None
) -> AnalogPart:
    """Sum up what ``config`` and the state file say; None: that file cannot be read."""
    kinds: dict[str, list[float]] = {}
    for name in config.tiles:
        ranges = None if state is None else state.get(f"{name}.input_range")
        if ranges is not None:
            kinds.setdefault(name.rpartition(".")[2], []).extend(ranges.double().flatten().tolist())
    spreads = {kind: spread for kind, v in kinds.items() if (spread := Spread.of(v)) is not None}
    tokens = None if state is None else state.get("prefix.tokens")
    return AnalogPart(
        config.scheme.to_dict(),
        len(config.tiles),
        sum(map(len, config.tiles.values())),
        max((max(tiles, default=0) for tiles in config.tiles.values()), default=0),
        spreads,
        prefix=0 if tokens is None else tokens.numel(),
        **_record(directory),
    )


def analog_faults(
    directory: Path, config: AnalogConfig, state: Mapping[str, Tensor] | None, modules: Modules
) -> list[str]:
    """What does not fit: tiles and layers, layers and ranges."""
    faults = []
    lost = [name for name in config.tiles if not _has_matrix(modules, name)]
    if lost:
        faults.append(
            f"{directory / CONFIG_FILE} describes tiles of {shown(lost[0])}{and_more(lost)}, but "
            f"the files hold no weight of it; {_AGAIN}"
        )
    for name, tiles in config.tiles.items():
        if name not in lost and not _fit(config.scheme, name, tiles, modules):
            shape = list(modules[name]["weight"].shape)
            faults.append(
                f"{directory / CONFIG_FILE} describes the tiles {shown(tiles)} of {shown(name)}, "
                f"which its scheme does not make of a weight {shape}; {_AGAIN}"
            )
    return faults if state is None else faults + _state_faults(directory, config, state)


def _has_matrix(modules: Modules, name: str) -> bool:
    weight = modules.get(name, {}).get("weight")
    return weight is not None and len(weight.shape) == 2


def _fit(scheme: AnalogScheme, name: str, tiles: list[int], modules: Modules) -> bool:
    """Whether the layer's scheme cuts its inputs so; a Conv1D's weight is [in, out]."""
    own = scheme.for_layer(name)
    sizes = modules[name]["weight"].shape
    return own is not None and any(size > 0 and own.tiles(size) == tiles for size in sizes)


def _state_faults(directory: Path, config: AnalogConfig, state: Mapping[str, Tensor]) -> list[str]:
    path = directory / STATE_FILE
    expected = {f"{name}.input_range": [len(tiles)] for name, tiles in config.tiles.items()}
    plain = [f"{name}.plain_range" for name in config.tiles]
    expected |= {name: [1] for name in plain if name in state}
    prefix = {n for n in state if n in _PREFIX or n.endswith(_PREFIX_ENDS)}
    if config.scheme.prefix is None:
        prefix = set()
    elif not prefix.issuperset(_PREFIX):
        return [f"{path} lacks the digital prefix that config.json names; {_AGAIN}"]
    faults = []
    for name in sorted(expected.keys() | state.keys() - prefix):
        found = list(state[name].shape) if name in state else None
        if expected.get(name) != found:
            wanted, there = _tensor(expected.get(name)), _tensor(found)
            faults.append(f"{path}: {shown(name)} is {there}, but must be {wanted}; {_AGAIN}")
        elif name.endswith("_range") and bool((state[name] <= 0).any()):
            faults.append(f"{path}: {shown(name)} holds a range that is not positive; {_AGAIN}")
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.element_size() != 4:
            faults.append(f"{path}: {shown(name)} is {tensor.dtype}, not float32; {_AGAIN}")
        elif not bool(tensor.isfinite().all()):
            faults.append(f"{path}: {shown(name)} holds values that are not finite; {_AGAIN}")
    return faults


def _tensor(shape: list[int] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


def _record(directory: Path) -> dict[str, int | None]:
    """What the training record says, where there is one that can be read."""
    path = directory / TRAINING_FILE
    try:
        record = read_json(path) if path.is_file() else {}
    except (AnalogError, OSError):
        return {}
    known = {name: record.get(name) for name in ("steps", "tokens", "seed")}
    return {name: v for name, v in known.items() if is_number(v) and isinstance(v, int)}
