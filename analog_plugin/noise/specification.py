"""How recipes name a noise model: ``"pcm"``, ``"gaussian:0.02"``, ``"hermes@1d"``, a mapping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from analog_plugin.errors import AnalogError
from analog_plugin.noise.programming import parse_time


def resolve_noise(noise: str | Mapping[str, Any] | Any | None) -> Any | None:
    """Return the noise model that ``noise`` names; None (or ``"none"``) means no noise.

    Args:
        noise: A name, with its first argument behind a colon (``"pcm:1.5"``) and the time since
            programming behind an @ (``"hermes@1d"``); a mapping of ``name`` and arguments; or an
            object with ``program(weight, generator)``.

    Raises:
        AnalogError: The name is unknown, or an argument does not fit.

    Example:
        >>> resolve_noise("gaussian:0.02").sigma
        0.02
    """
    from analog_plugin.plugins import lookup, noise_models

    if noise is None or noise == "none":
        return None
    if hasattr(noise, "program") and not isinstance(noise, type):
        return noise
    arguments: dict[str, Any] = {}
    if isinstance(noise, str):
        name, value, time = _parts(noise)
        arguments = {} if time is None else {"time": time}
    elif isinstance(noise, Mapping) and isinstance(noise.get("name"), str):
        arguments = {key: value for key, value in noise.items() if key != "name"}
        name, value = noise["name"], None
    else:
        raise AnalogError(
            f"noise is {noise!r}, but must be a name, name:level or a mapping with a name; write "
            "noise: pcm or noise: {name: gaussian, sigma: 0.02}."
        )
    factory = lookup(noise_models(), name, "noise model").factory
    parameters = list(inspect.signature(factory).parameters)
    if value is not None:
        try:
            arguments[parameters[0]] = float(value)
        except (ValueError, IndexError):
            raise AnalogError(
                f"noise {noise!r} has the level {value!r}, which is not a number; write {name}:1.5."
            ) from None
    for key in arguments:
        if key not in parameters:
            raise AnalogError(
                f"noise model {name!r} has no argument {key!r}; it takes {', '.join(parameters)}."
            )
    return factory(**arguments)


def at_times(
    noise: Sequence[str | Mapping[str, Any] | None], times: Sequence[str | float]
) -> list[str | Mapping[str, Any] | None]:
    """Each noise model read at each time since programming; as it is where it knows no time.

    Args:
        noise: As in :func:`resolve_noise`, but by name.
        times: Such as ``"1h"`` or seconds; none: ``noise`` itself.

    Raises:
        AnalogError: A noise model is unknown or has a time already, or a time is none.

    Example:
        >>> at_times(["hermes", "pcm"], ["1h", "1d"])
        ['hermes@1h', 'hermes@1d', 'pcm']
    """
    for time in times:
        parse_time(time)
    found: list[str | Mapping[str, Any] | None] = []
    for item in noise:
        model: Any = resolve_noise(item)
        if not times or not hasattr(model, "time"):
            found.append(item)
        elif model.time is not None:
            raise AnalogError(
                f"noise {noise_label(item)!r} has a time, and times were given beside it; leave "
                "one of them out."
            )
        elif isinstance(item, Mapping):
            found += [{**item, "time": time} for time in times]
        else:
            found += [f"{item}@{time}" for time in times]
    return found


class NoiseName(NamedTuple):
    """The parts of a label such as ``"hermes:1.5@1h"``.

    Args:
        name: The noise model.
        level: What stands behind the colon, else its first argument's default; None where that is
            no number.
        time: Seconds since programming; None: as programmed.
    """

    name: str
    level: float | None
    time: float | None


def split_label(label: str) -> NoiseName:
    """Read a label of :func:`noise_label` for plots.

    Example:
        >>> split_label("gaussian:0.02")
        NoiseName(name='gaussian', level=0.02, time=None)
    """
    from analog_plugin.plugins import noise_models

    name, said, time = _parts(label)
    known = noise_models().get(name)
    if said is None and known is not None:
        first = next(iter(inspect.signature(known.factory).parameters.values()), None)
        said = None if first is None else first.default
    try:
        level = float(said)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        level = None
    try:
        return NoiseName(name, level, parse_time(time))
    except AnalogError:  # a stranger's model may tell times in another way
        return NoiseName(name, level, None)


def _parts(text: str) -> tuple[str, str | None, str | None]:
    """Name, level and time of ``"name:level@time"``; None for what is not there."""
    rest, at, time = text.partition("@")
    name, colon, level = rest.partition(":")
    return name, level if colon else None, time if at else None


def noise_label(noise: str | Mapping[str, Any] | Any | None) -> str:
    """A short name of ``noise`` for tables and files."""
    if noise is None:
        return "none"
    if isinstance(noise, str):
        return noise
    if isinstance(noise, Mapping):
        rest = ",".join(f"{k}={v}" for k, v in noise.items() if k != "name")
        return f"{noise.get('name')}({rest})" if rest else str(noise.get("name"))
    return type(noise).__name__
